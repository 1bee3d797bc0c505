"""The operator library's CUDA side without a GPU: ONNX Runtime's CPU provider plays the part of the CUDA provider, and
kernels that write who they are play the kernels'."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export_kit import NaiveKernel, attention_inputs, problem_session
from hsa_compile.export.library import Served, kernel_table
from hsa_compile.ir import AnyProblem, ChunkAttention

PROBLEM = ChunkAttention(4, 2, 16, 8, 3)
FAILING = dataclasses.replace(PROBLEM, head_dim=8)
FEW, MANY, PLAIN = 3.0, 4.0, 5.0  # what the kernels write
MANY_TOKENS = 16
HERE = 90, 100  # compute capabilities of a machine that runs the kernels, and of one that does not

# A kernel writes its number to all of o. Its scratch is written to the end, and must be aligned.
KERNEL = """
#include <stdint.h>
#include "cuda_kernel.h"
static int64_t scratch_bytes(const int64_t* dims) { return 1000 * dims[1]; }
static int32_t run(void* const* tensors, const int64_t* dims, void* scratch, void* stream) {
  if (FAILS || (uintptr_t)scratch % 256) return 7;
  for (int64_t i = 0; i < 1000 * dims[1]; ++i) ((char*)scratch)[i] = 1;
  for (int64_t i = 0; i < dims[0] * dims[1] * WIDTH; ++i) ((float*)tensors[5])[i] = NUMBER;
  return 0;
}
static const char* message(int32_t error) { return error == 7 ? "seven" : "another"; }
const hsa_cuda_kernel SYMBOL = {HSA_CUDA_KERNEL_ABI, "", "forward", 6, scratch_bytes, run, message};
"""
GPU = """
#include <string.h>
#include "library.h"
int32_t hsa_plain_run(int32_t op, int32_t dtype, const int64_t* statics, float scale, void* const* tensors,
                      const int64_t* dims, void* stream) {
  for (int64_t i = 0; i < dims[0] * dims[1] * statics[0] * statics[2]; ++i) ((float*)tensors[5])[i] = 5;
  return op != HSA_CHUNK_ATTENTION;
}
int32_t hsa_gpu_sample(void* const* tensors, const int64_t* dims, void* stream) { return 1; }
int32_t hsa_gpu_capability(int32_t* capability) { *capability = CAPABILITY; return 0; }
int32_t hsa_gpu_fill(void* data, int32_t byte, int64_t bytes, void* stream) { memset(data, byte, bytes); return 0; }
const char* hsa_gpu_message(int32_t error) { return "an error of CUDA's"; }
"""
NATIVE, HOST = (Path(str(resources.files(f"hsa_compile.{name}"))) for name in ("export.native", "schedules.host"))


def _compile(compiler: str, source: Path, *flags: str) -> Path:
    built = source.with_suffix(".o")
    include = [f"-I{NATIVE}", f"-I{HOST}"]
    subprocess.run([compiler, "-O1", "-fPIC", *include, *flags, "-c", str(source), "-o", str(built)], check=True)
    return built


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The library for a GPU of that compute capability."""
    directory = tmp_path_factory.mktemp("cuda")
    served, objects = [], []
    kernels: list[tuple[AnyProblem, float, int]] = [(PROBLEM, FEW, 0), (PROBLEM, MANY, MANY_TOKENS), (FAILING, 0.0, 0)]
    for i, (problem, number, length) in enumerate(kernels):
        source = directory / f"kernel{i}.c"
        symbol, fails, width = f"hsa_served_{i}", int(problem is FAILING), PROBLEM.q_heads * PROBLEM.head_dim
        lines = {"SYMBOL": symbol, "NUMBER": number, "FAILS": fails, "WIDTH": width}
        source.write_text("".join(f"#define {name} {value}\n" for name, value in lines.items()) + KERNEL)
        objects.append(_compile("cc", source))
        served.append(Served(NaiveKernel(problem, [objects[-1]], symbol, "cuda:sm_90a"), length))
    # The table names kernels by their order in it.
    served.sort(key=lambda one: -one.length)
    for i, one in enumerate(served):
        renamed = directory / f"renamed{i}.o"
        change = f"{one.kernel.symbol}=hsa_served_{i}"
        subprocess.run(["objcopy", "--redefine-sym", change, str(one.kernel.objects[0]), str(renamed)], check=True)
    (directory / "table.c").write_text(kernel_table(served))
    (directory / "gpu.c").write_text(GPU)
    objects = [directory / f"renamed{i}.o" for i in range(len(served))] + [_compile("cc", directory / "table.c")]
    (directory / "execute.c").write_text((HOST / "execute.c").read_text())
    objects.append(_compile("cc", directory / "execute.c"))
    for name in ("hsa_ops.cc", "cpu.cc", "cuda.cc"):
        (directory / name).write_text((NATIVE / name).read_text())
        flags = ("-std=c++17", "-DHSA_CUDA", "-DHSA_CUDA_PROVIDER=nullptr")
        objects.append(_compile("c++", directory / name, *flags))

    def of(capability: int) -> Path:
        gpu = _compile("cc", directory / "gpu.c", f"-DCAPABILITY={capability}")
        built = directory / f"lib{capability}.so"
        subprocess.run(["c++", "-shared", *map(str, objects), str(gpu), "-o", str(built)], check=True)
        return built

    return of


def outcome(problem: ChunkAttention, library: Path, L: int, C: int = 4) -> set[float]:
    x: dict[str, Any] = attention_inputs(problem, 2, L, C, 0)
    (o,) = problem_session(problem, library).run(None, x)
    return set(np.unique(o))


def test_the_kernel_for_the_length_runs_with_its_scratch(library: Callable[[int], Path]) -> None:
    built = library(HERE[0])
    assert [outcome(PROBLEM, built, L) for L in (1, 15, 16, 300)] == [{FEW}, {FEW}, {MANY}, {MANY}]


def test_plain_kernels_serve_what_none_was_compiled_for(library: Callable[[int], Path]) -> None:
    built = library(HERE[0])
    for changed in ({"top_k": 2}, {"head_dim": 20}, {"logit_scale": 0.5}, {"off_by_one": True}):
        assert outcome(dataclasses.replace(PROBLEM, **changed), built, 3) == {PLAIN}  # type: ignore[arg-type]


def test_an_empty_memory_needs_no_kernel(library: Callable[[int], Path]) -> None:
    assert outcome(PROBLEM, library(HERE[0]), 5, C=0) == {0.0}


def test_errors_of_kernels_are_reported(library: Callable[[int], Path]) -> None:
    with pytest.raises(Exception, match=r"head_dim=8 .*float32: seven"):
        outcome(FAILING, library(HERE[0]), 3)


def test_other_gpus_are_named(library: Callable[[int], Path]) -> None:
    with pytest.raises(Exception, match=r"compute capability 10\.0, and the library was built for cuda:sm_90a"):
        outcome(PROBLEM, library(HERE[1]), 3)
