"""The sliding window's GPU program, where a CPU emulates the GPU: both forms against the reference."""

from __future__ import annotations

import importlib.util
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
from hsa_compile.kernels import deployed
from hsa_compile.schedules import build
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


@pytest.mark.parametrize("length", [1, None], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(SlidingWindow(4, 2, 16, 70, "bfloat16"), id="G2-D16"),
        pytest.param(SlidingWindow(3, 1, 96, 64, "float16"), id="G3-D96", marks=pytest.mark.slow),
    ],
)
def test_windows_are_computed(problem: SlidingWindow, length: int | None, tmp_path: Path) -> None:
    tile = window_tile(problem, length=length)
    assert (tile.form == "token") == (length == 1)
    run = EmulatedKernel(build(problem, target="cuda:sm_90a", tile=tile), tmp_path)
    for in_place in (False, True):
        check(run, problem, in_place)


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
