"""Chunk attention, backward: dQ by tiles of tokens, dK, dV and dW chunk by chunk, nothing by atomics.

With p the softmax of a slot, dp = dO·Vᵀ and delta = Σ p·dp: ``dw = delta``, ``ds = w·p·(dp - delta)``, ``dQ += ds·K``,
``dK += dsᵀ·Q``, ``dV += (w·p)ᵀ·dO``. The softmax runs over one chunk, which a program holds whole, so both passes make
it anew and no statistics are kept.
"""

import triton
import triton.language as tl

from hsa_compile.ir.programs.triton.attention import exponentials, memory_rows
from hsa_compile.ir.programs.triton.lists import row_weights, tile_rows, tile_slots


@triton.jit(do_not_specialize=["L", "C"])
def queries(
    GRAD_O, Q, K, V, INDICES, WEIGHTS, LISTS, COUNTS, D_Q, L, C, scale, scale_log2,
    H: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    S: tl.constexpr, S_P: tl.constexpr, TOP_K: tl.constexpr, K_P: tl.constexpr, TOKENS: tl.constexpr,
    OFF_BY_ONE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D_Q; one program a tile of TOKENS tokens and a kv head, as the forward."""
    pid = tl.program_id(0).to(tl.int64)
    rows, exists, b, h = tile_rows(pid, L, H, G, G_P, D, TOKENS)
    d = tl.arange(0, D_P)
    at_q = rows[:, None] + d[None, :]
    mask_q = exists[:, None] & (d < D)[None, :]
    q = tl.load(Q + at_q, mask=mask_q, other=0.0)
    grad_o = tl.load(GRAD_O + at_q, mask=mask_q, other=0.0)
    chunks, weights = tile_slots(INDICES, WEIGHTS, pid, L, H, TOP_K, K_P, TOKENS)
    d_q = tl.zeros([TOKENS * G_P, D_P], tl.float32)
    for i in tl.range(0, tl.load(COUNTS + pid), num_stages=STAGES):
        c = tl.load(LISTS + pid * (TOKENS * TOP_K) + i)
        at, mask = memory_rows(b, c, h, C, H, D, D_P, S, S_P)
        k = tl.load(K + at, mask=mask, other=0.0)
        v = tl.load(V + at, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(grad_o, tl.trans(v), input_precision=PRECISION)
        e, total = exponentials(s, scale_log2, S, S_P, OFF_BY_ONE)
        delta = tl.sum(e * dp, 1) / total
        ds = e * (dp - delta[:, None])
        part = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        w = row_weights(chunks, weights, c, G_P, TOKENS)
        d_q = tl.where((w != 0.0)[:, None], d_q + part * (w / total)[:, None], d_q)
    tl.store(D_Q + at_q, (d_q * scale).to(D_Q.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=["C", "owners"])
def memory(
    GRAD_O, Q, K, V, WEIGHTS, PAIRS, START, FIRST, OWNER, PART_K, PART_V, D_WEIGHTS, C, owners, scale, scale_log2,
    H: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    S: tl.constexpr, S_P: tl.constexpr, TOP_K: tl.constexpr, ITEM: tl.constexpr, TOKENS: tl.constexpr,
    OFF_BY_ONE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """D_WEIGHTS of all pairs, and the sums of dK and dV over one work item; one program an item.

    A pair is the place of a slot in [B, L, H, TOP_K]. PAIRS lists them by owner, which is a chunk of one row of the
    batch and one kv head, ``(b*H + h)*C + c``; those of owner x are START[x] … START[x+1]. They are cut in items of
    ITEM pairs, of which FIRST[x] is the first and OWNER[item] == x; items beyond the last have OWNER == owners. All
    int64.
    PART_K, PART_V: fp32 [items, S, D].
    """
    item = tl.program_id(0)
    x = tl.load(OWNER + item)
    if x >= owners:
        return
    begin = tl.load(START + x) + (item - tl.load(FIRST + x)) * ITEM
    end = tl.minimum(begin + ITEM, tl.load(START + x + 1))
    x = x.to(tl.int64)
    at, mask = memory_rows(x // C // H, x % C, x // C % H, C, H, D, D_P, S, S_P)
    k = tl.load(K + at, mask=mask, other=0.0)
    v = tl.load(V + at, mask=mask, other=0.0)
    d = tl.arange(0, D_P)
    row = tl.arange(0, TOKENS * G_P)
    g = row % G_P
    d_k = tl.zeros([S_P, D_P], tl.float32)
    d_v = tl.zeros([S_P, D_P], tl.float32)
    for j in tl.range(begin, end, TOKENS, num_stages=STAGES):
        listed = j + row // G_P < end
        pair = tl.load(PAIRS + j + row // G_P, mask=listed, other=0)
        w = tl.load(WEIGHTS + pair, mask=listed, other=0.0)
        at_q = ((pair // TOP_K * G + g) * D)[:, None] + d[None, :]
        mask_q = (listed & (g < G))[:, None] & (d < D)[None, :]
        q = tl.load(Q + at_q, mask=mask_q, other=0.0)
        grad_o = tl.load(GRAD_O + at_q, mask=mask_q, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(grad_o, tl.trans(v), input_precision=PRECISION)
        e, total = exponentials(s, scale_log2, S, S_P, OFF_BY_ONE)
        p = e / total[:, None]
        delta = tl.sum(p * dp, 1)
        pw = p * w[:, None]
        d_v += tl.dot(tl.trans(pw.to(v.dtype)), grad_o, input_precision=PRECISION)
        ds = pw * (dp - delta[:, None])
        d_k += tl.dot(tl.trans(ds.to(k.dtype)), q, input_precision=PRECISION)
        token = j + tl.arange(0, TOKENS)
        place = tl.load(PAIRS + token, mask=token < end, other=0)
        tl.store(D_WEIGHTS + place, tl.sum(tl.reshape(delta, [TOKENS, G_P]), 1), mask=token < end)
    n = tl.arange(0, S_P)
    out = item.to(tl.int64) * (S * D) + n[:, None] * D + d[None, :]
    tl.store(PART_K + out, d_k * scale, mask=mask)
    tl.store(PART_V + out, d_v, mask=mask)


@triton.jit(do_not_specialize=["C"])
def add_items(
    PART, FIRST, OUT, C,
    H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the items of each owner in their order, 0 without items: PART fp32 [items, S, D] -> OUT [B, C*S, H, D]."""
    blocks: tl.constexpr = (S * D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    x = pid // blocks
    e = (pid % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = e < S * D
    total = tl.zeros([BLOCK], tl.float32)
    for item in range(tl.load(FIRST + x), tl.load(FIRST + x + 1)):
        total += tl.load(PART + item * (S * D) + e, mask=mask, other=0.0)
    b = x // C // H
    at = ((b * C + x % C) * S + e // D) * (H * D) + x // C % H * D + e % D
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=mask)
