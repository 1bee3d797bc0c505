"""The GPU backward's programs lower and compile without a GPU; ``tests/gpu/check_backward.py`` runs them on one."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parent / "gpu" / "build_backward.py"
pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="tilelang is not installed"),
]
REFUSED = """
from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu import attention_backward
for sizes, dtype in (((16, 1, 64, 64, 8), "float32"), ((16, 1, 64, 40, 8), "float16"), ((16, 1, 40, 64, 8), "float16")):
    try:
        attention_backward.program(ChunkAttention(*sizes, dtype=dtype), GpuTile())
    except ProblemError as error:
        print(error)
"""


def _worker(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_tuned_program_compiles_without_spills(tmp_path: Path) -> None:
    report = _worker(str(BUILD), str(tmp_path), "g16-k8")
    assert "query_pass" in report
    assert "SPILLS" not in report
    elements = ctypes.CDLL(str(tmp_path / "g16-k8.so")).elements
    elements.argtypes, elements.restype = [ctypes.c_int] + [ctypes.c_int64] * 3, ctypes.c_int64
    for region in range(11):
        once, twice = elements(region, 1, 1 << 20, 1 << 14), elements(region, 1, 1 << 21, 1 << 15)
        assert 0 < twice <= 2 * once + 4096, "scratch must be linear in L"


def test_what_is_not_supported_is_refused_with_what_is() -> None:
    lines = _worker("-c", REFUSED).splitlines()
    assert ["float16 and bfloat16" in lines[0], "chunk_size" in lines[1], "head_dim" in lines[2]] == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["g16-d128", "g1", "g3-d96-s48", "s256", "d256"])
def test_other_programs_compile(case: str, tmp_path: Path) -> None:
    assert "memory_pass" in _worker(str(BUILD), str(tmp_path), case)
