"""Chunk attention on CPUs, backward: two passes, neither of which two threads ever write the same place in.

dQ and dW go tile by tile, as the forward does. dK and dV go chunk by chunk over lists of the pairs that selected it, so
they need no atomics and repeat to the bit. Both recompute the softmax: seven products instead of the five that are
needed, against L*K*Hq*S numbers that need not be kept.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import CpuTile, Program, Region, Stage
from hsa_compile.ir.programs.cpu.attention import Layout, group_by_chunk
from hsa_compile.ir.programs.cpu.blocks import LOG2E, across, clear, copy_row, product, softmax_row, transpose
from hsa_compile.ir.programs.cpu.pairs import pair_regions, pair_stage

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


def probabilities(problem, tile, lay) -> Any:
    """logits = softmax(queries · keys_t) and dp = grads · values_t, for gathered rows."""
    D, KEYS = problem.head_dim, lay.keys
    score = product(tile, KEYS, lay.width)
    softmax = softmax_row(tile, problem.chunk_size, KEYS, problem.off_by_one)

    @T.inline
    def compute(logits, dp, target, queries, grads, keys_t, values_t, rows):
        blocks = (rows + tile.row_block - 1) // tile.row_block
        score(logits, target, queries, keys_t, blocks, D)
        for r in T.serial(rows):
            softmax(logits, r * KEYS, T.float32(1))
        score(dp, target, grads, values_t, blocks, D)

    return compute


def query_stage(problem: ChunkAttention, tile: CpuTile, lay: Layout) -> Stage:
    """dQ and dW, a unit for every kv head of every tile of tokens."""
    Hq, Hkv, D, S, K, G = (
        problem.q_heads, problem.kv_heads, problem.head_dim, problem.chunk_size, problem.top_k, problem.groups,
    )  # fmt: skip
    MR, TOKENS, WIDTH, KEYS = tile.row_block, tile.tokens, lay.width, lay.keys
    group = group_by_chunk(tile, lay.table, K)
    zero = clear(tile, 0.0)
    pack_transposed = transpose(tile, D, KEYS)
    pack_row = copy_row(tile, D)
    compute = probabilities(problem, tile, lay)
    gradient = logit_gradient(tile, KEYS, keep_probabilities=False)
    add_keys = product(tile, WIDTH, KEYS, target="scatter")
    scale, logit_scale = problem.scale, problem.scale * LOG2E

    @T.prim_func(s_tir=True)
    def queries_pass(
        grad_o_ptr: T.handle("float32"), q_ptr: T.handle("float32"), k_ptr: T.handle("float32"),
        v_ptr: T.handle("float32"), indices_ptr: T.handle("int32"), weights_ptr: T.handle("float32"),
        d_q_ptr: T.handle("float32"), d_weights_ptr: T.handle("float32"),
        keys_t_ptr: T.handle("float32"), values_t_ptr: T.handle("float32"), keys_ptr: T.handle("float32"),
        queries_ptr: T.handle("float32"), grads_ptr: T.handle("float32"), logits_ptr: T.handle("float32"),
        dp_ptr: T.handle("float32"), weight_ptr: T.handle("float32"), sums_ptr: T.handle("float32"),
        target_ptr: T.handle("int32"), slot_ptr: T.handle("int32"), chunk_ptr: T.handle("int32"),
        head_ptr: T.handle("int32"), next_ptr: T.handle("int32"), found_ptr: T.handle("int32"),
        B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        grad_o = T.decl_buffer((B * L * Hq * D,), "float32", data=grad_o_ptr)
        q = T.decl_buffer((B * L * Hq * D,), "float32", data=q_ptr)
        k = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=k_ptr)
        v = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=v_ptr)
        indices = T.decl_buffer((B * L * Hkv * K,), "int32", data=indices_ptr)
        weights = T.decl_buffer((B * L * Hkv * K,), "float32", data=weights_ptr)
        d_q = T.decl_buffer((B * L * Hq * D,), "float32", data=d_q_ptr)
        d_weights = T.decl_buffer((B * L * Hkv * K,), "float32", data=d_weights_ptr)
        keys_t = T.decl_buffer((WIDTH * KEYS,), "float32", data=keys_t_ptr)
        values_t = T.decl_buffer((WIDTH * KEYS,), "float32", data=values_t_ptr)
        keys = T.decl_buffer((KEYS * WIDTH,), "float32", data=keys_ptr)
        queries = T.decl_buffer((lay.rows * WIDTH,), "float32", data=queries_ptr)
        grads = T.decl_buffer((lay.rows * WIDTH,), "float32", data=grads_ptr)
        logits = T.decl_buffer((lay.rows * KEYS,), "float32", data=logits_ptr)
        dp = T.decl_buffer((lay.rows * KEYS,), "float32", data=dp_ptr)
        weight = T.decl_buffer((lay.rows,), "float32", data=weight_ptr)
        sums = T.decl_buffer(((lay.out_rows + 1) * WIDTH,), "float32", data=sums_ptr)
        target = T.decl_buffer((lay.rows,), "int32", data=target_ptr)
        slot = T.decl_buffer((lay.rows,), "int32", data=slot_ptr)
        chunk = T.decl_buffer((lay.table,), "int32", data=chunk_ptr)
        head = T.decl_buffer((lay.table,), "int32", data=head_ptr)
        next = T.decl_buffer((lay.slots,), "int32", data=next_ptr)
        found = T.decl_buffer((lay.slots,), "int32", data=found_ptr)
        for unit in T.serial(end - begin):
            tiles = (L + TOKENS - 1) // TOKENS
            h = (begin + unit) % Hkv
            b = (begin + unit) // Hkv // tiles
            t0 = (begin + unit) // Hkv % tiles * TOKENS
            tokens = T.cast(T.min(L - t0, T.int64(TOKENS)), "int32")
            slots0 = ((b * L + t0) * Hkv + h) * K  # of the tile's first token; the next token's lie Hkv * K further
            count = T.alloc_buffer((1,), "int32", scope="local")
            delta = T.alloc_buffer((tile.lanes,), "float32", scope="local")
            zero(sums, lay.out_rows * WIDTH)
            for t in T.serial(tokens):
                for s in T.serial(K):
                    d_weights[slots0 + t * (Hkv * K) + s] = T.float32(0)
            group(indices, slots0, Hkv * K, tokens, chunk, head, next, found, count)
            for entry in T.serial(count[0]):
                memory = ((b * C + chunk[found[entry]]) * S * Hkv + h) * D
                pack_transposed(keys_t, k, memory, Hkv * D, S)
                pack_transposed(values_t, v, memory, Hkv * D, S)
                for s in T.serial(S):
                    pack_row(keys, s * WIDTH, k, memory + s * (Hkv * D), T.float32(1))
                pair: T.int32 = head[found[entry]]
                while pair >= 0:
                    rows: T.int32 = 0
                    while pair >= 0 and rows < lay.pairs * G:
                        token = b * L + t0 + pair // K
                        for g in T.serial(G):
                            row = rows + g
                            head_row = (token * Hq + h * G + g) * D
                            pack_row(queries, row * WIDTH, q, head_row, T.float32(logit_scale))
                            pack_row(grads, row * WIDTH, grad_o, head_row, T.float32(1))
                            target[row] = pair // K * G + g
                            slot[row] = pair // K * (Hkv * K) + pair % K
                            weight[row] = weights[slots0 + slot[row]]
                        rows = rows + G
                        pair = next[pair]
                    blocks = (rows + MR - 1) // MR
                    for r in T.serial(blocks * MR - rows):
                        target[rows + r] = lay.out_rows
                    compute(logits, dp, target, queries, grads, keys_t, values_t, rows)
                    for r in T.serial(rows):
                        gradient(delta, logits, dp, r * KEYS, weight[r] * T.float32(scale), T.float32(1))
                        d_weights[slots0 + slot[r]] = d_weights[slots0 + slot[r]] + delta[0]
                    add_keys(sums, target, dp, keys, blocks, S)
            for t in T.serial(tokens):
                for g in T.serial(G):
                    for d in T.serial(D):
                        d_q[((b * L + t0 + t) * Hq + h * G + g) * D + d] = sums[(t * G + g) * WIDTH + d]

    arguments = (
        *TENSORS[:6], "d_q", "d_weights", "keys_t", "values_t", "keys", "queries", "grads", "logits", "dp", "weight",
        "sums", "target", "slot", "chunk", "head", "next", "found",
    )  # fmt: skip
    return Stage("queries", queries_pass, f"B * {Hkv} * ((L + {TOKENS - 1}) / {TOKENS})", arguments)


def memory_stage(problem: ChunkAttention, tile: CpuTile, lay: Layout) -> Stage:
    """dK and dV, a unit for every kv head of every chunk."""
    Hq, Hkv, D, S, K, G = (
        problem.q_heads, problem.kv_heads, problem.head_dim, problem.chunk_size, problem.top_k, problem.groups,
    )  # fmt: skip
    WIDTH, KEYS = lay.width, lay.keys
    key_blocks = -(-S // tile.row_block)
    zero = clear(tile, 0.0)
    pack_transposed = transpose(tile, D, KEYS)
    pack_row = copy_row(tile, D)
    compute = probabilities(problem, tile, lay)
    gradient = logit_gradient(tile, KEYS, keep_probabilities=True)
    add_transposed = product(tile, WIDTH, 1, KEYS, target="add")
    logit_scale = problem.scale * LOG2E

    @T.prim_func(s_tir=True)
    def memory_pass(
        grad_o_ptr: T.handle("float32"), q_ptr: T.handle("float32"), k_ptr: T.handle("float32"),
        v_ptr: T.handle("float32"), weights_ptr: T.handle("float32"), d_k_ptr: T.handle("float32"),
        d_v_ptr: T.handle("float32"), ends_ptr: T.handle("int32"), pairs_ptr: T.handle("int32"),
        keys_t_ptr: T.handle("float32"), values_t_ptr: T.handle("float32"), queries_ptr: T.handle("float32"),
        grads_ptr: T.handle("float32"), logits_ptr: T.handle("float32"), dp_ptr: T.handle("float32"),
        weight_ptr: T.handle("float32"), d_keys_ptr: T.handle("float32"), d_values_ptr: T.handle("float32"),
        target_ptr: T.handle("int32"),
        B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        grad_o = T.decl_buffer((B * L * Hq * D,), "float32", data=grad_o_ptr)
        q = T.decl_buffer((B * L * Hq * D,), "float32", data=q_ptr)
        k = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=k_ptr)
        v = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=v_ptr)
        weights = T.decl_buffer((B * L * Hkv * K,), "float32", data=weights_ptr)
        d_k = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=d_k_ptr)
        d_v = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=d_v_ptr)
        ends = T.decl_buffer((B * Hkv * (C + 1),), "int32", data=ends_ptr)
        pairs = T.decl_buffer((B * Hkv * L * K,), "int32", data=pairs_ptr)
        keys_t = T.decl_buffer((WIDTH * KEYS,), "float32", data=keys_t_ptr)
        values_t = T.decl_buffer((WIDTH * KEYS,), "float32", data=values_t_ptr)
        queries = T.decl_buffer((lay.rows * WIDTH,), "float32", data=queries_ptr)
        grads = T.decl_buffer((lay.rows * WIDTH,), "float32", data=grads_ptr)
        logits = T.decl_buffer((lay.rows * KEYS,), "float32", data=logits_ptr)
        dp = T.decl_buffer((lay.rows * KEYS,), "float32", data=dp_ptr)
        weight = T.decl_buffer((lay.rows,), "float32", data=weight_ptr)
        d_keys = T.decl_buffer((KEYS * WIDTH,), "float32", data=d_keys_ptr)
        d_values = T.decl_buffer((KEYS * WIDTH,), "float32", data=d_values_ptr)
        target = T.decl_buffer((lay.rows,), "int32", data=target_ptr)
        for unit in T.serial(end - begin):
            c = (begin + unit) % C
            h = (begin + unit) // C % Hkv
            b = (begin + unit) // C // Hkv
            list = (begin + unit) // C
            memory = ((b * C + c) * S * Hkv + h) * D
            delta = T.alloc_buffer((tile.lanes,), "float32", scope="local")
            last = T.cast(ends[list * (C + 1) + c], "int64")
            at: T.int64 = 0
            if c > 0:
                at = T.cast(ends[list * (C + 1) + c - 1], "int64")
            zero(d_keys, KEYS * WIDTH)
            zero(d_values, KEYS * WIDTH)
            if at < last:
                pack_transposed(keys_t, k, memory, Hkv * D, S)
                pack_transposed(values_t, v, memory, Hkv * D, S)
            while at < last:
                rows: T.int32 = 0
                while at < last and rows < lay.pairs * G:
                    pair = T.cast(pairs[list * L * K + at], "int64")
                    token = b * L + pair // K
                    for g in T.serial(G):
                        head_row = (token * Hq + h * G + g) * D
                        pack_row(queries, (rows + g) * WIDTH, q, head_row, T.float32(logit_scale))
                        pack_row(grads, (rows + g) * WIDTH, grad_o, head_row, T.float32(1))
                        weight[rows + g] = weights[(token * Hkv + h) * K + pair % K]
                    rows = rows + G
                    at = at + 1
                compute(logits, dp, target, queries, grads, keys_t, values_t, rows)
                for r in T.serial(rows):
                    # The queries carry log2(e)/sqrt(D), which dK takes over from them but for the log2(e).
                    gradient(delta, logits, dp, r * KEYS, weight[r] * T.float32(1 / LOG2E), weight[r])
                add_transposed(d_keys, target, dp, queries, key_blocks, rows)
                add_transposed(d_values, target, logits, grads, key_blocks, rows)
            for s in T.serial(S):
                for d in T.serial(D):
                    d_k[memory + s * (Hkv * D) + d] = d_keys[s * WIDTH + d]
                    d_v[memory + s * (Hkv * D) + d] = d_values[s * WIDTH + d]

    arguments = (
        *TENSORS[:4], "weights", "d_k", "d_v", "pairs_end", "pairs", "keys_t", "values_t", "queries", "grads", "logits",
        "dp", "weight", "d_keys", "d_values", "target",
    )  # fmt: skip
    return Stage("memory", memory_pass, f"B * {Hkv} * C", arguments)


def program(problem: ChunkAttention, tile: CpuTile) -> Program:
    """The backward pass: the lists of pairs, then dQ and dW by tiles of tokens, then dK and dV by chunks."""
    lay = Layout(problem, tile)
    rows, block = lay.rows, str(lay.width * lay.keys)
    own = {"keys": block, "values_t": block, "d_keys": block, "d_values": block, "grads": str(rows * lay.width),
           "dp": str(rows * lay.keys)}  # fmt: skip
    workspace = tuple(r for r in lay.workspace() if r.name != "values")
    workspace += tuple(Region(name, "float32", size) for name, size in own.items()) + (
        Region("slot", "int32", str(rows)),
    )
    stages = (
        pair_stage(problem.kv_heads, problem.kv_heads, problem.top_k),
        query_stage(problem, tile, lay),
        memory_stage(problem, tile, lay),
    )
    return Program(TENSORS, pair_regions(problem.kv_heads, problem.top_k), workspace, stages)
