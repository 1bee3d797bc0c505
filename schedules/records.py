"""Tuning records: which tile was measured best, for what exactly, in readable JSON, a file a device.

They lie beside this module (packaged) and in the user's directory, which is looked at first. A record counts for its
device, target, problem, pass, program and compiler, and for segments from its length on; for anything else it is passed
over, and whoever asks is told why. Records are data: each is checked when it is read, and one that makes no sense is
refused with a message while the others stand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from hsa_compile.ir import Problem, problem_from_dict
from hsa_compile.schedules.choice import Backend, Tile, bucket, tile_from_dict
from hsa_compile.schedules.costs import Selection
from hsa_compile.schedules.device import Device, device_for
from hsa_compile.schedules.fingerprint import program_digest
from hsa_compile.schedules.target import CpuTarget, GpuTarget, TargetError, resolve_any

log = logging.getLogger("hsa_compile")

PACKAGED = Path(__file__).parent / "records"
FORMAT = 1
LONGER = "for segments"
CHANCE = 0.02
LARGEST = 16 << 20  # bytes of a file that is still read
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RecordError(ValueError):
    """Records could not be read or written; the message says which and what to do."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Measured(_Data):
    """How a record came about.

    ``ms`` is the median of ``rounds`` in which candidates took turns, ``default_ms`` the hand-picked tile's in the same
    rounds; ``clock`` is "wall", or "cpu" where the machine was busy (see ``measure.py``), or "device" for a GPU's own.
    ``threads`` are multiprocessors on a GPU. ``matmul_gflops_after`` is the machine's rate after the rounds: lower than
    ``matmul_gflops`` where it throttled meanwhile. ``resources``: a thread's registers, spilled bytes, shared memory.
    """

    date: str
    strategy: str
    candidates: Count
    seconds: Positive
    B: Count
    L: Count
    C: Count
    selection: Selection = "local"
    threads: Count
    clock: Literal["wall", "cpu", "device"]
    rounds: Count
    ms: Positive
    ms_min: Positive
    ms_max: Positive
    default_ms: Positive
    gflops: Positive
    matmul_gflops: Positive
    matmul_gflops_after: Positive | None = None
    resources: dict[str, int] = Field(default_factory=dict)


class Record(_Data):
    """The best tile of a backend found for a pass of a problem and segments of ``length`` tokens or more."""

    problem: dict[str, Any]
    pass_name: Literal["forward", "backward"] = Field(alias="pass")
    length: Count
    backend: Backend = "tvm"
    tile: dict[str, Any]
    program: str
    versions: dict[str, str]
    measured: Measured

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Record:
        from hsa_compile.schedules.space import refusal

        try:
            problem = self.parsed_problem
        except TypeError as error:
            raise ValueError(str(error)) from None
        if bucket(self.length) != self.length:
            raise ValueError(f"length must be the least of a bucket (1, 4, 16, 64, ...), got {self.length}")
        if info.context:
            level = info.context["level"]
            if reason := refusal(problem, self.pass_name, self.tile_for(level), level):
                raise ValueError(reason)
        return self

    @property
    def parsed_problem(self) -> Problem:
        return problem_from_dict(self.problem)

    def tile_for(self, level: CpuTarget | GpuTarget) -> Tile:
        """The record's tile, for the target that it was made for."""
        return tile_from_dict(self.tile, level, self.backend)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the record is for, within its file: of two with one key, the later counts."""
        return (
            json.dumps(self.problem, sort_keys=True), self.pass_name, self.length, self.backend, self.program,
            json.dumps(self.versions, sort_keys=True),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_defaults=True)


class _Header(_Data):
    format: Literal[1]
    device: str
    features: list[str]
    target: str
    records: list[Any]


@dataclass(frozen=True)
class Shelf:
    """A file of records.

    Args:
        path: of the file.
        device, target: what they are for.
        records: those that make sense.
        refused: a message for each that does not.
    """

    path: Path
    device: Device
    target: str
    records: tuple[Record, ...]
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A record and the file it lies in."""

    record: Record
    shelf: Shelf


def user_directory() -> Path:
    """``$HSA_COMPILE_RECORDS``, or ``records`` beside the kernel cache."""
    from hsa_compile.schedules.builder import cache_directory

    override = os.environ.get("HSA_COMPILE_RECORDS")
    return Path(override) if override else cache_directory() / "records"


