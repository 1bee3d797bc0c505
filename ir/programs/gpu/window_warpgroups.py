"""The sliding window's attention on sm_90a: warpgroups of 64 rows share the blocks of keys that one more warp loads.

A tile of T tokens meets its keys in blocks, newest first. Those of the segment end at the tile's last token; those of the
ring are runs of its slots, which wrap once, so that every block is one bulk copy. Blocks overshoot towards older keys
alone: no token's values, NaN or not, reach a token before it, and slots without a key are never loaded.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ProblemError, SlidingWindow
from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu.attention_warpgroups import LOADER_REGISTERS, REGISTERS, ROWS_EACH, THREADS_EACH
from hsa_compile.ir.programs.gpu.window_places import LOG2E, LOWEST, of_row

MULTIPROCESSORS = 132  # of an H100 or H200
WARP_ROWS = 16


class Blocks:
    """Where a tile's blocks of keys lie, as macros.

    The first ``fresh`` blocks are of the segment. Those until ``recent`` are of slots 0 to ``newest``, the others of the
    slots above, whose keys are older. A block ends where the one before begins.
    """

    def __init__(self, window: int, keys: int) -> None:
        W = window

        @T.macro
        def count(low, high, newest, fresh: T.Ref, recent: T.Ref, blocks: T.Ref):
            """Sets how many blocks reach from place ``high`` - 1 down to ``low``."""
            fresh = T.ceildiv(high - T.max(low, 0), keys)
            recent = fresh + T.ceildiv(T.min(T.max(-low, 0), newest + 1), keys)
            blocks = recent + T.ceildiv(T.max(-low - newest - 1, 0), keys)

        @T.macro
        def locate(i, high, newest, fresh, recent, first: T.Ref, floor: T.Ref):
            """Sets the place of block i's first key, and of the oldest that no other block has, or nobody."""
            first = high - (i + 1) * keys
            floor = 0
            if i >= fresh:
                first = -(i - fresh + 1) * keys
                floor = -(newest + 1)
            if i >= recent:
                first = -(newest + 1) - (i - recent + 1) * keys
                floor = -W

        @T.macro
        def start(i, high, newest, fresh, recent, row: T.Ref):
            """Sets the token of the segment, or the slot, that block i begins with; what is not there is loaded as zeros."""
            row = high - (i + 1) * keys
            if i >= fresh:
                row = newest + 1 - (i - fresh + 1) * keys
            if i >= recent:
                row = W - (i - recent + 1) * keys

        self.count, self.locate, self.start = count, locate, start


