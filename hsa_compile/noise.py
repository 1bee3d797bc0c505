"""Selection with Gumbel noise on the scores, for training: noisy scores decide which chunks are selected, and how they
are weighted.

It asks for a margin. Among the few chunks of a training sample the right one wins by little, and once it does nothing
asks for more; among half a million some other chunk then scores higher by chance. Against noise it has to win by a
multiple of the noise. The noise is in units of the spread of a token's scores, so larger scores do not escape it.

The noise is counter-based, a function of a seed and of (row, head, absolute token, chunk) alone: no tensor of it is
kept, it is the same in whatever blocks the work is done, and a kernel can make it in place. There is none yet: the
selection runs in eager PyTorch, whatever the backend; its backward is the operator's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsa_compile import eager, ops

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    """A 64-bit constant as PyTorch's int64, whose products wrap."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): a bijection of 64 bits that looks random."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def gumbel(seed: Tensor, token_BL: Tensor, heads: int, chunks: int) -> Tensor:
    """Standard Gumbel noise, fp32 [B, L, heads, chunks], of tokens at these absolute positions int64 [B, L]."""
    B = token_BL.shape[0]
    row = torch.arange(B, device=token_BL.device)[:, None] * heads + torch.arange(heads, device=token_BL.device)
    key_BLH = _mix(_mix(_mix(seed) ^ row)[:, None] ^ token_BL[:, :, None])
    bits = _shift_right(_mix(key_BLH[..., None] ^ torch.arange(chunks, device=token_BL.device)), 41)
    # 23 bits and a half: every value is a float32 strictly between 0 and 1.
    return -torch.log(-torch.log((bits.float() + 0.5) * 2.0**-23))


def spread(s_BLHC: Tensor, seen: Tensor) -> Tensor:
    """Standard deviation [B, L, H, 1] of a token's scores over what is seen [B, L, 1, C]; 0 where nothing is."""
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(seen, s_BLHC, 0.0).sum(-1, keepdim=True) / count
    return (torch.where(seen, s_BLHC - mean, 0.0).square().sum(-1, keepdim=True) / count).sqrt()


class _NoisySelect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_r: Tensor, landmark: Tensor, position: Tensor, chunks: Tensor, seed: Tensor,
        noise: float | Tensor, sizes: tuple[int, int, int, int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kv_heads, chunk_size, top_k, window = sizes
        token = position[:, None] + torch.arange(q_r.shape[1], device=q_r.device)

        def perturb(s_BlHC: Tensor, seen: Tensor, block: slice) -> Tensor:
            return s_BlHC + noise * spread(s_BlHC, seen) * gumbel(seed, token[:, block], *s_BlHC.shape[2:])

        lag = window - chunk_size if window else 0
        inputs = (q_r, landmark, position, chunks)
        indices, scores = eager.select(*inputs, kv_heads, chunk_size, top_k, lag, perturb)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(q_r, landmark, indices)
        ctx.chunk_size = chunk_size
        return indices, scores

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_landmark = ops.chunk_select_backward(grad_scores, *ctx.saved_tensors, ctx.chunk_size)
        return d_q, d_landmark, None, None, None, None, None


def noisy_chunk_select(
    q_r: Tensor,
    landmark: Tensor,
    position: Tensor,
    chunks: Tensor,
    kv_heads: int,
    chunk_size: int,
    top_k: int,
    window: int = 0,
    *,
    noise: float | Tensor,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops.chunk_select`` by scores that have Gumbel noise added, and these scores. The noise is taken as given: the
    gradients are those of scores without it.

    Args:
        noise: its scale in standard deviations of a token's scores (``spread``); on their device, where it is a tensor.
        seed: int64 scalar; by default drawn by the device's generator, so that ``torch.manual_seed`` repeats it and
            CUDA graphs draw another one at each replay.
    """
    if seed is None:
        seed = torch.randint(2**62, (), device=q_r.device)
    sizes = (kv_heads, chunk_size, top_k, window)
    return _NoisySelect.apply(q_r, landmark, position, chunks, seed.to(q_r.device), noise, sizes)
