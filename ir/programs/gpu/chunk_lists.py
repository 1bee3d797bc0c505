"""The (token, slot) pairs of a selection, listed by chunk in the order of tokens and slots: a counting sort.

Tokens are cut into segments. Each segment counts its pairs by chunk, the counts are summed over segments and chunks,
and each segment then puts its pairs where they belong, token after token. Atomics only count, so lists depend on the
selection alone. A chunk's list is cut into work items of at most ``tile.pairs``.

Regions, per batch row and head: ``counts`` [SEGMENTS, C]; ``chunk_pairs``, ``chunk_place`` and ``chunk_item`` [C], a
chunk's pairs and where its list and items begin; ``items`` [ROW_ITEMS, 4], (chunk, first place, pairs, -), no pairs
beyond the last; ``place_row`` and ``place_grad`` [L*K], token and gradient of a pair.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import GpuTile, Launch, Region

SEGMENT_TOKENS = 128  # the least; more where the counts of all segments would outgrow the pairs
SCAN_THREADS = 1024
OPTIONS = {
    "tl.disable_thread_storage_sync": True,
    "tl.disable_data_race_check": True,
    "tl.disable_warp_specialized": True,
}


class ChunkLists:
    """Sizes of the lists of a problem under a tile, as C expressions, and their launches."""

    def __init__(self, problem: ChunkSelect, tile: GpuTile) -> None:
        H, K = problem.retrieval_heads, problem.top_k
        self.problem, self.item_pairs = problem, tile.pairs
        fine, coarse = f"((L + {SEGMENT_TOKENS - 1}) / {SEGMENT_TOKENS})", "(8 * L / (C + 1) + 1)"
        self.segments = f"({fine} < {coarse} ? {fine} : {coarse})"
        self.row_items = f"(L * {K} / {tile.pairs} + C)"
        self.row_places = f"L * {K}"
        self.items = f"B * {H} * {self.row_items}"
        self.dims = {
            "B": "B", "L": "L", "C": "C", "SEGMENTS": self.segments, "ROW_ITEMS": self.row_items,
            "ROW_PLACES": self.row_places,
        }  # fmt: skip

    def regions(self) -> tuple[Region, ...]:
        """Scratch of the lists: linear in L*K and C, and never more than 8 counts a token."""
        H = self.problem.retrieval_heads
        return (
            Region("counts", "int32", f"B * {H} * {self.segments} * C"),
            Region("chunk_pairs", "int32", f"B * {H} * C"),
            Region("chunk_place", "int32", f"B * {H} * C"),
            Region("chunk_item", "int32", f"B * {H} * C"),
            Region("items", "int32", f"{self.items} * 4"),
            Region("place_row", "int32", f"B * {H} * {self.row_places}"),
            Region("place_grad", "float32", f"B * {H} * {self.row_places}"),
        )

    def launch(self, function: Any, *arguments: str) -> Launch:
        """A launch over ``arguments``, with those of ``dims`` that the function's buffers name."""
        named = {str(d) for buffer in function.buffer_map.values() for d in buffer.shape}
        dims = {name: text for name, text in self.dims.items() if name in named}
        return Launch(function.attrs["global_symbol"], function, arguments, dims, OPTIONS)

    def launches(self) -> tuple[Launch, ...]:
        """All launches, in order."""
        return (
            self.launch(count(self), "indices", "counts"),
            self.launch(sum_segments(self), "counts", "chunk_pairs"),
            self.launch(sum_chunks(self), "chunk_pairs", "chunk_place", "chunk_item", "items"),
            self.launch(cut_lists(self), "chunk_pairs", "chunk_place", "chunk_item", "items"),
            self.launch(place(self), "grad_scores", "indices", "counts", "chunk_place", "place_row", "place_grad"),
        )


def symbols(*names: str) -> tuple[Any, ...]:
    return tuple(T.dynamic(name) for name in names)


