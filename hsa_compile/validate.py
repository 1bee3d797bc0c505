"""Parity of everything that computes the model: reference, eager, compiled, and ONNX Runtime with and without kernels.

Two levels, in the bundle's type. Operators on random inputs, outputs and gradients, against the NumPy reference in
float64 (``operator_checks``). The whole model on text: logits however the text is cut and whatever rows are beside it,
last logits of prompts read in segments, and greedy tokens, against the same weights in float64 with the operators by
their definition; in float32, parameter gradients, too. ``tolerances`` has the rule and the table.

Shape letters: L tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.bench.record import common_keys
from hsa_compile.export.binding import StepError
from hsa_compile.export.bundle import BundleError, read_manifest
from hsa_compile.export.runtime import PROVIDERS
from hsa_compile.kernels import tiles
from hsa_compile.legs import Leg, OrtLeg, TorchLeg, cut
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.encoder import Memory
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import upper_reach
from hsa_compile.operator_checks import check_operators
from hsa_compile.schedules import BuildError, build, gpu_target
from hsa_compile.tolerances import Absent, Check, Errors, Judge

log = logging.getLogger("hsa_compile")

Device = Literal["cpu", "cuda"]
LEAST_TOKENS, GRADIENT_TOKENS, GENERATED_TOKENS = 200, 200, 80
TRIES, CLEAR_GAP = 40, 1e-5
ORT_LEGS = ("ort-fused", "ort-function")


@dataclass(frozen=True)
class Parity:
    """What was compared, and what was not."""

    checks: list[Check]
    absent: list[Absent]
    device: Device

    @property
    def failed(self) -> int:
        return sum(not check.passed for check in self.checks)


def run(
    model: HsaModel,
    bundle: Path,
    text: bytes,
    seed: int = 0,
    progress: Callable[[str], None] = print,
    device: Device = "cpu",
    tokens: int | None = None,
) -> Parity:
    """All comparisons of a model and its bundle.

    Args:
        model: in float32, on the CPU; it is compared in the bundle's type.
        text: what the whole model reads, as bytes.
        device: that PyTorch and ONNX Runtime run on.
        tokens: of the text that are read; by default ``enough_tokens``.

    Raises:
        BundleError: the bundle cannot be used.
    """
    dtype = read_manifest(bundle, []).dtype
    progress = _timed(progress)
    progress("kernels")
    backends, absent = torch_legs(model.config, dtype, device)
    progress("operators")
    checks = list(check_operators(model.config, backends, dtype, torch.device(device), seed))
    progress("the whole model in float64, by definition")
    whole = WholeModel(model, text, tokens or enough_tokens(model.config), dtype, device)
    checks += whole.gradients(backends)
    legs: list[Leg] = [TorchLeg(whole.rounded, name) for name in backends]
    more, missing = ort_legs(bundle, dtype, device)
    absent += missing
    for leg in [*legs, *more]:
        progress(f"the whole model, {leg.name}")
        try:
            found = [*whole.logits(leg), whole.generated(leg)]
        except StepError as error:
            if leg.name != "ort-function" or device == "cpu":
                raise
            absent.append(Absent(leg.name, f"ONNX Runtime has no such kernels on a GPU: {error}"))
            continue
        checks += found
    progress("done")
    return Parity(checks, absent, device)


def _timed(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Also logs when each part began: most of a comparison on a GPU is what is compiled and opened for it."""
    began = time.perf_counter()

    def say(part: str) -> None:
        log.info("%5.1f s: %s", time.perf_counter() - began, part)
        progress(part)

    return say


def choose_device(asked: Literal["auto", "cpu", "cuda"], bundle: Path) -> Device:
    """Where to compare.

    Raises:
        BundleError: a GPU is asked for that PyTorch or ONNX Runtime cannot use.
    """
    manifest = read_manifest(bundle, [])
    here = torch.cuda.is_available() and PROVIDERS["cuda"] in ort.get_available_providers()
    if asked == "cuda" and not here:
        raise BundleError(
            "PyTorch or ONNX Runtime has no GPU here; install the CUDA builds of both (torch, onnxruntime-gpu), or "
            "validate with --device cpu"
        )
    if asked != "auto":
        return asked
    return "cuda" if here and any(target.startswith("cuda:") for target in manifest.targets) else "cpu"


def enough_tokens(config: ModelConfig) -> int:
    """So many that the upper half of a short prefill leaves tokens out, past several windows and chunks."""
    W, S = config.window, config.chunk_size
    return max(LEAST_TOKENS, upper_reach(config) + 3 * S + 17, 3 * W + 5 * S + 17)


def torch_legs(config: ModelConfig, dtype: Any, device: Device) -> tuple[list[dispatch.Backend], list[Absent]]:
    """PyTorch's paths that exist for a type on a device, eager first, and why others do not."""
    legs: list[dispatch.Backend] = ["eager"]
    absent: list[Absent] = []
    if reason := _cannot_build(config, dtype, device):
        absent.append(Absent("compiled", reason))
    else:
        legs.append("compiled")
    if device == "cuda":
        if reason := dispatch.triton_lacks(torch.empty(0, dtype=getattr(torch, dtype), device=device)):
            absent.append(Absent("triton", reason))
        else:
            legs.append("triton")
    return legs, absent


