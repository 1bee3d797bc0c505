"""Chunk attention on CPUs, backward: two passes, neither of which two threads ever write the same place in.

dQ and dW go tile by tile, as the forward does. dK and dV go chunk by chunk over lists of the pairs that selected it, so
they need no atomics and repeat to the bit. Both recompute the softmax: seven products instead of the five that are
needed, against L*K*Hq*S numbers that need not be kept.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import CpuTile, Program, Stage
from hsa_compile.ir.programs.cpu.blocks import LOG2E, across, clear, product, softmax_row, store_row, transpose
from hsa_compile.ir.programs.cpu.layout import AttentionLayout
from hsa_compile.ir.programs.cpu.pairs import each_chunk, pair_regions, pair_stage
from hsa_compile.ir.programs.cpu.stages import each_token_tile, stage, token_tiles
from hsa_compile.ir.programs.cpu.tiles import gather_heads, pack_rows, walk_chunks, write_sums

TENSORS = ("grad_o", "q", "k", "v", "indices", "weights", "d_q", "d_k", "d_v", "d_weights")


def row_dot(tile, width) -> Any:
    """total[0] = X[x0 : x0+width] · Y[x0 : x0+width]."""
    V = tile.lanes
    add_lanes = across(V, lambda a, b: a + b)

    @T.inline
    def dot(total, X, Y, x0):
        for v in T.vectorized(V):
            total[v] = T.float32(0)
        for i in T.unroll(width // V):
            for v in T.vectorized(V):
                total[v] = total[v] + X[x0 + i * V + v] * Y[x0 + i * V + v]
        add_lanes(total)

    return dot


def logit_gradient(tile, width, keep_probabilities) -> Any:
    """For one row of probabilities p and of dp: ``dp = p*(dp - delta)*ds_factor`` with ``delta[0] = p·dp``, and
    ``p *= p_factor`` where they are needed still."""
    V = tile.lanes
    dot = row_dot(tile, width)

    @T.inline
    def gradient(delta, P, DP, x0, ds_factor, p_factor):
        dot(delta, P, DP, x0)
        for i in T.unroll(width // V):
            for v in T.vectorized(V):
                DP[x0 + i * V + v] = P[x0 + i * V + v] * (DP[x0 + i * V + v] - delta[0]) * ds_factor
                if keep_probabilities:
                    P[x0 + i * V + v] = P[x0 + i * V + v] * p_factor

    return gradient


def load_transposed(lay: AttentionLayout) -> Any:
    """Packs a chunk's keys and values, both transposed."""
    Hkv, D, S = lay.problem.kv_heads, lay.problem.head_dim, lay.problem.chunk_size
    pack = transpose(lay.tile, D, lay.keys)

    @T.inline
    def load(m, first):
        pack(m.keys_t, m.k, first, Hkv * D, S)
        pack(m.values_t, m.v, first, Hkv * D, S)

    return load


def probabilities(lay: AttentionLayout) -> Any:
    """logits = softmax(queries · keys_t) and dp = grads · values_t, for gathered rows."""
    D, KEYS, MR = lay.problem.head_dim, lay.keys, lay.tile.row_block
    score = product(lay.tile, KEYS, lay.width)
    softmax = softmax_row(lay.tile, lay.problem.chunk_size, KEYS, lay.problem.off_by_one)

    @T.inline
    def compute(m, rows):
        blocks = (rows + MR - 1) // MR
        score(m.logits, m.target, m.queries, m.keys_t, blocks, D)
        for r in T.serial(rows):
            softmax(m.logits, r * KEYS, T.float32(1))
        score(m.dp, m.target, m.grads, m.values_t, blocks, D)

    return compute


def load_for_queries(lay: AttentionLayout) -> Any:
    """Packs a chunk's keys and values, both transposed, and its keys as they are."""
    load_both, pack_keys = load_transposed(lay), pack_rows(lay)

    @T.inline
    def load(m, first):
        load_both(m, first)
        pack_keys(m.keys, m.k, first)

    return load