def count(lists: ChunkLists) -> Any:
    """A block a segment: ``counts``, its pairs by chunk."""
    H, Hkv, K = lists.problem.retrieval_heads, lists.problem.kv_heads, lists.problem.top_k
    B, L, C, SEGMENTS = symbols("B", "L", "C", "SEGMENTS")
    NT = 256

    @T.prim_func
    def list_count(indices: T.Tensor((B, L, Hkv, K), "int32"), counts: T.Tensor((B, H, SEGMENTS, C), "int32")):
        with T.Kernel(SEGMENTS, H, B, threads=NT) as (s, h, b):
            share = T.alloc_var("int32")
            t = T.alloc_var("int32")
            tx = T.get_thread_binding()
            share = T.truncdiv(L + SEGMENTS - 1, SEGMENTS)
            for i in T.serial((C + NT - 1) // NT):
                if i * NT + tx < C:
                    counts[b, h, s, i * NT + tx] = 0
            T.sync_threads()
            for i in T.serial((share * K + NT - 1) // NT):
                t = s * share + (i * NT + tx) // K
                if i * NT + tx < share * K and t < L:
                    if indices[b, t, h * (Hkv // H), (i * NT + tx) % K] >= 0:
                        T.atomic_add(counts[b, h, s, indices[b, t, h * (Hkv // H), (i * NT + tx) % K]], 1)

    return list_count


def sum_segments(lists: ChunkLists) -> Any:
    """Turns ``counts`` into the pairs of earlier segments, and leaves their sums in ``chunk_pairs``.

    32 chunks a block, a warp a sixteenth of the segments.
    """
    H = lists.problem.retrieval_heads
    B, C, SEGMENTS = symbols("B", "C", "SEGMENTS")
    W = 16

    @T.prim_func
    def list_sum_segments(
        counts: T.Tensor((B, H, SEGMENTS, C), "int32"), chunk_pairs: T.Tensor((B, H, C), "int32"),
    ):  # fmt: skip
        with T.Kernel((C + 31) // 32, H, B, threads=32 * W) as (n, h, b):
            sums = T.alloc_shared((W, 32), "int32")
            total = T.alloc_var("int32")
            own = T.alloc_var("int32")
            share = T.alloc_var("int32")
            c = T.alloc_var("int32")
            w = T.alloc_var("int32")
            tx = T.get_thread_binding()
            c = n * 32 + tx % 32
            w = tx // 32
            share = T.truncdiv(SEGMENTS + W - 1, W)
            total = 0
            if c < C:
                for i in T.serial(T.max(T.min(share, SEGMENTS - w * share), 0)):
                    total = total + counts[b, h, w * share + i, c]
            sums[w, tx % 32] = total
            T.sync_threads()
            total = 0
            for i in T.serial(W):
                if i < w:
                    total = total + sums[i, tx % 32]
            if c < C:
                if w == W - 1:
                    chunk_pairs[b, h, c] = total + sums[w, tx % 32]
                for i in T.serial(T.max(T.min(share, SEGMENTS - w * share), 0)):
                    own = counts[b, h, w * share + i, c]
                    counts[b, h, w * share + i, c] = total
                    total = total + own

    return list_sum_segments


@T.macro
def scan(x, warp_sums, tx):
    """x[0] = exclusive sum of x[0] over the SCAN_THREADS threads, x[1] = their total."""
    own = T.alloc_var("int32")
    up = T.alloc_var("int32")
    own = x[0]
    for j in T.unroll(5):
        up = T.shfl_up(x[0], 1 << j)
        if tx % 32 >= (1 << j):
            x[0] = x[0] + up
    if tx % 32 == 31:
        warp_sums[tx // 32] = x[0]
    T.sync_threads()
    x[0] = x[0] - own
    x[1] = 0
    for w in T.serial(SCAN_THREADS // 32):
        if w < tx // 32:
            x[0] = x[0] + warp_sums[w]
        x[1] = x[1] + warp_sums[w]
    T.sync_threads()


def sum_chunks(lists: ChunkLists) -> Any:
    """A block a batch row and head: where each chunk's list and items begin; items beyond the last are empty."""
    H, P = lists.problem.retrieval_heads, lists.item_pairs
    B, C, ROW_ITEMS = symbols("B", "C", "ROW_ITEMS")
    NT = SCAN_THREADS

    @T.prim_func
    def list_sum_chunks(
        chunk_pairs: T.Tensor((B, H, C), "int32"), chunk_place: T.Tensor((B, H, C), "int32"),
        chunk_item: T.Tensor((B, H, C), "int32"), items: T.Tensor((B, H, ROW_ITEMS, 4), "int32"),
    ):  # fmt: skip
        with T.Kernel(H, B, threads=NT) as (h, b):
            warp_sums = T.alloc_shared((32,), "int32")
            x = T.alloc_local((2,), "int32")
            y = T.alloc_local((2,), "int32")
            c = T.alloc_var("int32")
            share = T.alloc_var("int32")
            tx = T.get_thread_binding()
            share = T.truncdiv(C + NT - 1, NT)
            x[0] = 0
            y[0] = 0
            for i in T.serial(share):
                c = tx * share + i
                if c < C:
                    x[0] = x[0] + chunk_pairs[b, h, c]
                    y[0] = y[0] + T.truncdiv(chunk_pairs[b, h, c] + P - 1, P)
            scan(x, warp_sums, tx)
            scan(y, warp_sums, tx)
            for i in T.serial(share):
                c = tx * share + i
                if c < C:
                    chunk_place[b, h, c] = x[0]
                    chunk_item[b, h, c] = y[0]
                    x[0] = x[0] + chunk_pairs[b, h, c]
                    y[0] = y[0] + T.truncdiv(chunk_pairs[b, h, c] + P - 1, P)
            for i in T.serial((ROW_ITEMS + NT - 1) // NT):
                if i * NT + tx >= y[1] and i * NT + tx < ROW_ITEMS:
                    items[b, h, i * NT + tx, 2] = 0

    return list_sum_chunks


def cut_lists(lists: ChunkLists) -> Any:
    """A warp a chunk: its work items."""
    H, P = lists.problem.retrieval_heads, lists.item_pairs
    B, C, ROW_ITEMS = symbols("B", "C", "ROW_ITEMS")
    W = 8

    @T.prim_func
    def list_cut(
        chunk_pairs: T.Tensor((B, H, C), "int32"), chunk_place: T.Tensor((B, H, C), "int32"),
        chunk_item: T.Tensor((B, H, C), "int32"), items: T.Tensor((B, H, ROW_ITEMS, 4), "int32"),
    ):  # fmt: skip
        with T.Kernel((C + W - 1) // W, H, B, threads=32 * W) as (n, h, b):
            c = T.alloc_var("int32")
            pairs = T.alloc_var("int32")
            item = T.alloc_var("int32")
            tx = T.get_thread_binding()
            c = n * W + tx // 32
            if c < C:
                pairs = chunk_pairs[b, h, c]
                for j in T.serial((T.truncdiv(pairs + P - 1, P) + 31) // 32):
                    item = j * 32 + tx % 32
                    if item * P < pairs:
                        items[b, h, chunk_item[b, h, c] + item, 0] = c
                        items[b, h, chunk_item[b, h, c] + item, 1] = chunk_place[b, h, c] + item * P
                        items[b, h, chunk_item[b, h, c] + item, 2] = T.min(pairs - item * P, P)

    return list_cut


def place(lists: ChunkLists) -> Any:
    """A warp a segment: puts its pairs on the lists, a token at a time, a lane (or two slots a lane) a pair.

    ``place_grad`` is the gradient of the pair's score, times the score's factor, summed over kv heads that share it.
    """
    H, Hkv, K = lists.problem.retrieval_heads, lists.problem.kv_heads, lists.problem.top_k
    shared, scale = Hkv // H, lists.problem.scale
    B, L, C, SEGMENTS, ROW_PLACES = symbols("B", "L", "C", "SEGMENTS", "ROW_PLACES")
    EACH = -(-K // 32)

    @T.macro
    def place_slots(grad_scores, counts, chunk_place, place_row, place_grad, chunk, b, h, s, t, lane):
        """Duplicates of a chunk in a token follow one another: each counts those before it, the last counts all."""
        before = T.alloc_local((EACH,), "int32")
        after = T.alloc_local((EACH,), "int32")
        first = T.alloc_local((EACH,), "int32")
        other = T.alloc_var("int32")
        g = T.alloc_var("float32")
        for e in T.unroll(EACH):
            before[e] = 0
            after[e] = 0
            first[e] = 0
            if chunk[e] >= 0:
                first[e] = counts[b, h, s, chunk[e]]
        for k in T.unroll(K):
            other = T.shfl_sync(chunk[k // 32], k % 32)
            for e in T.unroll(EACH):
                if other == chunk[e]:
                    before[e] = before[e] + T.cast(k < e * 32 + lane, "int32")
                    after[e] = after[e] + T.cast(k > e * 32 + lane, "int32")
        T.sync_warp()
        for e in T.unroll(EACH):
            if chunk[e] >= 0:
                if after[e] == 0:
                    counts[b, h, s, chunk[e]] = first[e] + before[e] + 1
                first[e] = first[e] + chunk_place[b, h, chunk[e]] + before[e]
                g = 0
                for n in T.serial(shared):
                    g = g + grad_scores[b, t, h * shared + n, T.min(e * 32 + lane, K - 1)]
                place_row[b, h, first[e]] = t
                place_grad[b, h, first[e]] = g * T.float32(scale)
        T.sync_warp()

    @T.prim_func
    def list_place(
        grad_scores: T.Tensor((B, L, Hkv, K), "float32"), indices: T.Tensor((B, L, Hkv, K), "int32"),
        counts: T.Tensor((B, H, SEGMENTS, C), "int32"), chunk_place: T.Tensor((B, H, C), "int32"),
        place_row: T.Tensor((B, H, ROW_PLACES), "int32"), place_grad: T.Tensor((B, H, ROW_PLACES), "float32"),
    ):  # fmt: skip
        with T.Kernel(SEGMENTS, H, B, threads=32) as (s, h, b):
            chunk = T.alloc_local((EACH,), "int32")
            ahead = T.alloc_local((EACH,), "int32")
            share = T.alloc_var("int32")
            lane = T.get_thread_binding()
            share = T.truncdiv(L + SEGMENTS - 1, SEGMENTS)
            for e in T.unroll(EACH):
                ahead[e] = -1
                if e * 32 + lane < K and s * share < L:
                    ahead[e] = indices[b, s * share, h * shared, T.min(e * 32 + lane, K - 1)]
            for i in T.serial(T.max(T.min(share, L - s * share), 0)):
                for e in T.unroll(EACH):
                    chunk[e] = ahead[e]
                    if e * 32 + lane < K and i + 1 < share and s * share + i + 1 < L:
                        ahead[e] = indices[b, s * share + i + 1, h * shared, T.min(e * 32 + lane, K - 1)]
                place_slots(
                    grad_scores, counts, chunk_place, place_row, place_grad, chunk, b, h, s, s * share + i, lane
                )

    return list_place
