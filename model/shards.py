"""Text as tokens: files of token ids that are mapped into memory, and tokenizers that make them.

A directory of token shards holds 1-D NumPy files of little-endian uint16 or uint32, and ``index.json``:

    {"format": "hsa-compile tokens", "version": 1, "vocab_size": 50304, "tokenizer": "tokenizer.json",
     "shards": [{"file": "shard-00000.npy", "tokens": 16777216}, ...]}

The text is the shards one after the other. ``tokenizer`` is where the ids come from, for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsa_compile.model.checkpoint import write_atomically, write_text
from hsa_compile.model.data import DataError, read_text
from hsa_compile.model.tokenizer import JsonTokenizer, TokenizerError

FORMAT, VERSION, INDEX_NAME = "hsa-compile tokens", 1, "index.json"
MIN_TOKENS = 1024
SHARD_TOKENS = 1 << 24

Ids = NDArray[Any]


class Tokens:
    """Token ids, a part at a time in memory; a slice is an int64 array.

    Args:
        parts: 1-D arrays of unsigned integers, mapped or not.
        vocab_size: ids must lie below; looked at as they are read.
        name: of the data, for errors.
    """

    def __init__(self, parts: list[Ids], vocab_size: int, name: str) -> None:
        self.parts, self.vocab_size, self.name = parts, vocab_size, name
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> NDArray[np.int64]:
        start, stop, _ = where.indices(len(self))
        pieces = [part[max(0, start - first) : stop - first] for part, first in self._within(start, stop)]
        ids = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
        if len(ids) and ids.max() >= self.vocab_size:
            raise DataError(
                f"{self.name} has token id {ids.max()}, the model's vocabulary is 0 … {self.vocab_size - 1}; "
                "give the model the vocab_size of the tokenizer, or other data"
            )
        return ids

    def _within(self, start: int, stop: int) -> list[tuple[Ids, int]]:
        """The parts that hold tokens of start … stop - 1, each with the place of its first token."""
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        return [(self.parts[i], int(self.ends[i]) - len(self.parts[i])) for i in range(first, last + 1 if stop else 0)]

    def split(self, held_out: float = 0.05) -> tuple[Tokens, Tokens]:
        """The tokens to train on and their last part, held out; nothing is copied."""
        cut = int(len(self) * (1 - held_out))
        before = [part[: cut - first] for part, first in self._within(0, cut)]
        after = [part[max(0, cut - first) :] for part, first in self._within(cut, len(self))]
        return Tokens(before, self.vocab_size, self.name), Tokens(after, self.vocab_size, self.name)


def write_shards(
    directory: str | Path,
    ids: Iterable[Ids],
    vocab_size: int,
    tokenizer: str = "bytes",
    shard_tokens: int = SHARD_TOKENS,
) -> int:
    """Writes arrays of token ids to a directory of shards and returns how many tokens they are.

    Args:
        directory: must not hold shards yet.
        ids: arrays of any integer type, one after the other.
        vocab_size: ids lie below; decides between uint16 and uint32.
        tokenizer: where the ids come from, noted in the index.
        shard_tokens: of every file but the last.

    Raises:
        DataError: the directory holds shards, or an id is outside the vocabulary.
    """
    directory = Path(directory)
    if (directory / INDEX_NAME).exists():
        raise DataError(f"{directory} holds token shards already; remove it or give another directory")
    directory.mkdir(parents=True, exist_ok=True)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    shards: list[dict[str, Any]] = []
    rest: Ids = np.zeros(0, dtype)

    def write(part: Ids) -> None:
        path = directory / f"shard-{len(shards):05d}.npy"
        write_atomically(path, lambda temporary: np.save(temporary, part))
        shards.append({"file": path.name, "tokens": len(part)})

    for piece in ids:
        if len(piece) and not 0 <= piece.min() <= piece.max() < vocab_size:
            raise DataError(f"token ids {piece.min()} … {piece.max()} are outside the vocabulary 0 … {vocab_size - 1}")
        rest = np.concatenate((rest, piece.astype(dtype)))
        while len(rest) >= shard_tokens:
            write(rest[:shard_tokens])
            rest = rest[shard_tokens:]
    if len(rest):
        write(rest)
    index = {"format": FORMAT, "version": VERSION, "vocab_size": vocab_size, "tokenizer": tokenizer, "shards": shards}
    text = json.dumps(index, indent=2) + "\n"
    write_atomically(directory / INDEX_NAME, lambda path: write_text(path, text))
    return sum(shard["tokens"] for shard in shards)


def open_shards(directory: str | Path, vocab_size: int) -> tuple[Tokens, str]:
    """The tokens of a directory of shards, mapped into memory, and a digest of their index.

    Args:
        vocab_size: of the model.

    Raises:
        DataError: the index or a shard is missing, foreign or damaged, or the ids do not fit the model.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME
    try:
        text = path.read_text(encoding="utf-8")
        index = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); write the shards again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(f"{path} is not an index of {FORMAT}, version {VERSION}; see model/shards.py for the format")
    try:
        theirs, shards = int(index["vocab_size"]), [(str(x["file"]), int(x["tokens"])) for x in index["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks or misspells a field ({error!r}); see model/shards.py for the format") from None
    if theirs > vocab_size:
        raise DataError(f"{directory} has a vocabulary of {theirs}, the model {vocab_size}; raise its vocab_size")
    tokens = Tokens([_map(directory / file, count) for file, count in shards], vocab_size, str(directory))
    if not shards or len(tokens) < MIN_TOKENS:
        raise DataError(f"{directory} has too few tokens, training needs {MIN_TOKENS}; give more")
    return tokens, hashlib.sha256(text.encode()).hexdigest()


def _map(path: Path, count: int) -> Ids:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}); write the shards again") from None
    if ids.ndim != 1 or ids.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise DataError(f"{path} must be 1-D uint16 or uint32, got {ids.dtype} {list(ids.shape)}")
    if len(ids) != count:
        raise DataError(f"{path} has {len(ids)} tokens, the index says {count}; write the shards again")
    return ids


class Tokenizer:
    """A Hugging Face ``tokenizer.json``, for data.

    Raises:
        DataError: it cannot be read.
        ModuleNotFoundError: the package ``tokenizers`` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._tokenizer = JsonTokenizer(path)
        except TokenizerError as error:
            raise DataError(str(error)) from None
        self.vocab_size = self._tokenizer.vocab_size

    def encode(self, text: bytes) -> Ids:
        """Token ids of UTF-8 text, uint32."""
        return self._tokenizer.encode_array(text.decode())


def encode_files(
    files: Iterable[Path], tokenizer: str | Path, progress: Callable[[str], None]
) -> tuple[Iterator[Ids], int]:
    """The token ids of one text file after the other, and the vocabulary's size.

    Raises:
        DataError: the tokenizer cannot be read; while iterating, a file that is not text.
    """
    known = Tokenizer(tokenizer)

    def pieces() -> Iterator[Ids]:
        for file in files:
            progress(file.name)
            yield known.encode(read_text(file))

    return pieces(), known.vocab_size
