"""GPU programs lower, compile without spills, and compute their operator where a CPU emulates the GPU."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulate import EmulatedKernel
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules import build
from hsa_compile.schedules.choice import default_tile
from hsa_compile.schedules.gpu_forward import BLOCK_SHARED, attention_tile
from hsa_compile.schedules.gpu_select import SHARED_MEMORY, select_tile, shared_bytes
from hsa_compile.schedules.target import resolve_any
from inputs import (
    SELECT_KINDS,
    Tensors,
    assert_as_good_as,
    assert_selected,
    attention_by_definition,
    attention_inputs,
    select_gradient_inputs,
    select_gradients,
    select_inputs,
)

NAMES = ("o", "d_q", "d_k", "d_v", "d_w")
SHAPES = ((2, 13, 5), (1, 1, 3), (1, 5, 0))  # B, L, C: no whole tile, one token, no chunk
BF16: Any = {"dtype": "bfloat16"}
PLAIN = ChunkAttention(4, 1, 64, 64, 2, **BF16)
ODD = ChunkAttention(12, 4, 96, 32, 5, off_by_one=True, dtype="float16")
SELECT = ChunkSelect(1, 1, 64, 64, 4, **BF16)
SHARED = ChunkSelect(3, 1, 96, 16, 24, window=96, dtype="float16")
slow = pytest.mark.slow
needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("tilelang") is None or shutil.which("nvcc") is None, reason="needs tilelang and nvcc"
)


def _poison(*like: torch.Tensor) -> Tensors:
    return tuple(torch.full_like(x, torch.nan) for x in like)


def _forward(run: EmulatedKernel, p: ChunkAttention) -> None:
    for seed, (B, L, C) in enumerate(SHAPES):
        inputs = attention_inputs(p, B, L, C, getattr(torch, p.dtype), seed=seed)
        (o,) = _poison(inputs[1])
        run((*inputs[1:], o), B, L, C)
        _judge(p, inputs, (o,), slice(0, 1))


def _backward(run: EmulatedKernel, p: ChunkAttention) -> None:
    for seed, (B, L, C) in enumerate(SHAPES):
        inputs = attention_inputs(p, B, L, C, getattr(torch, p.dtype), seed=seed)
        got = _poison(*inputs[1:4], inputs[5])
        run((*inputs, *got), B, L, C)
        _judge(p, inputs, got, slice(1, 5))


def _judge(p: ChunkAttention, inputs: Tensors, got: Tensors, which: slice) -> None:
    low = attention_by_definition(p, inputs, torch.float32, getattr(torch, p.dtype))
    exact = attention_by_definition(p, inputs, torch.float64)
    assert_as_good_as(NAMES[which], got, low[which], exact[which])


def _select(run: EmulatedKernel, p: ChunkSelect) -> None:
    for (B, L, C), kind in [((2, 70, 90), kind) for kind in SELECT_KINDS] + [((1, 3, 0), "random")]:
        inputs = select_inputs(p, B, L, C, getattr(torch, p.dtype), kind, ragged=True)
        slots = (B, L, p.kv_heads, p.top_k)
        indices, scores = torch.full(slots, -77, dtype=torch.int32), torch.full(slots, torch.nan)
        run((*inputs, indices, scores), B, L, C)
        assert_selected(p, inputs, indices, scores, torch.arange(L), kind in ("ties", "zero"))


def _select_backward(run: EmulatedKernel, p: ChunkSelect) -> None:
    for B, L, C in ((2, 70, 20), (1, 5, 0)):
        inputs = select_gradient_inputs(p, B, L, C, getattr(torch, p.dtype))
        got = _poison(*inputs[1:3])
        run((*inputs, *got), B, L, C)
        low = select_gradients(p, inputs, torch.float32, getattr(torch, p.dtype))
        assert_as_good_as(("d_q_r", "d_landmark"), got, low, select_gradients(p, inputs, torch.float64))


CHECKS = {
    ("chunk_attention", "forward"): _forward,
    ("chunk_attention", "backward"): _backward,
    ("chunk_select", "forward"): _select,
    ("chunk_select", "backward"): _select_backward,
}


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("problem", "pass_name", "arch", "length"),
    [
        (PLAIN, "forward", "sm_90a", None),
        (PLAIN, "backward", "sm_90a", None),
        (SELECT, "forward", "sm_90a", 1),
        (PLAIN, "forward", "sm_80", 1),
        *(
            pytest.param(problem, pass_name, arch, length, marks=slow)
            for problem, pass_name, arch, length in [
                (PLAIN, "forward", "sm_80", None),
                (PLAIN, "backward", "sm_80", None),
                (ODD, "forward", "sm_90a", None),
                (ODD, "forward", "sm_80", None),
                (ODD, "backward", "sm_90a", None),
                (ODD, "backward", "sm_80", None),
                (ODD, "forward", "sm_90a", 1),
                (ChunkAttention(8, 1, 64, 64, 4, **BF16), "forward", "sm_90a", None),
                (ChunkAttention(16, 16, 64, 64, 16, **BF16), "backward", "sm_90a", None),
                (ChunkAttention(4, 1, 64, 256, 2, **BF16), "backward", "sm_90a", None),
                (ChunkAttention(4, 1, 256, 256, 2, **BF16), "backward", "sm_90a", None),
                (SELECT, "backward", "sm_90a", None),
                (SELECT, "forward", "sm_90a", None),
                (SELECT, "forward", "sm_80", 1),
                (SHARED, "forward", "sm_90a", None),
                (SHARED, "backward", "sm_80", None),
            ]
        ),
    ],
    ids=str,
)
def test_a_program_computes_its_operator(
    problem: Problem, pass_name: str, arch: str, length: int | None, tmp_path: Path
) -> None:
    _build_and_check(
        problem, pass_name, arch, default_tile(problem, pass_name, resolve_any(f"cuda:{arch}"), length), tmp_path
    )


def _build_and_check(problem: Problem, pass_name: str, arch: str, tile: Any, path: Path) -> dict[str, dict[str, int]]:
    artifact = build(problem, pass_name, f"cuda:{arch}", tile)
    resources = json.loads((artifact.directory / "resources.json").read_text())
    assert all(kernel["registers"] > 0 for kernel in resources.values())
    # Tiles are picked for Hopper; what they cost elsewhere is not known yet.
    assert arch != "sm_90a" or not any(kernel["spill_bytes"] for kernel in resources.values()), resources
    CHECKS[problem.op, pass_name](EmulatedKernel(artifact, path), problem)  # type: ignore[arg-type]
    return resources


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("problem", "sizes", "registers"),
    [
        (ChunkAttention(16, 1, 64, 64, 4, **BF16), {"tokens": 8, "stages": 2, "blocks": 1, "run": 2}, 168),
        *(
            pytest.param(problem, sizes, registers, marks=slow)
            for problem, sizes, registers in [
                (ChunkAttention(16, 1, 64, 64, 8, **BF16), {"tokens": 16, "stages": 12, "blocks": 1, "run": 4}, 96),
                (ChunkAttention(32, 2, 128, 64, 16, **BF16), {"tokens": 12, "stages": 5, "blocks": 1, "run": 2}, 128),
                (ODD, {"tokens": 42, "stages": 4, "blocks": 1, "run": 2}, 168),
                (PLAIN, {"tokens": 3, "stages": 3, "blocks": 3, "run": 3}, 80),
            ]
        ),
    ],
    ids=str,
)
def test_warpgroups_that_share_chunks_compute_attention(
    problem: ChunkAttention, sizes: dict[str, int], registers: int, tmp_path: Path
) -> None:
    tile = GpuTile(form="warpgroups", **sizes)
    resources = _build_and_check(problem, "forward", "sm_90a", tile, tmp_path)
    # Those that a block starts with are all that its warpgroups can share out anew; with fewer they wait for ever.
    assert resources["attend"]["registers"] == registers


REFUSED = """
import importlib
from hsa_compile.ir import ChunkAttention, ChunkSelect, ProblemError
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.cuda_worker import program_for
half = dict(dtype="float16")
for problem in (
    ChunkAttention(16, 1, 64, 64, 8), ChunkAttention(16, 1, 72, 64, 8, **half), ChunkAttention(16, 1, 64, 8, 8, **half),
    ChunkSelect(1, 1, 64, 64, 4), ChunkSelect(1, 1, 72, 64, 4, **half), ChunkSelect(1, 1, 64, 64, 65, **half),
):
    for pass_name in ("forward", "backward"):
        try:
            program_for(problem, pass_name, GpuTile(tokens=4))
            print(problem.op, pass_name, "serves it")
        except ProblemError as error:
            print(problem.op, pass_name, error)
