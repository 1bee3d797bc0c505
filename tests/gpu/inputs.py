"""What GPU kernels are checked on, and against: random inputs full of edge cases, definitions in plain PyTorch, and the
rule by which errors are judged."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hsa_compile.ir import ChunkAttention, ChunkSelect

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tensors = tuple[Tensor, ...]


def attention_inputs(
    p: ChunkAttention, B: int, L: int, C: int, dtype: torch.dtype, skew: float = 1.0, seed: int = 0
) -> Tensors:
    """(grad_o, q, k, v, indices, weights): a fifth of the slots empty, duplicates, tokens and a whole tile that select
    nothing, a few indices out of range, weights of both signs and NaN in empty slots. ``skew`` makes low chunks
    popular."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE).to(dtype)

    slots = (B, L, p.kv_heads, p.top_k)
    indices = (torch.rand(slots, generator=g, device=DEVICE) ** skew * C).int()
    empty = torch.rand(slots, generator=g, device=DEVICE) < 0.2
    empty[:, 3:7] = True
    empty[:, 64:128] = True
    if L > 40:
        indices[:, 20:30, :, 1::2] = indices[:, 20:30, :, : p.top_k // 2 * 2 : 2]
    indices[torch.rand(slots, generator=g, device=DEVICE) < 0.02] = C + 5
    indices[empty] = -1
    weights = torch.randn(slots, generator=g, device=DEVICE)
    weights[(indices < 0) | (indices >= C)] = math.nan
    rows, memory = (B, L, p.q_heads, p.head_dim), (B, C * p.chunk_size, p.kv_heads, p.head_dim)
    return normal(*rows), normal(*rows), normal(*memory), normal(*memory), indices, weights


def attention_by_definition(
    p: ChunkAttention, inputs: Tensors, wide: torch.dtype, rounded: torch.dtype | None = None, apart: bool = False
) -> Tensors:
    """(o, d_q, d_k, d_v, d_weights) in ``wide``. With ``rounded``, probabilities and logit gradients go through that
    type before they are multiplied, and so do the results, as in any half-precision attention. A token's duplicates of
    a chunk are rounded as one, as lists of distinct chunks do, or ``apart``, as walks over a token's slots do: with
    weights of both signs, the errors of the one are no bound for those of the other."""
    grad_o, q, k, v, indices, weights = inputs
    (B, L, _, D), Hkv, S, K = q.shape, p.kv_heads, p.chunk_size, p.top_k
    C, G = k.shape[1] // S, p.groups
    o, d_q = torch.zeros(2, B, L, Hkv, G, D, dtype=wide, device=q.device)
    d_k, d_v = torch.zeros(2, B, Hkv, C, S, D, dtype=wide, device=q.device)
    d_w = torch.zeros(B, L, Hkv, K, dtype=wide, device=q.device)

    def low(x: Tensor) -> Tensor:
        return x.to(rounded).to(wide) if rounded else x

    step = max(1, (1 << 26) // (K * S * max(D, G)))
    for b in range(B):
        for h in range(Hkv):
            keys, values = (x[b, :, h].view(C, S, D) for x in (k, v))
            for t in range(0, L if C else 0, step):
                rows = slice(t, t + step)
                live = (indices[b, rows, h] >= 0) & (indices[b, rows, h] < C)
                at = torch.where(live, indices[b, rows, h], 0).long()
                w = torch.where(live, weights[b, rows, h], 0.0).to(wide)
                if rounded and not apart:
                    same = (at[:, :, None] == at[:, None]) & live[:, :, None] & live[:, None]
                    w = (same * w[:, None]).sum(-1) * ~same.tril(-1).any(-1)
                w = w[..., None, None]
                kk, vv = keys[at].to(wide), values[at].to(wide)
                qq, gg = (x[b, rows].view(-1, Hkv, G, D)[:, h].to(wide) for x in (q, grad_o))
                s = torch.einsum("lgd,lksd->lkgs", qq, kk) * p.scale
                peak = s.amax(-1, keepdim=True).clamp(min=0 if p.off_by_one else -math.inf)
                e = (s - peak).exp()
                P = e / (e.sum(-1, keepdim=True) + ((-peak).exp() if p.off_by_one else 0))
                dp = torch.einsum("lgd,lksd->lkgs", gg, vv)
                delta = (P * dp).sum(-1, keepdim=True)
                ds, pw = low(w * P * (dp - delta) * p.scale), low(w * P)
                o[b, rows, h] = torch.einsum("lkgs,lksd->lgd", pw, vv)
                d_w[b, rows, h] = torch.where(live, delta.sum((-1, -2)), 0.0)
                d_q[b, rows, h] = torch.einsum("lkgs,lksd->lgd", ds, kk)
                d_k[b, h].index_add_(0, at.flatten(), torch.einsum("lkgs,lgd->lksd", ds, qq).flatten(0, 1))
                d_v[b, h].index_add_(0, at.flatten(), torch.einsum("lkgs,lgd->lksd", pw, gg).flatten(0, 1))
    d_k, d_v = (x.permute(0, 2, 3, 1, 4).reshape(k.shape) for x in (d_k, d_v))
    return *(low(x) for x in (o.view(q.shape), d_q.view(q.shape), d_k, d_v)), d_w


SELECT_KINDS = ("random", "ties", "older", "newer", "nan", "zero")


def select_inputs(p: ChunkSelect, B: int, L: int, C: int, dtype: torch.dtype, kind: str, ragged: bool) -> Tensors:
    """(q_r, landmark, position, chunks). ``kind`` is random; ties (small integers, whose scores are exact in any order
    of summation); older or newer (scores rise that way); nan (a landmark and a query); or zero. ``ragged``: segments
    begin anywhere, some landmarks are unfilled and hold NaN."""
    g = torch.Generator(DEVICE).manual_seed(L + C)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE).to(dtype)

    Hr, Dr = p.retrieval_heads, p.retrieval_dim
    q_r, landmark = normal(B, L, Hr, Dr), normal(B, C, Hr, Dr)
    position = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    chunks = torch.full((B,), C, dtype=torch.int64, device=DEVICE)
    if kind == "ties":
        q_r, landmark = q_r.round().clamp(-1, 1), landmark.round().clamp(-1, 1)
    elif kind in ("older", "newer"):
        rise = torch.linspace(0, 8, max(C, 1), device=DEVICE).to(dtype)[:C]
        landmark *= 0.05
        landmark[..., 0] = (rise if kind == "newer" else 8 - rise)[None, :, None]
        q_r[..., 0] = 8
    elif kind == "nan" and C:
        landmark[:, C // 3] = torch.nan
        q_r[:, L // 2] = torch.nan
    elif kind == "zero":
        landmark.zero_()
    if ragged:
        position = torch.randint(0, C * p.chunk_size + 1, (B,), generator=g, device=DEVICE)
        chunks = torch.randint(C // 2, C + 1, (B,), generator=g, device=DEVICE)
        landmark[torch.arange(C, device=DEVICE) >= chunks[:, None]] = torch.nan
    return q_r, landmark, position, chunks


def assert_selected(
    p: ChunkSelect, inputs: Tensors, indices: Tensor, scores: Tensor, rows: Tensor, exact: bool
) -> None:
    """The tokens ``rows`` hold the K best visible chunks by scores in float64, newest first; where ``exact``, ties as
    the definition breaks them, else any of what float32 can't tell apart."""
    q_r, landmark, position, chunks = inputs
    C, K, S, shared = landmark.shape[1], p.top_k, p.chunk_size, p.kv_heads // p.retrieval_heads
    for b in range(q_r.shape[0]):
        for h in range(p.kv_heads):
            r = h // shared
            s = q_r[b, rows, r].double() @ landmark[b, :, r].double().T * p.scale
            bound = ((position[b] + rows - p.visible_lag).clamp(min=0) // S).clamp(max=int(chunks[b]))
            seen = torch.arange(C, device=s.device) < bound[:, None]
            s = s.masked_fill(~seen, -torch.inf).nan_to_num(-torch.inf, neginf=-torch.inf)
            s = torch.nn.functional.pad(s, (0, max(0, K - C)), value=-torch.inf)
            order = torch.sort(s.flip(1), dim=1, descending=True, stable=True)
            best, where = order.values[:, :K], s.shape[1] - 1 - order.indices[:, :K]
            where = torch.where(best > -torch.inf, where, -1).sort(1, descending=True).values
            got, value = indices[b, rows, h].long(), scores[b, rows, h].double()
            filled = got >= 0
            assert torch.equal(filled.sum(1), (best > -torch.inf).sum(1)), "filled slots"
            assert not bool(((got[:, 1:] >= got[:, :-1]) & filled[:, 1:]).any()), "newest first, each once"
            assert not bool((got >= bound[:, None]).any()), "a chunk that is not visible"
            assert not bool((value[~filled] != 0).any()), "scores of empty slots"
            assert not bool((got[~filled] != -1).any()), "indices of empty slots"
            assert not exact or torch.equal(got, where), f"{int((got != where).sum())} other chunks on exact ties"
            theirs = torch.gather(s, 1, got.clamp(min=0)).masked_fill(~filled, -torch.inf)
            gap = (theirs.sort(1, descending=True).values - best).abs()[best > -torch.inf]
            assert not bool((gap > 1e-5 * best.abs()[best > -torch.inf] + 1e-9).any()), "a better chunk was left out"
            error = ((value - theirs).abs() / theirs.abs().clamp(min=0.5))[filled]
            assert not bool((error > 2e-5).any()), f"scores off by {float(error.max()):.1e}"


def select_gradient_inputs(p: ChunkSelect, B: int, L: int, C: int, dtype: torch.dtype, skew: float = 1.0) -> Tensors:
    """(grad_scores, q_r, landmark, indices): a fifth of the slots empty, with NaN gradients."""
    g = torch.Generator(DEVICE).manual_seed(L + C)
    H, Dr = p.retrieval_heads, p.retrieval_dim
    q_r, landmark = (torch.randn(B, n, H, Dr, generator=g, device=DEVICE).to(dtype) for n in (L, C))
    indices = (torch.rand(B, L, H, p.top_k, generator=g, device=DEVICE) ** skew * C).int()
    indices[torch.rand(indices.shape, generator=g, device=DEVICE) < (0.2 if C else 2)] = -1
    indices = indices.repeat_interleave(p.kv_heads // H, 2)
    grad = torch.randn(indices.shape, generator=g, device=DEVICE)
    grad[indices < 0] = torch.nan
    return grad, q_r, landmark, indices


def select_gradients(p: ChunkSelect, inputs: Tensors, wide: torch.dtype, rounded: torch.dtype | None = None) -> Tensors:
    """(d_q_r, d_landmark) by the definition, in ``wide``."""
    grad, q_r, landmark, indices = inputs
    (B, L, H, _), C, K, shared = q_r.shape, landmark.shape[1], p.top_k, p.kv_heads // p.retrieval_heads
    scaled = grad.to(wide).masked_fill(indices < 0, 0).view(B, L, H, shared, K).sum(3) * p.scale
    at = indices[:, :, ::shared].long().clamp(min=0)
    d_q, d_landmark = (torch.zeros(x.shape, dtype=wide, device=q_r.device) for x in (q_r, landmark))
    for b in range(B if C else 0):
        for h in range(H):
            one = at[b, :, h]
            d_q[b, :, h] = (scaled[b, :, h, :, None] * landmark[b, :, h].to(wide)[one]).sum(1)
            outer = (scaled[b, :, h, :, None] * q_r[b, :, h].to(wide)[:, None]).flatten(0, 1)
            d_landmark[b, :, h].index_add_(0, one.flatten(), outer)
    return tuple(x.to(rounded).to(wide) if rounded else x for x in (d_q, d_landmark))


def assert_as_good_as(names: Iterable[str], got: Tensors, low: Tensors, exact: Tensors) -> dict[str, float]:
    """Every error is at most twice that of ``low``, plus a floor, as a maximum and as a root mean square; returns the
    ratio of the root mean squares."""
    ratios, bad = {}, []
    for name, x, y, z in zip(names, got, low, exact):
        assert x.shape == z.shape
        assert bool(x.isfinite().all()), f"{name}: poison, or garbage"
        if not x.numel():
            continue
        error, allowed = (x.double() - z).abs(), (y.double() - z).abs()
        scale = max(1.0, float(z.abs().max()))
        rms, rms_low = (float(e.square().mean().sqrt()) for e in (error, allowed))
        ratios[name] = round(rms / max(rms_low, 1e-30), 2)
        if float(error.max()) > 2 * float(allowed.max()) + 1e-5 * scale or rms > 2 * rms_low + 2.5e-6 * scale:
            bad.append(f"{name} off by {float(error.max()):.2g} ({float(allowed.max()):.2g} allowed), rms {rms:.2g}")
    assert not bad, "; ".join(bad)
    return ratios
