"""Transformer layers with sliding windows and what they are made of.

Shape letters: B batch, L tokens of the segment, R tokens of the ring before it, T = R + L, W window, d model width,
H query heads, Hkv key/value heads, D head width, N blocks of a blocked segment.

Positions: rotations depend on differences of positions alone, so each call counts from its first visible key. No
absolute position ever becomes a float, and no table grows with the length of the text.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model import fused
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.rows import Ragged

NORM_EPS = 1e-6


class RmsNorm(nn.RMSNorm):
    """``x / sqrt(mean(x²) + eps) * weight``.

    PyTorch's own is composed of slow pieces on a CPU, two fifths of a small model's training step; this form takes half
    of its time there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fused.serves(x):
            return fused.rms_norm(x, self.weight, NORM_EPS)
        plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if torch.compiler.is_exporting() or not plain:
            # The result has the dtype of x: under autocast, queries and keys stay in the values' half precision.
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)
        mean_square = torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1]
        return (x * self.weight) * torch.rsqrt(mean_square + NORM_EPS)

    def after(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """``x + added``, and its norm."""
        if added.shape == x.shape and fused.serves(x):
            return fused.add_norm(x, added, self.weight, NORM_EPS)
        x = x + added
        return x, self(x)


def rms_norm(width: int) -> RmsNorm:
    return RmsNorm(width, eps=NORM_EPS)


def rotations(
    length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, 1, head_dim / 2] of positions 0 … length - 1, for [..., length, H, head_dim].

    Args:
        dtype: of the angles; those of many positions want float64. The result is float32.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angle = torch.arange(length, device=device, dtype=dtype)[:, None, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over leading batch dimensions: element i of the first half pairs with element i of the second."""
    if x_THD.dim() == 4 and fused.serves(x_THD):
        return fused.rotate(x_THD, cos, sin)
    if torch.compiler.is_exporting() and x_THD.dim() == 4 and cos.dim() == 3:
        return rotary(x_THD, cos.transpose(0, 1), sin.transpose(0, 1))
    a, b = x_THD.chunk(2, dim=-1)
    cos, sin = cos.to(x_THD.dtype), sin.to(x_THD.dtype)
    # Products of whole rows: on a CPU half the time of those of their halves, to the same bits.
    return x_THD * torch.cat((cos, cos), dim=-1) + torch.cat((b, a), dim=-1) * torch.cat((-sin, sin), dim=-1)


@torch.library.custom_op("hsa::rotary", mutates_args=())
def rotary(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rotate`` of [B, L, H, D] by cosines and sines [B or 1, L, D/2]: one operator in exported programs, where
    ``rotate`` is eight."""
    return rotate(x_BLHD, cos[:, :, None], sin[:, :, None])


@rotary.register_fake
def _(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x_BLHD.new_empty(x_BLHD.shape)


def attend(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention [B, L, H, D], H a multiple of the key heads; ``mask`` is true where a key is visible.

    Args:
        causal: in place of a mask, where queries and keys are of the same tokens; not for export.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BTHD, v_BTHD))
    if not torch.compiler.is_exporting():
        grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return o.transpose(1, 2)
    # Exported graphs take plain products, which every runtime computes for empty batches as well.
    q = q.unflatten(1, (k.shape[1], -1))
    scores = (q @ k.unsqueeze(2).transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


class Span(Protocol):
    """What the layers of one call share: how a segment's tokens see each other and what was carried from before."""

    def attend(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """[B, L, H, D] from unrotated queries of the segment and unrotated keys of what was carried and of it."""

    def kept(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """What of the keys and values the next segment needs."""


class SlidingWindow:
    """Attention of L tokens to the window before each, and what the layers of one call share for it.

    Segments longer than a window go in blocks of W tokens against their own and the previous block, so that the cost
    is O(L*W); shorter ones go in one masked product.

    Args:
        ring: tokens before the segment whose keys are given, at most W - 1.
        length: tokens of the segment.
        ragged: where rows are at different positions.
        starts_BL: where rows are packed documents; there is no ring then.
    """

    def __init__(
        self,
        config: ModelConfig,
        ring: int,
        length: int,
        device: torch.device,
        ragged: Ragged | None = None,
        starts_BL: Tensor | None = None,
    ) -> None:
        self.W, self.R, self.L = config.window, ring, length
        self.blocked = length > self.W
        keys = 2 * self.W if self.blocked else ring + length
        queries = self.W if self.blocked else length
        self.cos, self.sin = rotations(keys, config.swa_head_dim, config.rope_base, device)
        i = torch.arange(queries, device=device)[:, None] + (keys - queries)
        j = torch.arange(keys, device=device)
        self.mask = (i >= j) & (i - j < self.W)
        self.first_query = keys - queries
        self.ragged, self.starts = ragged, starts_BL
        if not self.blocked:
            self.mask = own_keys(self.mask, ring, ragged, starts_BL)

    def attend(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """[B, L, H, D] from unrotated queries and unrotated keys of the ring and the segment."""
        if self.blocked:
            return self._attend_blocks(q_BLHD, k_BTHD, v_BTHD)
        q = rotate(q_BLHD, self.cos[self.first_query :], self.sin[self.first_query :])
        return attend(q, rotate(k_BTHD, self.cos, self.sin), v_BTHD, self.mask)

    def _attend_blocks(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        B, W = q_BLHD.shape[0], self.W
        blocks = -(-self.L // W)
        tail = blocks * W - self.L
        q_BNWHD = F.pad(q_BLHD, (0, 0, 0, 0, 0, tail)).unflatten(1, (blocks, W))
        k_BNXHD, v_BNXHD = (self._with_previous(x, tail) for x in (k_BTHD, v_BTHD))
        q_BNWHD = rotate(q_BNWHD, self.cos[W:], self.sin[W:])
        k_BNXHD = rotate(k_BNXHD, self.cos, self.sin)
        mask = self.mask.expand(B, blocks, 1, W, 2 * W).clone()
        mask[:, 0, ..., : W - self.R] = False  # before the first token there is only padding
        if self.ragged is not None:
            mask[:, 0] = own_keys(mask[:, 0], W, self.ragged, None, self.R)
        if self.starts is not None:
            key_NX = torch.arange(-W, W, device=mask.device) + W * torch.arange(blocks, device=mask.device)[:, None]
            mask &= key_NX[:, None, None] >= F.pad(self.starts, (0, tail)).unflatten(1, (blocks, 1, W)).unsqueeze(-1)
        o = attend(q_BNWHD.flatten(0, 1), k_BNXHD.flatten(0, 1), v_BNXHD.flatten(0, 1), mask.flatten(0, 1))
        return o.reshape(B, blocks * W, *q_BLHD.shape[2:])[:, : self.L]

    def kept(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """The last W - 1 tokens."""
        if self.ragged is not None:
            return self.ragged.last(k_BTHD, self.R, self.W - 1), self.ragged.last(v_BTHD, self.R, self.W - 1)
        return last_tokens(k_BTHD, self.W - 1), last_tokens(v_BTHD, self.W - 1)

    def _with_previous(self, x_BTHD: Tensor, tail: int) -> Tensor:
        """[B, N, 2W, H, D]: every block of W tokens after the block before it."""
        x = F.pad(x_BTHD, (0, 0, 0, 0, self.W - self.R, tail))
        return torch.cat((x[:, : -self.W].unflatten(1, (-1, self.W)), x[:, self.W :].unflatten(1, (-1, self.W))), dim=2)


def last_tokens(x_BTHD: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens, or all of fewer, in memory of their own."""
    return x_BTHD[:, max(x_BTHD.shape[1] - count, 0) :].contiguous()


def own_keys(
    mask_LT: Tensor, carried: int, ragged: Ragged | None, starts_BL: Tensor | None, real: int | None = None
) -> Tensor:
    """The mask [L, T] (or [B, 1, L, T]) without keys that are padding or another document's.

    Args:
        carried: keys before the segment; of them only the last ones may be real.
        real: how many of them hold tokens of some row; by default all.
    """
    key = torch.arange(mask_LT.shape[-1], device=mask_LT.device)
    if ragged is not None:
        count = ragged.carried(carried if real is None else real, mask_LT.device)
        mask_LT = mask_LT & (key >= (carried - count)[:, None, None, None])
    if starts_BL is not None:
        mask_LT = mask_LT & (key >= starts_BL[:, None, :, None])
    return mask_LT


class Projections(nn.Module):
    """Queries, keys and values of a normed stream, QK-normed a head, and the way back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.swa_heads, config.swa_kv_heads, config.swa_kv_heads)
        self.D = D = config.swa_head_dim
        self.qkv = nn.Linear(config.d_model, sum(self.heads) * D, bias=False)
        self.out = nn.Linear(config.swa_heads * D, config.d_model, bias=False)
        self.q_norm = rms_norm(D) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(D) if config.qk_norm else nn.Identity()

    def split(self, x_BLd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, L, H, D], k and v [B, L, Hkv, D], before any rotation."""
        parts = self.qkv(x_BLd).split([heads * self.D for heads in self.heads], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.D)) for part in parts)
        return self.q_norm(q), self.k_norm(k), v

    def merge(self, o_BLHD: Tensor) -> Tensor:
        return self.out(o_BLHD.flatten(2))


class SwiGlu(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if fused.serves(gate_up):
            return self.down(fused.gated(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SwaLayer(nn.Module):
    """Pre-norm Transformer layer; the span says what its attention sees, by default a sliding window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = rms_norm(config.d_model)
        self.attention = Projections(config)
        self.mlp_norm = rms_norm(config.d_model)
        self.mlp = SwiGlu(config.d_model, config.mlp_dim)

    def forward(
        self, x_BLd: Tensor, span: Span, ring_k_BRHD: Tensor | None = None, ring_v_BRHD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output [B, L, d], and the unrotated keys and values of ring and segment [B, R + L, Hkv, D]."""
        q, k, v = self.attention.split(self.norm(x_BLd))
        if ring_k_BRHD is not None and ring_v_BRHD is not None:
            k, v = torch.cat((ring_k_BRHD, k), dim=1), torch.cat((ring_v_BRHD, v), dim=1)
        x, normed = self.mlp_norm.after(x_BLd, self.attention.merge(span.attend(q, k, v)))
        return x + self.mlp(normed), k, v
