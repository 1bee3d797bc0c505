"""What the operators mean: NumPy, float64, loops over tokens. Every other implementation is checked against this one.

Nothing here is fast. Read it to learn a semantic: visibility, ties, order, empty slots, the off-by-one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hsa_compile.ir.operators import ChunkAttention, ChunkSelect, SlidingWindow

Array = NDArray[np.float64]
Indices = NDArray[np.int32]


def visible_chunks(problem: ChunkSelect, t: int, chunks: int) -> int:
    """How many chunks token ``t`` (absolute position) may select: those that lie wholly in its past, ``(i+1)*S <= t``.

    With a window W the bound is ``t - W + S``, which leaves to the window what it covers. Never more than the
    ``chunks`` filled rows.
    """
    return min(max(t - problem.visible_lag, 0) // problem.chunk_size, chunks)


def select(
    problem: ChunkSelect, q_r: NDArray, landmark: NDArray, position: NDArray, chunks: NDArray
) -> tuple[Indices, Array]:
    """Selects for every token and kv head the K visible chunks with the highest scores.

    Args:
        q_r: [B, L, Hr, Dr].
        landmark: [B, C, Hr, Dr]; rows from ``chunks[b]`` on are never read.
        position: int [B], absolute index of each row's first token.
        chunks: int [B], filled landmark rows.

    Returns:
        ``indices`` int32 [B, L, Hkv, K], newest (highest index) first, -1 in empty slots, and ``scores`` float64 of
        that shape, ``q_r·landmark / sqrt(Dr)``, 0 in empty slots. Of exactly tied chunks the newer is selected.
    """
    B, L, Hr, _ = q_r.shape
    q_r, landmark = q_r.astype(np.float64), landmark.astype(np.float64)
    indices = np.full((B, L, problem.kv_heads, problem.top_k), -1, dtype=np.int32)
    scores = np.zeros(indices.shape)
    for b, t, h in np.ndindex(B, L, problem.kv_heads):
        r = h if Hr == problem.kv_heads else 0
        n = visible_chunks(problem, int(position[b]) + t, int(chunks[b]))
        s = landmark[b, :n, r] @ q_r[b, t, r] * problem.scale
        best_first = np.lexsort((-np.arange(n), -s))[: problem.top_k]
        newest_first = np.sort(best_first)[::-1]
        indices[b, t, h, : len(newest_first)] = newest_first
        scores[b, t, h, : len(newest_first)] = s[newest_first]
    return indices, scores


def select_backward(
    problem: ChunkSelect, grad_scores: NDArray, q_r: NDArray, landmark: NDArray, indices: NDArray
) -> tuple[Array, Array]:
    """Gradients of the scores to ``q_r`` and ``landmark``: through the selected chunks only, empty slots give none."""
    Hr = q_r.shape[2]
    d_q, d_landmark = np.zeros(q_r.shape), np.zeros(landmark.shape)
    for b, t, h, k in np.ndindex(*indices.shape):
        r, c = h if Hr == problem.kv_heads else 0, indices[b, t, h, k]
        if c >= 0:
            g = float(grad_scores[b, t, h, k]) * problem.scale
            d_q[b, t, r] += g * landmark[b, c, r].astype(np.float64)
            d_landmark[b, c, r] += g * q_r[b, t, r].astype(np.float64)
    return d_q, d_landmark


def chunk_softmax(problem: ChunkAttention, q_GD: Array, k_SD: Array) -> Array:
    """[G, S] softmax over the tokens of one chunk; with ``off_by_one`` the denominator has 1 more."""
    s = q_GD @ k_SD.T * problem.scale
    peak = np.maximum(s.max(-1, keepdims=True), 0.0 if problem.off_by_one else -np.inf)
    e = np.exp(s - peak)
    return e / (e.sum(-1, keepdims=True) + (np.exp(-peak) if problem.off_by_one else 0.0))


def _slots(problem: ChunkAttention, indices: NDArray) -> Iterator[tuple[int, int, slice, int, int, slice]]:
    """Yields (b, t, group of query heads, kv head, slot, tokens of the chunk) of every filled slot."""
    G, S = problem.groups, problem.chunk_size
    for b, t, h, k in np.ndindex(*indices.shape):
        c = int(indices[b, t, h, k])
        if c >= 0:
            yield b, t, slice(h * G, (h + 1) * G), h, k, slice(c * S, (c + 1) * S)


def attention(problem: ChunkAttention, q: NDArray, k: NDArray, v: NDArray, indices: NDArray, weights: NDArray) -> Array:
    """``o[t] = sum over slots of weight * softmax(q·K_chunk / sqrt(D))·V_chunk``.

    Args:
        q: [B, L, Hq, D]; query head i belongs to kv head i // G.
        k, v: [B, C*S, Hkv, D].
        indices: int [B, L, Hkv, K] in any order; -1 is an empty slot; duplicates each contribute.
        weights: [B, L, Hkv, K]; those of empty slots are not looked at.

    Returns:
        float64 [B, L, Hq, D]. No mask inside a chunk, no positions.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    o = np.zeros(q.shape)
    for b, t, heads, h, slot, chunk in _slots(problem, indices):
        p = chunk_softmax(problem, q[b, t, heads], k[b, chunk, h])
        o[b, t, heads] += float(weights[b, t, h, slot]) * (p @ v[b, chunk, h])
    return o


