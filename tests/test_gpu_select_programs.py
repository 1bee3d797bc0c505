"""The GPU programs of chunk selection lower and compile, in processes of their own, where TileLang and nvcc are."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsa_compile.ir import ChunkSelect
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_select import SHARED_MEMORY, select_tile, shared_bytes

BUILD = Path(__file__).parent / "gpu" / "tilelang_build.py"
NARROW = ChunkSelect(2, 2, 64, 64, 16, dtype="bfloat16")
needs_nvcc = pytest.mark.skipif(
    not shutil.which("nvcc") or not importlib.util.find_spec("tilelang"), reason="nvcc or TileLang is missing"
)


def compile_program(problem: ChunkSelect, tile: GpuTile, module: str, arch: str, directory: Path) -> str:
    request = {"problem": problem.to_dict(), "tile": vars(tile), "module": module, "archs": [arch]}
    done = subprocess.run(
        [sys.executable, str(BUILD), json.dumps(request), str(directory)], capture_output=True, text=True,
        env=os.environ | {"TILELANG_PRINT_ON_COMPILATION": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_nvcc
@pytest.mark.parametrize(
    ("arch", "module", "pass_name", "decode"),
    [("sm_90a", "select", "forward", False), pytest.param("sm_80", "select", "forward", True, marks=pytest.mark.slow)],
)
def test_forward_compiles_without_spills(arch: str, module: str, pass_name: str, decode: bool, tmp_path: Path) -> None:
    report = compile_program(NARROW, select_tile(NARROW, arch, pass_name, decode), module, arch, tmp_path)
    assert "bytes spill stores" in report
    assert all(part.startswith("0 bytes") for part in report.split(": ")[1:]), report


@needs_nvcc
@pytest.mark.slow
def test_backward_compiles(tmp_path: Path) -> None:
    report = compile_program(NARROW, select_tile(NARROW, "sm_80", "backward"), "select_backward", "sm_80", tmp_path)
    assert report.count("registers") == 8


@needs_nvcc
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("dtype", "float32", "bfloat16 or float16"), ("retrieval_dim", 72, "multiple of 16"), ("top_k", 65, "at most 64")],
)
def test_refuses_what_it_does_not_serve(field: str, value: object, says: str, tmp_path: Path) -> None:
    problem = ChunkSelect(**{**vars(NARROW), field: value})
    request = {"problem": problem.to_dict(), "tile": vars(GpuTile(tokens=64)), "module": "select", "archs": ["sm_80"]}
    done = subprocess.run(
        [sys.executable, str(BUILD), json.dumps(request), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ProblemError" in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_tiles_fit_shared_memory(arch: str) -> None:
    for retrieval_dim, top_k, decode in itertools.product(range(16, 1025, 16), (1, 16, 64), (False, True)):
        problem = ChunkSelect(1, 1, retrieval_dim, 64, top_k, dtype="bfloat16")
        tile = select_tile(problem, arch, decode=decode)
        assert shared_bytes(problem, tile) <= SHARED_MEMORY[arch][1], (retrieval_dim, top_k, decode)
        assert shared_bytes(problem, tile) * tile.blocks <= SHARED_MEMORY[arch][0], (retrieval_dim, top_k, decode)
