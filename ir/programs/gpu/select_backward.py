"""Chunk selection on GPUs, backward: queries gather the landmarks they selected, landmarks the queries that did.

Both are sums of rows with weights, 16 bytes of a row a thread. Landmarks walk lists of pairs in work items with fp32
partial sums that are added in order, so there are no atomics and results repeat to the bit. Where kv heads share a
selection, their indices are equal and their gradients are summed.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.chunk_lists import OPTIONS, ChunkLists
from hsa_compile.ir.programs.gpu.pairs import symbols
from hsa_compile.ir.programs.gpu.select import check

TENSORS = ("grad_scores", "q_r", "landmark", "indices", "d_q_r", "d_landmark")
VECTOR = 8  # elements of 16 bytes
THREADS = 256
AHEAD = 4  # rows that a thread asks for before it adds the first


def slice_width(retrieval_dim: int) -> int:
    """Columns that a block takes. Blocks of the same columns run together, so that narrow slices of the landmarks stay in
    the multiprocessors' own caches, and those of the queries in the one they share."""
    fitting = [d for d in range(16, retrieval_dim + 1, 16) if retrieval_dim % d == 0]
    return max([d for d in fitting if 32 <= d <= 64] or [d for d in fitting if 32 <= d <= 128] or [retrieval_dim])