"""


@needs_gpu_compiler
def test_what_is_not_supported_is_refused_with_what_is() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("chunk_")]
    assert len(lines) == 12, done.stderr[-2000:]
    expected = [
        *["float16"] * 2, *["head_dim"] * 2, *["chunk_size"] * 2,
        *["float16"] * 2, *["multiple of 16"] * 2, *["at most 64"] * 2,
    ]  # fmt: skip
    assert [text for text, line in zip(expected, lines) if text not in line] == [], lines


@pytest.mark.parametrize("heads", [(16, 1), (12, 4), (16, 16), (24, 1), (3, 1)])
@pytest.mark.parametrize("D", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("S", [16, 64, 256])
@pytest.mark.parametrize("K", [1, 64])
def test_tiles_of_attention_fit_the_machine(heads: tuple[int, int], D: int, S: int, K: int) -> None:
    problem = ChunkAttention(*heads, D, S, K, **BF16)
    tile = attention_tile(problem)
    assert tile.tokens * K <= 4096
    if tile.form == "warps":
        warps = -(-tile.tokens * problem.groups // 16)
        assert 1 <= warps < 16 // tile.blocks
        assert tile.blocks * tile.stages * 4 * S * D <= BLOCK_SHARED
        assert tile.stages >= 2
        return
    rows = -(-tile.tokens * problem.groups // 64) * 64
    assert rows <= (192 if tile.form == "warpgroups" else 128)
    if tile.wgmma:
        assert tile.blocks * (rows + 2 * tile.stages * S) * D * 2 <= BLOCK_SHARED
        assert tile.stages >= 2


def test_few_tokens_have_forms_of_their_own() -> None:
    forms = {length: attention_tile(PLAIN, length=length).form for length in (1, 4, 16, 4096, None)}
    assert forms == {1: "token", 4: "token", 16: "warps", 4096: "warps", None: "warps"}
    assert attention_tile(ChunkAttention(16, 1, 64, 64, 8, **BF16)).form == "rows"
    assert select_tile(SELECT, "sm_90a", length=1).tokens == 16
    assert select_tile(SELECT, "sm_90a").tokens == 128


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_tiles_of_selection_fit_shared_memory(arch: str) -> None:
    for retrieval_dim, top_k, length in itertools.product(range(16, 1025, 16), (1, 16, 64), (1, None)):
        problem = ChunkSelect(1, 1, retrieval_dim, 64, top_k, **BF16)
        tile = select_tile(problem, arch, length=length)
        assert shared_bytes(problem, tile) <= SHARED_MEMORY[arch][1], (retrieval_dim, top_k, length)
        assert shared_bytes(problem, tile) * tile.blocks <= SHARED_MEMORY[arch][0], (retrieval_dim, top_k, length)