def attention_backward(
    problem: ChunkAttention,
    grad_o: NDArray,
    q: NDArray,
    k: NDArray,
    v: NDArray,
    indices: NDArray,
    weights: NDArray,
) -> tuple[Array, Array, Array, Array]:
    """Gradients ``(d_q, d_k, d_v, d_weights)``, float64, in the shapes of their arguments.

    With p the softmax and dp = dO·Vᵀ of a slot: ``dw = Σ p·dp``, ``ds = w·p·(dp - Σ_j p·dp)``, ``dQ += ds·K``,
    ``dK += dsᵀ·Q``, ``dV += (w·p)ᵀ·dO``. The constant in an off-by-one denominator leaves these formulas as they are.
    """
    grad_o, q, k, v = (x.astype(np.float64) for x in (grad_o, q, k, v))
    d_q, d_k, d_v, d_w = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros(weights.shape)
    for b, t, heads, h, slot, chunk in _slots(problem, indices):
        w = float(weights[b, t, h, slot])
        p = chunk_softmax(problem, q[b, t, heads], k[b, chunk, h])
        dp = grad_o[b, t, heads] @ v[b, chunk, h].T
        delta = (p * dp).sum(-1, keepdims=True)
        ds = w * p * (dp - delta) * problem.scale
        d_w[b, t, h, slot] = delta.sum()
        d_q[b, t, heads] += ds @ k[b, chunk, h]
        d_k[b, chunk, h] += ds.T @ q[b, t, heads]
        d_v[b, chunk, h] += w * p.T @ grad_o[b, t, heads]
    return d_q, d_k, d_v, d_w


def sliding_window(
    problem: SlidingWindow,
    q: NDArray,
    k: NDArray,
    v: NDArray,
    past_k: NDArray,
    past_v: NDArray,
    position: NDArray,
    lengths: NDArray,
) -> tuple[Array, NDArray, NDArray]:
    """Attention of every token to the W last ones, and the ring that the next call takes.

    Args:
        q: [B, L, Hq, D], rotated; query head i belongs to kv head i // G.
        k, v: [B, L, Hkv, D], keys rotated.
        past_k, past_v: [B, W, Hkv, D], key j in slot j mod W; slots that no key of the past has are not looked at.
        position: int [B], absolute index of each row's first token.
        lengths: int [B], the tokens of each row that count.

    Returns:
        ``o`` float64 [B, L, Hq, D], 0 for tokens that do not count, and ``present_k``, ``present_v`` in the type and
        shape of the past.
    """
    W, G = problem.window, problem.groups
    o, present_k, present_v = np.zeros(q.shape), past_k.copy(), past_v.copy()
    for b, i in np.ndindex(q.shape[:2]):
        if i >= lengths[b]:
            continue
        start = int(position[b])
        present_k[b, (start + i) % W], present_v[b, (start + i) % W] = k[b, i], v[b, i]
        # The ring holds the token's own key by now, and in place of what it overwrote nothing that the token sees.
        slots = [j % W for j in range(max(0, start + i - W + 1), start + i + 1)]
        for h in range(problem.q_heads):
            s = present_k[b, slots, h // G].astype(np.float64) @ q[b, i, h].astype(np.float64) * problem.scale
            e = np.exp(s - s.max())
            o[b, i, h] = e / e.sum() @ present_v[b, slots, h // G].astype(np.float64)
    return o, present_k, present_v
