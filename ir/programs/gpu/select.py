"""Chunk selection on GPUs, forward: scores by tensor cores, candidates on a short list a query, its best at the end.

A block of threads walks the landmarks for a tile of queries of one retrieval head, newest first. Scores stay in
registers: one instruction each tells whether it beats the query's bar, and only those that do are put on its list. The
bar is the K-th best score of the list when it was last cut; a first walk over the newest ``tile.bound`` tiles makes one
to begin with, the K-th largest of 64 maxima over every 64th score, below which no score can be among the K best. So a
list takes little more than K entries whatever the order of the scores. Memory is O(T*K), never L x C.

Where queries are few and landmarks many (decoding), ``tile.split`` blocks in all share the landmarks: each writes the K
best of its part, and a second launch merges them.

A score that is NaN or -inf is never selected: such a chunk leaves its slot empty, and other rows are as without it.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkSelect, ProblemError
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.candidates import COLUMNS, LOWEST, WARP_ROWS, below, capacity, cut, places, put
from hsa_compile.ir.programs.gpu.select_stream import choose_streaming, stream_capacity, stream_columns

MERGE_THREADS = 256
MERGE_QUERIES = 256  # whose merging takes as long as a tile of landmarks
TENSORS = ("q_r", "landmark", "position", "chunks", "indices", "scores")
# Barriers are written out: a warp's lists need none of the block's, which the compiler would put inside branches.
OPTIONS = {
    "tl.disable_thread_storage_sync": True,
    "tl.disable_data_race_check": True,
    "tl.disable_warp_specialized": True,
}


def check(problem: ChunkSelect) -> None:
    """Raises ProblemError for what these programs do not serve."""
    if problem.dtype == "float32":
        raise ProblemError("chunk_select in TileLang takes bfloat16 or float16, got float32")
    if problem.retrieval_dim % 16 or problem.retrieval_dim > 1024:
        raise ProblemError(f"retrieval_dim must be a multiple of 16 up to 1024 on GPUs, got {problem.retrieval_dim}")
    if problem.top_k > 64:
        raise ProblemError(f"top_k must be at most 64 on GPUs, got {problem.top_k}")


def form(problem: ChunkSelect, tile: GpuTile) -> tuple[int, int, Any, Any]:
    """Entries of a list, landmarks of a tile, and the macros of the walk: streaming where ``tile.wgmma`` asks for it."""
    begin, walk = choose(problem, tile)
    if tile.wgmma and (tile.tokens % 64 or tile.blocks > 2):
        raise ProblemError(f"streaming takes whole 64 tokens and at most 2 blocks, got {tile.tokens} and {tile.blocks}")
    if tile.wgmma:
        return stream_capacity(problem, tile), stream_columns(problem), begin, choose_streaming(problem, tile)
    return capacity(problem.top_k), COLUMNS, begin, walk


def slice_width(retrieval_dim: int) -> int:
    """Columns of a landmark tile that are loaded at a time."""
    return max(d for d in range(16, min(retrieval_dim, 128) + 1, 16) if retrieval_dim % d == 0)


def choose(problem: ChunkSelect, tile: GpuTile):
    """The walk: leaves every query's candidates, K best among them, in the lists."""
    Dr, S, K, M, N, STAGES = (
        problem.retrieval_dim, problem.chunk_size, problem.top_k, tile.tokens, COLUMNS, tile.stages,
    )  # fmt: skip
    DEPTH = slice_width(Dr)
    SLICES, CAPACITY, BOUND = Dr // DEPTH, capacity(K), tile.bound
    lag, dtype = problem.visible_lag, problem.dtype
    put_tile = put(M, K, CAPACITY)

    @T.macro
    def begin(seen, count, level, position, chunks, t0, L, b, tx):
        first = position[b] + t0 - lag
        if tx < M:
            seen[tx] = T.if_then_else(
                t0 + tx < L, T.cast(T.min(T.max(first + tx, T.int64(0)) // S, chunks[b]), "int32"), 0
            )
            count[tx] = 0
            level[tx] = T.if_then_else(t0 + tx < L, LOWEST, -LOWEST)  # nothing beats the bar of a row past the end
        T.sync_threads()

    @T.macro
    def make_bar(top, bar, level, most):
        T.reduce_max(top, most, dim=1, clear=True)
        for k in T.serial(K - 1):
            for i, j in T.Parallel(M, N):
                top[i, j] = T.if_then_else(top[i, j] == most[i], LOWEST, top[i, j])
            T.reduce_max(top, most, dim=1, clear=True)
        # Below it, so that what ties with it is a candidate.
        for i in T.Parallel(M):
            bar[i] = T.max(bar[i], below(most[i]))
        T.sync_warp()  # other lanes have read it
        for i in T.Parallel(M):
            level[i] = bar[i]

    @T.macro
    def walk(q_r, landmark, seen, value, index, count, level, t0, r, b, part, parts, tx):
        """Of ``parts`` runs of landmark tiles, takes number ``part``."""
        queries = T.alloc_shared((SLICES, M, DEPTH), dtype)
        landmarks = T.alloc_shared((STAGES, N, DEPTH), dtype)
        s = T.alloc_fragment((M, N), "float32")
        top = T.alloc_fragment((M, N), "float32")
        bar = T.alloc_fragment((M,), "float32")
        counts = T.alloc_local((1,), "int32")
        most = T.alloc_fragment((M,), "float32")
        # Variables rather than expressions: the compiler would copy those into every address, and prove bounds of them.
        end = T.alloc_var("int32")
        sampled = T.alloc_var("int32")
        steps = T.alloc_var("int32")
        c0 = T.alloc_var("int32")
        c1 = T.alloc_var("int32")
        end = T.ceildiv(seen[T.max(T.min(M, q_r.shape[1] - t0), 1) - 1], N)
        sampled = part * T.ceildiv(end, parts)
        end = T.min(sampled + T.ceildiv(end, parts), end)
        steps = T.max(end - sampled, 0)
        sampled = T.min(steps, BOUND)
        steps = (steps + sampled) * SLICES
        for e in T.unroll(SLICES):
            T.async_copy(q_r[b, t0 : t0 + M, r, e * DEPTH : (e + 1) * DEPTH], queries[e, :, :])
        for p in T.unroll(STAGES - 1):
            if p < steps:
                c1 = (end - 1 - (p // SLICES - T.if_then_else(p // SLICES < sampled, 0, sampled))) * N
                d1 = (p % SLICES) * DEPTH
                T.async_copy(landmark[b, c1 : c1 + N, r, d1 : d1 + DEPTH], landmarks[p, :, :])
            else:
                T.ptx_commit_group()
        counts[0] = 0
        T.fill(top, LOWEST)
        for i in T.Parallel(M):
            bar[i] = level[i]
        for step in T.serial(steps):
            T.ptx_wait_group(STAGES - 2)
            T.sync_threads()
            ahead = step + STAGES - 1
            if ahead < steps:
                c1 = (end - 1 - (ahead // SLICES - T.if_then_else(ahead // SLICES < sampled, 0, sampled))) * N
                d1 = (ahead % SLICES) * DEPTH
                T.async_copy(landmark[b, c1 : c1 + N, r, d1 : d1 + DEPTH], landmarks[ahead % STAGES, :, :])
            else:
                T.ptx_commit_group()
            T.gemm(
                queries[step % SLICES, :, :], landmarks[step % STAGES, :, :], s, transpose_B=True,
                policy=T.GemmWarpPolicy.FullRow, clear_accum=step % SLICES == 0,
            )  # fmt: skip
            if step % SLICES == SLICES - 1:
                now = step // SLICES
                c0 = (end - 1 - (now - T.if_then_else(now < sampled, 0, sampled))) * N
                if c0 + N > seen[0]:  # tokens see no fewer chunks than those before them
                    for i, j in T.Parallel(M, N):
                        s[i, j] = T.if_then_else(c0 + j < seen[i], s[i, j], LOWEST)
                if now < sampled:
                    for i, j in T.Parallel(M, N):
                        top[i, j] = T.max(top[i, j], s[i, j])
                    if now == sampled - 1:
                        make_bar(top, bar, level, most)
                else:
                    put_tile(s, bar, value, index, count, level, counts, c0, tx // 32, tx % 32)
        if tx % 4 == 0:
            count[tx // 32 * WARP_ROWS + tx % 32 // 4] = counts[0] & 0xFFFF
            count[tx // 32 * WARP_ROWS + 8 + tx % 32 // 4] = T.shift_right(counts[0], 16)
        T.sync_warp()

    return begin, walk


def write(problem: ChunkSelect, CAPACITY: int):
    """Writes the K best of a row's list of n, newest first, for all kv heads that share the selection. For a warp."""
    K, scale, shared = problem.top_k, problem.scale, problem.kv_heads // problem.retrieval_heads
    EACH = CAPACITY // 32
    place_entries = places(K, CAPACITY)

    @T.macro
    def finish(value, index, row, n, indices, scores, b, t, r, lane):
        mine = T.alloc_local((EACH,), "float32")
        whose = T.alloc_local((EACH,), "int32")
        place = T.alloc_local((EACH,), "int32")
        place_entries(value, index, row, n, lane, mine, whose, place)
        for h in T.serial(shared):
            for e in T.unroll(EACH):
                if place[e] < K:
                    indices[b, t, r * shared + h, T.min(place[e], K - 1)] = whose[e]
                    scores[b, t, r * shared + h, T.min(place[e], K - 1)] = mine[e] * T.float32(scale)
                if e * 32 + lane >= n and e * 32 + lane < K:
                    indices[b, t, r * shared + h, T.min(e * 32 + lane, K - 1)] = -1
                    scores[b, t, r * shared + h, T.min(e * 32 + lane, K - 1)] = 0

    return finish


def whole(problem: ChunkSelect, tile: GpuTile) -> Launch:
    """A block walks all landmarks that its queries see; those that see most come first."""
    Hkv, Hr, Dr, K, M = (
        problem.kv_heads, problem.retrieval_heads, problem.retrieval_dim, problem.top_k, tile.tokens,
    )  # fmt: skip
    CAPACITY, _, begin, walk = form(problem, tile)
    finish = write(problem, CAPACITY)
    B, L, C, P = T.dynamic("B"), T.dynamic("L"), T.dynamic("C"), T.dynamic("parts")

    @T.prim_func
    def select(
        q_r: T.Tensor((B, L, Hr, Dr), problem.dtype), landmark: T.Tensor((B, C, Hr, Dr), problem.dtype),
        position: T.Tensor((B,), "int64"), chunks: T.Tensor((B,), "int64"),
        indices: T.Tensor((B, L, Hkv, K), "int32"), scores: T.Tensor((B, L, Hkv, K), "float32"),
        part_index: T.Tensor((B, L, Hr, K, P), "int32"),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, M) * (1 - T.min(P, 1)), Hr, B, threads=M // WARP_ROWS * 32) as (x, r, b):
            value = T.alloc_shared((M, CAPACITY), "float32")
            index = T.alloc_shared((M, CAPACITY), "int32")
            count = T.alloc_shared((M,), "int32")
            level = T.alloc_shared((M,), "float32")
            seen = T.alloc_shared((M,), "int32")
            if tile.blocks > 1:
                T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            t0 = T.alloc_var("int32")
            t0 = (T.ceildiv(L, M) - 1 - x) * M
            begin(seen, count, level, position, chunks, t0, L, b, tx)
            walk(q_r, landmark, seen, value, index, count, level, t0, r, b, 0, 1, tx)
            for i in T.serial(WARP_ROWS):
                row = tx // 32 * WARP_ROWS + i
                if t0 + row < L:
                    n = T.min(count[row], CAPACITY)
                    finish(value, index, row, n, indices, scores, b, t0 + row, r, tx % 32)

    dims = {"B": "B", "L": "L", "C": "C", "parts": parts(problem, tile)}
    return Launch("select", select, (*TENSORS, "part_index"), dims, OPTIONS)


def part(problem: ChunkSelect, tile: GpuTile) -> Launch:
    """``parts`` blocks a tile of queries; each writes the K best of its run of landmarks, best first."""
    Hr, Dr, K, M = problem.retrieval_heads, problem.retrieval_dim, problem.top_k, tile.tokens
    CAPACITY, _, begin, walk = form(problem, tile)
    keep_best = cut(K, CAPACITY)
    B, L, C, P = T.dynamic("B"), T.dynamic("L"), T.dynamic("C"), T.dynamic("parts")

    @T.prim_func
    def select_part(
        q_r: T.Tensor((B, L, Hr, Dr), problem.dtype), landmark: T.Tensor((B, C, Hr, Dr), problem.dtype),
        position: T.Tensor((B,), "int64"), chunks: T.Tensor((B,), "int64"),
        part_index: T.Tensor((B, L, Hr, K, P), "int32"), part_value: T.Tensor((B, L, Hr, K, P), "float32"),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, M) * P, Hr, B, threads=M // WARP_ROWS * 32) as (x, r, b):
            value = T.alloc_shared((M, CAPACITY), "float32")
            index = T.alloc_shared((M, CAPACITY), "int32")
            count = T.alloc_shared((M,), "int32")
            level = T.alloc_shared((M,), "float32")
            seen = T.alloc_shared((M,), "int32")
            if tile.blocks > 1:
                T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            t0 = T.alloc_var("int32")
            t0 = x // P * M
            begin(seen, count, level, position, chunks, t0, L, b, tx)
            walk(q_r, landmark, seen, value, index, count, level, t0, r, b, x % P, P, tx)
            for i in T.serial(WARP_ROWS):
                row = tx // 32 * WARP_ROWS + i
                if t0 + row < L:
                    keep_best(value, index, count, level, row, tx % 32)
                    for e in T.unroll(-(-K // 32)):
                        k = e * 32 + tx % 32
                        if k < K:
                            part_index[b, t0 + row, r, k, x % P] = index[row, k]
                            part_value[b, t0 + row, r, k, x % P] = T.if_then_else(k < count[row], value[row, k], LOWEST)

    arguments = (*TENSORS[:4], "part_index", "part_value")
    return Launch(
        "select_part", select_part, arguments, {"B": "B", "L": "L", "C": "C", "parts": parts(problem, tile)}, OPTIONS
    )


def merge(problem: ChunkSelect, tile: GpuTile) -> Launch:
    """A block a query: the K best of the parts' lists. It reads the parts' best, then their second best, and so on."""
    Hkv, Hr, K = problem.kv_heads, problem.retrieval_heads, problem.top_k
    CAPACITY, GROUPS = 2 * MERGE_THREADS, max(1, -(-tile.split // MERGE_THREADS))
    B, L, P = T.dynamic("B"), T.dynamic("L"), T.dynamic("parts")
    finish = write(problem, capacity(K))

    @T.macro
    def keep_best(value, index, count, tx):
        rank = T.alloc_local((2,), "int32")
        mine = T.alloc_local((2,), "float32")
        whose = T.alloc_local((2,), "int32")
        n = T.min(count[0], CAPACITY)
        for e in T.unroll(2):
            mine[e] = value[0, e * MERGE_THREADS + tx]
            whose[e] = index[0, e * MERGE_THREADS + tx]
            rank[e] = 0
        for o in T.serial(n):
            for e in T.unroll(2):
                if value[0, T.min(o, CAPACITY - 1)] > mine[e] or (
                    value[0, T.min(o, CAPACITY - 1)] == mine[e] and index[0, T.min(o, CAPACITY - 1)] > whose[e]
                ):
                    rank[e] = rank[e] + 1
        T.sync_threads()
        for e in T.unroll(2):
            if e * MERGE_THREADS + tx < n and rank[e] < K:
                value[0, T.min(rank[e], K - 1)] = mine[e]
                index[0, T.min(rank[e], K - 1)] = whose[e]
        if tx == 0:
            count[0] = T.min(n, K)
        T.sync_threads()

    @T.prim_func
    def select_merge(
        part_index: T.Tensor((B, L, Hr, K, P), "int32"), part_value: T.Tensor((B, L, Hr, K, P), "float32"),
        indices: T.Tensor((B, L, Hkv, K), "int32"), scores: T.Tensor((B, L, Hkv, K), "float32"),
    ):  # fmt: skip
        with T.Kernel(L * T.min(P, 1), Hr, B, threads=MERGE_THREADS) as (t, r, b):
            value = T.alloc_shared((1, CAPACITY), "float32")
            index = T.alloc_shared((1, CAPACITY), "int32")
            count = T.alloc_shared((1,), "int32")
            level = T.alloc_shared((1,), "float32")
            heads = T.alloc_shared((MERGE_THREADS,), "float32")
            v = T.alloc_local((GROUPS,), "float32")
            best = T.alloc_var("float32")
            rank = T.alloc_var("int32")
            k = T.alloc_var("int32")
            entered = T.alloc_var("int32")
            length = T.alloc_var("int32")
            tx = T.get_thread_binding()
            if tx == 0:
                count[0] = 0
            T.sync_threads()
            if K * P <= CAPACITY:  # all of them at once
                for e in T.unroll(CAPACITY // MERGE_THREADS):
                    k = e * MERGE_THREADS + tx
                    if k < K * P:
                        if part_value[b, t, r, T.truncdiv(k, P), T.truncmod(k, P)] > LOWEST:
                            entered = T.atomic_add(count[0], 1, return_prev=True)
                            value[0, T.min(entered, CAPACITY - 1)] = part_value[
                                b, t, r, T.truncdiv(k, P), T.truncmod(k, P)
                            ]
                            index[0, T.min(entered, CAPACITY - 1)] = part_index[
                                b, t, r, T.truncdiv(k, P), T.truncmod(k, P)
                            ]
                T.sync_threads()
            else:
                # Every part's list falls, so the K-th largest of the threads' best heads bounds the K-th best from below.
                best = LOWEST
                for g in T.unroll(GROUPS):
                    if g * MERGE_THREADS + tx < P:
                        best = T.max(best, part_value[b, t, r, 0, g * MERGE_THREADS + tx])
                heads[tx] = best
                T.sync_threads()
                rank = 0
                for o in T.serial(MERGE_THREADS):
                    if heads[o] > best or (heads[o] == best and o < tx):
                        rank = rank + 1
                T.sync_threads()  # ``level`` may lie where ``heads`` did
                if rank == K - 1:
                    level[0] = best
                T.sync_threads()
                k = 0
                entered = 1
                while T.syncthreads_or(entered) != 0:
                    entered = 0
                    for g in T.unroll(GROUPS):
                        v[g] = LOWEST
                        if g * MERGE_THREADS + tx < P and k < K:
                            v[g] = part_value[b, t, r, T.min(k, K - 1), g * MERGE_THREADS + tx]
                    for g in T.unroll(GROUPS):
                        if v[g] > LOWEST and v[g] >= level[0]:
                            entered = T.atomic_add(count[0], 1, return_prev=True)
                            value[0, T.min(entered, CAPACITY - 1)] = v[g]
                            index[0, T.min(entered, CAPACITY - 1)] = part_index[
                                b, t, r, T.min(k, K - 1), g * MERGE_THREADS + tx
                            ]
                            entered = 1
                        T.sync_threads()
                        length = count[0]
                        T.sync_threads()  # none may go on and add to it before all have read it
                        if length > CAPACITY - MERGE_THREADS:
                            keep_best(value, index, count, tx)
                            if tx == 0:
                                level[0] = value[0, K - 1]
                            T.sync_threads()
                    k = k + 1
            keep_best(value, index, count, tx)
            if tx < 32:
                finish(value, index, 0, count[0], indices, scores, b, t, r, tx)

    return Launch(
        "select_merge", select_merge, ("part_index", "part_value", *TENSORS[4:]),
        {"B": "B", "L": "L", "parts": parts(problem, tile)}, OPTIONS,
    )  # fmt: skip


def parts(problem: ChunkSelect, tile: GpuTile) -> str:
    """Blocks that share the landmarks of a tile of queries, a C expression: ``tile.split`` in all, each with enough of
    the landmarks that merging its list costs little beside them. 0 where there would be one."""
    H, columns = problem.retrieval_heads, form(problem, tile)[1]
    blocks = f"(B * L == 0 ? 1 : B * {H} * ((L + {tile.tokens - 1}) / {tile.tokens}))"
    runs = f"((C + {columns - 1}) / {columns} / (1 + B * L * {H} / {MERGE_QUERIES}))"
    most = f"({tile.split} / {blocks} < {runs} ? {tile.split} / {blocks} : {runs})"
    return f"({most} < 2 ? 0 : {most})"


def program(problem: ChunkSelect, tile: GpuTile) -> GpuProgram:
    """One launch, or, where ``tile.split`` is set and tiles of queries are few, two others.

    Raises:
        ProblemError: the dtype is float32, Dr is no multiple of 16 up to 1024, or K is above 64.
    """
    check(problem)
    entries = f"B * L * {problem.retrieval_heads * problem.top_k} * {parts(problem, tile)}"
    regions = (Region("part_index", "int32", entries), Region("part_value", "float32", entries))
    split = (part(problem, tile), merge(problem, tile)) if tile.split else ()
    return GpuProgram(TENSORS, regions, (whole(problem, tile), *split))
