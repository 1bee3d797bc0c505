"""Where a session's tensors live: the host's memory, or a GPU's, by the few calls of the CUDA driver that it takes.

A session binds raw addresses to its graph, so all it needs of a device is memory that stays in its place. What the host
reads and writes at every step (token ids, positions of rows) is *shared*: on a GPU it is pinned host memory mapped into
the device, which kernels read and write themselves, so that nothing has to be copied or waited for.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# numpy has no bfloat16; its bytes are kept as uint16. Numbers are those of onnx.TensorProto.
_STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int64": "int64"}
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}
_ALIGNMENT = 64  # what compiled kernels want; numpy gives 16


class DeviceError(RuntimeError):
    """A device is missing or out of memory; the message says what to do."""


@dataclass(frozen=True)
class Buffer:
    """A tensor at a fixed address.

    Attributes:
        host: the same memory as an array, where the host can see it.
        owner: what frees the memory when it goes.
    """

    shape: tuple[int, ...]
    dtype: str
    pointer: int
    host: Array | None = None
    owner: Any = field(default=None, repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the batch."""
        return math.prod(self.shape[1:]) * np.dtype(_STORAGE[self.dtype]).itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def view(self, *shape: int) -> Buffer:
        """The first elements in another shape."""
        host = self.host if self.host is None else self.host.reshape(-1)[: math.prod(shape)].reshape(shape)
        return Buffer(shape, self.dtype, self.pointer, host, self.owner)


class Host:
    """The CPU and its memory."""

    name = "cpu"

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Aligned zeros; the system gives the pages when they are first touched."""
        kind = np.dtype(_STORAGE[dtype])
        raw = np.zeros(math.prod(shape) * kind.itemsize + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        host = raw[start : len(raw) - _ALIGNMENT + start].view(kind).reshape(tuple(shape))
        return Buffer(tuple(shape), dtype, host.ctypes.data, host)

    shared = chunk_store = zeros

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Between addresses of this device; done when it returns."""
        ctypes.memmove(target, source, nbytes)

    def read(self, buffer: Buffer) -> Array:
        """A copy of what is in a buffer."""
        assert buffer.host is not None
        return buffer.host.copy()


class Cuda:
    """A GPU, through libcuda, which comes with its driver.

    Args:
        host_memory: keep chunk stores in the host's memory, pinned and mapped: kernels read what they select across
            the bus, as ``model.host`` does it. For contexts that outgrow the GPU's memory.
        device: its number.
        library: the driver's, for tests.

    Raises:
        DeviceError: there is no driver or no such GPU.
    """

    name = "cuda"

    def __init__(self, host_memory: bool = False, device: int = 0, library: str = "libcuda.so.1") -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise DeviceError(f'no NVIDIA driver here ({error}); use provider="cpu"') from None
        self._host_memory = host_memory
        self._context = ctypes.c_void_p()
        number = ctypes.c_int()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device))
        # The primary context is the one that ONNX Runtime works in.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Zeros in the GPU's memory."""
        return self._buffer(shape, dtype, self._device_bytes)

    def shared(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Zeros in mapped host memory."""
        return self._buffer(shape, dtype, self._mapped_bytes)

    def chunk_store(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Zeros for keys or values of chunks, where ``host_memory`` says."""
        return self.shared(shape, dtype) if self._host_memory else self.zeros(shape, dtype)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Between addresses of the host or the GPU; done when it returns."""
        self._enter()
        self._call("cuMemcpy", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
        self._call("cuCtxSynchronize")

    def read(self, buffer: Buffer) -> Array:
        """A copy in the host's memory of what is in a buffer."""
        array = np.empty(buffer.shape, _STORAGE[buffer.dtype])
        self.copy(array.ctypes.data, buffer.pointer, array.nbytes)
        return array

    def _buffer(self, shape: Sequence[int], dtype: str, allocate: Callable[[int], tuple[int, Any]]) -> Buffer:
        self._enter()
        kind = np.dtype(_STORAGE[dtype])
        pointer, owner = allocate(max(1, math.prod(shape) * kind.itemsize))
        host = None
        if isinstance(owner, _Mapped):
            host = np.frombuffer(memoryview(owner.bytes), kind, math.prod(shape)).reshape(tuple(shape))
        return Buffer(tuple(shape), dtype, pointer, host, owner)

    def _device_bytes(self, size: int) -> tuple[int, Any]:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        owner = _Owner(pointer.value, self._cuda.cuMemFree_v2)
        self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        self._call("cuCtxSynchronize")
        return pointer.value, owner

    def _mapped_bytes(self, size: int) -> tuple[int, Any]:
        pointer, portable_and_mapped = ctypes.c_void_p(), 1 | 2
        self._call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(portable_and_mapped))
        assert pointer.value is not None
        ctypes.memset(pointer.value, 0, size)
        return pointer.value, _Mapped(pointer.value, self._cuda.cuMemFreeHost, size)

    def _enter(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code == 2:
            raise DeviceError(
                f"{name}: out of memory; take fewer rows, shorter texts, or host_memory=True where the GPU is full"
            )
        if code:
            raise DeviceError(f"{name} failed with CUDA error {code}")


class _Owner:
    """Memory of the driver, freed with this."""

    def __init__(self, pointer: int, free: Any) -> None:
        weakref.finalize(self, free, ctypes.c_uint64(pointer))


class _Mapped(_Owner):
    def __init__(self, pointer: int, free: Any, size: int) -> None:
        super().__init__(pointer, free)
        self.bytes = (ctypes.c_ubyte * size).from_address(pointer)


Device = Host | Cuda
