"""Fused passes: their numbers in Triton's interpreter, every program through the compiler, and when they serve."""

import pytest
import torch

from hsa_compile import dispatch
from hsa_compile.model import fused
from triton_kit import SHARED_MEMORY, Launches, needs_triton, not_interpreted, passes_in_the_interpreter


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    passes_in_the_interpreter("fused_interpreter.py")


def _run_all(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 96, 20, 64, dtype=dtype, requires_grad=True)
    q = x[:, :, :16]
    cos = torch.zeros(96, 1, 32)
    y = fused.rotate(fused.rms_norm(q, torch.ones(64, requires_grad=True), 1e-6), cos, cos)
    wide, weight = x.flatten(2).float(), torch.ones(1280, requires_grad=True)
    total, normed = fused.add_norm(wide, x.flatten(2), weight, 1e-6)
    z = fused.gated((total + normed).to(dtype))
    loss = fused.cross_entropy(z.flatten(0, 1), torch.zeros(192, dtype=torch.int64))
    (y.sum() + loss.sum()).backward()


@needs_triton
@not_interpreted
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_program_compiles(dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch, capability)
    _run_all(dtype)
    assert len(launches.compiled) == 7
    for kernel in launches.compiled.values():
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]


@not_interpreted
def test_cpus_and_small_tensors_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = torch.empty(fused.LEAST), torch.empty(fused.LEAST - 1)
    assert not fused.serves(large)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(dispatch, "triton_lacks", lambda x: "")
    assert fused.serves(large)
    assert not fused.serves(small)
    with dispatch.use_backend("eager"):
        assert not fused.serves(large)
    monkeypatch.setattr(dispatch, "triton_lacks", lambda x: "there is none")
    assert not fused.serves(large)
