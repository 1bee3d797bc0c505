"""What was measured, a line each, as soon as it is known: the results, and where a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = "hsa-compile evaluation"
VERSION = 2  # goes up where the same answer is scored otherwise: 1 wanted sets (MV, CWE, FWE) in the text's order


class EvaluationError(ValueError):
    """An evaluation cannot go on; the message says why and what to do."""


class Journal:
    """Lines of a JSON Lines file. The first says of what they are; a line that was cut short is dropped.

    Args:
        path: made if missing.
        about: what the lines are of: another model, text or precision gives other ones.

    Raises:
        EvaluationError: the file is of something else, or cannot be read.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.lines = path, list[dict[str, Any]]()
        head = {"format": FORMAT, "version": VERSION, **about}
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self._read() if path.exists() else []
        if found and found[0] != head:
            differing = [key for key in {*head, *found[0]} if head.get(key) != found[0].get(key)]
            what = f"is of another evaluation (other: {', '.join(sorted(differing))})"
            if differing == ["version"]:
                what = "was written by another version, which scored answers otherwise"
            raise EvaluationError(f"{path} {what}; give another output, or remove it to start again")
        self.lines = found[1:]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [head, *self.lines]), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> list[dict[str, Any]]:
        try:
            raw = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise EvaluationError(f"cannot read {self.path} ({error}); remove it, or give another output") from None
        lines = []
        for number, line in enumerate(raw):
            try:
                lines.append(json.loads(line))
            except ValueError:
                if number + 1 < len(raw):
                    raise EvaluationError(
                        f"{self.path} is damaged at line {number + 1}; remove that line, or give another output"
                    ) from None
        return [line for line in lines if isinstance(line, dict)]

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; it is on its way to the disk when this returns."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        return [line for line in self.lines if line.get("kind") == kind]

    def close(self) -> None:
        """No line comes any more."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results.

    Raises:
        EvaluationError: it cannot be read, or is no file of the suite ``length``.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path} ({error}); give a length.jsonl that eval wrote") from None
    if not rows or not all(isinstance(row, dict) and row.get("suite") == "length" for row in rows):
        raise EvaluationError(f"{path} has no rows of the suite length; give a length.jsonl that eval wrote")
    return rows
