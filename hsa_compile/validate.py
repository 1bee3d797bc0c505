"""Parity of everything that computes the model: reference, eager, compiled, and ONNX Runtime with and without kernels.

Two levels. Operators on random inputs, outputs and gradients, against the NumPy reference in float64. The whole model
on text: logits and parameter gradients against the same model in float64 with the operators by their definition, and
greedy generation token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from hsa_compile import dispatch, ops
from hsa_compile.bench.record import common_keys
from hsa_compile.export import Session
from hsa_compile.ir import ChunkAttention, ChunkSelect, reference
from hsa_compile.model.encoder import Memory
from hsa_compile.model.generate import generate
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel

LOGITS = 1e-4  # absolute
RELATIVE = 1e-4  # of a gradient's largest element
OPERATOR = 2e-5  # relative to the largest element
TEXT_TOKENS, GENERATED_TOKENS = 200, 200
TRIES, CLEAR_GAP = 40, 1e-5
LEGS = ("eager", "compiled", "ort-fused", "ort-function")


@dataclass(frozen=True)
class Check:
    """One comparison; ``error`` is what is held against the tolerance."""

    leg: str
    quantity: str
    error: float
    rms: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def _compare(leg: str, quantity: str, got: Any, want: Any, tolerance: float, relative: bool) -> Check:
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return Check(leg, quantity, float("inf"), float("inf"), tolerance, "wrong shape or not finite")
    difference = np.abs(got - want) / (max(float(np.abs(want).max(initial=0.0)), 1e-30) if relative else 1.0)
    rms = float(np.sqrt((difference**2).mean())) if difference.size else 0.0
    return Check(leg, quantity, float(difference.max(initial=0.0)), rms, tolerance)


def run(
    model: HsaModel, bundle: Path, text: bytes, seed: int = 0, progress: Callable[[str], None] = print
) -> list[Check]:
    """All comparisons of a model and its bundle.

    Args:
        text: what the whole model reads; at least a few hundred bytes.
    """
    progress("operators")
    checks = list(_operator_checks(model, seed))
    progress("the whole model in float64, by definition")
    prompt, exact = _clear_prompt(model, text)
    checks += _model_checks(model, bundle, prompt, exact, progress)
    progress(f"{GENERATED_TOKENS} greedy tokens")
    return [*checks, *_generation_checks(model, bundle, list(text[:TEXT_TOKENS]))]


def _operator_checks(model: HsaModel, seed: int) -> Iterator[Check]:
    select, attention = model.config.problems()
    yield from _select_checks(select, seed)
    yield from _attention_checks(attention, seed)


def _attention_checks(p: ChunkAttention, seed: int) -> Iterator[Check]:
    g = torch.Generator().manual_seed(seed)
    L, C = 100, 9
    q, grad = torch.randn(2, 2, L, p.q_heads, p.head_dim, generator=g)
    k, v = torch.randn(2, 2, C * p.chunk_size, p.kv_heads, p.head_dim, generator=g)
    indices = torch.randint(-1, C, (2, L, p.kv_heads, p.top_k), generator=g, dtype=torch.int32)
    inputs = (q, k, v, indices, torch.rand(indices.shape, generator=g))
    arrays = [x.numpy() for x in inputs]
    want = reference.attention(p, *arrays), *reference.attention_backward(p, grad.numpy(), *arrays)
    for leg in ("eager", "compiled"):
        with dispatch.use_backend(leg):
            o = ops.chunk_attention(*inputs, p.chunk_size, p.off_by_one)
            grads = ops.chunk_attention_backward(grad, *inputs, p.chunk_size, p.off_by_one)
        for name, mine, theirs in zip(("o", "dq", "dk", "dv", "dweights"), (o, *grads), want):
            yield _compare(leg, f"chunk_attention {name}", mine, theirs, OPERATOR, relative=True)


def _select_checks(p: ChunkSelect, seed: int) -> Iterator[Check]:
    g = torch.Generator().manual_seed(seed)
    L, C = 100, 40
    # Small integers: their products are exact, so that the selection, ties and all, must be equal to the index.
    q_r = torch.randint(-3, 4, (2, L, p.retrieval_heads, p.retrieval_dim), generator=g).float()
    landmark = torch.randint(-3, 4, (2, C, p.retrieval_heads, p.retrieval_dim), generator=g).float()
    position, chunks = torch.tensor([0, C * p.chunk_size]), torch.tensor([C, C // 2])
    want, want_scores = reference.select(p, *(x.numpy() for x in (q_r, landmark, position, chunks)))
    grad = torch.randn(want.shape, generator=g)
    want_grads = reference.select_backward(p, grad.numpy(), q_r.numpy(), landmark.numpy(), want)
    for leg in ("eager", "compiled"):
        with dispatch.use_backend(leg):
            indices, scores = ops.chunk_select(
                q_r, landmark, position, chunks, p.kv_heads, p.chunk_size, p.top_k, p.window
            )
            grads = ops.chunk_select_backward(grad, q_r, landmark, torch.from_numpy(want), p.chunk_size)
        yield _compare(leg, "chunk_select indices", indices, want, 0.0, relative=False)
        yield _compare(leg, "chunk_select scores", scores, want_scores, OPERATOR, relative=True)
        for name, mine, theirs in zip(("dq_r", "dlandmark"), grads, want_grads):
            yield _compare(leg, f"chunk_select {name}", mine, theirs, OPERATOR, relative=True)


@dataclass(frozen=True)
class _Pass:
    """Logits [L, V] of a prompt, and the gradients of its mean loss by parameter."""

    logits: Tensor
    gradients: dict[str, Tensor]


def _read(model: HsaModel, prompt: Tensor, backend: dispatch.Backend) -> _Pass:
    model.zero_grad()
    with dispatch.use_backend(backend):
        logits = model(prompt[None])[0]
        F.cross_entropy(logits[:-1], prompt[1:]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return _Pass(logits.detach(), gradients)


def _clear_prompt(model: HsaModel, text: bytes) -> tuple[Tensor, _Pass]:
    """An excerpt on which no chunk is selected by a hair, and what the float64 model makes of it.

    Where the last chosen and the first rejected chunk differ by rounding alone, implementations may rightly choose
    differently; such an excerpt would compare choices, not arithmetic.
    """
    exact = HsaModel(model.config).double()
    exact.load_state_dict(model.state_dict())
    exact.eval()
    length = min(TEXT_TOKENS, len(text))
    for start in range(0, max(1, len(text) - length), max(1, (len(text) - length) // TRIES)):
        prompt = torch.tensor(list(text[start : start + length]))
        if _smallest_gap(model, prompt) > CLEAR_GAP:
            break
    return prompt, _read(exact, prompt, "reference")


def _smallest_gap(model: HsaModel, prompt: Tensor) -> float:
    """Over all selections: the gap between the K-th and the next score, relative to the largest score."""
    gaps = [1.0]

    def look(layer: HsaLayer, arguments: tuple[Tensor, Memory, Tensor, Tensor]) -> None:
        x, memory, position, chunks = arguments
        indices, scores = layer.select(layer.norm(x), memory, position, chunks, layer.top_k + 1)
        full = scores[(indices >= 0).all(-1)].sort(-1).values
        if full.numel():
            gaps.append(float(((full[:, 1] - full[:, 0]) / full.abs().amax(-1)).min()))

    layers = [module for module in model.modules() if isinstance(module, HsaLayer)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad(), dispatch.use_backend("eager"):
            model(prompt[None])
    finally:
        for hook in hooks:
            hook.remove()
    return min(gaps)


def _model_checks(
    model: HsaModel, bundle: Path, prompt: Tensor, exact: _Pass, progress: Callable[[str], None]
) -> Iterator[Check]:
    eager = None
    for leg in ("eager", "compiled"):
        progress(f"the whole model, {leg}")
        got = _read(model, prompt, leg)
        eager = eager or got
        yield _compare(leg, "logits", got.logits, exact.logits, LOGITS, relative=False)
        worst = [
            _compare(leg, "parameter gradients", got.gradients[name], want, RELATIVE, relative=True)
            for name, want in exact.gradients.items()
        ]
        yield max(worst, key=lambda check: check.error)
    assert eager is not None
    for leg, fused in (("ort-fused", True), ("ort-function", False)):
        progress(f"the whole model, {leg}")
        session = Session(bundle, fused=fused, threads=torch.get_num_threads())
        logits = session.step(prompt.tolist())[0]
        yield _compare(leg, "logits", logits, exact.logits, LOGITS, relative=False)
        yield _compare(leg, "logits against eager", logits, eager.logits, LOGITS, relative=False)


def _generation_checks(model: HsaModel, bundle: Path, prompt: list[int]) -> Iterator[Check]:
    def torch_tokens(backend: dispatch.Backend) -> list[int]:
        with dispatch.use_backend(backend):
            return [int(token) for token in generate(model, prompt, GENERATED_TOKENS)]

    def ort_tokens(fused: bool) -> list[int]:
        session = Session(bundle, fused=fused, threads=torch.get_num_threads())
        return list(session.generate(prompt, GENERATED_TOKENS))

    eager = torch_tokens("eager")
    for leg, tokens in (
        ("compiled", torch_tokens("compiled")),
        ("ort-fused", ort_tokens(True)),
        ("ort-function", ort_tokens(False)),
    ):
        different = sum(a != b for a, b in zip(tokens, eager)) + abs(len(tokens) - len(eager))
        yield Check(leg, "greedy tokens against eager", different, 0.0, 0, f"{len(eager) - different}/{len(eager)}")


def table(checks: Sequence[Check]) -> Table:
    """A line a quantity, a column a leg: the largest error against the reference, and the verdict."""
    out = Table(title="Largest error against the float64 reference", caption="– : does not exist there")
    out.add_column("quantity")
    for leg in LEGS:
        out.add_column(leg, justify="right")
    out.add_column("tolerance", justify="right")
    cells = {(c.quantity, c.leg): c for c in checks}
    for quantity in dict.fromkeys(c.quantity for c in checks):
        line = [cells.get((quantity, leg)) for leg in LEGS]
        tolerance = next(c.tolerance for c in line if c is not None)
        out.add_row(quantity, *map(_cell, line), f"{tolerance:.0e}" if tolerance else "equal")
    return out


def _cell(check: Check | None) -> str:
    if check is None:
        return "–"
    error = check.note or (f"{check.error:.1e}" if check.error else "0")
    return f"{error} [green]ok[/]" if check.passed else f"[bold red]{error} FAILED[/]"


def rows(checks: Sequence[Check], seed: int = 0) -> list[dict[str, Any]]:
    """In the committed format."""
    common = {**common_keys("parity", seed), "dtype": "float32"}
    return [
        {
            **common, "leg": c.leg, "reference": "eager" if "against eager" in c.quantity else "float64",
            "quantity": c.quantity, "max_error": c.error, "rms_error": c.rms, "tolerance": c.tolerance,
            "passed": c.passed,
        }
        for c in checks
    ]  # fmt: skip
