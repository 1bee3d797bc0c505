"""The walk of chunk selection on sm_90a: large tiles, whose landmarks stream through shared memory by bulk copies.

Queries of up to RESIDENT columns stay in shared memory, with tiles of 128 landmarks and two thread blocks on a
multiprocessor. Wider ones stream too, slice by slice, as in any matrix product: tiles of 128 queries by 256 landmarks
read less of both than tiles of which one side would fit.

A first walk over ``tile.bound`` tiles, spread evenly so that no order of scores misleads it, makes the first bar: scoring
costs less than cutting lists. Where products are most of the time ``tile.bound`` is 0, and the first tile's scores give
that bar while they are in registers.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu.candidates import LOWEST, WARP_ROWS, below, capacity, put

RESIDENT = 256
BLOCK_BYTES = {1: 227 << 10, 2: 113 << 10}  # of shared memory, by thread blocks on a multiprocessor


def stream_columns(problem: ChunkSelect) -> int:
    """Landmarks of a tile."""
    return 128 if problem.retrieval_dim <= RESIDENT else 256


def stream_depth(problem: ChunkSelect) -> int:
    """Columns of a slice, at most the 128 bytes of a swizzled row; less where small buffers fit better."""
    Dr = problem.retrieval_dim
    return next(d for d in (64, 32, 16) if Dr % d == 0 and (d < 64 or Dr == 64 or Dr > RESIDENT))


def stream_capacity(problem: ChunkSelect, tile: GpuTile) -> int:
    """Entries of a row's list: more than it must have, where there is room, so that it is cut less often."""
    Dr, depth, least = problem.retrieval_dim, stream_depth(problem), capacity(problem.top_k)
    loaded = tile.stages * stream_columns(problem) * depth
    loaded += tile.tokens * (Dr if Dr <= RESIDENT else tile.stages * depth)
    room = (BLOCK_BYTES[tile.blocks] - 3072 - loaded * 2) // tile.tokens
    return min(max(least, 64), max(least, room // 8 // 32 * 32))


def choose_streaming(problem: ChunkSelect, tile: GpuTile) -> Any:
    """As ``walk`` of ``select.choose``."""
    Dr, K, M, STAGES = problem.retrieval_dim, problem.top_k, tile.tokens, tile.stages
    N, DEPTH, STAYS = stream_columns(problem), stream_depth(problem), Dr <= RESIDENT
    SLICES, WARPS = Dr // DEPTH, M // WARP_ROWS
    put_tile = put(M, K, stream_capacity(problem, tile), N)
    BOUND = tile.bound
    GROUPS = 8 if K <= 16 else 16  # of columns, a thread; four threads share a row
    FULL_ROW = T.GemmWarpPolicy.FullRow

    @T.macro
    def issue(q_r, landmark, queries, landmarks, full, step, end, tiles, sampled, t0, r, b):
        now = T.truncdiv(step, SLICES)
        c = (end - 1 - T.if_then_else(now < sampled, T.truncdiv(now * tiles, T.max(sampled, 1)), now - sampled)) * N
        d = T.truncmod(step, SLICES) * DEPTH
        if not STAYS:
            T.tma_copy(
                q_r[b, t0 : t0 + M, r, d : d + DEPTH], queries[T.truncmod(step, STAGES), :, :],
                barrier=full[T.truncmod(step, STAGES)],
            )  # fmt: skip
        T.tma_copy(
            landmark[b, c : c + N, r, d : d + DEPTH], landmarks[T.truncmod(step, STAGES), :, :],
            barrier=full[T.truncmod(step, STAGES)],
        )  # fmt: skip
        T.barrier_arrive(full[T.truncmod(step, STAGES)])

    @T.macro
    def score(q_r, landmark, queries, landmarks, full, empty, s, seen, first, c0, end, tiles, sampled, t0, r, b, tx):
        """Scores of the tile whose first step is ``first``; those of chunks that a row does not see are the lowest."""
        step = T.alloc_var("int32")
        for e in T.serial(SLICES):
            step = first + e
            T.barrier_wait(full[T.truncmod(step, STAGES)], T.truncdiv(step, STAGES) & 1)
            T.wgmma_gemm(
                queries[e if STAYS else T.truncmod(step, STAGES), :, :], landmarks[T.truncmod(step, STAGES), :, :], s,
                transpose_B=True, policy=FULL_ROW, clear_accum=e == 0,
            )  # fmt: skip
            T.wait_wgmma(1)
            # The buffer of the product before this one is free: it is filled again while this one runs.
            if e > 0 and tx % 32 == 0:
                T.barrier_arrive(empty[T.truncmod(step - 1, STAGES)])
            if tx < 32 and step >= 1 and step - 1 + STAGES < (sampled + tiles) * SLICES:
                T.barrier_wait(empty[T.truncmod(step - 1, STAGES)], T.truncdiv(step - 1, STAGES) & 1)
                issue(q_r, landmark, queries, landmarks, full, step - 1 + STAGES, end, tiles, sampled, t0, r, b)
        T.wait_wgmma(0)
        if tx % 32 == 0:
            T.barrier_arrive(empty[T.truncmod(first + SLICES - 1, STAGES)])
        if c0 + N > seen[0]:  # tokens see no fewer chunks than those before them
            for i, j in T.Parallel(M, N):
                s[i, j] = T.if_then_else(c0 + j < seen[i], s[i, j], LOWEST)

    @T.macro
    def largest(best, most):
        """The largest of all groups of a thread's two rows."""
        for h in T.unroll(2):
            most[h] = best[h * GROUPS]
            for g in T.unroll(GROUPS - 1):
                most[h] = T.max(most[h], best[h * GROUPS + g + 1])
            most[h] = T.max(most[h], T.shfl_xor(most[h], 1))
            most[h] = T.max(most[h], T.shfl_xor(most[h], 2))

    @T.macro
    def fold(s, best):
        for i, j in T.Parallel(M, N):
            for g in T.unroll(GROUPS):
                if j // 8 % GROUPS == g:
                    if i // 8 % 2 == 0:
                        best[g] = T.max(best[g], s[i, j])
                    else:
                        best[GROUPS + g] = T.max(best[GROUPS + g], s[i, j])

    @T.macro
    def make_bar(best, bar, level):
        """The K-th largest of the maxima of 4 * GROUPS groups of columns: no score below it can be among the K best."""
        most = T.alloc_local((2,), "float32")
        largest(best, most)
        for k in T.serial(K - 1):
            for h in T.unroll(2):
                for g in T.unroll(GROUPS):
                    best[h * GROUPS + g] = T.if_then_else(best[h * GROUPS + g] == most[h], LOWEST, best[h * GROUPS + g])
            largest(best, most)
        # Below it, so that what ties with it is a candidate.
        for i in T.Parallel(M):
            bar[i] = T.max(bar[i], below(T.if_then_else(i // 8 % 2 == 0, most[0], most[1])))
        T.sync_warp()  # other lanes have read it
        for i in T.Parallel(M):
            level[i] = bar[i]

    @T.macro
    def walk(q_r, landmark, seen, value, index, count, level, t0, r, b, part, parts, tx):
        queries = T.alloc_shared((SLICES if STAYS else STAGES, M, DEPTH), problem.dtype)
        landmarks = T.alloc_shared((STAGES, N, DEPTH), problem.dtype)
        ready = T.alloc_barrier(arrive_count=32)
        full = T.alloc_barrier(arrive_count=[32] * STAGES)
        empty = T.alloc_barrier(arrive_count=[WARPS] * STAGES)
        s = T.alloc_fragment((M, N), "float32")
        bar = T.alloc_fragment((M,), "float32")
        best = T.alloc_local((2 * GROUPS,), "float32")
        counts = T.alloc_local((1,), "int32")
        end = T.alloc_var("int32")
        tiles = T.alloc_var("int32")
        sampled = T.alloc_var("int32")
        c0 = T.alloc_var("int32")
        end = T.ceildiv(seen[T.max(T.min(M, q_r.shape[1] - t0), 1) - 1], N)
        tiles = T.ceildiv(end, parts)
        end = T.min(part * tiles + tiles, end)
        tiles = T.max(end - part * tiles, 0)
        sampled = T.min(tiles, BOUND)
        if tx < 32:
            if STAYS:
                for e in T.unroll(SLICES):
                    T.tma_copy(q_r[b, t0 : t0 + M, r, e * DEPTH : (e + 1) * DEPTH], queries[e, :, :], barrier=ready)
            T.barrier_arrive(ready)
            for p in T.unroll(STAGES):
                if p < (sampled + tiles) * SLICES:
                    issue(q_r, landmark, queries, landmarks, full, p, end, tiles, sampled, t0, r, b)
        counts[0] = 0
        for i in T.Parallel(M):
            bar[i] = level[i]
        for g in T.unroll(2 * GROUPS):
            best[g] = LOWEST
        T.barrier_wait(ready, 0)
        if BOUND > 0:
            for now in T.serial(sampled):
                c0 = (end - 1 - T.truncdiv(now * tiles, T.max(sampled, 1))) * N
                score(
                    q_r, landmark, queries, landmarks, full, empty, s, seen, now * SLICES, c0, end, tiles, sampled, t0,
                    r, b, tx,
                )  # fmt: skip
                fold(s, best)
            make_bar(best, bar, level)
            T.sync_warp()
        for now in T.serial(tiles):
            c0 = (end - 1 - now) * N
            score(
                q_r, landmark, queries, landmarks, full, empty, s, seen, (sampled + now) * SLICES, c0, end, tiles,
                sampled, t0, r, b, tx,
            )  # fmt: skip
            if BOUND == 0:
                if now == 0:
                    fold(s, best)
                    make_bar(best, bar, level)
                    T.sync_warp()
            put_tile(s, bar, value, index, count, level, counts, c0, tx // 32, tx % 32)
        if tx % 4 == 0:
            count[tx // 32 * WARP_ROWS + tx % 32 // 4] = counts[0] & 0xFFFF
            count[tx // 32 * WARP_ROWS + 8 + tx % 32 // 4] = T.shift_right(counts[0], 16)
        T.sync_warp()

    return walk
