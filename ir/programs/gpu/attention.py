"""Chunk attention on GPUs, forward.

A tile of T neighbouring tokens of one kv head (T*G query rows) walks the union of their chunk lists once. For every
chunk, one product gives the logits of all rows, a softmax runs inside the chunk, and the row's weight for this chunk,
zero where its token did not select it, scales the row before the second product adds it to the output. Partial outputs
of chunks add up linearly, so nothing is rescaled and no order is kept. Overlap between neighbours is what makes this
fast: K tokens of keys are loaded |U| times a tile instead of T*K times.

Rows do not touch each other: a row's weight of zero makes its probabilities exactly zero, so NaN in a query row or in
the keys of a chunk stays with the tokens that own or selected it. NaN or infinity in the *values* of a chunk can reach
the other tokens of a tile, at most T-1 neighbours, because a matrix product turns 0 * NaN into NaN.
"""

import math
from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch
from hsa_compile.ir.programs.gpu.union import EMPTY, ROW_GROUP, UnionLists

LOG2E = math.log2(math.e)
SM80_SHARED = 160 * 1024  # bytes of shared memory that a thread block may take on sm_80, rounded down
TENSORS = ("q", "k", "v", "indices", "weights", "o")
# Every exchange through shared memory has its barrier written out; the compiler would add one to every iteration.
OPTIONS = {
    "tl.enable_fast_math": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_warp_specialized": True,
}


def require_supported(problem: ChunkAttention) -> None:
    """Says which problems the GPU programs of chunk attention compute.

    Raises:
        ProblemError: fp32, a head width that is not a multiple of 16 up to 256, or such a chunk size.
    """
    if problem.dtype == "float32":
        raise ProblemError("compiled GPU kernels are float16 or bfloat16; float32 runs on the Triton backend")
    for name, value, least in (("head_dim", problem.head_dim, 16), ("chunk_size", problem.chunk_size, 16)):
        if value % 16 or not least <= value <= 256:
            raise ProblemError(f"compiled GPU kernels need {name} to be a multiple of 16 up to 256, got {value}")


def program(problem: ChunkAttention, tile: GpuTile) -> GpuProgram:
    """The forward pass: the union lists, then one thread block for every tile and kv head.

    Raises:
        ProblemError: see ``require_supported`` and ``UnionLists``.
    """
    require_supported(problem)
    lists = UnionLists(problem, tile)
    regions = lists.regions()
    dims = {"B": "B", "L": "L", "C": "C", "N": lists.tiles}
    attend = _attend(lists) if tile.wgmma else _attend_mma(lists)
    options = OPTIONS if tile.wgmma else {**OPTIONS, "tl.disable_wgmma": True}
    launch = Launch("attend", attend, ("q", "k", "v", *(r.name for r in regions), "o"), dims, options)
    return GpuProgram(TENSORS, regions, (lists.launch(), launch))


