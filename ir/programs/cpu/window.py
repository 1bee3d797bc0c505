"""The sliding window on CPUs.

A unit of work is a tile of T neighbouring tokens of one kv head. Their T*G query rows meet the keys of all their windows
block by block, oldest first, with a softmax that carries peak, sum and output from block to block. A block is a run of
rows that lie one after the other, in the ring or in the segment, so that runs end where the ring wraps.

Of a few tokens, of a decoding step, each window is split into parts instead, so that they go out to all threads: query
heads are the lanes then, and nothing is transposed. The last stage adds a token's parts and writes the ring, which by
then nobody reads any more: present may be past.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import SlidingWindow
from hsa_compile.ir.programs import CpuTile, Program, Stage
from hsa_compile.ir.programs.cpu.blocks import (
    LOG2E,
    LOWEST,
    across,
    add_row,
    clear,
    copy_row,
    exp2,
    product,
    row_max,
    store_row,
    transpose,
)
from hsa_compile.ir.programs.cpu.layout import few_tokens, many_tokens
from hsa_compile.ir.programs.cpu.stages import each_token_tile, stage, token_tiles
from hsa_compile.ir.programs.cpu.window_layout import WindowLayout

TENSORS = ("q", "k", "v", "past_k", "past_v", "position", "lengths", "o", "present_k", "present_v")
WORKSPACE = ("queries", "keys", "keys_t", "values", "logits", "sums", "peak", "total", "target")


def online_softmax_row(tile, width) -> Any:
    """Exponentials, base 2, of X[x0+low : x0+high] in place, zeros around them up to ``width``; row ``r`` of ``peak``,
    ``total`` and ``sums`` [rows, sum_width] follows."""
    V, vectors = tile.lanes, width // tile.lanes
    maximum = row_max(tile, vectors, LOWEST)
    add_lanes = across(V, lambda a, b: a + b)

    @T.inline
    def softmax(m, X, x0, low, high, r, sum_width):
        top = T.alloc_buffer((V,), "float32", scope="local")
        lane = T.alloc_buffer((V,), "float32", scope="local")
        for i in T.serial(low):
            X[x0 + i] = T.float32(LOWEST)
        for i in T.serial(width - high):
            X[x0 + high + i] = T.float32(LOWEST)
        maximum(top, X, x0)
        top[0] = T.max(top[0], m.peak[r])
        for v in T.vectorized(V):
            lane[v] = T.float32(0)
        for i in T.unroll(vectors):
            for v in T.vectorized(V):
                X[x0 + i * V + v] = exp2(X[x0 + i * V + v] - top[0])
        for i in T.serial(low):
            X[x0 + i] = T.float32(0)
        for i in T.serial(width - high):
            X[x0 + high + i] = T.float32(0)
        for i in T.unroll(vectors):
            for v in T.vectorized(V):
                lane[v] = lane[v] + X[x0 + i * V + v]
        add_lanes(lane)
        if top[0] > m.peak[r]:
            top[1] = exp2(m.peak[r] - top[0])
            m.total[r] = m.total[r] * top[1]
            for i in T.serial(sum_width // V):
                for v in T.vectorized(V):
                    m.sums[r * sum_width + i * V + v] = m.sums[r * sum_width + i * V + v] * top[1]
            m.peak[r] = top[0]
        m.total[r] = m.total[r] + lane[0]

    return softmax


def pack_rows(lay: WindowLayout) -> Any:
    """dst[rows, width] = rows of one kv head, the first at ``first``, in float32."""
    Hkv, D, WIDTH = lay.problem.kv_heads, lay.problem.head_dim, lay.width
    copy, stride = copy_row(lay.tile, D), Hkv * D

    @T.inline
    def pack(dst, d0, src, first, rows):
        for r in T.serial(rows):
            copy(dst, (d0 + r) * WIDTH, src, first + r * stride, T.float32(1))

    return pack


def tile_stage(lay: WindowLayout) -> Stage:
    """The outputs of tiles of tokens."""
    p, tile, WIDTH, KEYS, MR = lay.problem, lay.tile, lay.width, lay.keys, lay.tile.row_block
    Hq, Hkv, D, W, G = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups
    zero, pack_query, store = clear(tile, 0.0), copy_row(tile, D), store_row(tile, D)
    pack_keys, pack_values = transpose(tile, D, KEYS), pack_rows(lay)
    score, add_values = product(tile, KEYS, WIDTH), product(tile, WIDTH, KEYS, target="add")
    softmax = online_softmax_row(tile, KEYS)
    logit_scale = p.scale * LOG2E

    @T.inline
    def load(m, keys, values, first, n):
        pack_keys(m.keys_t, keys, first, Hkv * D, n)
        pack_values(m.values, 0, values, first, n)

    @T.inline
    def attend(m, b, h, t0, tokens):
        start = m.position[b]
        live = T.cast(T.min(T.max(m.lengths[b] - t0, T.int64(0)), T.cast(tokens, "int64")), "int32")
        blocks = (live * G + MR - 1) // MR
        zero(m.queries, blocks * (MR * WIDTH))
        zero(m.sums, lay.rows * WIDTH)
        for r in T.serial(live * G):
            pack_query(
                m.queries, r * WIDTH, m.q, ((b * m.L + t0 + r // G) * Hq + h * G + r % G) * D, T.float32(logit_scale)
            )
            m.peak[r] = T.float32(LOWEST)
            m.total[r] = T.float32(0)
        # Keys by their place in the segment: those before it are negative, and lie in the ring.
        s: T.int64 = T.max(t0 - (W - 1), T.int64(0) - start)
        end = T.Select(live > 0, t0 + live, s)
        while s < end:
            n: T.int32 = T.cast(T.min(end - s, T.int64(KEYS)), "int32")
            if s < 0:
                slot = (start + s) % W
                n = T.cast(T.min(T.min(T.int64(0) - s, T.cast(n, "int64")), W - slot), "int32")
                load(m, m.past_k, m.past_v, ((b * W + slot) * Hkv + h) * D, n)
            else:
                load(m, m.k, m.v, ((b * m.L + s) * Hkv + h) * D, n)
            score(m.logits, m.target, m.queries, m.keys_t, blocks, D)
            for r in T.serial(live * G):
                last = t0 + r // G - s
                high = T.cast(T.max(T.min(last + 1, T.cast(n, "int64")), T.int64(0)), "int32")
                low = T.cast(T.min(T.max(last + 1 - W, T.int64(0)), T.cast(high, "int64")), "int32")
                softmax(m, m.logits, r * KEYS, low, high, r, WIDTH)
            add_values(m.sums, m.target, m.logits, m.values, blocks, n)
            s = s + n
        for r in T.serial(tokens * G):
            if r < live * G:
                for i in T.serial(WIDTH):
                    m.sums[r * WIDTH + i] = m.sums[r * WIDTH + i] / m.total[r]
            store(m.o, ((b * m.L + t0 + r // G) * Hq + h * G + r % G) * D, m.sums, r * WIDTH)

    names = ("q", "k", "v", "past_k", "past_v", "position", "lengths", "o", *WORKSPACE)
    units = many_tokens(tile.few, token_tiles(Hkv, tile.tokens))
    return stage("tiles", units, each_token_tile(Hkv, tile.tokens, attend), lay.regions(*names))


def part_softmax(tile, heads, scale) -> Any:
    """Exponentials, base 2, of the columns of X[rows, heads], which carry no scale yet; their peaks and sums go to
    ``peak`` and ``total`` from ``at`` on."""
    V = tile.lanes

    @T.inline
    def softmax(X, rows, peak, total, at):
        for n in T.serial(heads // V):
            top = T.alloc_buffer((V,), "float32", scope="local")
            lane = T.alloc_buffer((V,), "float32", scope="local")
            for v in T.vectorized(V):
                top[v] = T.float32(LOWEST)
                lane[v] = T.float32(0)
            for s in T.serial(rows):
                for v in T.vectorized(V):
                    top[v] = T.max(top[v], X[s * heads + n * V + v])
            for s in T.serial(rows):
                for v in T.vectorized(V):
                    X[s * heads + n * V + v] = exp2((X[s * heads + n * V + v] - top[v]) * T.float32(scale * LOG2E))
                    lane[v] = lane[v] + X[s * heads + n * V + v]
            for v in T.vectorized(V):
                peak[at + n * V + v] = top[v]
                total[at + n * V + v] = lane[v]

    return softmax


def part_stage(lay: WindowLayout) -> Stage:
    """Peak, sum and weighted values of a part of a token's window: a unit for each."""
    p, tile, WIDTH, HEADS, PARTS = lay.problem, lay.tile, lay.width, lay.heads, lay.parts
    Hq, Hkv, D, W, G, MR = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups, tile.row_block
    pack, pack_queries = pack_rows(lay), transpose(tile, D, HEADS)
    score, attend = product(tile, HEADS, WIDTH), product(tile, WIDTH, 1, HEADS)
    softmax, keep = part_softmax(tile, HEADS, p.scale), copy_row(tile, G * WIDTH)

    @T.inline
    def compute(unit, m):
        part = unit % PARTS
        h = unit // PARTS % Hkv
        token = unit // (PARTS * Hkv)
        b = token // m.L
        t = token % m.L
        start = m.position[b]
        if t < m.lengths[b]:
            first = T.max(t - (W - 1), T.int64(0) - start)
            size = (t - first + PARTS) // PARTS
            low = first + part * size
            rows = T.cast(T.max(T.min(size, t + 1 - low), T.int64(0)), "int32")
            # Of these, in the ring, and before it wraps.
            old = T.cast(T.min(T.max(T.int64(0) - low, T.int64(0)), T.cast(rows, "int64")), "int32")
            slot = (start + low) % W
            whole = T.cast(T.min(T.cast(old, "int64"), W - slot), "int32")
            pack(m.keys, 0, m.past_k, ((b * W + slot) * Hkv + h) * D, whole)
            pack(m.values, 0, m.past_v, ((b * W + slot) * Hkv + h) * D, whole)
            pack(m.keys, whole, m.past_k, (b * (W * Hkv) + h) * D, old - whole)
            pack(m.values, whole, m.past_v, (b * (W * Hkv) + h) * D, old - whole)
            pack(m.keys, old, m.k, ((b * m.L + low + old) * Hkv + h) * D, rows - old)
            pack(m.values, old, m.v, ((b * m.L + low + old) * Hkv + h) * D, rows - old)
            pack_queries(m.queries, m.q, (token * Hq + h * G) * D, D, G)
            score(m.logits, m.target, m.keys, m.queries, (rows + MR - 1) // MR, D)
            softmax(m.logits, rows, m.part_peak, m.part_total, unit * HEADS)
            attend(m.sums, m.target, m.logits, m.values, (G + MR - 1) // MR, rows)
            keep(m.parts, unit * (G * WIDTH), m.sums, 0, T.float32(1))

    names = ("q", "k", "v", "past_k", "past_v", "position", "lengths", "parts", "part_peak", "part_total", *WORKSPACE)
    return stage("parts", few_tokens(tile.few, f"B * L * {Hkv * PARTS}"), compute, lay.regions(*names))


def finish_stage(lay: WindowLayout) -> Stage:
    """The outputs of a few tokens from their parts, a unit for each kv head, then the ring's slots, a unit for each."""
    p, tile, WIDTH, HEADS, PARTS = lay.problem, lay.tile, lay.width, lay.heads, lay.parts
    Hq, Hkv, D, W, G = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups
    FEW, ROW, factor = tile.few, p.kv_heads * p.head_dim, p.scale * LOG2E
    zero, add, store = clear(tile, 0.0), add_row(tile, WIDTH), store_row(tile, D)

    @T.inline
    def merge(m, unit, token, h):
        zero(m.sums, G * WIDTH)
        if token % m.L < m.lengths[token // m.L]:
            for g in T.serial(G):
                m.peak[0] = T.float32(LOWEST)
                m.total[0] = T.float32(0)
                for part in T.serial(PARTS):
                    m.peak[0] = T.max(m.peak[0], m.part_peak[(unit * PARTS + part) * HEADS + g])
                for part in T.serial(PARTS):
                    weight: T.float32 = exp2(
                        (m.part_peak[(unit * PARTS + part) * HEADS + g] - m.peak[0]) * T.float32(factor)
                    )
                    m.total[0] = m.total[0] + m.part_total[(unit * PARTS + part) * HEADS + g] * weight
                    add(m.sums, g * WIDTH, m.parts, ((unit * PARTS + part) * G + g) * WIDTH, weight)
                for i in T.serial(WIDTH):
                    m.sums[g * WIDTH + i] = m.sums[g * WIDTH + i] / m.total[0]
        for g in T.serial(G):
            store(m.o, (token * Hq + h * G + g) * D, m.sums, g * WIDTH)

    @T.inline
    def write_slot(m, b, newest):
        """The slot of the ``newest``-th of the row's tokens, counted from the last."""
        count = m.lengths[b]
        slot = (b * W + (m.position[b] + count + (W - 1 - newest)) % W) * ROW
        if newest < count:
            for i in T.serial(ROW):
                m.present_k[slot + i] = m.k[(b * m.L + count - 1 - newest) * ROW + i]
                m.present_v[slot + i] = m.v[(b * m.L + count - 1 - newest) * ROW + i]
        else:
            for i in T.serial(ROW):
                m.present_k[slot + i] = m.past_k[slot + i]
                m.present_v[slot + i] = m.past_v[slot + i]

    @T.inline
    def compute(unit, m):
        merged = T.Select(m.L <= FEW, T.int64(1), T.int64(0)) * m.B * m.L * Hkv
        if unit < merged:
            merge(m, unit, unit // Hkv, unit % Hkv)
        else:
            write_slot(m, (unit - merged) // m.C, (unit - merged) % m.C)

    units = f"{few_tokens(FEW, f'B * L * {Hkv}')} + B * C"
    names = (*TENSORS, "parts", "part_peak", "part_total", "sums", "peak", "total")
    return stage("finish", units, compute, lay.regions(*names))


def program(problem: SlidingWindow, tile: CpuTile) -> Program:
    """The forward pass. Of the sizes, C is how many slots of every row's ring are written, from the newest backwards: W,
    or min(L, W) where present is past."""
    lay = WindowLayout(problem, tile)
    scratch = lay.regions("parts", "part_peak", "part_total")
    return Program(TENSORS, scratch, lay.regions(*WORKSPACE), (tile_stage(lay), part_stage(lay), finish_stage(lay)))
