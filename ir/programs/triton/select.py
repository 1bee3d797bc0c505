"""Chunk selection: landmarks stream by, every row keeps the K best; no matrix of scores is ever stored.

Landmarks come newest first and enter a list only by beating its worst entry, so of exactly tied chunks the newer stays,
and most tiles of landmarks cost one comparison a row. A score of NaN beats nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _keep_best(s, column, base, values, chunks):
    """Moves every score of tile ``s`` [M, N] that belongs there into the lists ``values``, ``chunks`` [M, K_P]."""
    worst = tl.min(values, 1)
    best = tl.max(s, 1)
    more = tl.max((best > worst).to(tl.int32), 0)
    while more != 0:
        newest = tl.max(tl.where(s == best[:, None], column[None, :], -1), 1)
        enters = best > worst
        oldest = tl.min(tl.where(values == worst[:, None], chunks, 0x7FFFFFFF), 1)
        leaves = (chunks == oldest[:, None]) & enters[:, None]
        values = tl.where(leaves, best[:, None], values)
        chunks = tl.where(leaves, (base + newest)[:, None], chunks)
        s = tl.where(column[None, :] == newest[:, None], float("-inf"), s)
        worst = tl.min(values, 1)
        best = tl.max(s, 1)
        more = tl.max((best > worst).to(tl.int32), 0)
    return values, chunks


@triton.jit
def _newest_first(values, chunks):
    """Sorts the lists along their last axis by chunk, newest first; empty slots (-1) last."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    ordered = tl.sort((chunks.to(tl.int64) << 32) | bits, descending=True)
    return ordered.to(tl.int32).to(tl.float32, bitcast=True), (ordered >> 32).to(tl.int32)


@triton.jit
def _scores(q, Q, at_q, LANDMARK, at_c, in_q, in_c, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Unscaled scores of query rows and landmarks, by blocks of the width; ``q`` is the query where one block does."""
    d = tl.arange(0, BLOCK_D)
    if BLOCK_D >= D:
        mark = tl.load(LANDMARK + at_c[None, :] + d[:, None], mask=in_c[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, mark, input_precision=PRECISION)
    else:
        s = tl.zeros([at_q.shape[0], at_c.shape[0]], tl.float32)
        for e in range(0, D, BLOCK_D):
            some = d + e < D
            part = tl.load(Q + at_q[:, None] + (d + e)[None, :], mask=in_q[:, None] & some[None, :], other=0.0)
            mark = tl.load(LANDMARK + at_c[None, :] + (d + e)[:, None], mask=in_c[None, :] & some[:, None], other=0.0)
            s = tl.dot(part, mark, s, input_precision=PRECISION)
    return s


@triton.jit
def _write(INDICES, SCORES, at, values, chunks, mask, HEADS: tl.constexpr, TOP_K: tl.constexpr):
    """Stores a selection for HEADS kv heads that share it; ``at`` is the place of the first one's first slot."""
    empty = chunks < 0
    for j in tl.static_range(HEADS):
        tl.store(INDICES + at + j * TOP_K, tl.where(empty, -1, chunks), mask=mask)
        tl.store(SCORES + at + j * TOP_K, tl.where(empty, 0.0, values), mask=mask)


@triton.jit(do_not_specialize=["L", "C", "lag", "span"])
def forward(
    Q, LANDMARK, POSITION, CHUNKS, INDICES, SCORES, L, C, lag, span, scale,
    HR: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr,
    TOP_K: tl.constexpr, K_P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program ROWS tokens of one retrieval head, and ``span`` tiles of COLUMNS landmarks.

    Without SPLIT the span covers all and INDICES, SCORES are [B, L, HR*HEADS, TOP_K]. With SPLIT they are partial lists
    in any order, [splits, B, L, HR, TOP_K], of unscaled scores, for ``merge``.
    """
    tiles = tl.cdiv(L, ROWS)
    # The last tokens see most chunks: they start first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles // HR).to(tl.int64)
    r = tl.program_id(0) // tiles % HR
    token = tile * ROWS + tl.arange(0, ROWS)
    exists = token < L
    last = tl.minimum(token, L - 1)
    filled = tl.minimum(tl.load(CHUNKS + b), C)
    visible = tl.maximum(tl.load(POSITION + b) + last - lag, 0) // S
    visible = tl.minimum(visible, filled).to(tl.int32)
    fewest = tl.min(visible, 0)
    at_q = ((b * L + last) * HR + r) * D
    d = tl.arange(0, BLOCK_D)
    q = tl.load(Q + at_q[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
    column = tl.arange(0, COLUMNS)
    slot = tl.arange(0, K_P)
    # Slots that only round K up hold inf, which nothing beats.
    values = tl.zeros([ROWS, K_P], tl.float32) + tl.where(slot < TOP_K, float("-inf"), float("inf"))[None, :]
    chunks = tl.zeros([ROWS, K_P], tl.int32) - 1 - slot[None, :]
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, tl.cdiv(tl.max(visible, 0), COLUMNS))
    for j in range(begin, end):
        base = (begin + end - 1 - j) * COLUMNS
        seen = base + column < filled
        at_c = ((b * C + base + column) * HR + r) * D
        s = _scores(q, Q, at_q, LANDMARK, at_c, exists, seen, D, BLOCK_D, PRECISION)
        if base + COLUMNS > fewest:
            s = tl.where((base + column)[None, :] < visible[:, None], s, float("-inf"))
        values, chunks = _keep_best(s, column, base, values, chunks)
    if SPLIT:
        splits_rows = (tl.program_id(1) * (tl.num_programs(0) // tiles // HR) + b) * L + token
        at = (splits_rows * HR + r)[:, None] * TOP_K + slot[None, :]
        _write(INDICES, SCORES, at, values, chunks, exists[:, None] & (slot < TOP_K)[None, :], 1, TOP_K)
    else:
        values, chunks = _newest_first(values * scale, tl.maximum(chunks, -1))
        at = ((b * L + token) * HR + r)[:, None] * (HEADS * TOP_K) + slot[None, :]
        _write(INDICES, SCORES, at, values, chunks, exists[:, None] & (slot < TOP_K)[None, :], HEADS, TOP_K)


@triton.jit(do_not_specialize=["splits"])
def merge(
    PART_INDICES, PART_SCORES, INDICES, SCORES, splits, scale,
    HEADS: tl.constexpr, TOP_K: tl.constexpr, K_P: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The TOP_K best of a row's partial lists, by score and then by chunk; one program a row of [B, L, HR].

    CANDIDATES: a power of two, at least ``splits * TOP_K``.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    place = tl.arange(0, CANDIDATES)
    used = place < splits * TOP_K
    at = (place // TOP_K * rows + row) * TOP_K + place % TOP_K
    chunk = tl.load(PART_INDICES + at, mask=used, other=-1)
    score = tl.load(PART_SCORES + at, mask=used, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    key = (tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) << 32) | chunk.to(tl.int64)
    least = -0x8000000000000000
    key = tl.where(chunk >= 0, key, least)
    slot = tl.arange(0, K_P)
    best = tl.full([K_P], least, tl.int64)
    for j in range(TOP_K):
        largest = tl.max(key, 0)
        best = tl.where(slot == j, largest, best)
        key = tl.where(key == largest, least, key)
    ordered = (best >> 32).to(tl.int32)
    values = tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
    chunks = tl.where(best == least, -1, best.to(tl.int32))
    values, chunks = _newest_first(tl.where(chunks < 0, 0.0, values * scale), chunks)
    _write(INDICES, SCORES, row * (HEADS * TOP_K) + slot, values, chunks, slot < TOP_K, HEADS, TOP_K)
