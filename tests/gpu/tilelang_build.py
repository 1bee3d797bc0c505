"""Builds GPU programs without a GPU, for tests and checks: TileLang to CUDA, nvcc to a cubin or a library.

Only for processes of their own: TileLang must never meet Apache TVM in one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tilelang  # noqa: F401  (before its tvm)
from tilelang import tvm
from tilelang.backend.module import create_backend_context
from tilelang.engine.lower import lower_with_context
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH
from tilelang.jit.adapter.wrapper import TLCUDASourceWrapper

from hsa_compile.ir.programs import GpuProgram, Launch

CALL = re.compile(r"TL_EXPORT int call\((.*?), cudaStream_t")


def lower(launch: Launch, arch: str) -> tuple[str, str]:
    """(device source, source with a host function ``call``) of a launch for ``arch``, such as "sm_90a"."""
    context = create_backend_context({"kind": "cuda", "arch": arch}, None, "cython")
    with tvm.transform.PassContext(opt_level=3, config=launch.options), context.target:
        artifact = lower_with_context(launch.function, context)
    module = tvm.IRModule({launch.function.attrs["global_symbol"]: launch.function})
    wrapper = TLCUDASourceWrapper(
        module, artifact.kernel_source, context.target, device_mod=artifact.device_mod, host_mod=artifact.host_mod,
        pass_configs=launch.options,
    )  # fmt: skip
    # A launch that overlaps the one before it would read what that has not written yet.
    return artifact.kernel_source, wrapper.lib_code.replace("config.numAttrs = 1;", "config.numAttrs = 0;")


def nvcc(source: Path, target: Path, arch: str) -> str:
    """Compiles to ``target`` (.cubin or .so); returns what ptxas says of registers and spills.

    Raises:
        RuntimeError: nvcc failed; its output.
    """
    code = arch.removeprefix("sm_")
    command = [
        "nvcc", "-std=c++20", "-O3", "-w", "-gencode", f"arch=compute_{code},code={arch}", "-Xptxas", "-v",
        f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}",
    ]  # fmt: skip
    command += ["-shared", "-Xcompiler", "-fPIC", "-cudart", "static"] if target.suffix == ".so" else ["-cubin"]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr or done.stdout)
    return " ".join(re.findall(r"Used \d+ registers|\d+ bytes spill stores", done.stderr))


def expressions(program: GpuProgram, launch: Launch) -> str:
    """C functions for the launch's dims and the program's scratch, which the caller of ``call`` needs."""
    functions = {f"dim_{name}": text for name, text in launch.dims.items()}
    functions |= {f"elements_{region.name}": region.elements for region in program.scratch}
    line = 'extern "C" long long {}(long long B, long long L, long long C) {{ return {}; }}\n'
    return "".join(line.format(name, text) for name, text in functions.items())


def build(program: GpuProgram, arch: str, directory: Path, name: str) -> dict[str, Any]:
    """Libraries of all launches in ``directory`` and a plain description of how to run them."""
    launches = []
    for launch in program.launches:
        _, host = lower(launch, arch)
        source = directory / f"{name}_{launch.symbol}.cu"
        source.write_text(host + expressions(program, launch))
        report = nvcc(source, source.with_suffix(".so"), arch)
        print(f"{source.stem} {arch}: {report}", flush=True)
        parameters = CALL.search(host).group(1).split(", ")  # type: ignore[union-attr]
        dims = [p.split()[-1] for p in parameters if "*" not in p]
        launches.append({"so": source.with_suffix(".so").name, "arguments": launch.arguments, "dims": dims})
    scratch = [{"name": r.name, "dtype": r.dtype} for r in program.scratch]
    return {"name": name, "tensors": program.tensors, "scratch": scratch, "launches": launches}


def compile_all(program: GpuProgram, arch: str, directory: Path) -> None:
    """A cubin of every launch; prints a line each."""
    for launch in program.launches:
        device, _ = lower(launch, arch)
        source = directory / f"{launch.symbol}_{arch}.cu"
        source.write_text(device)
        print(f"{launch.symbol} {arch}: {nvcc(source, source.with_suffix('.cubin'), arch)}", flush=True)


if __name__ == "__main__":  # REQUEST: {"problem", "tile", "module", "archs"}, DIRECTORY
    import importlib

    from hsa_compile.ir import problem_from_dict
    from hsa_compile.ir.programs import GpuTile

    request = json.loads(sys.argv[1])
    module = importlib.import_module(f"hsa_compile.ir.programs.gpu.{request['module']}")
    for arch in request["archs"]:
        tile = GpuTile(**request["tile"])
        compile_all(module.program(problem_from_dict(request["problem"]), tile), arch, Path(sys.argv[2]))