def query_gradients(lay: AttentionLayout) -> Any:
    """sums[target] += ds · keys and d_weights[slot] += p · dp, for gathered rows."""
    S, KEYS, MR, scale = lay.problem.chunk_size, lay.keys, lay.tile.row_block, lay.problem.scale
    compute = probabilities(lay)
    gradient = logit_gradient(lay.tile, KEYS, keep_probabilities=False)
    add_keys = product(lay.tile, lay.width, KEYS, target="scatter")

    @T.inline
    def add(m, rows, slots0):
        delta = T.alloc_buffer((lay.tile.lanes,), "float32", scope="local")
        compute(m, rows)
        for r in T.serial(rows):
            gradient(delta, m.logits, m.dp, r * KEYS, m.weight[r] * T.float32(scale), T.float32(1))
            m.d_weights[slots0 + m.slot[r]] = m.d_weights[slots0 + m.slot[r]] + delta[0]
        add_keys(m.sums, m.target, m.dp, m.keys, (rows + MR - 1) // MR, S)

    return add


def query_stage(lay: AttentionLayout) -> Stage:
    """dQ and dW, a unit for every kv head of every tile of tokens."""
    Hkv, K, TOKENS = lay.problem.kv_heads, lay.problem.top_k, lay.tile.tokens
    walk = walk_chunks(lay, load_for_queries(lay), query_gradients(lay), gradients=True)
    write = write_sums(lay)

    @T.inline
    def differentiate(m, b, h, t0, tokens):
        for t in T.serial(tokens):
            for s in T.serial(K):
                m.d_weights[((b * m.L + t0 + t) * Hkv + h) * K + s] = T.float32(0)
        walk(m, b, h, t0, tokens)
        write(m, m.d_q, b, h, t0, tokens)

    names = (
        *TENSORS[:6], "d_q", "d_weights", "keys_t", "values_t", "keys", "queries", "grads", "logits", "dp", "weight",
        "sums", "target", "slot", "chunk", "head", "next", "found",
    )  # fmt: skip
    compute = each_token_tile(Hkv, TOKENS, differentiate)
    return stage("queries", token_tiles(Hkv, TOKENS), compute, lay.regions(*names))


def memory_gradients(lay: AttentionLayout) -> Any:
    """d_keys += dsᵀ · queries and d_values += (weight * p)ᵀ · grads, for gathered rows."""
    WIDTH, KEYS = lay.width, lay.keys
    key_blocks = -(-lay.problem.chunk_size // lay.tile.row_block)
    compute = probabilities(lay)
    gradient = logit_gradient(lay.tile, KEYS, keep_probabilities=True)
    add_transposed = product(lay.tile, WIDTH, 1, KEYS, target="add")

    @T.inline
    def add(m, rows):
        delta = T.alloc_buffer((lay.tile.lanes,), "float32", scope="local")
        compute(m, rows)
        for r in T.serial(rows):
            # The queries carry log2(e)/sqrt(D), which dK takes over from them but for the log2(e).
            gradient(delta, m.logits, m.dp, r * KEYS, m.weight[r] * T.float32(1 / LOG2E), m.weight[r])
        add_transposed(m.d_keys, m.target, m.dp, m.queries, key_blocks, rows)
        add_transposed(m.d_values, m.target, m.logits, m.grads, key_blocks, rows)

    return add


def memory_stage(lay: AttentionLayout) -> Stage:
    """dK and dV, a unit for every kv head of every chunk."""
    p = lay.problem
    Hkv, D, S, K, G = p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    WIDTH, KEYS = lay.width, lay.keys
    zero = clear(lay.tile, 0.0)
    store = store_row(lay.tile, D)
    load = load_transposed(lay)
    gather = gather_heads(lay, gradients=True)
    add = memory_gradients(lay)

    @T.inline
    def differentiate(m, b, h, c, first, last):
        row = ((b * m.C + c) * S * Hkv + h) * D
        zero(m.d_keys, KEYS * WIDTH)
        zero(m.d_values, KEYS * WIDTH)
        if first < last:
            load(m, row)
        at: T.int64 = first
        while at < last:
            rows: T.int32 = 0
            while at < last and rows < lay.pairs * G:
                pair = T.cast(m.pairs[at], "int64")
                token = b * m.L + pair // K
                gather(m, rows, token, h, (token * Hkv + h) * K + pair % K)
                rows = rows + G
                at = at + 1
            add(m, rows)
        for s in T.serial(S):
            store(m.d_k, row + s * (Hkv * D), m.d_keys, s * WIDTH)
            store(m.d_v, row + s * (Hkv * D), m.d_values, s * WIDTH)

    names = (
        *TENSORS[:4], "weights", "d_k", "d_v", "keys_t", "values_t", "queries", "grads", "logits", "dp", "weight",
        "d_keys", "d_values", "target",
    )  # fmt: skip
    return stage(
        "memory", f"B * {Hkv} * C", each_chunk(Hkv, K, differentiate), lay.regions(*names) + pair_regions(Hkv, K)
    )


def program(problem: ChunkAttention, tile: CpuTile) -> Program:
    """The backward pass: the lists of pairs, then dQ and dW by tiles of tokens, then dK and dV by chunks."""
    lay = AttentionLayout(problem, tile)
    heads, K = problem.kv_heads, problem.top_k
    stages = (pair_stage(heads, heads, K, *lay.regions("indices")), query_stage(lay), memory_stage(lay))
    return Program(TENSORS, pair_regions(heads, K), lay.workspace("backward"), stages)
