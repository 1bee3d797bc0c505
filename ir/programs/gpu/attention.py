"""Chunk attention on GPUs, forward.

A tile of T neighbouring tokens of one kv head (T*G query rows) walks the union of their chunk lists once. For every
chunk, one product gives the logits of all rows, a softmax runs inside the chunk, and the row's weight for this chunk,
zero where its token did not select it, scales the row before the second product adds it to the output. Partial outputs
of chunks add up linearly, so nothing is rescaled and no order is kept. Overlap between neighbours is what makes this
fast: K tokens of keys are loaded |U| times a tile instead of T*K times.

It has four forms. By ``rows`` (here) all rows of a tile meet all chunks of its list; by ``warpgroups`` every 64 rows meet
those that one of their tokens selected, by ``warps`` every 16; by ``token``, for decoding, nothing is shared.

Rows do not touch each other: a row's weight of zero makes its probabilities exactly zero, so NaN in a query row or in
the keys of a chunk stays with the tokens that own or selected it. NaN or infinity in the *values* of a chunk can reach
other tokens, because a matrix product turns 0 * NaN into NaN: by rows the T-1 neighbours in the tile, by warpgroups and
warps those that share 64 or 16 rows (by warps none where G is a multiple of 16), by token none.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch
from hsa_compile.ir.programs.gpu import attention_warpgroups, attention_warps, decode
from hsa_compile.ir.programs.gpu.attention_walk import OPTIONS, TENSORS, Walk, require_supported, tile_copies
from hsa_compile.ir.programs.gpu.union import ROW_GROUP, UnionLists

SM80_SHARED = 160 * 1024  # bytes of shared memory that a thread block may take on sm_80, rounded down


def program(problem: ChunkAttention, tile: GpuTile) -> GpuProgram:
    """The forward pass in the tile's form: by token (see ``decode``), or the union lists, then one thread block for every
    tile and kv head.

    Raises:
        ProblemError: see ``require_supported`` and ``UnionLists``.
    """
    require_supported(problem)
    if tile.form == "token":
        return decode.program(problem, tile)
    lists = UnionLists(problem, tile)
    regions = lists.regions()
    dims = {"B": "B", "L": "L", "C": "C", "N": lists.tiles}
    options = {**OPTIONS, "tl.disable_wgmma": True}
    if tile.form == "warps":
        attend = attention_warps.attend(lists)
    elif tile.form == "warpgroups":
        attend, options = attention_warpgroups.attend(lists), OPTIONS
    elif tile.wgmma:
        attend, options = _attend(lists), OPTIONS
    else:
        attend = _attend_mma(lists)
    launch = Launch("attend", attend, ("q", "k", "v", *(r.name for r in regions), "o"), dims, options)
    return GpuProgram(TENSORS, regions, (lists.launch(), launch))


def _attend(lists: UnionLists) -> Any:
    """The walk with wgmma. A warp issues bulk copies ``stages`` chunks ahead, into the buffers released an iteration
    before; the logits of the next chunk are computed while the tensor cores add this one's values."""
    p, tile = lists.problem, lists.tile
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    TOKENS, STAGES, SLOTS = tile.tokens, tile.stages, lists.slots
    ROWS = -(-TOKENS * G // 64) * 64
    WARPS = ROWS // ROW_GROUP
    TURNS = tuple(range(4))
    FULL_ROW = T.GemmWarpPolicy.FullRow
    walk = Walk(lists, ROWS)
    load, store = tile_copies(p, TOKENS, ROWS)
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
            following = walk.alloc(walk.state_shape, "int32")
            following_weight = walk.alloc(walk.state_shape, "float32")
            slot = walk.alloc(walk.state_shape, "int32")
            weight = walk.alloc(walk.weight_shape, "float32")
            keys_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            keys_free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            values_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            values_free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            bits = T.alloc_var("int32")
            key_chunk = T.alloc_var("int32")
            value_chunk = T.alloc_var("int32")
            head = T.alloc_local((STAGES,), "int32")
            if tile.blocks > 1:
                T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            b = T.cast(bb, "int64")
            t0 = T.cast(bt, "int64") * TOKENS
            n = (b * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            entries = count[n]

            if tx < 32:
                for i in T.unroll(STAGES):
                    head[i] = chunk[n, T.min(i, SLOTS - 1)]
                for i in T.unroll(STAGES):
                    if i < entries:
                        T.tma_copy(k[bb, head[i], :, bh, :], keys[i, :, :], barrier=keys_ready[i])
                        T.barrier_arrive(keys_ready[i])
                        if i < STAGES - 1:
                            T.tma_copy(v[bb, head[i], :, bh, :], values[i, :, :], barrier=values_ready[i])
                            T.barrier_arrive(values_ready[i])
            load(q, queries, b, bh, t0, L)
            T.fence_proxy_async()
            T.sync_threads()
            T.fill(sums, 0.0)
            if entries > 0:
                walk.start(n, tx, following, following_weight, slot, slot_entry, slot_weight)
                walk.advance(0, n, following, following_weight, slot, weight, slot_entry, slot_weight)
                bits = active[n, 0]
                T.barrier_wait(keys_ready[0], 0)
                T.wgmma_gemm(queries, keys[0, :, :], logits, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                T.wait_wgmma(0)
                if tx % 32 == 0:
                    T.barrier_arrive(keys_free[0])
                walk.weigh(tx, bits, logits, peak, factor, weight)
                walk.probabilities(P, logits, factor, weight)
                for i in T.serial(entries - 1):
                    # What the iteration will need is asked for first, so that it arrives during the products.
                    walk.advance(i + 1, n, following, following_weight, slot, weight, slot_entry, slot_weight)
                    if not walk.whole:
                        bits = active[n, i + 1]
                    if tx // 32 == i % len(TURNS):
                        key_chunk = chunk[n, T.min(i + STAGES, SLOTS - 1)]
                        value_chunk = chunk[n, T.min(i + STAGES - 1, SLOTS - 1)]
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
                    # Warps take turns, since a scheduler has the same warp of all blocks. The compiler must see that
                    # one warp loads, hence a copy of the loads for each.
                    for turn in TURNS:
                        if tx >= 32 * turn and tx < 32 * turn + 32:
                            if i % len(TURNS) == turn:
                                if i + STAGES < entries:
                                    T.barrier_wait(keys_free[i % STAGES], (i // STAGES) & 1)
                                    T.tma_copy(
                                        k[bb, key_chunk, :, bh, :],
                                        keys[i % STAGES, :, :],
                                        barrier=keys_ready[i % STAGES],
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
            # By way of shared memory, so that full sectors reach the output, once no warp's products read the queries.
            T.sync_threads()
            for r, d in T.Parallel(ROWS, D):
                queries[r, d] = sums[r, d]
            T.sync_threads()
            store(o, queries, b, bh, t0, L)

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
            following = walk.alloc(walk.state_shape, "int32")
            following_weight = walk.alloc(walk.state_shape, "float32")
            slot = walk.alloc(walk.state_shape, "int32")
            weight = walk.alloc(walk.weight_shape, "float32")
            tx = T.get_thread_binding()
            b = T.cast(bb, "int64")
            t0 = T.cast(bt, "int64") * TOKENS
            n = (b * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            load(q, queries, b, bh, t0, L)
            T.fill(sums, 0.0)
            walk.start(n, tx, following, following_weight, slot, slot_entry, slot_weight)
            for i in T.serial(count[n]):
                c = T.cast(chunk[n, i], "int64")
                walk.advance(i, n, following, following_weight, slot, weight, slot_entry, slot_weight)
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
