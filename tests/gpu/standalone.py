"""GPU programs as libraries that need neither a compiler nor this package's loader: built here, carried to a GPU.

``build`` needs TileLang and nvcc, or g++ where the GPU is emulated (cuda_on_cpu.h); ``Standalone`` needs PyTorch and
the files alone.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hsa_compile.ir.programs import GpuProgram, Launch


def lower(launch: Launch, arch: str) -> tuple[str, str]:
    """(device source, device and host source) of a launch for ``sm_90a``, ``sm_80``, ..."""
    from tilelang import tvm
    from tilelang.backend.module import create_backend_context
    from tilelang.engine.lower import lower_with_context
    from tilelang.jit.adapter.wrapper import TLCUDASourceWrapper

    function = launch.function.with_attr("global_symbol", launch.symbol)
    context = create_backend_context({"kind": "cuda", "arch": arch}, None, "cython")
    with tvm.transform.PassContext(opt_level=3, config=dict(launch.options)), context.target:
        lowered = lower_with_context(function, context)
    host = TLCUDASourceWrapper(
        tvm.IRModule({launch.symbol: function}),
        lowered.kernel_source,
        context.target,
        device_mod=lowered.device_mod,
        host_mod=lowered.host_mod,
        pass_configs=dict(launch.options),
    )
    # The wrapper always allows the next kernel to start before this one ends, which these programs are not made for.
    return lowered.kernel_source, host.lib_code.replace("config.numAttrs = 1;", "config.numAttrs = 0;")


def nvcc(source: Path, output: Path, arch: str, fast_math: bool, *flags: str) -> dict[str, int]:
    """Compiles and returns what ptxas reports of the kernel: ``registers`` and ``spills`` (bytes stored)."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    command = ["nvcc", "-std=c++20", "-O3", "-w", "-gencode", f"arch=compute_{arch[3:]},code={arch}", "-Xptxas", "-v"]
    command += [f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}", *(["-use_fast_math"] if fast_math else [])]
    done = subprocess.run([*command, *flags, str(source), "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = {
        name: re.findall(pattern, done.stderr)
        for name, pattern in (("registers", r"Used (\d+) registers"), ("spills", r"(\d+) bytes spill stores"))
    }
    return {name: max(map(int, values), default=0) for name, values in found.items()}


def emulated(source: Path, output: Path) -> dict[str, int]:
    """Compiles device and host source to run on this CPU, in fibers."""
    text = re.sub(r"^#\s*(include|if|el|end|define|undef).*\n", "", source.read_text(), flags=re.MULTILINE)
    shared = "extern __shared__ __align__(1024) uchar buf_dyn_shmem[];"
    text = text.replace(shared, "uchar* buf_dyn_shmem = emulator.shared;").replace("__declspec(dllexport)", "")
    adapted = source.with_suffix(".cc")
    adapted.write_text('#include "cuda_on_cpu.h"\n#define ERROR_BUF_SIZE 1024\n' + text)
    command = ["g++", "-std=c++20", "-O2", "-march=native", "-w", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
    subprocess.run([*command, str(adapted), "-o", str(output)], check=True)
    return {"registers": 0, "spills": 0}


def build(program: GpuProgram, directory: Path, arch: str, emulate: bool = False) -> list[dict[str, int]]:
    """Writes a library a launch and ``program.json``; returns the ptxas reports."""
    directory.mkdir(parents=True, exist_ok=True)
    launches, reports = [], []
    for launch in program.launches:
        source, library = directory / f"{launch.symbol}.cu", directory / f"{launch.symbol}.so"
        source.write_text(lower(launch, arch)[1])
        if emulate:
            reports.append(emulated(source, library))
        else:
            fast_math = bool(launch.options.get("tl.enable_fast_math"))
            flags = ("-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-Xlinker", "-s")
            reports.append(nvcc(source, library, arch, fast_math, *flags))
        match = re.search(r"int call\((.*?), cudaStream_t", source.read_text())
        assert match
        symbols = [p.split()[-1] for p in match[1].split(", ")][len(launch.arguments) :]
        dims = [launch.dims[s] for s in symbols]
        launches.append({"symbol": launch.symbol, "arguments": launch.arguments, "dims": dims})
    scratch = [(r.name, r.dtype, r.elements) for r in program.scratch]
    description = {"tensors": program.tensors, "scratch": scratch, "launches": launches}
    (directory / "program.json").write_text(json.dumps(description))
    return reports


class Standalone:
    """A built program, callable on CUDA tensors, or on CPU tensors if it was built to be emulated."""

    def __init__(self, directory: Path) -> None:
        data = json.loads((directory / "program.json").read_text())
        self.tensors, self.scratch, self.launches = data["tensors"], data["scratch"], data["launches"]
        self.libraries: list[Any] = []
        for launch in self.launches:
            library = ctypes.CDLL(str(directory / f"{launch['symbol']}.so"))
            library.get_last_error.restype = ctypes.c_char_p
            if library.init():
                raise RuntimeError(library.get_last_error().decode())
            self.libraries.append(library)

    def bind(self, tensors: dict[str, torch.Tensor], B: int, L: int, C: int, only: str | None = None) -> Any:
        """A function that runs the launches (or one of them) on these tensors; scratch is allocated and poisoned."""
        import torch

        def value(expression: str) -> int:
            return int(eval(expression.replace("/", "//"), {"B": B, "L": L, "C": C}))

        tensors = dict(tensors)
        device = tensors["o"].device
        for name, dtype, elements in self.scratch:
            region = torch.empty(value(elements), dtype=getattr(torch, dtype), device=device)
            tensors[name] = region.fill_(float("nan") if dtype.startswith("float") else -(2**30))
        calls = []
        for library, launch in zip(self.libraries, self.launches):
            arguments = [ctypes.c_void_p(tensors[n].data_ptr()) for n in launch["arguments"]]
            arguments += [ctypes.c_int64(value(d)) for d in launch["dims"]]
            if only in (None, launch["symbol"]):
                calls.append((library, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None)

        def run(keep: dict[str, torch.Tensor] = tensors) -> None:
            for library, arguments in calls:
                if library.call(*arguments, stream):
                    raise RuntimeError(library.get_last_error().decode())

        return run
