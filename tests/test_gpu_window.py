"""The sliding window's GPU program, where a CPU emulates the GPU: its forms against the reference."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulate import EmulatedKernel
from export_kit import naive_kernel, problem_session, select_inputs
from hsa_compile.export.library import build_library
from hsa_compile.ir import ChunkSelect, SlidingWindow, reference
from hsa_compile.ir.programs import GpuTile
from hsa_compile.kernels import deployed
from hsa_compile.schedules import build
from hsa_compile.schedules.gpu_forward import BLOCK_SHARED, RESERVED_SHARED
from hsa_compile.schedules.gpu_window import window_tile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tilelang") is None or shutil.which("nvcc") is None, reason="needs tilelang and nvcc"
)
TOLERANCE = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 5e-6}
# B, L, position, lengths: below, at and above the window, far away, tokens that do not count, an empty segment.
CALLS = (
    (2, 1, (0, 5), (1, 1)),
    (2, 3, (70, 2**33), (3, 1)),
    (2, 40, (2**25 + 1, 9), (40, 17)),
    (1, 150, (0,), (150,)),
    (2, 130, (1000, 64), (0, 129)),
    (1, 0, (77,), (0,)),
)


def check(run: EmulatedKernel, p: SlidingWindow, in_place: bool) -> None:
    dtype, W = getattr(torch, p.dtype), p.window
    for B, L, position, lengths in CALLS:
        g = torch.Generator().manual_seed(L)
        shapes = (B, L, p.q_heads), (B, L, p.kv_heads), (B, L, p.kv_heads), (B, W, p.kv_heads), (B, W, p.kv_heads)
        tensors = [torch.randn(*shape, p.head_dim, generator=g).to(dtype) for shape in shapes]
        for b in range(B):  # nobody looks at slots without a key, nor at keys and values of tokens that do not count
            for ring in tensors[3:]:
                ring[b, position[b] :] = torch.nan
            for fresh in tensors[1:3]:
                fresh[b, lengths[b] :] = torch.nan
        counts = torch.tensor(position), torch.tensor(lengths)
        want = reference.sliding_window(p, *(x.double().numpy() for x in tensors), *(x.numpy() for x in counts))
        o = torch.full_like(tensors[0], torch.nan)
        present = tensors[3:] if in_place else [torch.full_like(x, 7) for x in tensors[3:]]
        run((*tensors, *counts, o, *present), B, L, min(L, W) if in_place else W)
        assert bool(o.isfinite().all())
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(o[b, :length].double(), want[0][b, :length], atol=TOLERANCE[p.dtype], rtol=0)
        for got, expected in zip(present, want[1:]):
            np.testing.assert_array_equal(got.double(), expected)


SMALL, ODD = SlidingWindow(4, 2, 16, 70, "bfloat16"), SlidingWindow(3, 1, 96, 64, "float16")
slow = pytest.mark.slow


def built(problem: SlidingWindow, tile: GpuTile, arch: str, path: Path) -> EmulatedKernel:
    artifact = build(problem, target=f"cuda:{arch}", tile=tile)
    resources = json.loads((artifact.directory / "resources.json").read_text())
    # By warpgroups a tile may put aside what it needs again after its blocks.
    most = 128 if tile.form == "warpgroups" else 0
    assert arch != "sm_90a" or all(kernel["spill_bytes"] <= most for kernel in resources.values()), resources
    threads = -(-tile.tokens * problem.groups // 64) * 128 + 128
    if tile.form == "warpgroups" and tile.blocks * threads > 256:
        # Those that a block starts with are all that its warpgroups can share out anew; with fewer they wait for ever.
        assert resources["attend"]["registers"] == 65536 // (tile.blocks * threads) // 8 * 8
    return EmulatedKernel(artifact, path)


@pytest.mark.parametrize(
    ("problem", "arch", "length", "form"),
    [
        (SMALL, "sm_90a", 1, "token"),
        (SMALL, "sm_90a", None, "warpgroups"),
        (SMALL, "sm_80", None, "rows"),
        *(
            pytest.param(problem, arch, length, form, marks=slow)
            for problem, arch, length, form in [
                (ODD, "sm_90a", 1, "token"),
                (ODD, "sm_90a", None, "warpgroups"),
                (ODD, "sm_80", None, "rows"),
                (SlidingWindow(2, 2, 64, 512, "float16"), "sm_90a", None, "warpgroups"),
                (SlidingWindow(16, 2, 64, 512, "bfloat16"), "sm_90a", None, "warpgroups"),
                (SlidingWindow(8, 1, 128, 130, "bfloat16"), "sm_90a", None, "warpgroups"),
                (SlidingWindow(4, 4, 256, 70, "bfloat16"), "sm_90a", None, "warpgroups"),
                (SlidingWindow(5, 1, 80, 100, "float16"), "sm_90a", None, "warpgroups"),
                (SlidingWindow(2, 1, 64, 1, "float16"), "sm_90a", None, "warpgroups"),
            ]
        ),
    ],
    ids=str,
)
def test_windows_are_computed(problem: SlidingWindow, arch: str, length: int | None, form: str, tmp_path: Path) -> None:
    tile = window_tile(problem, arch, length)
    assert tile.form == form
    run = built(problem, tile, arch, tmp_path)
    for in_place in (False, True):
        check(run, problem, in_place)


@pytest.mark.parametrize(
    ("problem", "sizes"),
    [
        # 33 blocks a head take 38 tiles; of keys, several blocks meet every kind of slots.
        (SMALL, {"tokens": 4, "stages": 2, "slots": 16}),
        # Warps of which some rows see nothing of a block.
        (SMALL, {"tokens": 64, "stages": 2, "slots": 16}),
        pytest.param(SMALL, {"tokens": 128, "stages": 3, "slots": 48}, marks=slow),  # four warpgroups
        pytest.param(SMALL, {"tokens": 60, "stages": 2, "slots": 64, "blocks": 2}, marks=slow),  # rows of no token
        pytest.param(ODD, {"tokens": 42, "stages": 2, "slots": 112}, marks=slow),  # more keys than the ring has
    ],
    ids=str,
)
def test_warpgroups_that_share_keys_compute_windows(
    problem: SlidingWindow, sizes: dict[str, int], tmp_path: Path
) -> None:
    run = built(problem, GpuTile(form="warpgroups", **{"blocks": 1, **sizes}), "sm_90a", tmp_path)
    check(run, problem, in_place=True)


@pytest.mark.parametrize("heads", [(16, 2), (16, 16), (3, 1), (7, 1), (128, 1), (192, 1), (193, 1), (512, 1)])
@pytest.mark.parametrize("D", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("W", [1, 70, 512, 4096])
def test_tiles_of_windows_fit_the_machine(heads: tuple[int, int], D: int, W: int) -> None:
    problem = SlidingWindow(*heads, D, W, "bfloat16")
    assert window_tile(problem, "sm_80").form == "rows"
    tile = window_tile(problem)
    assert tile.form == ("warpgroups" if problem.groups <= (192 if D <= 128 else 128) else "rows")
    if tile.form == "warpgroups":
        rows = -(-tile.tokens * problem.groups // 64) * 64
        assert rows <= 192
        assert tile.stages >= 2
        assert (rows + 2 * tile.stages * tile.slots) * D * 2 <= BLOCK_SHARED - RESERVED_SHARED


def test_a_library_with_gpu_kernels_serves_cpus_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HSA_COMPILE_SCHEDULE", raising=False)
    on_gpu, on_cpu = SlidingWindow(4, 2, 16, 70, "bfloat16"), ChunkSelect(2, 2, 3, 4, 3)
    odd = SlidingWindow(4, 2, 20, 70, "bfloat16")  # no matrix instruction takes its width: a plain kernel does
    served = list(deployed([on_gpu, odd], ["cuda:sm_90a"]))
    assert {(one.kernel.problem, one.length) for one in served} == {(on_gpu, 0), (on_gpu, 16)}
    library = build_library([*served, naive_kernel(on_cpu, tmp_path)], tmp_path / "lib.so")
    x = select_inputs(on_cpu, 2, 3, 4, 0)
    problem_session(on_cpu, library).run(None, x)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        problem_session(on_gpu, library)
