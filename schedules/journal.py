"""The tuner's journal: a line for every candidate that was tried, appended as it happens, from which a run resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger("hsa_compile")

Status = Literal["ok", "compile", "crash", "hang", "wrong"]


class JournalError(RuntimeError):
    """A trial could not be written down; the message says what to do."""


class Trial(BaseModel):
    """What became of a candidate.

    Args:
        tile: its fields.
        status: "ok", or what it failed by: it did not compile, crashed, hung, or computed something wrong.
        ms: median of its first runs, milliseconds; only where it is ok.
        detail: of a failure.
        seconds: that it took to build, check and time.
        backend: whose tile it is, where that is not the one that is compiled ahead.
        resources: registers of a thread, spilled bytes and shared memory of the largest kernel, where they are known.
        estimate_ms: what the cost model expected.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile: dict[str, Any]
    status: Status
    ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    detail: str = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    estimate_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    backend: Literal["", "triton"] = ""
    resources: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)

    @property
    def score(self) -> float:
        """Milliseconds, infinite for a failure."""
        return self.ms if self.status == "ok" and self.ms is not None else float("inf")


class Journal:
    """Trials of one search. ``key`` is all that they hang on; it names the file and is its first line."""

    def __init__(self, directory: Path, key: dict[str, Any]) -> None:
        self.key = key
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = directory / f"{digest}.jsonl"

    def read(self) -> list[Trial]:
        """All trials that were written whole; a warning tells of lines that were not.

        Raises:
            JournalError: the file can't be read.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise JournalError(f"cannot read the journal {self.path}: {error.strerror}") from error
        trials, bad = [], 0
        for line in lines:
            try:
                data = json.loads(line)
                if not (isinstance(data, dict) and "key" in data):
                    trials.append(Trial.model_validate(data))
            except (ValueError, RecursionError, ValidationError):
                bad += 1
        if bad:
            log.warning("%s: %d lines are cut off or make no sense and are ignored", self.path, bad)
        return trials

    def append(self, trial: Trial) -> None:
        """Writes a trial down, on the disk before this returns. Safe beside other tuners.

        Raises:
            JournalError: the disk is full or can't be written; the journal is left as it was.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_suffix(".lock")), open(self.path, "ab+") as file:
                self._append(file, trial.model_dump_json(exclude_defaults=True))
        except OSError as error:
            raise JournalError(
                f"cannot write the journal {self.path}: {error.strerror}; all trials before this one are in it. "
                "Free space or set HSA_COMPILE_CACHE to another directory, then run the same command again"
            ) from error

    def _append(self, file: Any, line: str) -> None:
        size = file.seek(0, os.SEEK_END)
        text = "" if size else json.dumps({"key": self.key}) + "\n"
        if size:
            file.seek(size - 1)
            text = "" if file.read(1) == b"\n" else "\n"  # after a line that was cut
        try:
            file.write(f"{text}{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise
