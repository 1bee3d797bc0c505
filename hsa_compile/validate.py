"""Parity of everything that computes the model: reference, eager, compiled, and ONNX Runtime with and without kernels.

Two levels. Operators on random inputs, outputs and gradients, against the NumPy reference in float64. The whole model
on text, in the bundle's type: logits however the text is cut and whatever rows are beside it, and greedy tokens,
against the same weights in float64 with the operators by their definition; in float32, parameter gradients, too.

Shape letters: L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from hsa_compile import dispatch, ops
from hsa_compile.bench.record import common_keys
from hsa_compile.export.bundle import read_manifest
from hsa_compile.ir import ChunkAttention, ChunkSelect, reference
from hsa_compile.legs import Leg, OrtLeg, TorchLeg, cut
from hsa_compile.model.encoder import Memory
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel


@dataclass(frozen=True)
class Tolerance:
    """What errors of logits against float64 may be, in a type.

    Args:
        logits: in float32 absolute, else a part of the largest logit.
        of_eager: or so many times eager PyTorch's own error, where that is more.
    """

    logits: float
    of_eager: float
    reason: str


TOLERANCES = {
    "float32": Tolerance(
        1e-4, 1.0, "the bound within which segments and single tokens agree with one pass; other orders of summation "
        "give 1e-6 to 1e-5"
    ),
    "float16": Tolerance(
        3e-2, 2.0, "11 bits, rounded at every layer: 32 units of the largest logit's last place. Where the scores of "
        "two chunks round to the other order, another one is selected, in eager PyTorch as well"
    ),
    "bfloat16": Tolerance(2.5e-1, 2.0, "8 bits; else as float16"),
}  # fmt: skip
RELATIVE = 1e-4  # of a gradient's largest element: as of logits in float32
OPERATOR = 2e-5  # relative to the largest element: one product and one sum, where a model has tens of them
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
    dtype: str = "float32"

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
        model: in float32, on the CPU; it is compared in the bundle's type.
        text: what the whole model reads; at least a few hundred bytes.

    Raises:
        BundleError: the bundle cannot be used.
    """
    dtype = read_manifest(bundle, []).dtype
    progress("operators")
    checks = list(_operator_checks(model, seed))
    checks += whole_model(model, bundle, text, dtype, progress)
    return checks


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


def _clear_prompt(model: HsaModel, text: bytes) -> Tensor:
    """An excerpt on which no chunk is selected by a hair.

    Where the last chosen and the first rejected chunk differ by rounding alone, implementations may rightly choose
    differently; such an excerpt would compare choices, not arithmetic.
    """
    length = min(TEXT_TOKENS, len(text))
    for start in range(0, max(1, len(text) - length), max(1, (len(text) - length) // TRIES)):
        prompt = torch.tensor(list(text[start : start + length]))
        if _smallest_gap(model, prompt) > CLEAR_GAP:
            break
    return prompt


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


def whole_model(
    model: HsaModel, bundle: Path, text: bytes, dtype: str, progress: Callable[[str], None] = print
) -> Iterator[Check]:
    """Every leg that there is in the type; no CPU provider multiplies bfloat16."""
    progress("the whole model in float64, by definition")
    rounded = HsaModel(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    rounded.to(getattr(torch, dtype))
    exact = HsaModel(model.config).double().eval()
    exact.load_state_dict(rounded.state_dict())
    prompt = _clear_prompt(model, text)
    judge = _Judge(exact, prompt, dtype)
    yield from judge.gradients(rounded)
    legs: list[Leg] = [TorchLeg(rounded, "eager"), TorchLeg(rounded, "compiled")]
    if dtype != "bfloat16":
        legs += [OrtLeg(bundle, "ort-fused"), OrtLeg(bundle, "ort-function")]
    for leg in legs:
        progress(f"the whole model, {leg.name}")
        yield from judge.logits(leg)
    for leg in legs:
        progress(f"{GENERATED_TOKENS} greedy tokens, {leg.name}")
        yield judge.generated(leg)


class _Judge:
    """Compares with the model in float64, by definition.

    Args:
        exact: with the very weights of the others.
        prompt: int64 [L].
    """

    def __init__(self, exact: HsaModel, prompt: Tensor, dtype: str) -> None:
        self.exact, self.prompt, self.dtype = exact, prompt, dtype
        self.whole = _read(exact, prompt, "reference")
        self.want = self.whole.logits.numpy()
        self.scale = float(np.abs(self.want).max()) if dtype != "float32" else 1.0
        rule = TOLERANCES[dtype]
        self.allowed = rule.logits * self.scale

    def gradients(self, model: HsaModel) -> Iterator[Check]:
        if self.dtype != "float32":  # half precisions are trained under autocast, with weights in float32
            return
        for leg in ("eager", "compiled"):
            got = _read(model, self.prompt, leg).gradients
            worst = [
                _compare(leg, "parameter gradients", got[name], want, RELATIVE, relative=True)
                for name, want in self.whole.gradients.items()
            ]
            yield max(worst, key=lambda check: check.error)

    def logits(self, leg: Leg) -> Iterator[Check]:
        """Of the whole text, of any cut of it, of ragged rows; and which tokens are likeliest."""
        L, S, W = len(self.prompt), self.exact.config.chunk_size, self.exact.config.window
        whole = leg.logits([self.prompt], [[L]])[0]
        check = self._held("logits", leg, [whole], [self.want])
        if leg.name == "eager":  # what the others are measured by
            rule = TOLERANCES[self.dtype]
            self.allowed = max(self.allowed, rule.of_eager * check.error)
        yield check
        yield self._likeliest(leg, whole)
        cuts = [cut(L, sizes) for sizes in ([1] * 40, [S - 1, 1, S, 2 * S + 1], [W, 1, W + 1, 3], [L // 2, 1, 1])]
        parts = [leg.logits([self.prompt], [[n] for n in sizes])[0] for sizes in cuts]
        yield self._held("logits, text cut anywhere", leg, parts, [self.want] * len(parts))
        short = L // 3
        ragged = leg.logits([self.prompt, self.prompt[:short]], [[L // 2, short - 1], [L - L // 2 - 1, 0], [1, 1]])
        yield self._held("logits, rows of other lengths", leg, ragged, [self.want, self.want[:short]])

    def generated(self, leg: Leg) -> Check:
        """Tokens that float64 finds less likely than its own by more than both logits' errors."""
        prompt = self.prompt.tolist()
        tokens = leg.generated(prompt, GENERATED_TOKENS)
        ids = torch.tensor([prompt + tokens[:-1]])
        with torch.no_grad(), dispatch.use_backend("eager"):
            logits = self.exact(ids)[0, len(prompt) - 1 :].numpy()
        gaps = logits.max(-1) - logits[np.arange(len(tokens)), tokens]
        wrong = int((gaps > 2 * self.allowed).sum()) + GENERATED_TOKENS - len(tokens)
        ties = int((gaps > 0).sum()) - wrong
        note = f"{len(tokens) - wrong - ties}/{GENERATED_TOKENS}" + (f" and {ties} near ties" if ties else "")
        return Check(leg.name, "greedy tokens", wrong, 0.0, 0, note, self.dtype)

    def _likeliest(self, leg: Leg, logits: Any) -> Check:
        theirs, mine = logits.argmax(-1), self.want.argmax(-1)
        gaps = self.want.max(-1) - self.want[np.arange(len(theirs)), theirs]
        wrong, ties = int((gaps > 2 * self.allowed).sum()), int(((theirs != mine) & (gaps <= 2 * self.allowed)).sum())
        note = f"{len(mine) - wrong - ties}/{len(mine)}" + (f" and {ties} near ties" if ties else "")
        return Check(leg.name, "likeliest tokens", wrong, 0.0, 0, note, self.dtype)

    def _held(self, quantity: str, leg: Leg, got: Sequence[Any], want: Sequence[Any]) -> Check:
        pairs = [_compare(leg.name, quantity, g, w, self.allowed, relative=False) for g, w in zip(got, want)]
        return replace(max(pairs, key=lambda check: check.error), dtype=self.dtype)


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
    common = common_keys("parity", seed)
    return [
        {
            **common, "dtype": c.dtype, "leg": c.leg, "reference": "float64", "quantity": c.quantity,
            "max_error": c.error, "rms_error": c.rms, "tolerance": c.tolerance,
            "passed": c.passed,
        }
        for c in checks
    ]  # fmt: skip
