"""Whether what a GPU kernel computed is right, on the very inputs that it is timed on: some tokens and some chunks
against float32, which takes little beside the timing."""

from __future__ import annotations

import torch
from torch import Tensor

from hsa_compile import eager
from hsa_compile.ir import ChunkAttention, ChunkSelect

TOKENS = 128  # at either end
# Largest error over the largest value. Half precisions round probabilities and logit gradients before they are
# multiplied, to 2^-9 of each; a wrong kernel is off by the order of 1.
TOLERANCE = 2**-5


def attention_error(p: ChunkAttention, inputs: tuple[Tensor, ...], o: Tensor) -> float:
    """Relative error of the first and the last tokens' outputs."""
    q, k, v, indices, weights = inputs
    worst = 0.0
    for at in _ends(q.shape[1]):
        wide = (q[:, at].float(), k.float(), v.float())
        exact = eager.attention(*wide, indices[:, at], weights[:, at], p.chunk_size, p.off_by_one)
        worst = max(worst, _relative(o[:, at], exact))
    return worst


def gradients_error(
    p: ChunkAttention, grad_o: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> float:
    """Relative error of d_q and d_weights of the first and the last tokens, and of d_k and d_v of some chunks."""
    q, k, v, indices, weights = inputs
    d_q, d_k, d_v, d_w = gradients
    S, G, worst = p.chunk_size, p.groups, 0.0
    for at in _ends(q.shape[1]):
        wide = (grad_o[:, at].float(), q[:, at].float(), k.float(), v.float())
        exact = eager.attention_backward(*wide, indices[:, at], weights[:, at], S, p.off_by_one)
        worst = max(worst, _relative(d_q[:, at], exact[0]), _relative(d_w[:, at], exact[3]))
    C = k.shape[1] // S
    for c in {0, C // 2, max(0, C - 2)}:
        where = indices[0, :, 0] == c
        token = where.any(-1).nonzero().flatten()
        grad_rows, rows = (x[:1, token, :G].float() for x in (grad_o, q))
        keys, values = (x[:1, c * S : (c + 1) * S, :1].float() for x in (k, v))
        only = torch.where(where[token], 0, -1).to(torch.int32).view(1, -1, 1, p.top_k)
        w = weights[:1, token, :1]
        exact = eager.attention_backward(grad_rows, rows, keys, values, only, w, S, p.off_by_one)
        for got, want in zip((d_k, d_v), exact[1:3]):
            worst = max(worst, _relative(got[:1, c * S : (c + 1) * S, :1], want))
    return worst


def select_error(p: ChunkSelect, inputs: tuple[Tensor, ...], indices: Tensor, scores: Tensor) -> float:
    """Relative error of the last tokens' sorted scores against those of the best visible chunks; 1 if a slot is empty
    that should not be, or holds what is not visible. For one head."""
    q_r, landmark, position, chunks = inputs
    L, C = q_r.shape[1], landmark.shape[1]
    token = torch.arange(max(0, L - TOKENS), L, device=q_r.device)
    score = torch.einsum("btd,bcd->btc", q_r[:, token, 0].float(), landmark[:, :, 0].float()) * p.scale
    bound = ((position[:, None] + token - p.visible_lag) // p.chunk_size).clamp(max=chunks[:, None])
    hidden = torch.arange(C, device=q_r.device) >= bound[..., None]
    best = score.masked_fill(hidden, -torch.inf).topk(min(p.top_k, C)).values
    got = torch.where(indices[:, token, 0] >= 0, scores[:, token, 0], -torch.inf).sort(-1, descending=True).values
    got = got[..., : best.shape[-1]]
    if not torch.equal(got.isfinite(), best.isfinite()) or bool((indices[:, token, 0] >= bound[..., None]).any()):
        return 1.0
    return _relative(got.nan_to_num(neginf=0.0), best.nan_to_num(neginf=0.0))


def _ends(length: int) -> tuple[slice, slice]:
    return slice(0, TOKENS), slice(max(0, length - TOKENS), length)


def _relative(got: Tensor, exact: Tensor) -> float:
    error = (got.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-6)
    return float(error.nan_to_num(torch.inf))
