"""The GPU programs of the forward lower and compile without a GPU; what they compute is checked by tests/gpu."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from hsa_compile.ir import ChunkAttention
from hsa_compile.schedules import build
from hsa_compile.schedules.gpu_forward import BLOCK_SHARED, attention_tile

needs_nvcc = pytest.mark.skipif(
    importlib.util.find_spec("tilelang") is None or shutil.which("nvcc") is None, reason="needs tilelang and nvcc"
)
TUNED = ChunkAttention(16, 1, 64, 64, 8, dtype="bfloat16")
ODD = ChunkAttention(12, 4, 96, 32, 5, off_by_one=True, dtype="float16")


@needs_nvcc
@pytest.mark.parametrize(
    ("problem", "length", "arch", "form"),
    [
        (TUNED, None, "sm_90a", "rows"),
        (ODD, 1, "sm_80", "token"),
        pytest.param(ODD, None, "sm_90a", "warps", marks=pytest.mark.slow),
        pytest.param(ODD, None, "sm_80", "rows", marks=pytest.mark.slow),
        pytest.param(TUNED, None, "sm_80", "rows", marks=pytest.mark.slow),
        pytest.param(TUNED, 1, "sm_90a", "token", marks=pytest.mark.slow),
        *(
            pytest.param(ChunkAttention(*sizes, dtype="bfloat16"), None, "sm_90a", form, marks=pytest.mark.slow)
            for *sizes, form in (
                (16, 1, 64, 64, 16, "rows"),
                (32, 2, 128, 64, 16, "rows"),
                (16, 16, 64, 64, 16, "warps"),
            )
        ),
    ],
)
def test_compiles_without_spills(problem: ChunkAttention, length: int | None, arch: str, form: str) -> None:
    tile = attention_tile(problem, arch, length)
    assert tile.form == form
    artifact = build(problem, "forward", f"cuda:{arch}", tile)
    reports = json.loads((artifact.directory / "resources.json").read_text())
    assert set(reports) == ({"attend", "add"} if form == "token" else {"unite", "attend"})
    assert all(r["spill_bytes"] == 0 for r in reports.values()), reports
    source = (artifact.directory / "attend.cu").read_text()
    assert ("wgmma_ss" in source) == (form == "rows" and arch == "sm_90a")


@pytest.mark.parametrize("heads", [(16, 1), (12, 4), (16, 16), (24, 1), (3, 1)])
@pytest.mark.parametrize("D", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("S", [16, 64, 256])
@pytest.mark.parametrize("K", [1, 64])
def test_tiles_fit_the_machine(heads: tuple[int, int], D: int, S: int, K: int) -> None:
    problem = ChunkAttention(*heads, D, S, K, dtype="bfloat16")
    tile = attention_tile(problem)
    assert tile.tokens * K <= 4096
    if tile.form == "warps":
        warps = -(-tile.tokens * problem.groups // 16)
        assert 1 <= warps < 16 // tile.blocks
        assert tile.blocks * tile.stages * 4 * S * D <= BLOCK_SHARED
        assert tile.stages >= 2
        return
    rows = -(-tile.tokens * problem.groups // 64) * 64
    assert rows <= 128
    if tile.wgmma:
        assert tile.blocks * (rows + 2 * tile.stages * S) * D * 2 <= BLOCK_SHARED
        assert tile.stages >= 2


def test_few_tokens_have_a_form_of_their_own() -> None:
    forms = {length: attention_tile(TUNED, length=length).form for length in (1, 4, 16, 4096, None)}
    assert forms == {1: "token", 4: "token", 16: "rows", 4096: "rows", None: "rows"}


@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float32"}, "float16 or bfloat16"),
        ({"head_dim": 72}, "head_dim to be a multiple of 16"),
        ({"chunk_size": 8}, "chunk_size to be a multiple of 16"),
    ],
)
def test_says_what_is_supported(changes: dict[str, object], says: str) -> None:
    # TileLang cannot live in a process with Apache TVM, which other tests import.
    code = f"""
from hsa_compile.ir import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu import attention
try:
    attention.program(ChunkAttention(**{ ({**vars(TUNED), **changes})!r}), GpuTile(tokens=4))
except ProblemError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert says in done.stdout, done.stderr[-1000:]
