"""Windows by FlashAttention: what surrounds the kernels, which run on GPUs alone (tests/gpu)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hsa_compile.model import flash
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.flash import FlashWindow, fits
from hsa_compile.model.layers import SlidingWindow, attend

CPU = torch.device("cpu")
SMALL = ModelConfig(swa_heads=4, swa_kv_heads=2, swa_head_dim=8, window=5)


def masked(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    """What ``attend_window`` says it does."""
    L, T = q_BLHD.shape[1], k_BTHD.shape[1]
    i, j = torch.arange(T - L, T)[:, None], torch.arange(T)
    return attend(q_BLHD, k_BTHD, v_BTHD, (i >= j) & (i - j < window))


@pytest.mark.parametrize(("ring", "length"), [(0, 1), (0, 3), (4, 1), (2, 7), (4, 8), (0, 16), (4, 33)])
def test_a_segment_equals_blocks(monkeypatch: pytest.MonkeyPatch, ring: int, length: int) -> None:
    monkeypatch.setattr(flash, "attend_window", masked)
    g = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, 4, 8, generator=g, requires_grad=True)
    k, v = (torch.randn(2, ring + length, 2, 8, generator=g, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, length, 4, 8, generator=g)
    ours, blocks = FlashWindow(SMALL, ring, length, CPU), SlidingWindow(SMALL, ring, length, CPU)
    got, want = (span.attend(q, k, v) for span in (ours, blocks))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (got, want))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours.kept(k, v), blocks.kept(k, v)))


def test_kernels_are_for_gpus_and_half_precision() -> None:
    assert not fits(SMALL, CPU, torch.bfloat16)
    assert not fits(SMALL, torch.device("cuda"), torch.float32)
    assert not fits(ModelConfig(swa_head_dim=12), torch.device("cuda"), torch.bfloat16)