def _cannot_build(config: ModelConfig, dtype: Any, device: Device) -> str:
    """Why kernels of a model can't be had here, "" if they can; they are built."""
    try:
        target = "cpu:native"
        if device == "cuda":
            found = gpu_target(torch.cuda.get_device_capability())
            if found is None:
                return "no kernels are built for GPUs like this one"
            target = found.name
        for problem in config.problems(dtype=dtype):
            for name in ("forward", "backward"):
                for tile in tiles(problem, name, target):
                    build(problem, name, target, tile)
    except BuildError as error:
        return str(error).strip().splitlines()[-1]
    return ""


def ort_legs(bundle: Path, dtype: str, device: Device) -> tuple[list[Leg], list[Absent]]:
    """The bundle in ONNX Runtime on a device, by its kernels and by the graph's function bodies.

    Raises:
        BundleError: it does not open there by its kernels.
    """
    if device == "cpu" and dtype == "bfloat16":
        reason = "ONNX Runtime multiplies no bfloat16 on a CPU: validate with --device cuda, or export in float16"
        return [], [Absent(name, reason) for name in ORT_LEGS]
    legs: list[Leg] = [OrtLeg(bundle, "ort-fused", device)]
    try:
        legs.append(OrtLeg(bundle, "ort-function", device))
    except BundleError as error:
        if device == "cpu":
            raise
        return legs, [Absent("ort-function", f"ONNX Runtime has no such kernels on a GPU: {error}")]
    return legs, []


@dataclass(frozen=True)
class _Pass:
    """Logits [L, V] of a prompt, and the gradients of its mean loss by parameter."""

    logits: Tensor
    gradients: dict[str, Tensor]


