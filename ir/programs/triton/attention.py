"""Chunk attention, forward: tiles of neighbouring tokens walk the union of their chunk lists.

The rows of a tile are its tokens times the query heads of one kv head. Rows that did not select a chunk compute it all
the same and leave it out of their sum, by a select and not by a factor 0: a chunk with NaN or inf in it reaches only
the tokens that selected it.
"""

import triton
import triton.language as tl

from hsa_compile.ir.programs.triton.lists import row_weights, tile_rows, tile_slots


@triton.jit
def exponentials(s, scale_log2, S: tl.constexpr, S_P: tl.constexpr, OFF_BY_ONE: tl.constexpr):
    """(e, sum) of the softmax e / sum over the S keys of a chunk, from unscaled logits [M, S_P]; ``scale_log2`` is
    log2(e)/sqrt(D)."""
    s = s * scale_log2
    if S != S_P:
        s = tl.where((tl.arange(0, S_P) < S)[None, :], s, float("-inf"))
    peak = tl.max(s, 1)
    if OFF_BY_ONE:
        peak = tl.maximum(peak, 0.0)
    e = tl.exp2(s - peak[:, None])
    total = tl.sum(e, 1)
    if OFF_BY_ONE:
        total += tl.exp2(-peak)
    return e, total


@triton.jit
def memory_rows(
    b, c, h, C,
    H: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, S: tl.constexpr, S_P: tl.constexpr,
):  # fmt: skip
    """Offsets and mask, [S_P, D_P], of chunk ``c`` of kv head ``h`` in [B, C*S, H, D]."""
    s = tl.arange(0, S_P)
    d = tl.arange(0, D_P)
    at = ((b * C + c) * (S * H) + h) * D + s[:, None] * (H * D) + d[None, :]
    return at, (s < S)[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=["L", "C"])
def forward(
    Q, K, V, INDICES, WEIGHTS, LISTS, COUNTS, O, L, C, scale_log2,
    H: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    S: tl.constexpr, S_P: tl.constexpr, TOP_K: tl.constexpr, K_P: tl.constexpr, TOKENS: tl.constexpr,
    OFF_BY_ONE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of TOKENS tokens and a kv head; LISTS and COUNTS are those of ``lists.unite``."""
    pid = tl.program_id(0).to(tl.int64)
    rows, exists, b, h = tile_rows(pid, L, H, G, G_P, D, TOKENS)
    d = tl.arange(0, D_P)
    at_q = rows[:, None] + d[None, :]
    mask_q = exists[:, None] & (d < D)[None, :]
    q = tl.load(Q + at_q, mask=mask_q, other=0.0)
    chunks, weights = tile_slots(INDICES, WEIGHTS, pid, L, H, TOP_K, K_P, TOKENS)
    o = tl.zeros([TOKENS * G_P, D_P], tl.float32)
    for i in tl.range(0, tl.load(COUNTS + pid), num_stages=STAGES):
        c = tl.load(LISTS + pid * (TOKENS * TOP_K) + i)
        at, mask = memory_rows(b, c, h, C, H, D, D_P, S, S_P)
        k = tl.load(K + at, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        e, total = exponentials(s, scale_log2, S, S_P, OFF_BY_ONE)
        v = tl.load(V + at, mask=mask, other=0.0)
        part = tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        w = row_weights(chunks, weights, c, G_P, TOKENS)
        o = tl.where((w != 0.0)[:, None], o + part * (w / total)[:, None], o)
    tl.store(O + at_q, o.to(O.dtype.element_ty), mask=mask_q)
