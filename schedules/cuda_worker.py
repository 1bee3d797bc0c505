"""The GPU compilers' process: ``python -m hsa_compile.schedules.cuda_worker`` answers requests of
``schedules/worker.py``.

A request names a directory and a build request; the answer is the kernel's C symbol. Written there: TileLang's kernels
(.cu) and what nvcc made of them (.cubin), host.cc and host.o (launchers and the C interface), kernel.so and
resources.json (registers, spills and shared memory of each kernel).
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")

from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

from hsa_compile.ir import AnyProblem, any_problem_from_dict
from hsa_compile.ir.programs import GpuProgram, GpuTile
from hsa_compile.schedules.builder import cache_directory, cuda_compiler
from hsa_compile.schedules.cuda_glue import HEADERS, Lowered, image_source, launcher_source, table_source
from hsa_compile.schedules.cuda_lowering import lower
from hsa_compile.schedules.target import GpuTarget, resolve_gpu
from hsa_compile.schedules.worker import serve

HOST = Path(__file__).parent / "host"


def program_for(problem: AnyProblem, pass_name: str, tile: GpuTile) -> GpuProgram:
    """The GPU program of an operator's pass."""
    module = {
        ("chunk_attention", "forward"): "attention",
        ("chunk_attention", "backward"): "attention_backward",
        ("chunk_select", "forward"): "select",
        ("chunk_select", "backward"): "select_backward",
        ("sliding_window", "forward"): "window",
    }[problem.op, pass_name]
    return importlib.import_module(f"hsa_compile.ir.programs.gpu.{module}").program(problem, tile)


def _nvcc(target: GpuTarget) -> list[str]:
    include = [f"-I{path}" for path in (TILELANG_TEMPLATE_PATH, CUTLASS_INCLUDE_DIR)]
    return [cuda_compiler(), "-std=c++20", "-O3", "-w", f"-arch={target.arch}", "-cubin", *include]


@functools.cache
def _versions() -> str:
    """Of what a cubin depends on besides its source: nvcc, and the headers that come with TileLang."""
    nvcc = subprocess.run([cuda_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return nvcc + importlib.metadata.version("tilelang")


@dataclass(frozen=True)
class Unit:
    """A source file.

    Args:
        name: of the file, without its suffix.
        source: CUDA C++.
        flags: nvcc's, besides those of the target.
        kernels: its kernels, by launch.
    """

    name: str
    source: str
    flags: tuple[str, ...]
    kernels: dict[str, Lowered]


def _units(program: GpuProgram, kernels: list[Lowered]) -> Iterator[Unit]:
    """Matrix kernels, which tiles change, in files of their own; the others together, as TileLang's headers take nvcc
    longer than they do."""
    together: dict[tuple[str, ...], dict[str, Lowered]] = {}
    for launch, kernel in zip(program.launches, kernels):
        # TileLang leaves it to nvcc to make exponentials single instructions where the program allows it.
        flags: tuple[str, ...] = ("-use_fast_math",) if launch.options.get("tl.enable_fast_math") else ()
        if "/instruction/" in kernel.source:
            yield Unit(launch.symbol, kernel.source, flags, {launch.symbol: kernel})
        else:
            together.setdefault(flags, {})[launch.symbol] = kernel
    for flags, each in together.items():
        yield Unit("_".join(each), "\n".join(kernel.source for kernel in each.values()), flags, each)


def _compile(unit: Unit, directory: Path, target: GpuTarget) -> dict[str, dict[str, int]]:
    """Compiles a unit to a cubin; returns what each of its kernels takes of the machine.

    Cubins are kept by their source: tiles that differ for one launch share the others, and nvcc is most of a build.
    """
    name, options = unit.name, [*_nvcc(target), *unit.flags, "-Xptxas", "-v"]
    (directory / f"{name}.cu").write_text(unit.source)
    key = hashlib.sha256("\0".join([*options, _versions(), unit.source]).encode()).hexdigest()[:24]
    kept = cache_directory() / "cubins" / key
    if not kept.is_dir():
        command = [*options, f"{name}.cu", "-o", f"{name}.cubin"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"nvcc failed on {name}.cu:\n{done.stderr[-3000:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            new = Path(temporary) / "cubin"
            new.mkdir()
            shutil.move(directory / f"{name}.cubin", new / "cubin")
            (new / "ptxas.txt").write_text(done.stderr)
            with contextlib.suppress(OSError):  # another process was first
                new.rename(kept)
    shutil.copy(kept / "cubin", directory / f"{name}.cubin")
    reports = (kept / "ptxas.txt").read_text().split("Compiling entry function '")[1:]
    of_kernel = {report.split("'")[0]: report for report in reports}
    taken = {launch: _resources(of_kernel[kernel.symbol]) for launch, kernel in unit.kernels.items()}
    return {launch: taken[launch] | {"dynamic_shared_bytes": unit.kernels[launch].shared_bytes} for launch in taken}


def _host_source(program: GpuProgram, units: list[Unit], prefix: str, table: str) -> str:
    """C++ of the launchers and the C interface, with the cubins."""
    launches = {launch.symbol: launch for launch in program.launches}
    parts = [HEADERS]
    for number, unit in enumerate(units):
        image = f"{prefix}_image{number}"
        parts.append(image_source(image, f"{unit.name}.cubin"))
        parts += [launcher_source(launches[name], kernel, image) for name, kernel in unit.kernels.items()]
    return "\n".join([*parts, table])


def _resources(report: str) -> dict[str, int]:
    """What ptxas says of a kernel."""
    found = {
        "registers": r"Used (\d+) registers",
        "stack_bytes": r"(\d+) bytes stack frame",
        "spill_bytes": r"(\d+) bytes spill stores",
        "static_shared_bytes": r"(\d+) bytes smem",
    }
    return {key: int(m.group(1)) if (m := re.search(pattern, report)) else 0 for key, pattern in found.items()}


def main(directory: Path, request: dict[str, Any]) -> str:
    problem, target = any_problem_from_dict(request["problem"]), resolve_gpu(request["target"])
    program = program_for(problem, request["pass"], GpuTile(**request["tile"]))
    prefix = f"hsa_{problem.digest}_{request['pass']}"
    kernels = [lower(launch, f"{prefix}_{launch.symbol}", target) for launch in program.launches]
    symbol, table = table_source(program, problem, request["pass"], [kernel.symbol for kernel in kernels])
    units = list(_units(program, kernels))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda unit: _compile(unit, directory, target), units)
        resources = {launch: each for unit in compiled for launch, each in unit.items()}
    (directory / "resources.json").write_text(json.dumps(resources, indent=1) + "\n")
    (directory / "host.cc").write_text(_host_source(program, units, prefix, table))
    compile_host = [cuda_compiler(), "-std=c++20", "-O2", f"-I{HOST}", "-Xcompiler", "-fPIC"]
    for command in (
        [*compile_host, "-c", "host.cc", "-o", "host.o"],
        [*compile_host, "-shared", "-cudart", "static", "host.o", "-o", "kernel.so"],
    ):
        subprocess.run(command, cwd=directory, check=True)
    return symbol


if __name__ == "__main__":
    serve(lambda message: {"symbol": main(Path(message["directory"]), message["request"])})
