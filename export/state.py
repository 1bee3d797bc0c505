"""What a running session carries from step to step, of rows that advance each by itself.

Every tensor is allocated once and written in place by the graph. Only the chunk memory grows with the texts: by
doubling, which copies what is filled. Counts of tokens are known on the host, too, so that nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsa_compile.export.bundle import TensorSpec
from hsa_compile.export.memory import Buffer, Device

_MEMORY_DIMENSIONS = {"rows", "capacity"}
_CHUNK_STORES = ("mem_k", "mem_v")


class CapacityError(ValueError):
    """A text would become longer than what the session was opened for."""


class SessionState:
    """Named buffers, each ``past.*`` and ``present.*`` at once.

    Args:
        specs: of the bundle.
        batch: rows.
        chunk_size: S.
        capacity: chunks a row to make room for at first.
        device: where the buffers are.
        limit: tokens that a row may grow to; None for no limit but memory.

    Attributes:
        positions: int64 [B], tokens that each row has seen.
        generation: changes when buffers move.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        batch: int,
        chunk_size: int,
        capacity: int,
        device: Device,
        limit: int | None = None,
    ) -> None:
        self.batch, self.chunk_size, self.device, self.limit = batch, chunk_size, device, limit
        self.positions = np.zeros(batch, np.int64)
        self.generation = 0
        self._capacity = max(1, capacity)
        self.specs = tuple(specs)
        self._specs = {spec.name: spec for spec in specs}
        self._memory = [spec.name for spec in specs if _MEMORY_DIMENSIONS & set(spec.shape)]
        self.buffers = {name: self._allocate(name) for name in self._specs}

    @property
    def capacity(self) -> int:
        """Chunks that the memory has room for in each row."""
        return self._capacity

    @property
    def memory_bytes(self) -> int:
        """Bytes of the chunk memory, filled or not."""
        return sum(self.buffers[name].nbytes for name in self._memory)

    def completing(self, lengths: np.ndarray) -> int:
        """Chunks that the row which completes the most of them completes with so many tokens more."""
        S = self.chunk_size
        return int(((self.positions + lengths) // S - self.positions // S).max(initial=0))

    def make_room(self, lengths: np.ndarray, least: int = 0) -> None:
        """Grows the memory so that the rows can take so many tokens more.

        Args:
            least: chunks that are written in any case.

        Raises:
            CapacityError: a row would pass the limit.
        """
        after = int((self.positions + lengths).max(initial=0))
        if self.limit is not None and after > self.limit:
            raise CapacityError(
                f"a text would have {after:,} tokens, and the session was opened for {self.limit:,} at most; "
                "open it with a higher limit, or reset"
            )
        # Every row writes as many chunks as the row that completes the most, seen or not yet.
        needed = int((self.positions // self.chunk_size).max(initial=0)) + max(least, self.completing(lengths))
        if needed > self._capacity:
            self._grow(max(needed, 2 * self._capacity))

    def advance(self, lengths: np.ndarray) -> None:
        """Counts what a step took; the graph has written the buffers."""
        self.positions += lengths

    def reset(self, row: int | None = None) -> None:
        """Forgets the text of a row, or of all. What stays behind of it is never looked at."""
        zero = np.zeros(1, np.int64)
        for b in range(self.batch) if row is None else [row]:
            self.positions[b] = 0
            self._copy_in("position", b, zero)

    def copy_row(self, source: SessionState, row: int, to: int) -> None:
        """Row ``to`` becomes a copy of row ``row`` of a state of the same model, which may be this one.

        Raises:
            CapacityError: the row has more tokens than the limit.
        """
        chunks = int(source.positions[row]) // self.chunk_size
        if self.limit is not None and source.positions[row] > self.limit:
            raise CapacityError(f"the row has {source.positions[row]:,} tokens, of at most {self.limit:,} here")
        if chunks > self._capacity:
            self._grow(max(chunks, 2 * self._capacity))
        for name, target in self.buffers.items():
            nbytes, given = target.row_bytes, source.buffers[name]
            if name in self._memory:
                nbytes = chunks * (target.row_bytes // self._capacity)
            if nbytes:
                places = target.pointer + to * target.row_bytes, given.pointer + row * given.row_bytes
                self.device.copy(*places, nbytes)
        self.positions[to] = source.positions[row]

    def _copy_in(self, name: str, row: int, value: np.ndarray) -> None:
        buffer = self.buffers[name]
        self.device.copy(buffer.pointer + row * buffer.row_bytes, value.ctypes.data, value.nbytes)

    def _grow(self, capacity: int) -> None:
        old_capacity, self._capacity = self._capacity, capacity
        filled = self.positions // self.chunk_size
        for name in self._memory:
            old, new = self.buffers[name], self._allocate(name)
            chunk_bytes = old.row_bytes // old_capacity
            for b, chunks in enumerate(filled.tolist()):
                if chunks:
                    places = new.pointer + b * new.row_bytes, old.pointer + b * old.row_bytes
                    self.device.copy(*places, chunks * chunk_bytes)
            self.buffers[name] = new  # so that the old one goes before the next is made
        self.generation += 1

    def _allocate(self, name: str) -> Buffer:
        sizes = {"batch": self.batch, "capacity": self._capacity, "rows": self._capacity * self.chunk_size}
        spec = self._specs[name]
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        make = self.device.chunk_store if name in _CHUNK_STORES else self.device.zeros
        return make(shape, spec.dtype)
