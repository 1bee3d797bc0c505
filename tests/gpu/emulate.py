"""Runs built GPU kernels on a CPU: CUDA source and launchers, compiled with g++ and ``emulator/cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from hsa_compile.native import CudaTable
from hsa_compile.schedules import Artifact, builder

EMULATOR = Path(__file__).parent / "emulator"
HOST = Path(builder.__file__).parent / "host"


def adapted(source: str) -> str:
    """CUDA source for the emulator: no headers, its shared memory, and kernels by their type."""
    text = re.sub(r"^#\s*(include|if|el|end|define|undef).*\n", "", source, flags=re.MULTILINE)
    dynamic = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
    text = dynamic.sub(r"\1* \2 = (\1*)emulator.shared;", text)
    text = re.sub(r'__asm__\(.*|extern "C" const char .*|static hsa_image .*', "", text)
    embedded = re.compile(r'static hsa_embedded kernel = \{&\w+, "(\w+)"\};\n  return hsa_launch\(kernel')
    return embedded.sub(r"return cudaLaunchKernel(\1", text)


class EmulatedKernel:
    """A built GPU kernel that computes on CPU tensors, slowly; called like ``hsa_compile.native.CudaKernel``."""

    def __init__(self, artifact: Artifact, directory: Path) -> None:
        sources = [*sorted(artifact.directory.glob("*.cu")), artifact.directory / "host.cc"]
        headers = "".join(f'#include "{name}"\n' for name in ("cuda_launch.h", "cuda_kernel.h"))
        text = directory / "kernel.cc"
        text.write_text(headers + "".join(adapted(path.read_text()) for path in sources))
        # nvcc lets vectors of other types be read from arrays; g++ must be told to.
        flags = ("-std=c++20", "-O2", "-march=native", "-fno-strict-aliasing", "-w", "-shared", "-fPIC")
        command = ["g++", *flags, f"-I{EMULATOR}", f"-I{HOST}"]
        subprocess.run([*command, str(text), "-o", str(directory / "kernel.so")], check=True)
        self._library = ctypes.CDLL(str(directory / "kernel.so"))
        self._table = CudaTable.in_dll(self._library, artifact.symbol)

    def __call__(self, tensors: tuple[Tensor, ...], B: int, L: int, C: int) -> None:
        """Scratch is poisoned.

        Raises:
            RuntimeError: a launch failed: all threads of a block wait, or it takes too much shared memory.
        """
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        dims = (ctypes.c_int64 * 3)(B, L, C)
        scratch = torch.full((self._table.scratch_bytes(dims) + 256,), 255, dtype=torch.uint8)
        if error := self._table.run(pointers, dims, -(-scratch.data_ptr() // 256) * 256, None):
            raise RuntimeError(self._table.message(error).decode())
