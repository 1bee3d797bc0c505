"""Triton programs for what stands between a model's matrix products; ``fused`` launches them.

Each reads and writes every tensor once, computes in float32, and repeats to the bit: sums over rows are of partial sums
in a fixed order. Tensors are X [tokens, H, width] with strides, or plain rows.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(first, rows, token_stride, head_stride, H: tl.constexpr, ROWS: tl.constexpr):
    """Numbers of ROWS rows (token, head) from ``first`` on, where they begin in a strided tensor, and which exist."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    return row, row // H * token_stride + row % H * head_stride, row < rows


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    X, ADDED, SUM, W, Y, rows, token_stride, head_stride, eps,
    ADDS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y [tokens*H, WIDTH] = X / sqrt(mean(X²) + eps) * W; a program has ROWS rows. With ADDS, of SUM = X + ADDED in
    place of X; both are [tokens*H, WIDTH]."""
    column = tl.arange(0, WIDTH_P)
    row, begin, exists = _rows(tl.program_id(0) * ROWS, rows, token_stride, head_stride, H, ROWS)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    x = tl.load(X + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ADDS:
        total = (x + tl.load(ADDED + place, mask=inside, other=0.0).to(tl.float32)).to(SUM.dtype.element_ty)
        tl.store(SUM + place, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    y = x * scale[:, None] * w[None, :]
    tl.store(Y + place, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "PROGRAMS"])
def norm_backward(
    DY, X, W, BESIDE, DX, DX_HALF, DW, rows, token_stride, head_stride, eps, PROGRAMS,
    ADDS: tl.constexpr, COPIES: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """DX [tokens*H, WIDTH], and of every program the sum over its rows of W's gradient, DW [PROGRAMS, WIDTH].

    With ADDS, DX is added to a gradient BESIDE [tokens*H, WIDTH]; with COPIES it is written to DX_HALF, too.
    """
    column = tl.arange(0, WIDTH_P)
    w = tl.load(W + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, WIDTH_P], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), PROGRAMS):
        row, begin, exists = _rows(block * ROWS, rows, token_stride, head_stride, H, ROWS)
        inside = exists[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        x = tl.load(X + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
        unit = x * scale[:, None]
        wdy = dy * w[None, :]
        along = tl.sum(unit * wdy, 1) / WIDTH
        dx = (wdy - unit * along[:, None]) * scale[:, None]
        if ADDS:
            dx += tl.load(BESIDE + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=inside)
        if COPIES:
            tl.store(DX_HALF + place, dx.to(DX_HALF.dtype.element_ty), mask=inside)
        dw += dy * unit
    tl.store(DW + tl.program_id(0) * WIDTH + column, tl.sum(dw, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["rows", "length"])
def turn(
    X, COS, SIN, Y, rows, length, token_stride, head_stride, sign,
    H: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """RoPE: element i of the first half of X's rows pairs with element i of the second; the angles are those of token
    modulo ``length``, COS and SIN [length, HALF], times ``sign`` (-1 turns back, which is the gradient)."""
    column = tl.arange(0, HALF_P)
    row, begin, exists = _rows(tl.program_id(0) * ROWS, rows, token_stride, head_stride, H, ROWS)
    inside = exists[:, None] & (column < HALF)[None, :]
    angle = (row // H % length)[:, None] * HALF + column[None, :]
    cos = tl.load(COS + angle, mask=inside, other=0.0)
    sin = tl.load(SIN + angle, mask=inside, other=0.0) * sign
    source = X + begin[:, None] + column[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    place = Y + row[:, None] * (2 * HALF) + column[None, :]
    tl.store(place, (a * cos - b * sin).to(Y.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (b * cos + a * sin).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gate_forward(X, Y, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Y [rows, INNER] = silu(first half of X's row) * second half; X [rows, 2*INNER]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(X + row * (2 * INNER) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + row * (2 * INNER) + INNER + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * INNER + column, (gate * tl.sigmoid(gate) * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(DY, X, DX, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """DX [rows, 2*INNER] of ``gate_forward``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    place = row * (2 * INNER) + column
    gate = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + place + INNER, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * INNER + column, mask=inside, other=0.0).to(tl.float32)
    open = tl.sigmoid(gate)
    d_gate = dy * up * open * (1.0 + gate * (1.0 - open))
    tl.store(DX + place, d_gate.to(DX.dtype.element_ty), mask=inside)
    tl.store(DX + place + INNER, (dy * gate * open).to(DX.dtype.element_ty), mask=inside)


@triton.jit
def entropy_forward(LOGITS, TARGETS, LOSS, LOG_SUM, V: tl.constexpr, BLOCK: tl.constexpr):
    """LOSS [rows] = LOG_SUM - logit of the target, LOG_SUM = log Σ exp(logits); LOGITS [rows, V]. A target outside
    0 … V-1 has the loss NaN."""
    row = tl.program_id(0).to(tl.int64)
    highest = -float("inf")
    total = 0.0
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + row * V + column, mask=column < V, other=-float("inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(before, tl.max(x, 0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest), 0)
    log_sum = tl.log(total) + highest
    target = tl.load(TARGETS + row)
    known = (target >= 0) & (target < V)
    logit = tl.load(LOGITS + row * V + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(LOSS + row, log_sum - logit)
    tl.store(LOG_SUM + row, log_sum)


@triton.jit
def entropy_backward(DLOSS, LOGITS, TARGETS, LOG_SUM, DLOGITS, V: tl.constexpr, BLOCK: tl.constexpr):
    """DLOGITS [rows, V] = (softmax - one at the target) * DLOSS [rows]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    x = tl.load(LOGITS + row * V + column, mask=inside, other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.load(LOG_SUM + row))
    d = (p - tl.where(column == tl.load(TARGETS + row), 1.0, 0.0)) * tl.load(DLOSS + row)
    tl.store(DLOGITS + row * V + column, d.to(DLOGITS.dtype.element_ty), mask=inside)
