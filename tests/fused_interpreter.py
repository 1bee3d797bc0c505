"""Numbers of the fused passes, on CPU tensors through Triton's interpreter.

Not collected with the other tests: TRITON_INTERPRET must be set before Triton is imported, so ``test_fused.py`` runs
this file in a process of its own. Half precision is float16 here, for the interpreter can't take bfloat16.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.model import fused
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import RmsNorm, SwiGlu, rotate, rotations
from hsa_compile.model.model import HsaModel, sequence_loss


@pytest.fixture(autouse=True)
def _fused(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "LEAST", 0)
    monkeypatch.setattr(fused, "_PROGRAMS", 3)
    with dispatch.use_backend("triton"):
        yield


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """The fused result and its gradients against the composed ones in float64; both repeat to the bit."""
    given = [x.detach().requires_grad_() for x in inputs]
    y = run(*given)
    grad = _random(*y.shape, seed=9)
    got = [y, *torch.autograd.grad(y, given, grad.to(y.dtype))]
    again = run(*given)
    for a, b in zip(got, [again, *torch.autograd.grad(again, given, grad.to(y.dtype))]):
        assert torch.equal(a, b)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with dispatch.use_backend("eager"):
        y = run(*wide)
        want = [y, *torch.autograd.grad(y, wide, grad.double())]
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.shape == b.shape
        off = float((a - b).detach().norm() / b.detach().norm())
        assert off <= tolerance, f"{i}: off by {off:.2g}"


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(70, 24), (2, 3, 5), (1, 3), (2, 40, 3, 8), (1, 2100, 2)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(RmsNorm(shape[-1], eps=1e-6), {"weight": weight}, (x,))

    _check(run, (_random(*shape, dtype=dtype), 1 + _random(shape[-1], seed=1)), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.float32,) * 2, (torch.float32, torch.float16), (torch.float16,) * 2]
)
@pytest.mark.parametrize("read", ["both", "sum", "norm"])
def test_norm_after_an_addition(read: str, dtype: torch.dtype, half: torch.dtype) -> None:
    def run(x: Tensor, added: Tensor, weight: Tensor) -> Tensor:
        norm = RmsNorm(24, eps=1e-6)
        del norm.weight
        norm.weight = weight  # a tensor that gradients are asked of, in place of a parameter
        total, normed = norm.after(x, added)
        return {"both": total + 2 * normed, "sum": total + weight.sum(), "norm": normed}[read]

    inputs = (_random(2, 35, 24, dtype=dtype), _random(2, 35, 24, dtype=half, seed=2), 1 + _random(24, seed=1))
    _check(run, inputs, TOLERANCE[half])


def test_norm_and_rotation_of_heads_within_a_projection() -> None:
    """Queries and keys are strided parts of what was projected."""
    norm, cos_sin = RmsNorm(8, eps=1e-6), rotations(6, 8, 100.0, torch.device("cpu"))

    def run(x: Tensor) -> Tensor:
        q, k, _ = x.split((3, 1, 1), dim=2)
        q, k = (rotate(norm.to(x.dtype)(y), *(t.to(x.dtype) for t in cos_sin)) for y in (q, k))
        return torch.cat((q, rotate(k, *cos_sin)), dim=2)

    _check(run, (_random(2, 6, 5, 8),), 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 5, 3, 6), (1, 900, 2, 8), (3, 1, 1, 2)])
def test_rotation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cos_sin = rotations(shape[1], shape[3], 10.0, torch.device("cpu"), torch.float64)
    _check(lambda x: rotate(x, *cos_sin), (_random(*shape, dtype=dtype),), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inner", [1, 48, 1100])
def test_gate(inner: int, dtype: torch.dtype) -> None:
    mlp = SwiGlu(4, inner)
    torch.nn.init.normal_(mlp.gate_up.weight)

    def run(x: Tensor) -> Tensor:
        weights = {name: p.detach().to(x.dtype) for name, p in mlp.named_parameters()}
        return torch.func.functional_call(mlp, weights, (x,))

    _check(run, (_random(2, 3, 4, dtype=dtype),), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocabulary", [3, 4096, 9000])
def test_loss(vocabulary: int, dtype: torch.dtype) -> None:
    targets, weights = torch.tensor([[0, vocabulary - 1], [1, 2]]), torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    logits = 4 * _random(2, 2, vocabulary, dtype=dtype)
    for given in (None, weights):
        _check(lambda x, given=given: sequence_loss(x, targets, given), (logits,), TOLERANCE[dtype])


def test_a_target_outside_the_vocabulary_gives_no_number() -> None:
    loss = fused.cross_entropy(_random(4, 5), torch.tensor([0, 5, -100, 4]))
    assert loss.isnan().tolist() == [False, True, True, False]
    infinite = torch.tensor([[0.0, float("nan")], [float("inf"), 0.0], [0.0, -float("inf")]])
    assert fused.cross_entropy(infinite, torch.zeros(3, dtype=torch.int64)).isnan().tolist() == [True, True, False]


def test_a_model_learns_the_same() -> None:
    """A step of a whole model: loss and gradients are those of PyTorch's composition."""
    config = ModelConfig(d_model=16, mlp_dim=24, swa_heads=2, swa_kv_heads=1, swa_head_dim=8, window=6, chunk_size=4,
        hsa_heads=2, hsa_head_dim=8, retrieval_dim=8, top_k=2, train_top_k=2)  # fmt: skip
    torch.manual_seed(0)
    model, ids = HsaModel(config), torch.randint(0, 260, (2, 33))
    found = []
    for least in (0, 1 << 30):
        fused.LEAST = least
        model.zero_grad()
        loss = sequence_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_under_autocast_a_norm_is_read_in_half_precision() -> None:
    x, norm = _random(8, 16), RmsNorm(16, eps=1e-6)
    with torch.autocast("cpu", torch.float16):
        y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), F.rms_norm(x, (16,), norm.weight, 1e-6), atol=2e-3, rtol=1e-3)
    y.sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32
