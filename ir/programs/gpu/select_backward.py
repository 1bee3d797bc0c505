"""Chunk selection on GPUs, backward: queries gather the landmarks they selected, landmarks the queries that did.

Both are sums of rows with weights, 16 bytes of a row a thread. Landmarks walk lists of pairs in work items with fp32
partial sums that are added in order, so there are no atomics and results repeat to the bit. Where kv heads share a
selection, their indices are equal and their gradients are summed.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.chunk_lists import OPTIONS, ChunkLists, symbols
from hsa_compile.ir.programs.gpu.select import check

TENSORS = ("grad_scores", "q_r", "landmark", "indices", "d_q_r", "d_landmark")
VECTOR = 8  # elements of 16 bytes
THREADS = 256


def rows_at_once(retrieval_dim: int) -> int:
    """Rows that the threads of a block hold side by side."""
    return max(1, THREADS // (retrieval_dim // VECTOR))


def block_threads(retrieval_dim: int) -> int:
    """Threads for those rows, whole warps."""
    return -(-rows_at_once(retrieval_dim) * (retrieval_dim // VECTOR) // 32) * 32


def query_gradients(problem: ChunkSelect) -> Launch:
    """``d_q_r``, a row of threads a token and retrieval head."""
    H, Hkv, Dr, K = problem.retrieval_heads, problem.kv_heads, problem.retrieval_dim, problem.top_k
    shared, scale, W, ROWS = Hkv // H, problem.scale, Dr // VECTOR, rows_at_once(Dr)
    B, L, C = symbols("B", "L", "C")

    @T.prim_func
    def query_gradients(
        grad_scores: T.Tensor((B, L, Hkv, K), "float32"), landmark: T.Tensor((B, C, H, Dr), problem.dtype),
        indices: T.Tensor((B, L, Hkv, K), "int32"), d_q_r: T.Tensor((B, L, H, Dr), problem.dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, ROWS), H, B, threads=block_threads(Dr)) as (x, h, b):
            sums = T.alloc_local((VECTOR,), "float32")
            row = T.alloc_local((VECTOR,), problem.dtype)
            g = T.alloc_var("float32")
            c = T.alloc_var("int32")
            t = T.alloc_var("int32")
            tx = T.get_thread_binding()
            t = x * ROWS + tx // W
            if tx < ROWS * W and t < L:
                for u in T.unroll(VECTOR):
                    sums[u] = 0
                for k in T.serial(K):
                    c = indices[b, t, h * shared, k]
                    if c >= 0:
                        g = 0
                        for n in T.serial(shared):
                            g = g + grad_scores[b, t, h * shared + n, k]
                        for u in T.vectorized(VECTOR):
                            row[u] = landmark[b, c, h, tx % W * VECTOR + u]
                        for u in T.unroll(VECTOR):
                            sums[u] = sums[u] + g * T.float32(scale) * T.cast(row[u], "float32")
                for u in T.unroll(VECTOR):
                    row[u] = T.cast(sums[u], problem.dtype)
                for u in T.vectorized(VECTOR):
                    d_q_r[b, t, h, tx % W * VECTOR + u] = row[u]

    return Launch(
        "query_gradients", query_gradients, ("grad_scores", "landmark", "indices", "d_q_r"),
        {"B": "B", "L": "L", "C": "C"}, OPTIONS,
    )  # fmt: skip


def item_gradients(problem: ChunkSelect, lists: ChunkLists) -> Any:
    """A block a work item: the sum of its pairs, in ``partial``."""
    H, Dr = problem.retrieval_heads, problem.retrieval_dim
    W, ROWS = Dr // VECTOR, rows_at_once(Dr)
    NT = block_threads(Dr)
    B, L, ROW_ITEMS, ROW_PLACES = symbols("B", "L", "ROW_ITEMS", "ROW_PLACES")

    @T.prim_func
    def item_gradients(
        q_r: T.Tensor((B, L, H, Dr), problem.dtype), items: T.Tensor((B, H, ROW_ITEMS, 4), "int32"),
        place_row: T.Tensor((B, H, ROW_PLACES), "int32"), place_grad: T.Tensor((B, H, ROW_PLACES), "float32"),
        partial: T.Tensor((B, H, ROW_ITEMS, Dr), "float32"),
    ):  # fmt: skip
        with T.Kernel(ROW_ITEMS, H, B, threads=NT) as (x, h, b):
            all_sums = T.alloc_shared((ROWS, Dr), "float32")
            sums = T.alloc_local((VECTOR,), "float32")
            row = T.alloc_local((VECTOR,), problem.dtype)
            g = T.alloc_var("float32")
            t = T.alloc_var("int32")
            pairs = T.alloc_var("int32")
            first = T.alloc_var("int32")
            tx = T.get_thread_binding()
            pairs = items[b, h, x, 2]
            if pairs > 0:
                first = items[b, h, x, 1]
                for u in T.unroll(VECTOR):
                    sums[u] = 0
                for i in T.serial((pairs - tx // W + ROWS - 1) // ROWS):
                    t = place_row[b, h, first + i * ROWS + tx // W]
                    g = place_grad[b, h, first + i * ROWS + tx // W]
                    for u in T.vectorized(VECTOR):
                        row[u] = q_r[b, t, h, tx % W * VECTOR + u]
                    for u in T.unroll(VECTOR):
                        sums[u] = sums[u] + g * T.cast(row[u], "float32")
                if tx < ROWS * W:
                    for u in T.vectorized(VECTOR):
                        all_sums[tx // W, tx % W * VECTOR + u] = sums[u]
                T.sync_threads()
                for i in T.serial((Dr + NT - 1) // NT):
                    if i * NT + tx < Dr:
                        g = 0
                        for n in T.serial(ROWS):
                            g = g + all_sums[n, i * NT + tx]
                        partial[b, h, x, i * NT + tx] = g

    return lists.launch(item_gradients, "q_r", "items", "place_row", "place_grad", "partial")


def landmark_gradients(problem: ChunkSelect, lists: ChunkLists) -> Any:
    """A block a chunk: the sum of its items, every 8th by each of 8 rows of threads, those then in order."""
    H, Dr, P = problem.retrieval_heads, problem.retrieval_dim, lists.item_pairs
    COLUMNS, ROWS = 32, 8
    B, C, ROW_ITEMS = symbols("B", "C", "ROW_ITEMS")

    @T.prim_func
    def landmark_gradients(
        chunk_pairs: T.Tensor((B, H, C), "int32"), chunk_item: T.Tensor((B, H, C), "int32"),
        partial: T.Tensor((B, H, ROW_ITEMS, Dr), "float32"), d_landmark: T.Tensor((B, C, H, Dr), problem.dtype),
    ):  # fmt: skip
        with T.Kernel(C, H, B, threads=COLUMNS * ROWS) as (c, h, b):
            all_sums = T.alloc_shared((ROWS, COLUMNS), "float32")
            g = T.alloc_var("float32")
            items = T.alloc_var("int32")
            first = T.alloc_var("int32")
            d = T.alloc_var("int32")
            y = T.alloc_var("int32")
            tx = T.get_thread_binding()
            items = T.truncdiv(chunk_pairs[b, h, c] + P - 1, P)
            first = chunk_item[b, h, c]
            y = tx // COLUMNS
            for e in T.serial((Dr + COLUMNS - 1) // COLUMNS):
                d = e * COLUMNS + tx % COLUMNS
                g = 0
                if d < Dr:
                    for i in T.serial(T.truncdiv(T.max(items - y, 0) + ROWS - 1, ROWS)):
                        g = g + partial[b, h, first + i * ROWS + y, d]
                all_sums[y, tx % COLUMNS] = g
                T.sync_threads()
                if y == 0 and d < Dr:
                    for n in T.serial(ROWS - 1):
                        g = g + all_sums[n + 1, tx % COLUMNS]
                    d_landmark[b, c, h, d] = T.cast(g, problem.dtype)
                T.sync_threads()

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