def load(path: Path) -> Shelf:
    """Reads a file; records that make no sense are left out and told in ``refused``.

    Raises:
        RecordError: it can't be read, or is no file of records.
    """
    try:
        stat = path.stat()
        return _load(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise RecordError(f"cannot read the records {path}: {error.strerror}") from None


@functools.lru_cache(64)
def _load(path: Path, changed: int, size: int) -> Shelf:
    try:
        if size > LARGEST:
            raise ValueError(f"{size >> 20} MiB are no records")
        header = _Header.model_validate(json.loads(path.read_text()))
        level = resolve_any(header.target)
    except ValidationError as error:
        raise RecordError(f"{path} is no file of tuning records: {_complaint(error)}") from None
    except (ValueError, RecursionError, TargetError) as error:
        raise RecordError(f"{path} is no file of tuning records: {error}") from None
    records, refused = [], []
    for number, data in enumerate(header.records):
        try:
            records.append(Record.model_validate(data, context={"level": level}))
        except ValidationError as error:
            refused.append(f"record {number} of {path} is refused: {_complaint(error)}")
    device = Device(header.device, tuple(header.features))
    return Shelf(path, device, header.target, tuple(records), tuple(refused))


def _complaint(error: ValidationError) -> str:
    found = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors(include_url=False)]
    return "; ".join(found[:3])[:500]


def shelves() -> Iterator[Shelf]:
    """All readable files, the user's first; of the others and of refused records a warning tells, once a process."""
    for directory in (user_directory(), PACKAGED):
        for path in sorted(directory.glob("*.json")):
            try:
                shelf = load(path)
            except RecordError as error:
                _warn_once(str(error))
                continue
            for complaint in shelf.refused:
                _warn_once(complaint)
            yield shelf


@functools.cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def find(
    problem: Problem, pass_name: str, level: CpuTarget | GpuTarget, length: int | None, backend: Backend | None = None
) -> tuple[Stored | None, list[tuple[Stored, str]]]:
    """The record to use, and all others of this problem and pass with the reason they are not used. Of two backends
    measured for one length, the faster is used; ``backend`` leaves one alone."""
    fitting: list[Stored] = []
    passed_over: list[tuple[Stored, str]] = []
    for shelf in shelves():
        for record in shelf.records:
            if backend not in (None, record.backend):
                continue
            if record.pass_name == pass_name and record.parsed_problem == problem:
                stored = Stored(record, shelf)
                reason = _mismatch(stored, level, length)
                if reason:
                    passed_over.append((stored, reason))
                else:
                    fitting.append(stored)
    if not fitting:
        return None, passed_over
    nearest = max(stored.record.length for stored in fitting)
    mine: dict[Backend, Stored] = {}
    for stored in fitting:
        if stored.record.length == nearest:
            mine.setdefault(stored.record.backend, stored)  # the first of equals: the user's own
    best = min(mine.values(), key=_handicapped)
    passed_over += [(other, _not_best(other, best)) for other in fitting if other is not best]
    return best, passed_over


def _handicapped(stored: Stored) -> float:
    """Milliseconds; a backend that is not compiled ahead has to be faster by more than medians differ by chance."""
    return stored.record.measured.ms * (1 + CHANCE if stored.record.backend == "triton" else 1)


def _not_best(other: Stored, best: Stored) -> str:
    faster = other.record.length == best.record.length and other.record.backend != best.record.backend
    return f"{describe(best)} is {'faster' if faster else 'nearer'}"


def _mismatch(stored: Stored, level: CpuTarget | GpuTarget, length: int | None) -> str | None:
    record, shelf = stored.record, stored.shelf
    if shelf.target != level.name:
        return f"made for {shelf.target}"
    if shelf.device != device_for(level.name):
        same = shelf.device.name == device_for(level.name).name
        return f"measured on another machine{', of other features' if same else ''} ({shelf.device.name})"
    if record.program != program_digest(record.parsed_problem.op, record.pass_name, level.name, record.backend):
        return "stale: the program has changed since; tune again"
    if not _same_compiler(record, level.name):
        made = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        return f"stale: made with {made}; tune again"
    if length is not None and record.length > bucket(length):
        return f"{LONGER} of {record.length} tokens and more"
    return None


def _compiler_versions(target: str, backend: str = "") -> dict[str, str]:
    from hsa_compile.schedules import builder

    return builder.compiler_versions(target, backend)


def _same_compiler(record: Record, target: str) -> bool:
    """Whether the installed compilers are those of the record. Where none is, kernels that others made are run, and
    records that others made say which."""
    from hsa_compile.schedules.builder import NOT_INSTALLED

    installed = _compiler_versions(target, record.backend)
    return all(version in (NOT_INSTALLED, record.versions.get(name)) for name, version in installed.items())


def describe(stored: Stored) -> str:
    """A record in a line."""
    m, where = stored.record.measured, "packaged" if stored.shelf.path.parent == PACKAGED else str(stored.shelf.path)
    gain = m.default_ms / m.ms
    kind = f"{stored.record.backend} " if stored.record.backend != "tvm" else ""
    what = f"{kind}record of L >= {stored.record.length}, {m.selection} selections"
    return f"{what} ({m.ms:.3g} ms, {gain:.2f}x the default's rate, {m.date}, {where})"


