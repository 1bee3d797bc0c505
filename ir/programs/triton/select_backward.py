"""Chunk selection, backward: the scores of the selected chunks, and nothing else, carry gradients."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["L", "C", "rows"])
def queries(
    GRAD, LANDMARK, INDICES, D_Q, L, C, rows, scale,
    HR: tl.constexpr, D: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D_Q [B, L, HR, D] = scale * Σ over slots of GRAD * landmark; GRAD fp32 and INDICES are [B, L, HR, TOP_K]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    b = row // HR // L
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for k in range(TOP_K):
        c = tl.load(INDICES + row * TOP_K + k, mask=exists, other=-1)
        live = exists & (c >= 0) & (c < C)
        grad = tl.load(GRAD + row * TOP_K + k, mask=live, other=0.0)
        at = ((b * C + c) * HR + row % HR) * D
        mask = live[:, None] & (d < D)[None, :]
        total += grad[:, None] * tl.load(LANDMARK + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    mask = exists[:, None] & (d < D)[None, :]
    tl.store(D_Q + row[:, None] * D + d[None, :], (total * scale).to(D_Q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["owners"])
def landmarks(
    GRAD, Q, PAIRS, START, FIRST, OWNER, PART, owners, scale,
    D: tl.constexpr, TOP_K: tl.constexpr, ITEM: tl.constexpr, PAIRS_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of the landmark's gradient over one work item, PART fp32 [items, D]; items and pairs as in
    ``attention_backward.memory``, and so is the sum of the items (``attention_backward.add_items``)."""
    item = tl.program_id(0)
    x = tl.load(OWNER + item)
    if x >= owners:
        return
    begin = tl.load(START + x) + (item - tl.load(FIRST + x)) * ITEM
    end = tl.minimum(begin + ITEM, tl.load(START + x + 1))
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([PAIRS_BLOCK, BLOCK_D], tl.float32)
    for j in range(begin, end, PAIRS_BLOCK):
        place = j + tl.arange(0, PAIRS_BLOCK)
        listed = place < end
        pair = tl.load(PAIRS + place, mask=listed, other=0)
        grad = tl.load(GRAD + pair, mask=listed, other=0.0)
        at = (pair // TOP_K * D)[:, None] + d[None, :]
        mask = listed[:, None] & (d < D)[None, :]
        total += grad[:, None] * tl.load(Q + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(PART + item.to(tl.int64) * D + d, tl.sum(total, 0) * scale, mask=d < D)
