"""Runs compiled kernels on PyTorch's tensors, threads and streams, through ctypes; no compiler is loaded."""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from hsa_compile.schedules import Artifact

log = logging.getLogger("hsa_compile")


@functools.cache
def _openmp() -> int:
    """Address of the process's GOMP_parallel (libgomp, libomp and libiomp5 all have it), 0 if there is none.

    PyTorch loads its OpenMP runtime globally, so kernels run on the very threads its own operators use.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError:
        log.warning("this process has no OpenMP runtime: compiled kernels run on one thread")
        return 0


class Kernel:
    """A loaded kernel. Calls release the GIL.

    Raises:
        OSError: the library can't be loaded.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._library = ctypes.CDLL(str(artifact.library))
        self._kernel = ctypes.addressof(ctypes.c_char.in_dll(self._library, artifact.symbol))
        self._execute = self._library.hsa_execute
        self._execute.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int32] + [ctypes.c_void_p] * 2
        name = "hsa_parallel_openmp" if _openmp() else "hsa_parallel_serial"
        self._parallel = ctypes.cast(getattr(self._library, name), ctypes.c_void_p)

    def __call__(self, tensors: tuple[Tensor, ...], B: int, L: int, C: int) -> None:
        """Runs on contiguous CPU tensors, inputs first, in the order of ``schedules/host/kernel.h``.

        Raises:
            MemoryError: no memory for the kernel's workspace.
        """
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        dims = (ctypes.c_int64 * 3)(B, L, C)
        threads = torch.get_num_threads()
        if self._execute(self._kernel, pointers, dims, threads, self._parallel, _openmp()):
            raise MemoryError(f"no memory for the workspace of {self.artifact.problem}")


class CudaTable(ctypes.Structure):
    """``hsa_cuda_kernel`` of ``schedules/host/cuda_kernel.h``."""

    _fields_ = (
        ("abi", ctypes.c_int32),
        ("problem", ctypes.c_char_p),
        ("pass_name", ctypes.c_char_p),
        ("tensors", ctypes.c_int32),
        ("scratch_bytes", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)),
        ("run", ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4)),
        ("message", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int32)),
    )


CUDA_ABI = 1


class CudaKernel:
    """A loaded GPU kernel. A call enqueues it on the current stream and returns; nothing waits for the device.

    Raises:
        OSError: the library can't be loaded, or has another interface.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._library = ctypes.CDLL(str(artifact.library))
        self._table = CudaTable.in_dll(self._library, artifact.symbol)
        if self._table.abi != CUDA_ABI:
            raise OSError(f"{artifact.library} has interface {self._table.abi}, this version reads {CUDA_ABI}")

    def __call__(self, tensors: tuple[Tensor, ...], B: int, L: int, C: int) -> None:
        """Runs on contiguous tensors of one GPU, inputs first, in the order of ``schedules/host/kernel.h``.

        Raises:
            RuntimeError: a launch was refused.
        """
        device = tensors[0].device
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        dims = (ctypes.c_int64 * 3)(B, L, C)
        with torch.cuda.device(device):
            # The caching allocator keeps scratch alive on this stream after it is freed here.
            scratch = torch.empty(max(256, self._table.scratch_bytes(dims)), dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
            error = self._table.run(pointers, dims, scratch.data_ptr(), stream)
        if error:
            raise RuntimeError(f"{self.artifact.problem}: {self._table.message(error).decode()}")
