"""The GPU compilers' process: ``python -m hsa_compile.schedules.cuda_worker`` answers requests of
``schedules/worker.py``.

A request names a directory and a build request; the answer is the kernel's C symbol. A .cu of each launch (TileLang's
kernel and its launcher), table.cu (the C interface), kernel.so and resources.json (registers, spills and shared memory
of each kernel) are written there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")

from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

from hsa_compile.ir import Problem, problem_from_dict
from hsa_compile.ir.programs import GpuProgram, GpuTile
from hsa_compile.schedules.builder import cache_directory, cuda_compiler
from hsa_compile.schedules.cuda_glue import launcher_source, table_source
from hsa_compile.schedules.cuda_lowering import lower
from hsa_compile.schedules.target import GpuTarget, resolve_gpu
from hsa_compile.schedules.worker import serve

HOST = Path(__file__).parent / "host"


def program_for(problem: Problem, pass_name: str, tile: GpuTile) -> GpuProgram:
    """The GPU program of an operator's pass."""
    module = {
        ("chunk_attention", "forward"): "attention",
        ("chunk_attention", "backward"): "attention_backward",
        ("chunk_select", "forward"): "select",
        ("chunk_select", "backward"): "select_backward",
    }[problem.op, pass_name]
    return importlib.import_module(f"hsa_compile.ir.programs.gpu.{module}").program(problem, tile)


def _nvcc(target: GpuTarget) -> list[str]:
    architecture = f"arch=compute_{target.arch.removeprefix('sm_')},code={target.arch}"
    include = [f"-I{path}" for path in (HOST, TILELANG_TEMPLATE_PATH, CUTLASS_INCLUDE_DIR)]
    return [cuda_compiler(), "-std=c++20", "-O3", "-w", "-gencode", architecture, "-Xcompiler", "-fPIC", *include]


@functools.cache
def _versions() -> str:
    """Of what an object depends on besides its source: nvcc, and the headers that come with TileLang."""
    nvcc = subprocess.run([cuda_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    host = "".join(path.read_text() for path in sorted(HOST.glob("*.h")))
    return nvcc + host + importlib.metadata.version("tilelang")


def _compile(name: str, directory: Path, target: GpuTarget, flags: list[str]) -> dict[str, int]:
    """Compiles ``<name>.cu`` to an object; returns what the kernel takes of the machine.

    Objects are kept by their source: tiles that differ for one launch share the others, and nvcc is most of a build.
    """
    options = [*_nvcc(target), *flags, "-Xptxas", "-v"]
    source = (directory / f"{name}.cu").read_text()
    key = hashlib.sha256("\0".join([*options, _versions(), source]).encode()).hexdigest()[:24]
    kept = cache_directory() / "objects" / key
    if not kept.is_dir():
        done = subprocess.run(
            [*options, "-c", f"{name}.cu", "-o", f"{name}.o"], cwd=directory, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"nvcc failed on {name}.cu:\n{done.stderr[-3000:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            new = Path(temporary) / "object"
            new.mkdir()
            shutil.move(directory / f"{name}.o", new / "object.o")
            (new / "ptxas.txt").write_text(done.stderr)
            with contextlib.suppress(OSError):  # another process was first
                new.rename(kept)
    shutil.copy(kept / "object.o", directory / f"{name}.o")
    report = (kept / "ptxas.txt").read_text()
    found = {
        "registers": r"Used (\d+) registers",
        "stack_bytes": r"(\d+) bytes stack frame",
        "spill_bytes": r"(\d+) bytes spill stores",
        "static_shared_bytes": r"(\d+) bytes smem",
    }
    return {key: int(m.group(1)) if (m := re.search(pattern, report)) else 0 for key, pattern in found.items()}


def main(directory: Path, request: dict[str, Any]) -> str:
    problem, target = problem_from_dict(request["problem"]), resolve_gpu(request["target"])
    program = program_for(problem, request["pass"], GpuTile(**request["tile"]))
    prefix = f"hsa_{problem.digest}_{request['pass']}"
    kernels = [lower(launch, f"{prefix}_{launch.symbol}", target) for launch in program.launches]
    for launch, kernel in zip(program.launches, kernels):
        (directory / f"{launch.symbol}.cu").write_text(launcher_source(launch, kernel))
    symbol, table = table_source(program, problem, request["pass"], [kernel.symbol for kernel in kernels])
    (directory / "table.cu").write_text(table)
    # TileLang leaves it to nvcc to make exponentials single instructions where the program allows it.
    flags = {x.symbol: ["-use_fast_math"] if x.options.get("tl.enable_fast_math") else [] for x in program.launches}
    flags["table"] = []
    names = list(flags)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        resources = dict(zip(names, pool.map(lambda name: _compile(name, directory, target, flags[name]), names)))
    for launch, kernel in zip(program.launches, kernels):
        resources[launch.symbol]["dynamic_shared_bytes"] = kernel.shared_bytes
    del resources["table"]
    (directory / "resources.json").write_text(json.dumps(resources, indent=1) + "\n")
    # Every object brings the same printing helpers of TileLang's header debug.h, which defines them without inline.
    same = ["-Xlinker", "--allow-multiple-definition"]
    link = [cuda_compiler(), "-shared", "-cudart", "static", *same, *(f"{name}.o" for name in names), "-o", "kernel.so"]
    subprocess.run(link, cwd=directory, check=True)
    for name in names:
        (directory / f"{name}.o").unlink()
    return symbol


if __name__ == "__main__":
    serve(lambda message: {"symbol": main(Path(message["directory"]), message["request"])})
