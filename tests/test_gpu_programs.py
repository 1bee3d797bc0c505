"""The GPU programs of the forward lower and compile without a GPU; what they compute is checked by tests/gpu."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsa_compile.ir import ChunkAttention
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_forward import BLOCK_SHARED, attention_tile

GPU = Path(__file__).parent / "gpu"
# TileLang cannot live in a process with Apache TVM, which other tests import: compile in a process of its own.
WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from standalone import lower, nvcc
from hsa_compile.ir import problem_from_dict
from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu import attention, decode
request = json.load(sys.stdin)
problem, tile = problem_from_dict(request["problem"]), GpuTile(**request["tile"])
for launch in {"attention": attention, "decode": decode}[request["module"]].program(problem, tile).launches:
    source = Path(launch.symbol + ".cu")
    source.write_text(lower(launch, request["arch"])[0])
    report = nvcc(source, source.with_suffix(".cubin"), request["arch"], True, "-cubin")
    print(json.dumps({"symbol": launch.symbol, "instructions": "wgmma" in source.read_text(), **report}))
"""
needs_nvcc = pytest.mark.skipif(
    importlib.util.find_spec("tilelang") is None or shutil.which("nvcc") is None, reason="needs tilelang and nvcc"
)
TUNED = ChunkAttention(16, 1, 64, 64, 8, dtype="bfloat16")
ODD = ChunkAttention(12, 4, 96, 32, 5, off_by_one=True, dtype="float16")


def compiled(directory: Path, problem: ChunkAttention, tile: GpuTile, module: str, arch: str) -> dict[str, dict]:
    request = {"problem": problem.to_dict(), "tile": vars(tile), "module": module, "arch": arch}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(GPU)],
        input=json.dumps(request),
        cwd=directory,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {r["symbol"]: r for r in reports}


@needs_nvcc
@pytest.mark.parametrize(
    ("problem", "module", "arch"),
    [
        (TUNED, "attention", "sm_90a"),
        (ODD, "decode", "sm_80"),
        pytest.param(ODD, "attention", "sm_90a", marks=pytest.mark.slow),
        pytest.param(ODD, "attention", "sm_80", marks=pytest.mark.slow),
        pytest.param(TUNED, "attention", "sm_80", marks=pytest.mark.slow),
        pytest.param(TUNED, "decode", "sm_90a", marks=pytest.mark.slow),
        *(
            pytest.param(ChunkAttention(*sizes, dtype="bfloat16"), "attention", "sm_90a", marks=pytest.mark.slow)
            for sizes in ((16, 1, 64, 64, 16), (32, 2, 128, 64, 16), (16, 16, 64, 64, 16), (24, 1, 80, 16, 64))
        ),
    ],
)
def test_compiles_without_spills(tmp_path: Path, problem: ChunkAttention, module: str, arch: str) -> None:
    tile = attention_tile(problem, arch)
    reports = compiled(tmp_path, problem, tile, module, arch)
    assert set(reports) == ({"unite", "attend"} if module == "attention" else {"attend", "add"})
    assert all(r["spills"] == 0 for r in reports.values()), reports
    assert reports["attend"]["instructions"] == (module == "attention" and arch == "sm_90a")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")
@pytest.mark.parametrize("name", ["check-g16", "check-g3d96", "mma-g24d80s16", "decode-g3d96"])
def test_computes_the_operator_when_emulated(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(GPU / "check_forward.py"), "emulate", str(tmp_path), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("heads", [(16, 1), (12, 4), (16, 16), (24, 1), (3, 1)])
@pytest.mark.parametrize("D", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("S", [16, 64, 256])
@pytest.mark.parametrize("K", [1, 64])
def test_tiles_fit_the_machine(heads: tuple[int, int], D: int, S: int, K: int) -> None:
    problem = ChunkAttention(*heads, D, S, K, dtype="bfloat16")
    tile = attention_tile(problem)
    rows = -(-tile.tokens * problem.groups // 64) * 64
    assert tile.tokens * K <= 4096
    assert rows <= 128
    if tile.wgmma:
        assert tile.blocks * (rows + 2 * tile.stages * S) * D * 2 <= BLOCK_SHARED
        assert tile.stages >= 2


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
