"""Chunk attention on CPUs, forward, for the few tokens of a decoding step: a unit of work is one slot of one token.

So a single token's chunks go out to all threads. Heads are the lanes: the logits of a chunk are its keys times the
group's queries, transposed, and the softmax of all heads goes element by element. Chunks are read once, in order,
and nothing of them is transposed. Each unit leaves its part of the output; a second stage adds a token's parts, in the
order of the slots.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import Stage
from hsa_compile.ir.programs.cpu.blocks import (
    LOG2E,
    LOWEST,
    add_row,
    clear,
    copy_row,
    exp2,
    product,
    store_row,
    transpose,
)
from hsa_compile.ir.programs.cpu.layout import AttentionLayout, few_tokens
from hsa_compile.ir.programs.cpu.stages import stage
from hsa_compile.ir.programs.cpu.tiles import pack_rows


def softmax_columns(tile, rows, width, scale, off_by_one) -> Any:
    """Softmax of the columns of X[rows, width], which carry no scale yet, times ``factor``."""
    V = tile.lanes

    @T.inline
    def softmax(X, factor):
        for n in T.serial(width // V):
            peak = T.alloc_buffer((V,), "float32", scope="local")
            total = T.alloc_buffer((V,), "float32", scope="local")
            for v in T.vectorized(V):
                peak[v] = T.float32(0.0 if off_by_one else LOWEST)
            for s in T.serial(rows):
                for v in T.vectorized(V):
                    peak[v] = T.max(peak[v], X[s * width + n * V + v])
            for v in T.vectorized(V):
                total[v] = exp2(-peak[v] * T.float32(scale * LOG2E)) if off_by_one else T.float32(0)
            for s in T.serial(rows):
                for v in T.vectorized(V):
                    X[s * width + n * V + v] = exp2((X[s * width + n * V + v] - peak[v]) * T.float32(scale * LOG2E))
                    total[v] = total[v] + X[s * width + n * V + v]
            for v in T.vectorized(V):
                total[v] = factor / total[v]
            for s in T.serial(rows):
                for v in T.vectorized(V):
                    X[s * width + n * V + v] = X[s * width + n * V + v] * total[v]

    return softmax


def slot_stage(lay: AttentionLayout) -> Stage:
    """parts[slot] = weight * softmax(q·kᵀ)·v, a unit for every slot."""
    p, tile = lay.problem, lay.tile
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    MR, WIDTH, HEADS = tile.row_block, lay.width, lay.heads
    pack = pack_rows(lay)
    pack_queries = transpose(tile, D, HEADS)
    score = product(tile, HEADS, WIDTH)
    softmax = softmax_columns(tile, S, HEADS, p.scale, p.off_by_one)
    attend = product(tile, WIDTH, 1, HEADS)
    keep = copy_row(tile, G * WIDTH)

    @T.inline
    def compute(unit, m):
        c = m.indices[unit]
        if c >= 0:
            h = unit // K % Hkv
            token = unit // K // Hkv
            first = ((token // m.L * m.C + c) * S * Hkv + h) * D
            pack_queries(m.queries, m.q, (token * Hq + h * G) * D, D, G)
            pack(m.keys, m.k, first)
            pack(m.values, m.v, first)
            score(m.logits, m.target, m.keys, m.queries, (S + MR - 1) // MR, D)
            softmax(m.logits, m.weights[unit])
            attend(m.sums, m.target, m.logits, m.values, (G + MR - 1) // MR, S)
            keep(m.parts, unit * (G * WIDTH), m.sums, 0, T.float32(1))

    names = ("q", "k", "v", "indices", "weights", "queries", "keys", "values", "logits", "sums", "target", "parts")
    return stage("slots", few_tokens(tile.few, f"B * L * {Hkv * K}"), compute, lay.regions(*names))


def sum_stage(lay: AttentionLayout) -> Stage:
    """o = the sum of a token's parts, a unit for every kv head of every token."""
    p, tile = lay.problem, lay.tile
    Hq, Hkv, D, K, G, WIDTH = p.q_heads, p.kv_heads, p.head_dim, p.top_k, p.groups, lay.width
    zero, add, store = clear(tile, 0.0), add_row(tile, G * WIDTH), store_row(tile, D)

    @T.inline
    def compute(unit, m):
        zero(m.sums, G * WIDTH)
        for s in T.serial(K):
            if m.indices[unit * K + s] >= 0:
                add(m.sums, 0, m.parts, (unit * K + s) * (G * WIDTH), T.float32(1))
        for g in T.serial(G):
            store(m.o, (unit // Hkv * Hq + unit % Hkv * G + g) * D, m.sums, g * WIDTH)

    return stage("sum", few_tokens(tile.few, f"B * L * {Hkv}"), compute, lay.regions("indices", "parts", "sums", "o"))
