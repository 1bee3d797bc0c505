"""What a running session carries from step to step: small tensors that each step makes anew, and the chunk memory,
which is allocated once, grows by doubling and is written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from hsa_compile.export.bundle import TensorSpec

Array = np.ndarray[Any, Any]
_MEMORY_DIMENSIONS = {"rows", "capacity"}
_ALIGNMENT = 64  # what compiled kernels want; numpy gives 16


class SessionState:
    """Named ONNX Runtime values for ``past.*``; those of the memory serve as ``present.*`` as well.

    Args:
        specs: of the bundle.
        batch: texts that advance in lock-step.
        chunk_size: S.
        capacity: chunks to make room for at first.
    """

    def __init__(self, specs: Sequence[TensorSpec], batch: int, chunk_size: int, capacity: int) -> None:
        self.batch = batch
        self.position = 0
        self._chunk_size = chunk_size
        self._capacity = max(1, capacity)
        self._memory_specs = [spec for spec in specs if _MEMORY_DIMENSIONS & set(spec.shape)]
        small = [spec for spec in specs if spec not in self._memory_specs]
        self._memory = {spec.name: _zeros(self._shape(spec), spec.dtype) for spec in self._memory_specs}
        self.memory = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in self._memory.items()}
        self.small = {s.name: ort.OrtValue.ortvalue_from_numpy(_zeros(self._shape(s), s.dtype)) for s in small}

    @property
    def capacity(self) -> int:
        """Chunks that the memory has room for."""
        return self._capacity

    @property
    def memory_bytes(self) -> int:
        """Bytes of the chunk memory, filled or not."""
        return sum(x.nbytes for x in self._memory.values())

    def make_room(self, tokens: int) -> None:
        """Grows the memory so that the next ``tokens`` tokens can complete their chunks."""
        needed = (self.position + tokens) // self._chunk_size
        if needed <= self._capacity:
            return
        self._capacity = max(needed, 2 * self._capacity)
        for spec in self._memory_specs:
            new = _zeros(self._shape(spec), spec.dtype)
            new[:, : self._memory[spec.name].shape[1]] = self._memory[spec.name]
            self._memory[spec.name] = new  # so that the old one goes before the next is made
            self.memory[spec.name] = ort.OrtValue.ortvalue_from_numpy(new)

    def advance(self, tokens: int, small: dict[str, Any]) -> None:
        """Takes over what a step of ``tokens`` tokens made; the memory was already written."""
        self.small = small
        self.position += tokens

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Of a memory tensor at the present capacity, or of a small one before the first token."""
        sizes = {"batch": self.batch, "capacity": self._capacity, "rows": self._capacity * self._chunk_size}
        return tuple(sizes.get(d, 0) if isinstance(d, str) else d for d in spec.shape)


def _zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """Aligned zeros; the system gives the pages when they are first touched."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)