def of_device(level: CpuTarget | GpuTarget) -> list[Stored]:
    """All records of this machine and target, usable or stale."""
    device = device_for(level.name)
    mine = [shelf for shelf in shelves() if (shelf.device, shelf.target) == (device, level.name)]
    return [Stored(record, shelf) for shelf in mine for record in shelf.records]


def why_none(passed_over: list[tuple[Stored, str]], level: CpuTarget | GpuTarget) -> tuple[str, bool]:
    """Why the default is used, and whether the user has tuned this machine, who then should hear of it."""
    tuned_here = any(stored.shelf.path.parent != PACKAGED for stored in of_device(level))
    if passed_over and all(reason.startswith(LONGER) for _, reason in passed_over):
        return "its records are for longer segments", False  # as it should be: no news
    if passed_over:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in passed_over))
        return f"no record fits: {reasons}", tuned_here
    if tuned_here:
        return "no record of this shape; hsa-compile tune makes one", True
    return "nothing was tuned for it on this machine; hsa-compile tune does", False


def current(record: Record, target: str) -> bool:
    """Whether the program and the compiler are still those that the record was measured with."""
    digest = program_digest(record.parsed_problem.op, record.pass_name, target, record.backend)
    return record.program == digest and _same_compiler(record, target)


def file_for(device: Device, target: str, directory: Path) -> Path:
    """Where the records of a device lie in a directory."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{device.name} {target.split(':')[1]}".lower()).strip("-")
    return directory / f"{name}-{hashlib.sha256(json.dumps(asdict(device)).encode()).hexdigest()[:6]}.json"


def save(records: Iterable[Record], device: Device, target: str, directory: Path | None = None) -> Path:
    """Adds records to a device's file, in place of those of the same key. Safe beside other tuners; the file is
    replaced whole or not at all.

    Raises:
        RecordError: the directory can't be written.
    """
    directory = directory or user_directory()
    path = file_for(device, target, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / ".lock"):
            kept: dict[tuple[Any, ...], Record] = {}
            if path.exists():
                kept = {record.key: record for record in _readable(path)}
            kept |= {record.key: record for record in records}
            _write(path, device, target, kept)
    except OSError as error:
        raise RecordError(
            f"cannot write records to {directory}: {error.strerror}; free space, make it writable or set "
            "HSA_COMPILE_RECORDS to a directory that is"
        ) from error
    return path


def _readable(path: Path) -> tuple[Record, ...]:
    """The file's records; what can't be read is kept aside before the file is replaced."""
    try:
        shelf = load(path)
        records, damage = shelf.records, "; ".join(shelf.refused)
    except RecordError as error:
        records, damage = (), str(error)
    if damage:
        aside = path.with_suffix(".json.bad")
        shutil.copy(path, aside)
        log.warning("%s; the file as it was is kept as %s", damage, aside.name)
    return records


def _write(path: Path, device: Device, target: str, records: dict[tuple[Any, ...], Record]) -> None:
    ordered = [records[key].to_json() for key in sorted(records)]
    header = {"format": FORMAT, "device": device.name, "features": list(device.features), "target": target}
    # A line a record: to be read, compared and merged by eye and by git.
    text = json.dumps(header)[:-1] + ', "records": [\n' + ",\n".join(map(json.dumps, ordered)) + "\n]}\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def merge(paths: Iterable[Path], directory: Path | None = None) -> dict[Path, int]:
    """Takes the records of other files in; of two for one key the later measured stays. Returns how many each file of
    the directory gained.

    Raises:
        RecordError: a file can't be read or written, or holds a record that makes no sense.
    """
    gained: dict[Path, int] = {}
    for path in paths:
        shelf = load(path)
        if shelf.refused:
            raise RecordError("; ".join(shelf.refused))
        target = file_for(shelf.device, shelf.target, directory or user_directory())
        mine = {record.key: record for record in load(target).records} if target.exists() else {}
        new = [
            record for record in shelf.records
            if record.key not in mine or mine[record.key].measured.date < record.measured.date
        ]  # fmt: skip
        gained[save(new, shelf.device, shelf.target, directory)] = len(new)
    return gained


def diff(old: Path, new: Path) -> list[tuple[str, Record | None, Record | None]]:
    """(what, old record, new record) of all that differ between two files.

    Raises:
        RecordError: one can't be read.
    """
    sides = []
    for path in (old, new):
        records = load(path).records
        sides.append(
            {(record.parsed_problem, record.pass_name, record.length, record.backend): record for record in records}
        )
    keys = sorted(sides[0].keys() | sides[1].keys(), key=str)
    changed = ((key, sides[0].get(key), sides[1].get(key)) for key in keys)
    return [
        (f"{p} {name}, L >= {length}{'' if backend == 'tvm' else ', ' + backend}", a, b)
        for (p, name, length, backend), a, b in changed
        if a != b
    ]