def rows_at_once(retrieval_dim: int) -> int:
    """Rows that the threads of a block hold side by side."""
    return max(1, THREADS // (slice_width(retrieval_dim) // VECTOR))


def block_threads(retrieval_dim: int) -> int:
    """Threads for those rows, whole warps."""
    return -(-rows_at_once(retrieval_dim) * (slice_width(retrieval_dim) // VECTOR) // 32) * 32


def query_gradients(problem: ChunkSelect) -> Launch:
    """``d_q_r``, a row of threads a token, retrieval head and slice of columns."""
    H, Hkv, Dr, K, dtype = (
        problem.retrieval_heads, problem.kv_heads, problem.retrieval_dim, problem.top_k, problem.dtype,
    )  # fmt: skip
    WIDTH, ROWS, NT = slice_width(Dr), rows_at_once(Dr), block_threads(Dr)
    shared, scale, W = Hkv // H, problem.scale, WIDTH // VECTOR
    B, L, C = symbols("B", "L", "C")

    @T.macro
    def add(grad_scores, landmark, indices, sums, b, t, h, k0, e, y):
        """The next AHEAD slots."""
        rows = T.alloc_local((AHEAD, VECTOR), dtype)
        g = T.alloc_local((AHEAD,), "float32")
        c = T.alloc_local((AHEAD,), "int32")
        for j in T.unroll(AHEAD):
            c[j] = -1
            g[j] = 0
            if k0 + j < K:
                c[j] = indices[b, t, h * shared, T.min(k0 + j, K - 1)]
                for n in T.unroll(shared):
                    g[j] = g[j] + grad_scores[b, t, h * shared + n, T.min(k0 + j, K - 1)]
            if c[j] >= C:
                c[j] = -1
        for j in T.unroll(AHEAD):
            for u in T.unroll(VECTOR):
                rows[j, u] = T.cast(0, dtype)
            if c[j] >= 0:
                for u in T.vectorized(VECTOR):
                    rows[j, u] = landmark[b, c[j], h, e * WIDTH + y * VECTOR + u]
        for j in T.unroll(AHEAD):
            g[j] = T.if_then_else(c[j] >= 0, g[j] * T.float32(scale), T.float32(0))
            for u in T.unroll(VECTOR):
                sums[u] = sums[u] + g[j] * T.cast(rows[j, u], "float32")

    @T.prim_func
    def query_gradients(
        grad_scores: T.Tensor((B, L, Hkv, K), "float32"), landmark: T.Tensor((B, C, H, Dr), dtype),
        indices: T.Tensor((B, L, Hkv, K), "int32"), d_q_r: T.Tensor((B, L, H, Dr), dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, ROWS) * (Dr // WIDTH), H, B, threads=NT) as (x, h, b):
            sums = T.alloc_local((VECTOR,), "float32")
            row = T.alloc_local((VECTOR,), dtype)
            t = T.alloc_var("int32")
            e = T.alloc_var("int32")
            tx = T.get_thread_binding()
            t = T.truncmod(x, T.ceildiv(L, ROWS)) * ROWS + tx // W
            e = T.truncdiv(x, T.ceildiv(L, ROWS))
            if tx < ROWS * W and t < L:
                for u in T.unroll(VECTOR):
                    sums[u] = 0
                for k in T.serial(-(-K // AHEAD)):
                    add(grad_scores, landmark, indices, sums, b, t, h, k * AHEAD, e, tx % W)
                for u in T.unroll(VECTOR):
                    row[u] = T.cast(sums[u], dtype)
                for u in T.vectorized(VECTOR):
                    d_q_r[b, t, h, e * WIDTH + tx % W * VECTOR + u] = row[u]

    return Launch(
        "query_gradients", query_gradients, ("grad_scores", "landmark", "indices", "d_q_r"),
        {"B": "B", "L": "L", "C": "C"}, OPTIONS,
    )  # fmt: skip


def item_gradients(problem: ChunkSelect, lists: ChunkLists) -> Any:
    """A block a work item and slice of columns: the sum of its pairs, in ``partial``."""
    H, Dr, P = problem.retrieval_heads, problem.retrieval_dim, lists.item_pairs
    WIDTH, ROWS, NT = slice_width(Dr), rows_at_once(Dr), block_threads(Dr)
    W = WIDTH // VECTOR
    B, L, ROW_ITEMS, ROW_PLACES = symbols("B", "L", "ROW_ITEMS", "ROW_PLACES")

    @T.macro
    def add(q_r, pairs, sums, n, b, h, i, e, tx):
        """The next AHEAD pairs, ROWS apart."""
        rows = T.alloc_local((AHEAD, VECTOR), problem.dtype)
        pair = T.alloc_local((AHEAD, 2), "int32")
        for j in T.unroll(AHEAD):
            for u in T.vectorized(2):
                pair[j, u] = pairs[T.min((i * AHEAD + j) * ROWS + tx // W, P - 1), u]
            for u in T.unroll(VECTOR):
                rows[j, u] = T.cast(0, problem.dtype)
            if (i * AHEAD + j) * ROWS + tx // W < n:
                for u in T.vectorized(VECTOR):
                    rows[j, u] = q_r[b, pair[j, 0], h, e * WIDTH + tx % W * VECTOR + u]
        for j in T.unroll(AHEAD):
            if (i * AHEAD + j) * ROWS + tx // W < n:
                for u in T.unroll(VECTOR):
                    sums[u] = sums[u] + T.reinterpret(pair[j, 1], "float32") * T.cast(rows[j, u], "float32")

    @T.prim_func
    def item_gradients(
        q_r: T.Tensor((B, L, H, Dr), problem.dtype), items: T.Tensor((B, H, ROW_ITEMS, 4), "int32"),
        places: T.Tensor((B, H, ROW_PLACES, 2), "int32"), partial: T.Tensor((B, H, ROW_ITEMS, Dr), "float32"),
    ):  # fmt: skip
        with T.Kernel(ROW_ITEMS * (Dr // WIDTH), H, B, threads=NT) as (x, h, b):
            pairs = T.alloc_shared((P, 2), "int32")
            all_sums = T.alloc_shared((ROWS, WIDTH), "float32")
            sums = T.alloc_local((VECTOR,), "float32")
            g = T.alloc_var("float32")
            n = T.alloc_var("int32")
            item = T.alloc_var("int32")
            first = T.alloc_var("int32")
            e = T.alloc_var("int32")
            tx = T.get_thread_binding()
            item = T.truncmod(x, ROW_ITEMS)
            e = T.truncdiv(x, ROW_ITEMS)
            n = items[b, h, item, 2]
            if n > 0:
                first = items[b, h, item, 1]
                for i in T.serial(-(-P // NT)):
                    if i * NT + tx < n:
                        for u in T.vectorized(2):
                            pairs[T.min(i * NT + tx, P - 1), u] = places[b, h, first + i * NT + tx, u]
                for u in T.unroll(VECTOR):
                    sums[u] = 0
                T.sync_threads()
                if tx < ROWS * W:
                    for i in T.serial((n + AHEAD * ROWS - 1) // (AHEAD * ROWS)):
                        add(q_r, pairs, sums, n, b, h, i, e, tx)
                T.sync_threads()  # ``all_sums`` may lie where ``pairs`` did
                if tx < ROWS * W:
                    for u in T.vectorized(VECTOR):
                        all_sums[tx // W, tx % W * VECTOR + u] = sums[u]
                T.sync_threads()
                for i in T.serial(-(-WIDTH // NT)):
                    if i * NT + tx < WIDTH:
                        g = 0
                        for y in T.unroll(ROWS):
                            g = g + all_sums[y, i * NT + tx]
                        partial[b, h, item, e * WIDTH + i * NT + tx] = g

    return lists.launch(item_gradients, "q_r", "items", "places", "partial")


def landmark_gradients(problem: ChunkSelect, lists: ChunkLists) -> Any:
    """A block a chunk and slice of columns: the sum of its items, every ROWS-th by a row of threads, those in order."""
    H, Dr, P = problem.retrieval_heads, problem.retrieval_dim, lists.item_pairs
    FOUR = 4  # columns of a thread
    WIDTH = max(d for d in range(16, min(Dr, 128) + 1, 16) if Dr % d == 0)
    W, ROWS = WIDTH // FOUR, THREADS // (WIDTH // FOUR)
    B, C, ROW_ITEMS = symbols("B", "C", "ROW_ITEMS")

    @T.prim_func
    def landmark_gradients(
        chunk_pairs: T.Tensor((B, H, C), "int32"), chunk_item: T.Tensor((B, H, C), "int32"),
        partial: T.Tensor((B, H, ROW_ITEMS, Dr), "float32"), d_landmark: T.Tensor((B, C, H, Dr), problem.dtype),
    ):  # fmt: skip
        with T.Kernel(C * (Dr // WIDTH), H, B, threads=THREADS) as (x, h, b):
            all_sums = T.alloc_shared((ROWS, WIDTH), "float32")
            sums = T.alloc_local((FOUR,), "float32")
            row = T.alloc_local((FOUR,), "float32")
            g = T.alloc_var("float32")
            items = T.alloc_var("int32")
            first = T.alloc_var("int32")
            c = T.alloc_var("int32")
            e = T.alloc_var("int32")
            tx = T.get_thread_binding()
            c = T.truncdiv(x, Dr // WIDTH)
            e = T.truncmod(x, Dr // WIDTH)
            items = T.truncdiv(chunk_pairs[b, h, c] + P - 1, P)
            first = chunk_item[b, h, c]
            for u in T.unroll(FOUR):
                sums[u] = 0
            if tx < ROWS * W:
                for i in T.serial(T.truncdiv(T.max(items - tx // W, 0) + ROWS - 1, ROWS)):
                    for u in T.vectorized(FOUR):
                        row[u] = partial[b, h, first + i * ROWS + tx // W, e * WIDTH + tx % W * FOUR + u]
                    for u in T.unroll(FOUR):
                        sums[u] = sums[u] + row[u]
                for u in T.vectorized(FOUR):
                    all_sums[tx // W, tx % W * FOUR + u] = sums[u]
            T.sync_threads()
            if tx < WIDTH:
                g = 0
                for n in T.serial(ROWS):
                    g = g + all_sums[n, tx]
                d_landmark[b, c, h, e * WIDTH + tx] = T.cast(g, problem.dtype)

    return lists.launch(landmark_gradients, "chunk_pairs", "chunk_item", "partial", "d_landmark")


def program(problem: ChunkSelect, tile: GpuTile) -> GpuProgram:
    """The queries' gradients, the lists of pairs, then the landmarks' gradients by work item and by chunk.

    Raises:
        ProblemError: the dtype is float32, Dr is no multiple of 16 up to 1024, or K is above 64.
    """
    check(problem)
    lists = ChunkLists(problem, tile)
    partial = Region("partial", "float32", f"{lists.items} * {problem.retrieval_dim}")
    launches = (
        query_gradients(problem), *lists.launches(), item_gradients(problem, lists), landmark_gradients(problem, lists),
    )  # fmt: skip
    return GpuProgram(TENSORS, (*lists.regions(), partial), launches)
