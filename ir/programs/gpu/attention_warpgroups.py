"""Chunk attention's forward on sm_90a where warpgroups of 64 rows share a tile's chunks, each passing by what none of its
rows selected."""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ProblemError
from hsa_compile.ir.programs.gpu.attention_walk import Walk
from hsa_compile.ir.programs.gpu.union import ROW_GROUP, UnionLists

ROWS_EACH = 64  # of a warpgroup
THREADS_EACH = 128
REGISTERS = 65536  # of a multiprocessor
LOADER_REGISTERS = 24  # of a thread, the fewest there can be


def attend(lists: UnionLists) -> Any:
    """The walk with wgmma. One more warp loads the tile's chunks, ``stages`` ahead, into buffers that all warpgroups read.

    A warpgroup holds its 64 rows' state and meets no other one: they drift apart by as much as the buffers allow. It
    computes the logits of an entry while the tensor cores add the values of the entry before, those of its own rows.
    """
    p, tile = lists.problem, lists.tile
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    TOKENS, STAGES, SLOTS, RUN = tile.tokens, tile.stages, lists.slots, tile.run
    ROWS = -(-TOKENS * G // ROWS_EACH) * ROWS_EACH
    WARPS = ROWS // ROW_GROUP
    THREADS = 32 * WARPS
    if THREADS + THREADS_EACH > 1024:
        raise ProblemError(f"tokens * groups must be at most {7 * ROWS_EACH} in the form of warpgroups")
    if STAGES < 2:
        raise ProblemError("warpgroups that share chunks need stages of 2 or more")
    # For how many entries that it passes by a warpgroup may put off its last product: until then it holds the buffer of
    # the values, and may not wait for a chunk that is to come there.
    HELD = max(1, STAGES // 2)
    # A block starts with as many registers as its launch bounds allow, and can only share out those: with more than
    # that, a warpgroup would wait for ever.
    start = REGISTERS // (tile.blocks * (THREADS + THREADS_EACH)) // 8 * 8
    EACH = min(240, start + (start - LOADER_REGISTERS) * THREADS_EACH // THREADS // 8 * 8)
    SHARED_OUT = LOADER_REGISTERS < start < EACH
    FULL_ROW = T.GemmWarpPolicy.FullRow
    walk = Walk(lists, ROWS)
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    @T.macro
    def step(stage: T.Ref, phase: T.Ref):
        stage = stage + 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1

    @T.macro
    def load(q, queries, b, bh, t0, L, tx):
        """A warpgroup's rows of the tile, by its own threads; rows of no token hold another's."""
        for j in T.unroll(D // 16):
            x = j * THREADS_EACH + tx % THREADS_EACH
            r = tx // THREADS_EACH * ROWS_EACH + x // (D // 8)
            token = T.min(t0 + T.min(r // G, TOKENS - 1), L - 1)
            for u in T.vectorized(8):
                queries[r, x % (D // 8) * 8 + u] = q[b, token, bh * G + r % G, x % (D // 8) * 8 + u]

    @T.macro
    def store(o, queries, b, bh, t0, L, tx):
        """As ``load``: every thread takes what it may then load over."""
        for j in T.unroll(D // 16):
            x = j * THREADS_EACH + tx % THREADS_EACH
            r = tx // THREADS_EACH * ROWS_EACH + x // (D // 8)
            if r < TOKENS * G and t0 + r // G < L:
                for u in T.vectorized(8):
                    o[b, t0 + r // G, bh * G + r % G, x % (D // 8) * 8 + u] = queries[r, x % (D // 8) * 8 + u]

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, C, S, Hkv, D), p.dtype),
        v: T.Tensor((B, C, S, Hkv, D), p.dtype), count: T.Tensor((N,), "int32"), chunk: T.Tensor((N, SLOTS), "int32"),
        active: T.Tensor((N, SLOTS), "int32"), slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"),
        slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"), o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(T.ceildiv(L, TOKENS), RUN), Hkv, B, threads=THREADS + THREADS_EACH) as (bt, bh, bb):
            queries = T.alloc_shared((ROWS, D), p.dtype)
            keys = T.alloc_shared((STAGES, S, D), p.dtype)
            values = T.alloc_shared((STAGES, S, D), p.dtype)
            logits = T.alloc_fragment((ROWS, S), "float32")
            P = T.alloc_fragment((ROWS, S), p.dtype)
            sums = T.alloc_fragment((ROWS, D), "float32")
            peak = T.alloc_fragment((ROWS,), "float32")
            factor = T.alloc_fragment((ROWS,), "float32")
            following = walk.alloc(walk.state_shape, "int32")
            following_weight = walk.alloc(walk.state_shape, "float32")
            slot = walk.alloc(walk.state_shape, "int32")
            weight = walk.alloc(walk.weight_shape, "float32")
            keys_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            values_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            held = T.alloc_var("int32")  # by lane: of the entries i // 32 * 32 + lane
            bits = T.alloc_var("int32")
            c = T.alloc_var("int32")
            stage = T.alloc_var("int32")
            phase = T.alloc_var("int32")
            last_stage = T.alloc_var("int32")  # of the entry whose values are still to be added, or -1
            last_phase = T.alloc_var("int32")
            wait = T.alloc_var("int32")  # entries since
            T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            b = T.cast(bb, "int64")
            tiles = T.ceildiv(L, TOKENS)
            first = T.cast(bt, "int64") * RUN
            stage = 0
            phase = 0
            if tx < THREADS:
                if SHARED_OUT:
                    T.inc_max_nreg(EACH)
                for j in T.serial(T.cast(T.min(RUN, tiles - first), "int32")):
                    t0 = (first + j) * TOKENS
                    n = (b * Hkv + bh) * tiles + first + j
                    entries = count[n]
                    load(q, queries, b, bh, t0, L, tx)
                    walk.start(n, tx, following, following_weight, slot, slot_entry, slot_weight)
                    T.fill(sums, 0.0)
                    T.fence_proxy_async()
                    T.sync_threads(1 + tx // THREADS_EACH, THREADS_EACH)
                    last_stage = -1
                    for i in T.serial(entries):
                        if i % 32 == 0:
                            held = active[n, T.min(i + tx % 32, SLOTS - 1)]
                        bits = T.shfl_sync(held, i % 32)
                        if ((bits >> (tx // THREADS_EACH * 4)) & 15) != 0:
                            walk.advance(i, n, following, following_weight, slot, weight, slot_entry, slot_weight)
                            T.barrier_wait(keys_ready[stage], phase)
                            T.wgmma_gemm(
                                queries,
                                keys[stage, :, :],
                                logits,
                                transpose_B=True,
                                policy=FULL_ROW,
                                clear_accum=True,
                            )
                            if last_stage >= 0:
                                T.barrier_wait(values_ready[last_stage], last_phase)
                                T.wgmma_gemm(P, values[last_stage, :, :], sums, policy=FULL_ROW)
                                T.wait_wgmma(1)
                                walk.weigh(tx, bits, logits, peak, factor, weight)
                                T.wait_wgmma(0)
                                if tx % 32 == 0:
                                    T.barrier_arrive(free[last_stage])
                            else:
                                T.wait_wgmma(0)
                                walk.weigh(tx, bits, logits, peak, factor, weight)
                            walk.probabilities(P, logits, factor, weight)
                            last_stage = stage
                            last_phase = phase
                            wait = 0
                        else:
                            wait = wait + 1
                            if last_stage >= 0 and wait == HELD:
                                T.barrier_wait(values_ready[last_stage], last_phase)
                                T.wgmma_gemm(P, values[last_stage, :, :], sums, policy=FULL_ROW)
                                T.wait_wgmma(0)
                                if tx % 32 == 0:
                                    T.barrier_arrive(free[last_stage])
                                last_stage = -1
                            # Not before the loader used the buffer's last release: that could be of another warp's.
                            T.barrier_wait(keys_ready[stage], phase)
                            if tx % 32 == 0:
                                T.barrier_arrive(free[stage])
                        step(stage, phase)
                    if last_stage >= 0:
                        T.barrier_wait(values_ready[last_stage], last_phase)
                        T.wgmma_gemm(P, values[last_stage, :, :], sums, policy=FULL_ROW)
                        T.wait_wgmma(0)
                        if tx % 32 == 0:
                            T.barrier_arrive(free[last_stage])
                    # By way of shared memory, so that full sectors reach the output, once no product reads the queries.
                    T.sync_threads(1 + tx // THREADS_EACH, THREADS_EACH)
                    for r, d in T.Parallel(ROWS, D):
                        queries[r, d] = sums[r, d]
                    T.sync_threads(1 + tx // THREADS_EACH, THREADS_EACH)
                    store(o, queries, b, bh, t0, L, tx)
            else:
                if SHARED_OUT:
                    T.dec_max_nreg(LOADER_REGISTERS)
                if tx < THREADS + 32:
                    for j in T.serial(T.cast(T.min(RUN, tiles - first), "int32")):
                        n = (b * Hkv + bh) * tiles + first + j
                        entries = count[n]
                        for i in T.serial(entries):
                            if i % 32 == 0:
                                held = chunk[n, T.min(i + tx % 32, SLOTS - 1)]
                            c = T.shfl_sync(held, i % 32)
                            T.barrier_wait(free[stage], phase ^ 1)  # passes in the first round
                            T.tma_copy(k[bb, c, :, bh, :], keys[stage, :, :], barrier=keys_ready[stage])
                            T.barrier_arrive(keys_ready[stage])
                            T.tma_copy(v[bb, c, :, bh, :], values[stage, :, :], barrier=values_ready[stage])
                            T.barrier_arrive(values_ready[stage])
                            step(stage, phase)

    return attend