class Walk:
    """What a tile's rows do at every entry of its list, as macros that both kinds of matrix instructions share.

    Row t*G + g is query head g of token t, and a warp owns 16 rows in a row. ``state`` is, for every row, its token's
    next entry, the weight there, the place among the token's slots, and the weight at the current entry.
    """

    def __init__(self, lists: UnionLists, rows: int) -> None:
        p, TOKENS = lists.problem, lists.tile.tokens
        S, G = p.chunk_size, p.groups
        scale = p.scale * LOG2E
        # If a warp's rows belong to one token, its weight is zero for all of them or for none: skipping the chunks that
        # the token did not select is then all the masking there is to do, and a thread follows one token, not two rows.
        self.whole = WHOLE = G % ROW_GROUP == 0
        self.state_shape = (1,) if WHOLE else (rows,)

        @T.macro
        def start(n, tx, following, following_weight, slot, slot_entry, slot_weight):
            if WHOLE:
                token = tx // (2 * G)
                slot[0] = 0
                following[0] = T.if_then_else(token < TOKENS, slot_entry[n, T.min(token, TOKENS - 1), 0], EMPTY)
                following_weight[0] = slot_weight[n, T.min(token, TOKENS - 1), 0]
            else:
                for r in T.Parallel(rows):
                    slot[r] = 0
                    following[r] = T.if_then_else(r // G < TOKENS, slot_entry[n, T.min(r // G, TOKENS - 1), 0], EMPTY)
                    following_weight[r] = slot_weight[n, T.min(r // G, TOKENS - 1), 0]

        @T.macro
        def advance(i, n, tx, following, following_weight, slot, weight, slot_entry, slot_weight):
            """Sets the weights at entry i; rows whose token selected it step to the token's next slot."""
            if WHOLE:
                weight[0] = 0.0
                if following[0] == i:
                    weight[0] = following_weight[0]
                    slot[0] = slot[0] + 1
                    following[0] = slot_entry[n, T.min(tx // (2 * G), TOKENS - 1), slot[0]]
                    following_weight[0] = slot_weight[n, T.min(tx // (2 * G), TOKENS - 1), slot[0]]
            else:
                for r in T.Parallel(rows):
                    weight[r] = 0.0
                    if following[r] == i:
                        weight[r] = following_weight[r]
                        slot[r] = slot[r] + 1
                        following[r] = slot_entry[n, T.min(r // G, TOKENS - 1), slot[r]]
                        following_weight[r] = slot_weight[n, T.min(r // G, TOKENS - 1), slot[r]]

        @T.macro
        def softmax(logits, peak, factor, weight):
            """Leaves the exponentials in ``logits`` and weight / denominator in ``factor``."""
            T.reduce_max(logits, peak, dim=1, clear=True)
            for r in T.Parallel(rows):
                peak[r] = (T.max(peak[r], 0.0) if p.off_by_one else peak[r]) * scale
            for r, j in T.Parallel(rows, S):
                logits[r, j] = T.exp2(logits[r, j] * scale - peak[r])
            T.reduce_sum(logits, factor, dim=1)
            for r in T.Parallel(rows):
                factor[r] = weight[0 if WHOLE else r] / (factor[r] + (T.exp2(-peak[r]) if p.off_by_one else 0.0))

        @T.macro
        def weigh(tx, bits, logits, peak, factor, weight):
            """The softmax, in the warps of which a row has a weight; ``bits`` says which, 16 rows a bit."""
            if WHOLE:
                if weight[0] != 0.0:
                    softmax(logits, peak, factor, weight)
            else:
                if ((bits >> (tx // 32)) & 1) != 0:
                    softmax(logits, peak, factor, weight)

        @T.macro
        def probabilities(P, logits, factor, weight):
            """Weighted probabilities: exactly zero where the weight is, whatever the logits are."""
            for r, j in T.Parallel(rows, S):
                P[r, j] = T.if_then_else(weight[0 if WHOLE else r] == 0.0, 0.0, logits[r, j] * factor[r])

        self.start, self.advance, self.weigh, self.probabilities = start, advance, weigh, probabilities


def tile_copies(problem: ChunkAttention, tokens: int, rows: int) -> Any:
    """Macros that bring a tile's query rows to shared memory (zeros in the rows of no token) and its sums to ``o``."""
    G = problem.groups

    @T.macro
    def load(q, queries, b, bh, t0, L):
        for r, d in T.Parallel(rows, problem.head_dim):
            token = T.min(t0 + T.min(r // G, tokens - 1), L - 1)
            queries[r, d] = q[b, token, bh * G + r % G, d]

    @T.macro
    def store(o, sums, b, bh, t0, L):
        for r, d in T.Parallel(rows, problem.head_dim):
            if r < tokens * G and t0 + r // G < L:
                o[b, t0 + r // G, bh * G + r % G, d] = sums[r, d]

    return load, store


def _attend(lists: UnionLists) -> Any:
    """The walk with wgmma. Warp 0 issues bulk copies ``stages`` chunks ahead, into the buffers released an iteration
    before; the logits of the next chunk are computed while the tensor cores add this one's values."""
    p, tile = lists.problem, lists.tile
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    TOKENS, STAGES, SLOTS = tile.tokens, tile.stages, lists.slots
    ROWS = -(-TOKENS * G // 64) * 64
    WARPS = ROWS // ROW_GROUP
    FULL_ROW = T.GemmWarpPolicy.FullRow
    walk = Walk(lists, ROWS)
    load, store = tile_copies(p, TOKENS, ROWS)
    alloc_state = T.alloc_local if walk.whole else T.alloc_fragment
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, C, S, Hkv, D), p.dtype),
        v: T.Tensor((B, C, S, Hkv, D), p.dtype), count: T.Tensor((N,), "int32"), chunk: T.Tensor((N, SLOTS), "int32"),
        active: T.Tensor((N, SLOTS), "int32"), slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"),
        slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"), o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, TOKENS), Hkv, B, threads=32 * WARPS) as (bt, bh, bb):
            queries = T.alloc_shared((ROWS, D), p.dtype)
            keys = T.alloc_shared((STAGES, S, D), p.dtype)
            values = T.alloc_shared((STAGES, S, D), p.dtype)
            logits = T.alloc_fragment((ROWS, S), "float32")
            P = T.alloc_fragment((ROWS, S), p.dtype)
            sums = T.alloc_fragment((ROWS, D), "float32")
            peak = T.alloc_fragment((ROWS,), "float32")
            factor = T.alloc_fragment((ROWS,), "float32")
            following = alloc_state(walk.state_shape, "int32")
            following_weight = alloc_state(walk.state_shape, "float32")
            slot = alloc_state(walk.state_shape, "int32")
            weight = alloc_state(walk.state_shape, "float32")
            keys_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            keys_free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            values_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            values_free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            bits = T.alloc_var("int32")
            key_chunk = T.alloc_var("int32")
            value_chunk = T.alloc_var("int32")
            if tile.blocks > 1:
                T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            b = T.cast(bb, "int64")
            t0 = T.cast(bt, "int64") * TOKENS
            n = (b * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            entries = count[n]

            if tx < 32:
                for i in T.unroll(STAGES):
                    if i < entries:
                        T.tma_copy(k[bb, chunk[n, i], :, bh, :], keys[i, :, :], barrier=keys_ready[i])
                        T.barrier_arrive(keys_ready[i])
                        if i < STAGES - 1:
                            T.tma_copy(v[bb, chunk[n, i], :, bh, :], values[i, :, :], barrier=values_ready[i])
                            T.barrier_arrive(values_ready[i])
            load(q, queries, b, bh, t0, L)
            T.fence_proxy_async()
            T.sync_threads()
            T.fill(sums, 0.0)
            if entries > 0:
                walk.start(n, tx, following, following_weight, slot, slot_entry, slot_weight)
                walk.advance(0, n, tx, following, following_weight, slot, weight, slot_entry, slot_weight)
                bits = active[n, 0]
                value_chunk = chunk[n, T.min(STAGES - 1, SLOTS - 1)]
                T.barrier_wait(keys_ready[0], 0)
                T.wgmma_gemm(queries, keys[0, :, :], logits, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                T.wait_wgmma(0)
                if tx % 32 == 0:
                    T.barrier_arrive(keys_free[0])
                walk.weigh(tx, bits, logits, peak, factor, weight)
                walk.probabilities(P, logits, factor, weight)
                for i in T.serial(entries - 1):
                    # What the iteration will need is asked for first, so that it arrives during the products.
                    walk.advance(i + 1, n, tx, following, following_weight, slot, weight, slot_entry, slot_weight)
                    if not walk.whole:
                        bits = active[n, i + 1]
                    key_chunk = chunk[n, T.min(i + STAGES, SLOTS - 1)]
                    T.barrier_wait(keys_ready[(i + 1) % STAGES], ((i + 1) // STAGES) & 1)
                    T.wgmma_gemm(
                        queries,
                        keys[(i + 1) % STAGES, :, :],
                        logits,
                        transpose_B=True,
                        policy=FULL_ROW,
                        clear_accum=True,
                    )
                    T.barrier_wait(values_ready[i % STAGES], (i // STAGES) & 1)
                    T.wgmma_gemm(P, values[i % STAGES, :, :], sums, policy=FULL_ROW)
                    # The keys of entry i and the values of entry i-1 were used an iteration ago: refill their buffers.
                    if tx < 32:
                        if i + STAGES < entries:
                            T.barrier_wait(keys_free[i % STAGES], (i // STAGES) & 1)
                            T.tma_copy(
                                k[bb, key_chunk, :, bh, :], keys[i % STAGES, :, :], barrier=keys_ready[i % STAGES]
                            )
                            T.barrier_arrive(keys_ready[i % STAGES])
                        if i + STAGES - 1 < entries:
                            if i > 0:
                                T.barrier_wait(values_free[(i + STAGES - 1) % STAGES], ((i - 1) // STAGES) & 1)
                            T.tma_copy(
                                v[bb, value_chunk, :, bh, :],
                                values[(i + STAGES - 1) % STAGES, :, :],
                                barrier=values_ready[(i + STAGES - 1) % STAGES],
                            )
                            T.barrier_arrive(values_ready[(i + STAGES - 1) % STAGES])
                    value_chunk = key_chunk
                    T.wait_wgmma(1)
                    if tx % 32 == 0:
                        T.barrier_arrive(keys_free[(i + 1) % STAGES])
                    walk.weigh(tx, bits, logits, peak, factor, weight)
                    T.wait_wgmma(0)
                    if tx % 32 == 0:
                        T.barrier_arrive(values_free[i % STAGES])
                    walk.probabilities(P, logits, factor, weight)
                T.barrier_wait(values_ready[(entries - 1) % STAGES], ((entries - 1) // STAGES) & 1)
                T.wgmma_gemm(P, values[(entries - 1) % STAGES, :, :], sums, policy=FULL_ROW)
                T.wait_wgmma(0)
            store(o, sums, b, bh, t0, L)

    return attend


def _attend_mma(lists: UnionLists) -> Any:
    """The walk with the matrix instructions of sm_80: one chunk at a time, several thread blocks on a multiprocessor to
    hide its loads. Chunks too large for two buffers put the values where the keys were."""
    p, tile = lists.problem, lists.tile
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    TOKENS, SLOTS = tile.tokens, lists.slots
    ROWS = -(-TOKENS * G // 64) * 64
    WARPS = ROWS // ROW_GROUP
    SHARE = (ROWS + 2 * S) * D * 2 > SM80_SHARED
    FULL_ROW = T.GemmWarpPolicy.FullRow
    walk = Walk(lists, ROWS)
    load, store = tile_copies(p, TOKENS, ROWS)
    alloc_state = T.alloc_local if walk.whole else T.alloc_fragment
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, C, S, Hkv, D), p.dtype),
        v: T.Tensor((B, C, S, Hkv, D), p.dtype), count: T.Tensor((N,), "int32"), chunk: T.Tensor((N, SLOTS), "int32"),
        active: T.Tensor((N, SLOTS), "int32"), slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"),
        slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"), o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, TOKENS), Hkv, B, threads=32 * WARPS) as (bt, bh, bb):
            queries = T.alloc_shared((ROWS, D), p.dtype)
            keys = T.alloc_shared((S, D), p.dtype)
            values = keys if SHARE else T.alloc_shared((S, D), p.dtype)
            logits = T.alloc_fragment((ROWS, S), "float32")
            P = T.alloc_fragment((ROWS, S), p.dtype)
            sums = T.alloc_fragment((ROWS, D), "float32")
            peak = T.alloc_fragment((ROWS,), "float32")
            factor = T.alloc_fragment((ROWS,), "float32")
            following = alloc_state(walk.state_shape, "int32")
            following_weight = alloc_state(walk.state_shape, "float32")
            slot = alloc_state(walk.state_shape, "int32")
            weight = alloc_state(walk.state_shape, "float32")
            tx = T.get_thread_binding()
            b = T.cast(bb, "int64")
            t0 = T.cast(bt, "int64") * TOKENS
            n = (b * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            load(q, queries, b, bh, t0, L)
            T.fill(sums, 0.0)
            walk.start(n, tx, following, following_weight, slot, slot_entry, slot_weight)
            for i in T.serial(count[n]):
                c = T.cast(chunk[n, i], "int64")
                walk.advance(i, n, tx, following, following_weight, slot, weight, slot_entry, slot_weight)
                T.sync_threads()
                T.copy(k[b, c, :, bh, :], keys)
                if not SHARE:
                    T.copy(v[b, c, :, bh, :], values)
                T.sync_threads()
                T.gemm(queries, keys, logits, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                walk.weigh(tx, active[n, i], logits, peak, factor, weight)
                walk.probabilities(P, logits, factor, weight)
                if SHARE:
                    T.sync_threads()
                    T.copy(v[b, c, :, bh, :], values)
                    T.sync_threads()
                T.gemm(P, values, sums, policy=FULL_ROW)
            store(o, sums, b, bh, t0, L)

    return attend