def _read(model: HsaModel, prompt: Tensor, backend: dispatch.Backend, gradients: bool) -> _Pass:
    with dispatch.use_backend(backend), torch.set_grad_enabled(gradients):
        logits = model(prompt[None])[0]
        if not gradients:
            return _Pass(logits, {})
        model.zero_grad()
        F.cross_entropy(logits[:-1], prompt[1:]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return _Pass(logits.detach(), found)


def _clear_prompt(model: HsaModel, text: bytes, length: int) -> Tensor:
    """The excerpt on which chunks are selected by the widest margin, or one with a margin that will do.

    Where the last chosen and the first rejected chunk differ by rounding alone, implementations may rightly choose
    differently; such an excerpt would compare choices, not arithmetic.
    """
    length = min(length, len(text))
    best, widest = torch.empty(0), -1.0
    for start in range(0, max(1, len(text) - length), max(1, (len(text) - length) // TRIES)):
        prompt = torch.tensor(list(text[start : start + length]), device=model.embedding.weight.device)
        gap = _smallest_gap(model, prompt)
        if gap > widest:
            best, widest = prompt, gap
        if gap > CLEAR_GAP:
            break
    return best


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


class WholeModel:
    """Compares legs with the model in float64, by definition.

    Args:
        model: in float32; all legs have its weights, rounded to ``dtype``.
        text: bytes, of which ``tokens`` are read.
    """

    def __init__(self, model: HsaModel, text: bytes, tokens: int, dtype: str, device: Device) -> None:
        self.dtype, half = dtype, getattr(torch, dtype)
        self.rounded = _copy(model, half).to(device)
        self.exact = _copy(self.rounded, half).double().to(device)
        self.prompt = _clear_prompt(_copy(model, torch.float32).to(device), text, tokens)
        self.want = _read(self.exact, self.prompt, "reference", False).logits.cpu().numpy()
        self.scale = float(np.abs(self.want).max())
        self.judge = Judge("logits", dtype)
        self.near = 0.0  # gaps between logits that two errors may bridge

    def gradients(self, legs: Sequence[dispatch.Backend]) -> Iterator[Check]:
        if self.dtype != "float32":  # half precisions are trained under autocast, with weights in float32
            return
        prompt, judge = self.prompt[:GRADIENT_TOKENS], Judge("gradients", self.dtype)
        wanted = _read(self.exact, prompt, "reference", True).gradients
        for leg in legs:
            got = _read(self.rounded, prompt, leg, True).gradients
            yield judge.compared(leg, "parameter gradients", [(got[name], want) for name, want in wanted.items()])

    def logits(self, leg: Leg) -> Iterator[Check]:
        """Of the whole text, of any cut of it, of ragged rows, of prompts; and which tokens are likeliest."""
        prompt, L = self.prompt.cpu(), len(self.prompt)
        S, W = self.exact.config.chunk_size, self.exact.config.window
        whole = leg.logits([prompt], [[L]])
        yield self._held("logits", leg, [(whole[0], self.want)])
        yield self._likeliest(leg, whole[0])
        del whole
        cuts = [cut(L, sizes) for sizes in ([1] * 40, [S - 1, 1, S, 2 * S + 1], [W, 1, W + 1, 3], [L // 2, 1, 1])]
        parts = ((leg.logits([prompt], [[n] for n in sizes])[0], self.want) for sizes in cuts)
        yield self._held("logits, text cut anywhere", leg, parts)
        short = L // 3
        ragged = leg.logits([prompt, prompt[:short]], [[L // 2, short - 1], [L - L // 2 - 1, 0], [1, 1]])
        yield self._held("logits, rows of other lengths", leg, zip(ragged, (self.want, self.want[:short])))
        for name, shortened in (("prefill", False), ("short prefill", True)):
            lengths = sorted({n for n in (S, W + 1, L // 2 + 1, L) if n <= L})
            pairs = ((leg.last(prompt[:n], 3 * S + 5, shortened), self.want[n - 1]) for n in lengths)
            yield self._held(f"last logits, {name} in segments", leg, pairs)

    def generated(self, leg: Leg) -> Check:
        """Tokens that float64 finds less likely than its own by more than both logits' errors."""
        prompt = self.prompt.tolist()
        tokens = leg.generated(prompt, GENERATED_TOKENS)
        ids = torch.tensor([prompt + tokens[:-1]], device=self.prompt.device)
        with torch.no_grad(), dispatch.use_backend("eager"):
            logits = self.exact(ids)[0, len(prompt) - 1 :].cpu().numpy()
        return self._agreeing(leg, "greedy tokens", logits, np.array(tokens), GENERATED_TOKENS)

    def _likeliest(self, leg: Leg, logits: Any) -> Check:
        return self._agreeing(leg, "likeliest tokens", self.want, logits.argmax(-1), len(logits))

    def _agreeing(self, leg: Leg, quantity: str, exact_LV: Any, tokens_L: Any, count: int) -> Check:
        """How many of ``count`` tokens are the likeliest by the exact logits, near ties apart."""
        gaps = exact_LV.max(-1) - exact_LV[np.arange(len(tokens_L)), tokens_L]
        wrong = int((gaps > 2 * self.near).sum()) + count - len(tokens_L)
        ties = int(((gaps > 0) & (gaps <= 2 * self.near)).sum())
        note = f"{count - wrong - ties}/{count}" + (f" and {ties} near ties" if ties else "")
        return Check(leg.name, quantity, wrong, 0.0, 0.0, 0.0, self.dtype, note)

    def _held(self, quantity: str, leg: Leg, pairs: Iterable[tuple[Any, Any]]) -> Check:
        errors = Errors()
        for got, want in pairs:
            errors.add(got, want)
        check = self.judge.held(leg.name, quantity, errors, self.scale)
        if quantity == "logits":
            self.near = check.tolerance
        return check


def _copy(model: HsaModel, dtype: torch.dtype) -> HsaModel:
    """The same weights in another type, on the CPU."""
    made = HsaModel(model.config).eval()
    made.load_state_dict(model.state_dict())
    return made.to(dtype)


def table(parity: Parity) -> Table:
    """A line a quantity, a column a leg: the largest error against the reference and their rms, and the verdict."""
    checks = parity.checks
    caption = "\n".join(f"{one.leg}: {one.reason}" for one in parity.absent)
    dtype = checks[0].dtype if checks else ""
    title = f"Largest error and rms against the float64 reference, {dtype} on {parity.device}"
    out = Table(title=title, caption=caption or None, caption_justify="left")
    legs = [*dict.fromkeys(check.leg for check in checks), *(one.leg for one in parity.absent)]
    out.add_column("quantity")
    for leg in legs:
        out.add_column(leg, justify="right")
    out.add_column("tolerance", justify="right")
    cells = {(c.quantity, c.leg): c for c in checks}
    for quantity in dict.fromkeys(c.quantity for c in checks):
        line = [cells.get((quantity, leg)) for leg in legs]
        widest = max((c for c in line if c is not None), key=lambda c: c.tolerance)
        bounds = f"{widest.tolerance:.0e} {widest.rms_tolerance:.0e}" if widest.tolerance else "equal"
        out.add_row(quantity, *map(_cell, line), bounds)
    return out


def _cell(check: Check | None) -> str:
    if check is None:
        return "–"
    error = check.note or (f"{check.error:.1e} {check.rms:.0e}" if check.error else "0")
    return f"{error} [green]ok[/]" if check.passed else f"[bold red]{error} FAILED[/]"


def rows(parity: Parity, seed: int = 0) -> list[dict[str, Any]]:
    """In the committed format."""
    common = common_keys("parity", seed, parity.device)
    return [
        {
            **common, "dtype": c.dtype, "leg": c.leg, "reference": "float64", "quantity": c.quantity,
            "max_error": c.error, "rms_error": c.rms, "tolerance": c.tolerance, "rms_tolerance": c.rms_tolerance,
            "passed": c.passed,
        }
        for c in parity.checks
    ]  # fmt: skip
