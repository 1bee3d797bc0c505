"""Norms, rotations, gates and the loss on a GPU, each in one pass over memory.

PyTorch composes these of several kernels each. Fused, a step of 240m at 8 x 4 K tokens on an H100 takes 134 ms of
kernels in place of 221, of which norms are 13, gates 8, the loss 3.4 and rotations 1.8. Where Triton cannot serve, and
where tensors are so small that launches count rather than bytes, ``serves`` says no, and the callers go on in PyTorch:
the same up to rounding.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hsa_compile import dispatch

# Elements below which PyTorch's own launches, cheaper for the CPU, are as fast: a decoding step stays below.
LEAST = 1 << 20
_ELEMENTS = 4096  # of a program's tile: loads of 16 to 32 bytes a thread
_PROGRAMS = 528  # of a sum over rows: the four that each of an H100's 132 multiprocessors holds


def serves(x: Tensor) -> bool:
    """Whether these functions take tensors like ``x`` here and now."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or x.numel() < LEAST:
        return False
    return dispatch.fuses(x)


def _programs() -> ModuleType:
    from hsa_compile.model import programs  # imports Triton

    return programs


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as [tokens, H, width] with strides, its last dimension dense, and H: 1 but for [B, L, H, D]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return (x.flatten(0, 1), x.shape[2]) if x.dim() == 4 else (x.reshape(-1, 1, x.shape[-1]), 1)


def _tiles(width: int, elements: int = _ELEMENTS) -> dict[str, int]:
    return {"WIDTH": width, "WIDTH_P": _power_of_two(width), "ROWS": max(1, elements // _power_of_two(width))}


def _norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of ``x``, or of ``x + added``, in ``dtype``; and what was normed, as rows."""
    rows, H = _as_rows(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = rows if added is None else torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    beside = rows if added is None else added.contiguous()
    count, sizes = rows.shape[0] * H, _tiles(x.shape[-1])
    strides = (rows.stride(0), rows.stride(1))
    with _on(x):
        grid = (-(-count // sizes["ROWS"]),)
        _programs().norm_forward[grid](
            rows, beside, total, weight, y, count, *strides, eps, ADDS=added is not None, H=H, **sizes
        )
    return y, total


def _norm_backward(
    dy: Tensor, rows: Tensor, weight: Tensor, eps: float, beside: Tensor | None = None, half: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normed, also in ``half`` where that is given, and of the weight; ``beside`` is added."""
    T, H, width = rows.shape
    dx = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    copy = dx if half is None else torch.empty(rows.shape, dtype=half, device=rows.device)
    sizes = _tiles(width, _ELEMENTS // 2)  # it holds three tensors
    programs = min(_PROGRAMS, -(-T * H // sizes["ROWS"]))
    dw = torch.empty(programs, width, dtype=torch.float32, device=rows.device)
    other = dy if beside is None else beside
    with _on(rows):
        _programs().norm_backward[(programs,)](
            dy.contiguous(), rows, weight, other.contiguous(), dx, copy, dw, T * H, rows.stride(0), rows.stride(1), eps,
            programs, ADDS=beside is not None, COPIES=half is not None, H=H, **sizes,
        )  # fmt: skip
    return dx, copy, dw.sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, rows = _norm(x, None, weight, eps, dtype)
        ctx.save_for_backward(rows, weight)
        ctx.eps, ctx.shape = eps, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        dx, _, dw = _norm_backward(dy, rows, weight, ctx.eps)
        return dx.view(ctx.shape), dw, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, rows = _norm(x.contiguous(), added, weight, eps, dtype)
        ctx.save_for_backward(rows, weight)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.half = eps, added.dtype if added.dtype != x.dtype else None
        return rows.view(x.shape), y

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            half = d_total if d_total is None or ctx.half is None else d_total.to(ctx.half)
            return d_total, half, None, None, None
        rows, weight = ctx.saved_tensors
        dx, half, dw = _norm_backward(dy, rows, weight, ctx.eps, d_total, ctx.half)
        return dx.view(dy.shape), half.view(dy.shape), dw, None, None


def _read_in(x: Tensor) -> torch.dtype:
    """In which alone autocast reads what is normed, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, in x's dtype, or autocast's."""
    return _Norm.apply(x, weight, eps, _read_in(x))


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + added`` in x's dtype, and ``rms_norm`` of it."""
    return _AddNorm.apply(x, added, weight, eps, _read_in(x))


def _turned(x_BTHD: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    rows, H = _as_rows(x_BTHD)
    y = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    half = x_BTHD.shape[-1] // 2
    width = _power_of_two(half)
    count, tile = rows.shape[0] * H, max(1, _ELEMENTS // 2 // width)
    sizes = {"H": H, "HALF": half, "HALF_P": width, "ROWS": tile}
    with _on(x_BTHD):
        grid = (-(-count // tile),)
        strides = (rows.stride(0), rows.stride(1))
        _programs().turn[grid](rows, cos, sin, y, count, x_BTHD.shape[1], *strides, sign, **sizes)
    return y


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BTHD, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, -1.0), None, None


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``layers.rotate`` of [B, T, H, D] by cosines and sines [T, 1, D / 2]; has the dtype of ``x_BTHD``."""
    return _Turn.apply(x_BTHD, cos.contiguous(), sin.contiguous())


class _Gate(torch.autograd.Function):
    BLOCK = 1024

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        x = gate_up.contiguous()
        ctx.save_for_backward(x)
        inner = x.shape[-1] // 2
        y = torch.empty((*x.shape[:-1], inner), dtype=x.dtype, device=x.device)
        with _on(x):
            grid = (y.numel() // inner, -(-inner // _Gate.BLOCK))
            _programs().gate_forward[grid](x, y, INNER=inner, BLOCK=_Gate.BLOCK)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx, inner = torch.empty_like(x), x.shape[-1] // 2
        with _on(x):
            grid = (dy.numel() // inner, -(-inner // _Gate.BLOCK))
            _programs().gate_backward[grid](dy.contiguous(), x, dx, INNER=inner, BLOCK=_Gate.BLOCK)
        return dx


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., 2 * inner], whose halves these are."""
    return _Gate.apply(gate_up)


class _Entropy(torch.autograd.Function):
    BLOCK = 4096

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        N, V = logits_NV.shape
        logits, targets = logits_NV.contiguous(), targets_N.contiguous()
        loss, log_sum = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
        with _on(logits):
            _programs().entropy_forward[(N,)](logits, targets, loss, log_sum, V=V, BLOCK=_Entropy.BLOCK)
        ctx.save_for_backward(logits, targets, log_sum)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum = ctx.saved_tensors
        (N, V), d_logits = logits.shape, torch.empty_like(logits)
        with _on(logits):
            grid = (N, -(-V // _Entropy.BLOCK))
            _programs().entropy_backward[grid](
                d_loss.contiguous(), logits, targets, log_sum, d_logits, V=V, BLOCK=_Entropy.BLOCK
            )
        return d_logits, None


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy [N] in nats, float32, of logits in any precision; NaN where the target is outside 0 … V-1."""
    return _Entropy.apply(logits_NV, targets_N)
