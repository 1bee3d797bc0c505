"""Chunk attention's forward on GPUs where every 16 rows of a tile meet the chunks that they selected, and no others."""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.programs.gpu.attention_walk import Walk, tile_copies
from hsa_compile.ir.programs.gpu.union import ROW_GROUP, UnionLists


def attend(lists: UnionLists) -> Any:
    """The walk with a warp for 16 rows: it multiplies the chunks that its rows selected and passes the others by.

    One more warp loads the tile's chunks, ``stages`` ahead, into buffers that all warps read. So a tile can have many
    tokens and load each chunk once for all of them, without multiplying what most did not select; wgmma's 64 rows
    would.
    """
    p, tile = lists.problem, lists.tile
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    TOKENS, STAGES, SLOTS = tile.tokens, tile.stages, lists.slots
    ROWS = -(-TOKENS * G // ROW_GROUP) * ROW_GROUP
    WARPS = ROWS // ROW_GROUP
    FULL_ROW = T.GemmWarpPolicy.FullRow
    walk = Walk(lists, ROWS)
    load, store = tile_copies(p, TOKENS, ROWS)
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    @T.macro
    def step(stage: T.Ref, phase: T.Ref):
        stage = stage + 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, C, S, Hkv, D), p.dtype),
        v: T.Tensor((B, C, S, Hkv, D), p.dtype), count: T.Tensor((N,), "int32"), chunk: T.Tensor((N, SLOTS), "int32"),
        active: T.Tensor((N, SLOTS), "int32"), slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"),
        slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"), o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, TOKENS), Hkv, B, threads=32 * (WARPS + 1)) as (bt, bh, bb):
            keys = T.alloc_shared((STAGES, S, D), p.dtype)
            values = T.alloc_shared((STAGES, S, D), p.dtype)
            queries = T.alloc_fragment((ROWS, D), p.dtype)
            logits = T.alloc_fragment((ROWS, S), "float32")
            P = T.alloc_fragment((ROWS, S), p.dtype)
            sums = T.alloc_fragment((ROWS, D), "float32")
            peak = T.alloc_fragment((ROWS,), "float32")
            factor = T.alloc_fragment((ROWS,), "float32")
            following = walk.alloc(walk.state_shape, "int32")
            following_weight = walk.alloc(walk.state_shape, "float32")
            slot = walk.alloc(walk.state_shape, "int32")
            weight = walk.alloc(walk.weight_shape, "float32")
            ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            bits = T.alloc_var("int32")
            stage = T.alloc_var("int32")
            phase = T.alloc_var("int32")
            if tile.blocks > 1:
                T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            b = T.cast(bb, "int64")
            t0 = T.cast(bt, "int64") * TOKENS
            n = (b * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            entries = count[n]
            stage = 0
            phase = 0
            if tx < 32 * WARPS:
                load(q, queries, b, bh, t0, L)
                T.fill(sums, 0.0)
                walk.start(n, tx, following, following_weight, slot, slot_entry, slot_weight)
                bits = active[n, 0]
                for i in T.serial(entries):
                    T.barrier_wait(ready[stage], phase)
                    if ((bits >> (tx // 32)) & 1) != 0:
                        T.gemm(
                            queries,
                            keys[stage, :, :],
                            logits,
                            transpose_B=True,
                            policy=FULL_ROW,
                            clear_accum=True,
                        )
                        walk.advance(i, n, following, following_weight, slot, weight, slot_entry, slot_weight)
                        walk.softmax(logits, peak, factor, weight)
                        if walk.whole:
                            for r, j in T.Parallel(ROWS, S):
                                P[r, j] = logits[r, j] * factor[r]
                        else:
                            walk.probabilities(P, logits, factor, weight)
                        T.gemm(P, values[stage, :, :], sums, policy=FULL_ROW)
                    bits = active[n, T.min(i + 1, SLOTS - 1)]
                    if tx % 32 == 0:
                        T.barrier_arrive(free[stage])
                    step(stage, phase)
                store(o, sums, b, bh, t0, L)
            else:
                for i in T.serial(entries):
                    if i >= STAGES:
                        T.barrier_wait(free[stage], phase ^ 1)
                    T.tma_copy(k[bb, chunk[n, i], :, bh, :], keys[stage, :, :], barrier=ready[stage])
                    T.tma_copy(v[bb, chunk[n, i], :, bh, :], values[stage, :, :], barrier=ready[stage])
                    T.barrier_arrive(ready[stage])
                    step(stage, phase)

    return attend
