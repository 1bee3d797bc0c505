"""The tokens of a long text with facts hidden in it, made a part at a time.

Shape letters: L tokens of the text.

A haystack of 32 million tokens is never made whole: prose is a text of any length read in a circle, and edits lie over
it. Words that are drawn are kept as the smallest integers that hold them.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsa_compile.model.config import ConfigError
from hsa_compile.model.shards import Tokenizer
from hsa_compile.model.tasks.problem import Ask, Problem, invented_word

Ids = NDArray[np.int64]
BLOCK_WORDS = 1 << 14
NEAR = 256  # tokens after a fact's place among which the end of a line is looked for
OCCURRENCES = 3  # of a word that is not asked for


class Codec(Protocol):
    """What turns text into tokens."""

    vocab_size: int

    def encode(self, text: bytes) -> NDArray[np.integer]:
        """Token ids of UTF-8 text, 1-D."""


class Bytes:
    """Tokens are bytes."""

    vocab_size = 256

    def encode(self, text: bytes) -> NDArray[np.integer]:
        """The bytes."""
        return np.frombuffer(text, np.uint8)


def codec(tokenizer: str | None) -> Codec:
    """Bytes, or a Hugging Face ``tokenizer.json``.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    return Bytes() if tokenizer is None else Tokenizer(tokenizer)


class Text(ABC):
    """L tokens that are made as they are asked for: like a tensor of token ids [1, L], whose parts are read."""

    @abstractmethod
    def __len__(self) -> int:
        """L."""

    @abstractmethod
    def read(self, first: int, end: int) -> Ids:
        """Tokens ``first`` … ``end - 1``."""

    @property
    def shape(self) -> tuple[int, int]:
        """[1, L]."""
        return 1, len(self)

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        """``text[:, first:end]``, int64 [1, end - first]."""
        first, end, _ = where[1].indices(len(self))
        return torch.from_numpy(self.read(first, end))[None]


class Circle(Text):
    """A text that starts again where it ends.

    Args:
        tokens: the text once.
        length: [L] tokens of the haystack.
        offset: where in the text it starts.
    """

    def __init__(self, tokens: NDArray[np.integer], length: int, offset: int = 0) -> None:
        if not len(tokens):
            raise ConfigError("a haystack needs a text of at least one token")
        self.tokens, self.length, self.offset = tokens, length, offset

    def __len__(self) -> int:
        return self.length

    def read(self, first: int, end: int) -> Ids:
        places = (self.offset + first) % len(self.tokens) + np.arange(end - first)
        if end - first and places[-1] < len(self.tokens):
            return self.tokens[places[0] : places[-1] + 1].astype(np.int64)
        return self.tokens[places % len(self.tokens)].astype(np.int64)


def _word_tokens(codec: Codec, word: str) -> int:
    return max(1, len(codec.encode(f"{word} ".encode())))


def _written(codec: Codec, words: Sequence[str], blocks: Iterator[NDArray[np.integer]], length: int) -> Circle:
    """``length`` tokens of words that are given by their numbers, in blocks."""
    table = np.array([f"{word} " for word in words])
    dtype = np.uint8 if codec.vocab_size <= 1 << 8 else np.uint16 if codec.vocab_size <= 1 << 16 else np.uint32
    parts, have = [], 0
    while have < length:
        text = "".join(table[next(blocks)])
        parts.append(codec.encode(text.encode()).astype(dtype))
        have += len(parts[-1])
    return Circle(np.concatenate(parts)[:length], length)


