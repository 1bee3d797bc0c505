"""What a server needs of a model: rows that each hold one text, read in segments and decoded together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from hsa_compile.export.sampling import Floats
from hsa_compile.export.session import Ids, Session
from hsa_compile.export.state import SessionState


class Engine(Protocol):
    """Rows of one model. Not thread-safe: one thread makes all calls.

    A row is admitted with its prompt, read until there are logits, decoded any number of times and released. What a
    row computes depends on its own text alone. After an error of a row, the row is released and not used again.
    """

    @property
    def rows(self) -> int:
        """Texts at a time."""
        ...

    def admit(self, prompt_ids: Sequence[int]) -> int:
        """Takes a free row, which is to read the prompt: at least one id, all within the vocabulary."""
        ...

    def read(self, row: int) -> Floats | None:
        """Reads the next segment of the row's prompt: logits [V] after its last token, None if there is more."""
        ...

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Floats]:
        """Reads one token in each of these rows and returns the logits [V] after it, by row."""
        ...

    def release(self, row: int) -> None:
        """Frees the row and what it remembers."""
        ...


class SessionEngine:
    """Rows over the weights and kernels of one session, each with its own state.

    Args:
        session: used by nobody else from here on.
        rows: texts at a time.
    """

    def __init__(self, session: Session, rows: int) -> None:
        self.rows = rows
        self._session = session
        self._free = list(reversed(range(rows)))
        self._states: dict[int, SessionState] = {}
        self._unread: dict[int, Ids] = {}

    def admit(self, prompt_ids: Sequence[int]) -> int:
        self._session.reset()
        row = self._free.pop()
        self._states[row], self._unread[row] = self._session.state, np.asarray(prompt_ids, np.int64)
        return row

    def read(self, row: int) -> Floats | None:
        segment = self._session.segment
        part, self._unread[row] = self._unread[row][:segment], self._unread[row][segment:]
        logits = self._of(row).prefill(part)[0]
        return None if len(self._unread[row]) else logits

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Floats]:
        return {row: self._of(row).prefill([token])[0] for row, token in tokens.items()}

    def release(self, row: int) -> None:
        del self._states[row], self._unread[row]
        self._free.append(row)

    def _of(self, row: int) -> Session:
        self._session.state = self._states[row]
        return self._session
