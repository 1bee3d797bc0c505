"""What a server needs of a model: rows that each hold one text, read in segments and decoded together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hsa_compile.export.sampling import Sampler
from hsa_compile.export.session import Ids, Session


class Engine(Protocol):
    """Rows of one model. Not thread-safe: one thread makes all calls.

    A row is admitted with its prompt, read until there are logits, decoded any number of times and released. What a
    row computes depends on its own text alone. After an error of a row, the row is released and not used again.
    """

    @property
    def rows(self) -> int:
        """Texts at a time."""
        ...

    def admit(self, prompt_ids: Sequence[int], sampler: Sampler) -> int:
        """Takes a free row, which is to read the prompt, at least one id, all within the vocabulary, and whose tokens
        are chosen so."""
        ...

    def read(self, row: int) -> int | None:
        """Reads the next segment of the row's prompt: the token after it, None if there is more. It is -1 where the
        logits are no numbers."""
        ...

    def decode(self, tokens: Mapping[int, int]) -> dict[int, int]:
        """Reads one token in each of these rows and returns the ones after them, by row."""
        ...

    def release(self, row: int) -> None:
        """Frees the row and what it remembers."""
        ...


# Tokens of a prompt that others wait for at once, fewer than read fastest.
SEGMENT = 8192


class _Reader(NamedTuple):
    """A prompt that is being read."""

    session: Session
    tokens: Iterator[Ids]
    length: int


class SessionEngine:
    """The rows of a session. A prompt is read by a session of one row of its own, in segments, so that it costs the
    others nothing but its time, and is then copied into its row.

    Args:
        session: used by nobody else from here on.
    """

    def __init__(self, session: Session) -> None:
        self.rows = session.batch
        self._session = session
        self._free = list(reversed(range(self.rows)))
        self._readers: dict[int, _Reader] = {}
        self._samplers: dict[int, Sampler] = {}

    def admit(self, prompt_ids: Sequence[int], sampler: Sampler) -> int:
        reader = self._session.fork()
        row = self._free.pop()
        self._samplers[row] = sampler
        tokens = reader.segments(prompt_ids, [sampler], segment=min(reader.segment, SEGMENT))
        self._readers[row] = _Reader(reader, tokens, len(prompt_ids))
        return row

    def read(self, row: int) -> int | None:
        reader = self._readers[row]
        token = int(next(reader.tokens)[0])
        if reader.session.position < reader.length:
            return None
        self._session.copy_row(reader.session, 0, row)
        del self._readers[row]
        return token

    def decode(self, tokens: Mapping[int, int]) -> dict[int, int]:
        ids, lengths = np.zeros(self.rows, np.int64), np.zeros(self.rows, np.int64)
        for row, token in tokens.items():
            ids[row], lengths[row] = token, 1
        samplers = [self._samplers[row] if row in tokens else None for row in range(self.rows)]
        chosen = self._session.next(ids, lengths, samplers)
        return {row: int(chosen[row]) for row in tokens}

    def release(self, row: int) -> None:
        self._readers.pop(row, None)
        self._samplers.pop(row, None)
        self._session.reset(row)
        self._free.append(row)