def frequent_words(codec: Codec, problem: Problem, length: int, seed: int) -> Circle:
    """The problem's words in any order, of which the one of rank r comes in proportion to 1/r². Were each
    drawn by itself, another would be as frequent as the third in a third of the texts of 512 bytes, and 2 % of 4096."""
    rng, p = np.random.default_rng(seed), 1 / np.arange(1, len(problem.words) + 1) ** 2
    size = min(BLOCK_WORDS, -(-length // _word_tokens(codec, problem.words[0])))
    ends = np.round(p.cumsum() / p.sum() * size).astype(np.int64)
    numbers = np.repeat(np.arange(len(p)), np.diff(ends, prepend=0))
    return _written(codec, problem.words, (rng.permutation(numbers) for _ in itertools.count()), length)


def other_words(codec: Codec, length: int, seed: int) -> Circle:
    """Invented words that come three times each, among which common ones are hidden."""
    rng, order = random.Random(seed), np.random.default_rng(seed)
    count = max(2, length // _word_tokens(codec, invented_word(rng, 4)) // OCCURRENCES)
    numbers = np.repeat(np.arange(count), OCCURRENCES)
    blocks = (
        part
        for _ in itertools.count()
        for part in np.split(order.permutation(numbers), range(BLOCK_WORDS, len(numbers), BLOCK_WORDS))
    )
    return _written(codec, [invented_word(rng, 4) for _ in range(count)], blocks, length)


@dataclass(frozen=True)
class Context(Text):
    """A haystack with facts written over it, and a question at its end.

    Attributes:
        hay: what lies below; its length is that of the context.
        edits: (place, tokens) of what was written over it, in order, the question last.
        parts: token ids that are to come next. Where they are several, any order of them is right.
        needed: which of the edits are the facts that the answer needs, in order.
    """

    hay: Circle
    edits: tuple[tuple[int, Ids], ...]
    parts: tuple[Ids, ...]
    needed: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.hay)

    @property
    def answer(self) -> Ids:
        """The parts in their order."""
        return np.concatenate(self.parts)

    def read(self, first: int, end: int) -> Ids:
        ids = self.hay.read(first, end)
        for place, tokens in self.edits:
            low, high = max(first, place), min(end, place + len(tokens))
            if low < high:
                ids[low - first : high - first] = tokens[low - place : high - place]
        return ids

    @property
    def changed(self) -> list[tuple[int, int]]:
        """(first, end) of each edit."""
        return [(place, place + len(tokens)) for place, tokens in self.edits]

    @property
    def depth(self) -> float:
        """Of the first fact that the answer needs, as a part of the context; 0 where it needs none."""
        return self.edits[self.needed[0]][0] / len(self.hay) if self.needed else 0.0


def hide(rng: random.Random, codec: Codec, hay: Circle, problem: Problem, ask: Ask, after: bytes = b"\n") -> Context:
    """The problem's facts at uniform places of the haystack, in their order, and the question at its end.

    Args:
        after: facts are written after the next one of this character, where there is one near and room.

    Raises:
        ConfigError: they do not fit.
    """
    query, *parts = (codec.encode(text).astype(np.int64) for text in (ask.query, *ask.parts))
    facts = [codec.encode(fact).astype(np.int64) for fact in problem.facts]
    free = len(hay) - len(query) - sum(map(len, facts))
    if free < 1:
        raise ConfigError(f"the facts and the question do not fit into {len(hay)} tokens; ask for longer contexts")
    ends = codec.encode(after)
    starts = list(_places(rng, hay, facts, free, int(ends[0]) if len(ends) == 1 else -1))
    edits = [*zip(starts, facts), (len(hay) - len(query), query)]
    return Context(hay, tuple(edits), tuple(parts), ask.facts)


def _places(rng: random.Random, hay: Circle, facts: Sequence[Ids], free: int, after: int) -> Iterator[int]:
    gaps = sorted(rng.randrange(free + 1) for _ in facts)
    written = 0
    for i, fact in enumerate(facts):
        place = gaps[i] + written
        # The next fact starts no earlier than its own draw.
        room = (gaps[i + 1] if i + 1 < len(gaps) else free) - gaps[i]
        ends = np.flatnonzero(hay.read(place, place + min(room, NEAR)) == after)
        yield place + (int(ends[0]) + 1 if len(ends) else 0)
        written += len(fact)
