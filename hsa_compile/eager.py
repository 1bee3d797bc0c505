"""Both operators in plain PyTorch: the path without a compiler, on any device, and a peer to measure kernels against.

Work goes in blocks of tokens so that what is gathered stays bounded. Half precisions are computed in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Elements of the largest temporary: 2^24 floats are 64 MiB, about what a laptop's caches and allocator bear well.
BLOCK_ELEMENTS = 1 << 24


def _blocks(length: int, elements_a_token: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, elements_a_token))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def _in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast reaches into operators and would round the float32 products here to half precision again."""

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type  # type: ignore[attr-defined]
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return precise


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@_in_own_precision
def select(
    q_r_BLHrDr: Tensor,
    landmark_BCHrDr: Tensor,
    position_B: Tensor,
    chunks_B: Tensor,
    kv_heads: int,
    chunk_size: int,
    top_k: int,
    visible_lag: int,
    perturb: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The K best visible chunks, newest first; see ``hsa_compile.ops.chunk_select``.

    ``perturb`` maps the scores [B, l, Hr, C] of a block of tokens, and which of them are visible, to those that decide
    the selection and are returned.
    """
    B, L, Hr, Dr = q_r_BLHrDr.shape
    C = landmark_BCHrDr.shape[1]
    device = q_r_BLHrDr.device
    indices = torch.full((B, L, Hr, top_k), -1, dtype=torch.int32, device=device)
    scores = torch.zeros((B, L, Hr, top_k), dtype=torch.float32, device=device)
    chunk = torch.arange(C, device=device)
    k = min(top_k, C)
    landmark = landmark_BCHrDr.float().permute(0, 2, 3, 1)
    for block in _blocks(L if k else 0, B * Hr * C * 3):
        s = (q_r_BLHrDr[:, block].float().transpose(1, 2) @ landmark).transpose(1, 2) / math.sqrt(Dr)
        last = position_B.view(B, 1) + torch.arange(L, device=device)[block]
        visible = torch.minimum((last - visible_lag).div(chunk_size, rounding_mode="floor"), chunks_B.view(B, 1))
        seen = chunk < visible.view(B, -1, 1, 1)
        if perturb is not None:
            s = perturb(s, seen, block)
        order = _best(s, seen, k)
        picked = torch.where(order >= 0, s.gather(-1, order.clamp(min=0)), 0.0)
        indices[:, block, :, :k] = order.to(torch.int32)
        scores[:, block, :, :k] = picked
    if Hr != kv_heads:
        shape = (B, L, kv_heads, top_k)
        return indices.expand(shape).contiguous(), scores.expand(shape).contiguous()
    return indices, scores


def _best(s_BLHC: Tensor, visible: Tensor, k: int) -> Tensor:
    """Indices of the top k, highest index first and -1 in empty slots. Exact ties go to the newer chunk: score bits and
    chunk index make one unique 64-bit key."""
    bits = (s_BLHC + 0.0).view(torch.int32).long()  # adding zero turns -0.0 into 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    chunk = torch.arange(s_BLHC.shape[-1], device=s_BLHC.device)
    key = torch.where(visible, ordered * (1 << 32) + chunk, torch.iinfo(torch.int64).min)
    best = key.topk(k, dim=-1).values
    return torch.where(best == torch.iinfo(torch.int64).min, -1, best & 0xFFFFFFFF).sort(-1, descending=True).values


@_in_own_precision
def select_backward(
    grad_scores_BLHkvK: Tensor, q_r_BLHrDr: Tensor, landmark_BCHrDr: Tensor, indices_BLHkvK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the selected scores to ``q_r`` and ``landmark``; nothing reaches chunks that were not selected."""
    B, L, Hr, Dr = q_r_BLHrDr.shape
    C = landmark_BCHrDr.shape[1]
    q_r, landmark = q_r_BLHrDr.float(), landmark_BCHrDr.float()
    grad = torch.where(indices_BLHkvK >= 0, grad_scores_BLHkvK, 0.0) / math.sqrt(Dr)
    indices = indices_BLHkvK[:, :, :Hr].clamp(min=0).long()
    if grad.shape[2] != Hr:  # one selection shared by all kv heads
        grad = grad.sum(2, keepdim=True)
    row = (torch.arange(B, device=q_r.device).view(B, 1, 1, 1) * C + indices) * Hr
    row = row + torch.arange(Hr, device=q_r.device).view(1, 1, Hr, 1)
    d_q = torch.zeros_like(q_r)
    d_landmark = torch.zeros_like(landmark)
    for block in _blocks(L if C else 0, B * grad.shape[2] * grad.shape[3] * Dr):
        picked = landmark.reshape(-1, Dr)[row[:, block]]
        d_q[:, block] = (grad[:, block].unsqueeze(-2) @ picked).squeeze(-2)
        outer = grad[:, block].unsqueeze(-1) * q_r[:, block].unsqueeze(-2)
        d_landmark.view(-1, Dr).index_add_(0, row[:, block].reshape(-1), outer.reshape(-1, Dr))
    return d_q.to(q_r_BLHrDr.dtype), d_landmark.to(landmark_BCHrDr.dtype)


class _Gathered:
    """One block of tokens with the chunks it selected, and the softmax inside each of them."""

    def __init__(
        self, block: slice, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, S: int, off_by_one: bool
    ) -> None:
        B, D = q.shape[0], q.shape[3]
        Hkv = k.shape[2]
        C = k.shape[1] // S
        self.live = (indices[:, block] >= 0).transpose(1, 2)
        self.w = torch.where(self.live, weights[:, block].transpose(1, 2), 0.0).to(_accumulate(q[:0]).dtype)
        self.row = indices[:, block].transpose(1, 2).clamp(min=0).long()
        self.row = self.row + C * torch.arange(B * Hkv, device=q.device).view(B, Hkv, 1, 1)
        self.k = self._chunks(k, S)[self.row]  # [B, Hkv, l, K, S, D]
        self.v = self._chunks(v, S)[self.row]
        self.q = self.heads(q[:, block], Hkv)
        s = torch.einsum("bhlgd,bhlksd->bhlgks", self.q, self.k) / math.sqrt(D)
        peak = s.amax(-1, keepdim=True).clamp(min=0) if off_by_one else s.amax(-1, keepdim=True)
        e = torch.exp(s - peak)
        self.p = e / (e.sum(-1, keepdim=True) + (torch.exp(-peak) if off_by_one else 0.0))

    @staticmethod
    def heads(x_BlHqD: Tensor, Hkv: int) -> Tensor:
        return _accumulate(x_BlHqD).unflatten(2, (Hkv, -1)).transpose(1, 2)

    @staticmethod
    def _chunks(x_BTHkvD: Tensor, S: int) -> Tensor:
        return _accumulate(x_BTHkvD).unflatten(1, (-1, S)).permute(0, 3, 1, 2, 4).flatten(0, 2)

    def tokens(self, x_BHlgd: Tensor) -> Tensor:
        return x_BHlgd.transpose(1, 2).flatten(2, 3)


def _attention_blocks(q: Tensor, k: Tensor, indices: Tensor, S: int) -> Iterator[slice]:
    K, gathered_tokens = indices.shape[3], indices.shape[3] * S
    length = q.shape[1] if K and k.shape[1] else 0
    return _blocks(length, q.shape[0] * gathered_tokens * (2 * k.shape[2] * k.shape[3] + 2 * q.shape[2]))


@_in_own_precision
def attention(
    q_BLHqD: Tensor,
    k_BTHkvD: Tensor,
    v_BTHkvD: Tensor,
    indices_BLHkvK: Tensor,
    weights_BLHkvK: Tensor,
    chunk_size: int,
    off_by_one: bool,
) -> Tensor:
    """Gather the selected chunks and attend to each; see ``hsa_compile.ops.chunk_attention``."""
    o = torch.zeros_like(q_BLHqD, memory_format=torch.contiguous_format)
    for block in _attention_blocks(q_BLHqD, k_BTHkvD, indices_BLHkvK, chunk_size):
        x = _Gathered(block, q_BLHqD, k_BTHkvD, v_BTHkvD, indices_BLHkvK, weights_BLHkvK, chunk_size, off_by_one)
        o[:, block] = x.tokens(torch.einsum("bhlgks,bhlksd,bhlk->bhlgd", x.p, x.v, x.w)).to(o.dtype)
    return o


@_in_own_precision
def attention_backward(
    grad_o_BLHqD: Tensor,
    q_BLHqD: Tensor,
    k_BTHkvD: Tensor,
    v_BTHkvD: Tensor,
    indices_BLHkvK: Tensor,
    weights_BLHkvK: Tensor,
    chunk_size: int,
    off_by_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and the weights. The softmax is recomputed; with p its result and dp = dO·V,
    ``dw = sum(p*dp)`` and ``dS = w*p*(dp - sum(p*dp))``, which holds for the off-by-one softmax as well."""
    B, _, _, D = q_BLHqD.shape
    T, Hkv = k_BTHkvD.shape[1:3]
    d_q = torch.zeros_like(q_BLHqD, memory_format=torch.contiguous_format)
    d_w = torch.zeros_like(weights_BLHkvK, memory_format=torch.contiguous_format)
    wide = _accumulate(q_BLHqD[:0]).dtype
    rows = B * Hkv * (T // chunk_size)
    d_k = torch.zeros(rows, chunk_size * D, dtype=wide, device=q_BLHqD.device)
    d_v = torch.zeros_like(d_k)
    for block in _attention_blocks(q_BLHqD, k_BTHkvD, indices_BLHkvK, chunk_size):
        x = _Gathered(block, q_BLHqD, k_BTHkvD, v_BTHkvD, indices_BLHkvK, weights_BLHkvK, chunk_size, off_by_one)
        d_o = x.heads(grad_o_BLHqD[:, block], Hkv)
        dp = torch.einsum("bhlgd,bhlksd->bhlgks", d_o, x.v)
        delta = (x.p * dp).sum(-1, keepdim=True)
        d_w[:, block] = torch.where(x.live, delta.squeeze(-1).sum(3), 0.0).transpose(1, 2).to(d_w.dtype)
        pw = x.p * x.w.unsqueeze(3).unsqueeze(-1)
        ds = pw * (dp - delta) / math.sqrt(D)
        d_q[:, block] = x.tokens(torch.einsum("bhlgks,bhlksd->bhlgd", ds, x.k)).to(d_q.dtype)
        d_k.index_add_(0, x.row.flatten(), torch.einsum("bhlgks,bhlgd->bhlksd", ds, x.q).reshape(-1, chunk_size * D))
        d_v.index_add_(0, x.row.flatten(), torch.einsum("bhlgks,bhlgd->bhlksd", pw, d_o).reshape(-1, chunk_size * D))

    def memory(x: Tensor, like: Tensor) -> Tensor:
        return x.view(B, Hkv, -1, chunk_size, D).permute(0, 2, 3, 1, 4).reshape(like.shape).to(like.dtype).contiguous()

    return d_q, memory(d_k, k_BTHkvD), memory(d_v, v_BTHkvD), d_w