def _softmax(p: SlidingWindow, rows: int, keys: int) -> Any:
    """A macro that turns a block's logits into exponentials in the warps that see it, and says which do (``seen``).

    Only blocks at either end of a warp's windows are masked. ``factor`` is what becomes of the sums until now.
    """
    W, G, scale = p.window, p.groups, p.scale * LOG2E

    @T.macro
    def weigh(logits, t0, first, floor, tx, seen: T.Ref, highest, peak, factor, total):
        eldest = t0 + tx // 32 * WARP_ROWS // G
        youngest = t0 + (tx // 32 * WARP_ROWS + WARP_ROWS - 1) // G
        seen = 0
        if first <= youngest and first + (keys - 1) >= T.max(eldest - (W - 1), floor):
            seen = 1
        T.fill(factor, 1.0)
        # As a block of its own, or the compiler lets the softmax wait for the product that it is to run beside.
        if seen != 0:
            if first + (keys - 1) > eldest or first < T.max(youngest - (W - 1), floor):
                for r, j in T.Parallel(rows, keys):
                    token = t0 + r // G
                    if first + j > token or first + j < T.max(token - (W - 1), floor):
                        logits[r, j] = LOWEST
            for r in T.Parallel(rows):
                factor[r] = peak[r]
            T.reduce_max(logits, peak, dim=1, clear=False)
            for r in T.Parallel(rows):
                highest[r] = peak[r] * scale
                factor[r] = T.exp2(factor[r] * scale - highest[r])
            for r, j in T.Parallel(rows, keys):
                logits[r, j] = T.exp2(logits[r, j] * scale - highest[r])
            T.reduce_sum(logits, highest, dim=1)
            for r in T.Parallel(rows):
                total[r] = total[r] * factor[r] + highest[r]

    return weigh


def _copies(p: SlidingWindow, tokens: int) -> Any:
    """Macros of a warpgroup's threads that bring its rows to shared memory and from there to ``o``, full sectors at once;
    rows of no token hold another's. A thread stores the elements that it loads."""
    D, G = p.head_dim, p.groups

    @T.macro
    def load(q, queries, b, bh, t0, L, tx):
        for j in T.unroll(D // 16):
            x = j * THREADS_EACH + tx % THREADS_EACH
            r = tx // THREADS_EACH * ROWS_EACH + x // (D // 8)
            token = T.min(T.cast(t0 + T.min(r // G, tokens - 1), "int64"), L - 1)
            for u in T.vectorized(8):
                queries[r, x % (D // 8) * 8 + u] = q[b, token, bh * G + r % G, x % (D // 8) * 8 + u]

    @T.macro
    def store(o, queries, b, bh, t0, L, tx):
        for j in T.unroll(D // 16):
            x = j * THREADS_EACH + tx % THREADS_EACH
            r = tx // THREADS_EACH * ROWS_EACH + x // (D // 8)
            token = T.cast(t0 + r // G, "int64")
            if r < tokens * G and token < L:
                for u in T.vectorized(8):
                    o[b, token, bh * G + r % G, x % (D // 8) * 8 + u] = queries[r, x % (D // 8) * 8 + u]

    return load, store


def attend(p: SlidingWindow, tile: GpuTile) -> Any:
    """Outputs of all tiles; row t*G + g of a tile is query head g of token t.

    As many thread blocks as fit take tile after tile, and load ahead across tiles. A warpgroup computes the logits of a
    block while the tensor cores add the values of the block before, and passes by blocks that none of its tokens sees.

    Raises:
        ProblemError: a tile that no thread block can have.
    """
    Hq, Hkv, D, W, G = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups
    TOKENS, STAGES, KEYS, MOST = tile.tokens, tile.stages, tile.slots, MULTIPROCESSORS * tile.blocks
    ROWS = -(-TOKENS * G // ROWS_EACH) * ROWS_EACH
    WARPS = ROWS // WARP_ROWS
    THREADS = 32 * WARPS
    if THREADS + THREADS_EACH > 1024:
        raise ProblemError(f"tokens * groups must be at most {7 * ROWS_EACH} in the form of warpgroups")
    if STAGES < 2 or KEYS % 16 or KEYS > 256:
        raise ProblemError(f"warpgroups need 2 stages and a multiple of 16 keys up to 256, got {STAGES} and {KEYS}")
    # As in ``attention_warpgroups``: a block shares out the registers that its launch bounds give it.
    start = REGISTERS // (tile.blocks * (THREADS + THREADS_EACH)) // 8 * 8
    EACH = min(240, start + (start - LOADER_REGISTERS) * THREADS_EACH // THREADS // 8 * 8)
    LEFT = (start * (THREADS + THREADS_EACH) - EACH * THREADS) // THREADS_EACH // 8 * 8
    SHARED_OUT = LOADER_REGISTERS < start < EACH
    FULL_ROW = T.GemmWarpPolicy.FullRow
    where, weigh = Blocks(W, KEYS), _softmax(p, ROWS, KEYS)
    load, store = _copies(p, TOKENS)
    B, L = (T.dynamic(n, "int64") for n in ("B", "L"))

    @T.macro
    def step(stage: T.Ref, phase: T.Ref):
        stage = stage + 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1

    @T.macro
    def begin_tile(
        n, along, position, lengths, L, b: T.Ref, bh: T.Ref, t0: T.Ref, newest: T.Ref, oldest: T.Ref, count: T.Ref,
        high: T.Ref, fresh: T.Ref, recent: T.Ref, blocks: T.Ref,
    ):  # fmt: skip
        t0 = n % along * TOKENS
        bh = n // along % Hkv
        b = n // along // Hkv
        newest, oldest, count = of_row(position, lengths, b, L, W)
        high = T.min(t0 + TOKENS, count)
        blocks = 0
        if t0 < count:
            where.count(T.max(t0 - (W - 1), oldest), high, newest, fresh, recent, blocks)

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, L, Hkv, D), p.dtype), v: T.Tensor((B, L, Hkv, D), p.dtype),
        past_k: T.Tensor((B, W, Hkv, D), p.dtype), past_v: T.Tensor((B, W, Hkv, D), p.dtype),
        position: T.Tensor((B,), "int64"), lengths: T.Tensor((B,), "int64"), o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(T.min(B * Hkv * T.ceildiv(L, TOKENS), MOST), threads=THREADS + THREADS_EACH) as bx:
            queries = T.alloc_shared((ROWS, D), p.dtype)
            keys = T.alloc_shared((STAGES, KEYS, D), p.dtype)
            values = T.alloc_shared((STAGES, KEYS, D), p.dtype)
            logits = T.alloc_fragment((ROWS, KEYS), "float32")
            P = T.alloc_fragment((ROWS, KEYS), p.dtype)
            sums = T.alloc_fragment((ROWS, D), "float32")
            peak = T.alloc_fragment((ROWS,), "float32")
            highest = T.alloc_fragment((ROWS,), "float32")
            factor = T.alloc_fragment((ROWS,), "float32")
            total = T.alloc_fragment((ROWS,), "float32")
            keys_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            values_ready = T.alloc_barrier(arrive_count=[32] * STAGES)
            keys_free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            values_free = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
            stage = T.alloc_var("int32")
            phase = T.alloc_var("int32")
            last_stage = T.alloc_var("int32")  # of the block whose values are still to be added
            b = T.alloc_var("int32")
            bh = T.alloc_var("int32")
            t0 = T.alloc_var("int32")
            newest = T.alloc_var("int32")
            oldest = T.alloc_var("int32")
            count = T.alloc_var("int32")
            high = T.alloc_var("int32")
            fresh = T.alloc_var("int32")
            recent = T.alloc_var("int32")
            blocks = T.alloc_var("int32")
            begin = T.alloc_var("int32")  # of the blocks that a warpgroup's tokens see
            end = T.alloc_var("int32")
            first = T.alloc_var("int32")
            floor = T.alloc_var("int32")
            seen = T.alloc_var("int32")
            row = T.alloc_var("int32")
            T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            along = T.cast(T.ceildiv(L, TOKENS), "int32")
            turns = T.ceildiv(T.cast(B, "int32") * Hkv * along - bx, MOST)
            stage = 0
            phase = 0
            if tx < THREADS:
                if SHARED_OUT:
                    T.inc_max_nreg(EACH)
                for turn in T.serial(turns):
                    begin_tile(
                        bx + turn * MOST, along, position, lengths, L, b, bh, t0, newest, oldest, count, high, fresh,
                        recent, blocks,
                    )  # fmt: skip
                    begin = blocks
                    end = blocks
                    eldest = t0 + tx // THREADS_EACH * ROWS_EACH // G
                    youngest = T.min(t0 + (tx // THREADS_EACH * ROWS_EACH + ROWS_EACH - 1) // G, high - 1)
                    if blocks > 0 and eldest < high:
                        begin = (high - 1 - youngest) // KEYS
                        where.count(T.max(eldest - (W - 1), oldest), high, newest, fresh, recent, end)
                    load(q, queries, b, bh, t0, L, tx)
                    T.fill(sums, 0.0)
                    T.fill(total, 0.0)
                    T.fill(peak, LOWEST)
                    T.fence_proxy_async()
                    T.sync_threads(1 + tx // THREADS_EACH, THREADS_EACH)
                    for i in T.serial(blocks):
                        T.barrier_wait(keys_ready[stage], phase)
                        if i < begin or i >= end:
                            # Not before the loader used the buffer's last release: that could be of another warp's.
                            T.barrier_wait(values_ready[stage], phase)
                            if tx % 32 == 0:
                                T.barrier_arrive(keys_free[stage])
                                T.barrier_arrive(values_free[stage])
                        else:
                            T.wgmma_gemm(
                                queries, keys[stage, :, :], logits, transpose_B=True, policy=FULL_ROW, clear_accum=True
                            )
                            where.locate(i, high, newest, fresh, recent, first, floor)
                            # Two copies of what follows: a product in flight across branches would be waited for at once.
                            if i > begin:
                                last_stage = T.if_then_else(stage == 0, STAGES, stage) - 1
                                T.barrier_wait(values_ready[last_stage], T.if_then_else(stage == 0, phase ^ 1, phase))
                                T.wgmma_gemm(P, values[last_stage, :, :], sums, policy=FULL_ROW)
                                T.wait_wgmma(1)
                                if tx % 32 == 0:
                                    T.barrier_arrive(keys_free[stage])
                                weigh(logits, t0, first, floor, tx, seen, highest, peak, factor, total)
                                T.wait_wgmma(0)
                                if tx % 32 == 0:
                                    T.barrier_arrive(values_free[last_stage])
                                for r, d in T.Parallel(ROWS, D):
                                    sums[r, d] = sums[r, d] * factor[r]
                            else:
                                T.wait_wgmma(0)
                                if tx % 32 == 0:
                                    T.barrier_arrive(keys_free[stage])
                                weigh(logits, t0, first, floor, tx, seen, highest, peak, factor, total)
                            if seen != 0:
                                for r, j in T.Parallel(ROWS, KEYS):
                                    P[r, j] = logits[r, j]
                            else:
                                T.fill(P, 0.0)
                            if i == end - 1:
                                T.barrier_wait(values_ready[stage], phase)
                                T.wgmma_gemm(P, values[stage, :, :], sums, policy=FULL_ROW)
                                T.wait_wgmma(0)
                                if tx % 32 == 0:
                                    T.barrier_arrive(values_free[stage])
                        step(stage, phase)
                    # Once no warp's products read the queries, outputs take their place.
                    T.sync_threads(1 + tx // THREADS_EACH, THREADS_EACH)
                    for r in T.Parallel(ROWS):
                        factor[r] = 1.0 / total[r]
                    for r, d in T.Parallel(ROWS, D):
                        queries[r, d] = T.if_then_else(t0 + r // G < high, sums[r, d] * factor[r], 0.0)
                    T.sync_threads(1 + tx // THREADS_EACH, THREADS_EACH)
                    store(o, queries, b, bh, t0, L, tx)
            else:
                if SHARED_OUT:
                    T.dec_max_nreg(LEFT)
                if tx < THREADS + 32:
                    for turn in T.serial(turns):
                        begin_tile(
                            bx + turn * MOST, along, position, lengths, L, b, bh, t0, newest, oldest, count, high, fresh,
                            recent, blocks,
                        )  # fmt: skip
                        for i in T.serial(blocks):
                            where.start(i, high, newest, fresh, recent, row)
                            T.barrier_wait(keys_free[stage], phase ^ 1)  # passes in the first round
                            if i < fresh:
                                T.tma_copy(k[b, row : row + KEYS, bh, :], keys[stage, :, :], barrier=keys_ready[stage])
                            else:
                                T.tma_copy(
                                    past_k[b, row : row + KEYS, bh, :], keys[stage, :, :], barrier=keys_ready[stage]
                                )
                            T.barrier_arrive(keys_ready[stage])
                            T.barrier_wait(values_free[stage], phase ^ 1)
                            if i < fresh:
                                T.tma_copy(
                                    v[b, row : row + KEYS, bh, :], values[stage, :, :], barrier=values_ready[stage]
                                )
                            else:
                                T.tma_copy(
                                    past_v[b, row : row + KEYS, bh, :], values[stage, :, :], barrier=values_ready[stage]
                                )
                            T.barrier_arrive(values_ready[stage])
                            step(stage, phase)

    return attend
