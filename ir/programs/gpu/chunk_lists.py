"""The (token, slot) pairs of a selection, listed by chunk in the order of tokens: a counting sort.

Tokens are cut into segments. Each segment counts its pairs by chunk, the counts are summed over segments and chunks,
and each segment then puts its pairs where they belong, 32 tokens at a time: a word for every chunk in shared memory says
which of them selected it, so that bits below its own tell a pair's place. Atomics only set bits and count, so lists
depend on the selection alone. Slots of a token with the same chunk are one pair; a slot whose index is negative or not
below C is empty. A chunk's list is cut into work items of at most ``tile.pairs``.

Regions, per batch row and head: ``counts`` [SEGMENTS, C]; ``chunk_pairs``, ``chunk_place`` and ``chunk_item`` [C], a
chunk's pairs and where its list and items begin; ``items`` [ROW_ITEMS, 4], (chunk, first place, pairs, -), no pairs
beyond the last; ``places`` [L*K, 2], token and gradient (the bits of a float32) of a pair.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.pairs import ones, scan, set_bits, symbols

SEGMENT_TOKENS = 128  # the least; more where the counts of all segments would outgrow the pairs
SEGMENTS = 384  # the most: with the memory of a WINDOW, three fit on a multiprocessor of an H100, so one wave
TILE_TOKENS = 32  # bits of a mask
# Chunks whose masks and counts a block holds; where there are more, it walks its segment for each so many. Counts in
# device memory cost a request each, of which a multiprocessor makes but one in two cycles.
WINDOW = 8192
SCAN_THREADS = 1024
# Barriers and bounds are written out.
OPTIONS = {
    "tl.disable_safe_memory_legalize": True,
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
        least = f"({fine} < {coarse} ? {fine} : {coarse})"
        self.segments = f"({least} < {SEGMENTS} ? {least} : {SEGMENTS})"
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
            Region("places", "int32", f"B * {H} * {self.row_places} * 2"),
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
            self.launch(
                place(self),
                "grad_scores",
                "indices",
                "counts",
                "chunk_pairs",
                "chunk_place",
                "chunk_item",
                "items",
                "places",
            ),
        )


def tile_threads(K: int) -> int:
    """Threads of a block: the slots of a tile of tokens, or as many of them as it takes at a time."""
    return min(512, max(64, TILE_TOKENS * K))


def segment_walk(lists: ChunkLists, C: Any) -> Any:
    """A macro that reads a thread's slots of tile ``i`` of a segment: their chunks, -1 where there is none in window
    ``w``. A thread's slot ``e`` of a tile is number ``e * threads + tx``."""
    H, Hkv, K = lists.problem.retrieval_heads, lists.problem.kv_heads, lists.problem.top_k
    NT = tile_threads(K)

    @T.macro
    def read(indices, chunk, b, h, first, tokens, i, w, tx):
        for e in T.unroll(-(-TILE_TOKENS * K // NT)):
            chunk[e] = -1
            if e * NT + tx < TILE_TOKENS * K and i * TILE_TOKENS + (e * NT + tx) // K < tokens:
                chunk[e] = indices[b, first + i * TILE_TOKENS + (e * NT + tx) // K, h * (Hkv // H), (e * NT + tx) % K]
            if chunk[e] < w * WINDOW or chunk[e] >= T.min(C, (w + 1) * WINDOW):
                chunk[e] = -1

    return read


def count(lists: ChunkLists) -> Any:
    """A block a segment: ``counts``, its pairs by chunk."""
    H, Hkv, K = lists.problem.retrieval_heads, lists.problem.kv_heads, lists.problem.top_k
    B, L, C, SEGMENTS = symbols("B", "L", "C", "SEGMENTS")
    NT = tile_threads(K)
    EACH = -(-TILE_TOKENS * K // NT)
    read = segment_walk(lists, C)

    @T.prim_func
    def list_count(indices: T.Tensor((B, L, Hkv, K), "int32"), counts: T.Tensor((B, H, SEGMENTS, C), "int32")):
        with T.Kernel(SEGMENTS, H, B, threads=NT) as (s, h, b):
            masks = T.alloc_shared((WINDOW,), "int32")
            found = T.alloc_shared((WINDOW,), "int32")
            chunk = T.alloc_local((EACH,), "int32")
            ahead = T.alloc_local((EACH,), "int32")
            share = T.alloc_var("int32")
            tokens = T.alloc_var("int32")
            mask = T.alloc_var("int32")
            tx = T.get_thread_binding()
            share = T.truncdiv(L + SEGMENTS - 1, SEGMENTS)
            tokens = T.max(T.min(share, L - s * share), 0)
            for i in T.serial((T.min(C, WINDOW) + NT - 1) // NT):
                if i * NT + tx < WINDOW:
                    masks[i * NT + tx] = 0
                    found[i * NT + tx] = 0
            T.sync_threads()
            for w in T.serial((C + WINDOW - 1) // WINDOW):
                read(indices, ahead, b, h, s * share, tokens, 0, w, tx)
                for i in T.serial((tokens + TILE_TOKENS - 1) // TILE_TOKENS):
                    for e in T.unroll(EACH):
                        chunk[e] = ahead[e]
                        if chunk[e] >= 0:
                            set_bits(masks[chunk[e] - w * WINDOW], T.shift_left(1, (e * NT + tx) // K))
                    read(indices, ahead, b, h, s * share, tokens, i + 1, w, tx)
                    T.sync_threads()
                    for e in T.unroll(EACH):
                        if chunk[e] >= 0:  # who takes the mask away counts it
                            mask = T.call_extern("int32", "atomicExch", T.address_of(masks[chunk[e] - w * WINDOW]), 0)
                            if mask != 0:
                                found[chunk[e] - w * WINDOW] = found[chunk[e] - w * WINDOW] + ones(mask)
                    T.sync_threads()
                for i in T.serial((T.min(C - w * WINDOW, WINDOW) + NT - 1) // NT):
                    if i * NT + tx < T.min(C - w * WINDOW, WINDOW):
                        counts[b, h, s, w * WINDOW + i * NT + tx] = found[i * NT + tx]
                        found[i * NT + tx] = 0
                T.sync_threads()

    return list_count


def sum_segments(lists: ChunkLists) -> Any:
    """Turns ``counts`` into the pairs of earlier segments, and leaves their sums in ``chunk_pairs``.

    32 chunks a block, to a warp one in W of the segments, of which it reads several at a time.
    """
    H = lists.problem.retrieval_heads
    B, C, SEGMENTS = symbols("B", "C", "SEGMENTS")
    W, EACH = 32, 4

    @T.macro
    def read(counts, own, b, h, c, first, n):
        for u in T.unroll(EACH):
            own[u] = 0
            if u < n:
                own[u] = counts[b, h, first + u, c]

    @T.prim_func
    def list_sum_segments(
        counts: T.Tensor((B, H, SEGMENTS, C), "int32"), chunk_pairs: T.Tensor((B, H, C), "int32"),
    ):  # fmt: skip
        with T.Kernel((C + 31) // 32, H, B, threads=32 * W) as (n, h, b):
            sums = T.alloc_shared((W, 32), "int32")
            own = T.alloc_local((EACH,), "int32")
            total = T.alloc_var("int32")
            share = T.alloc_var("int32")
            mine = T.alloc_var("int32")
            c = T.alloc_var("int32")
            w = T.alloc_var("int32")
            tx = T.get_thread_binding()
            c = n * 32 + tx % 32
            w = tx // 32
            share = T.truncdiv(SEGMENTS + W - 1, W)
            mine = T.if_then_else(c < C, T.max(T.min(share, SEGMENTS - w * share), 0), 0)
            total = 0
            for i in T.serial((mine + EACH - 1) // EACH):
                read(counts, own, b, h, c, w * share + i * EACH, mine - i * EACH)
                for u in T.unroll(EACH):
                    total = total + own[u]
            sums[w, tx % 32] = total
            T.sync_threads()
            total = 0
            for i in T.serial(W):
                if i < w:
                    total = total + sums[i, tx % 32]
            if c < C and w == W - 1:
                chunk_pairs[b, h, c] = total + sums[w, tx % 32]
            for i in T.serial((mine + EACH - 1) // EACH):
                read(counts, own, b, h, c, w * share + i * EACH, mine - i * EACH)
                for u in T.unroll(EACH):
                    if i * EACH + u < mine:
                        counts[b, h, w * share + i * EACH + u, c] = total
                    total = total + own[u]

    return list_sum_segments


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
            scan(x, warp_sums, tx, NT)
            scan(y, warp_sums, tx, NT)
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


def place(lists: ChunkLists) -> Any:
    """A block a segment: puts its pairs on the lists, a tile of tokens at a time, then cuts its share of the lists.

    A pair's gradient is that of its score, times the score's factor, summed over kv heads that share the selection.
    """
    H, Hkv, K = lists.problem.retrieval_heads, lists.problem.kv_heads, lists.problem.top_k
    shared, scale, P = Hkv // H, lists.problem.scale, lists.item_pairs
    B, L, C, SEGMENTS, ROW_ITEMS = symbols("B", "L", "C", "SEGMENTS", "ROW_ITEMS")
    ROW_PLACES = symbols("ROW_PLACES")[0]
    NT = tile_threads(K)
    EACH, W = -(-TILE_TOKENS * K // NT), NT // 32
    read = segment_walk(lists, C)

    @T.macro
    def mark(grad_scores, masks, doubled, chunk, grad, b, h, first, i, w, tx):
        """Sets the bits of a tile's pairs; of slots with the same token and chunk only the first to come goes on."""
        bit = T.alloc_var("int32")
        for e in T.unroll(EACH):
            if chunk[e] >= 0:
                grad[e] = 0
                for n in T.unroll(shared):
                    grad[e] = (
                        grad[e]
                        + grad_scores[
                            b, first + i * TILE_TOKENS + (e * NT + tx) // K, h * shared + n, (e * NT + tx) % K
                        ]
                    )
                bit = set_bits(masks[chunk[e] - w * WINDOW], T.shift_left(1, (e * NT + tx) // K))
                if T.bitwise_and(T.shift_right(bit, (e * NT + tx) // K), 1) != 0:
                    doubled[0] = 1
                    chunk[e] = -1

    @T.macro
    def rank(masks, begin, chunk, place, leads, w, tx):
        """Places; ``leads`` has the tile's pairs of a chunk where the token is its first."""
        mask = T.alloc_var("int32")
        for e in T.unroll(EACH):
            leads[e] = 0
            if chunk[e] >= 0:
                mask = masks[chunk[e] - w * WINDOW]
                place[e] = begin[chunk[e] - w * WINDOW] + ones(mask & (T.shift_left(1, (e * NT + tx) // K) - 1))
                if (mask & (T.shift_left(1, (e * NT + tx) // K) - 1)) == 0:
                    leads[e] = ones(mask)

    @T.macro
    def write(grad_scores, indices, masks, begin, doubled, chunk, place, leads, grad, places, b, h, first, i, w, tx):
        pair = T.alloc_local((2,), "int32")
        g = T.alloc_var("float32")
        for e in T.unroll(EACH):
            if chunk[e] >= 0:
                if leads[e] > 0:
                    masks[chunk[e] - w * WINDOW] = 0
                    begin[chunk[e] - w * WINDOW] = begin[chunk[e] - w * WINDOW] + leads[e]
                pair[0] = first + i * TILE_TOKENS + (e * NT + tx) // K
                g = grad[e]
                if doubled[0] != 0:
                    g = 0
                    for k in T.serial(K):
                        if indices[b, pair[0], h * shared, k] == chunk[e]:
                            for n in T.serial(shared):
                                g = g + grad_scores[b, pair[0], h * shared + n, k]
                g = g * T.float32(scale)
                pair[1] = T.reinterpret(g, "int32")
                for u in T.vectorized(2):
                    places[b, h, place[e], u] = pair[u]

    @T.macro
    def cut(chunk_pairs, chunk_place, chunk_item, items, b, h, s, tx):
        """A warp a chunk: its work items."""
        c = T.alloc_var("int32")
        pairs = T.alloc_var("int32")
        item = T.alloc_var("int32")
        for i in T.serial(T.truncdiv(T.truncdiv(C, SEGMENTS) + W, W)):
            c = (i * W + tx // 32) * SEGMENTS + s
            if c < C:
                pairs = chunk_pairs[b, h, c]
                for j in T.serial((T.truncdiv(pairs + P - 1, P) + 31) // 32):
                    item = j * 32 + tx % 32
                    if item * P < pairs:
                        items[b, h, chunk_item[b, h, c] + item, 0] = c
                        items[b, h, chunk_item[b, h, c] + item, 1] = chunk_place[b, h, c] + item * P
                        items[b, h, chunk_item[b, h, c] + item, 2] = T.min(pairs - item * P, P)

    @T.prim_func
    def list_place(
        grad_scores: T.Tensor((B, L, Hkv, K), "float32"), indices: T.Tensor((B, L, Hkv, K), "int32"),
        counts: T.Tensor((B, H, SEGMENTS, C), "int32"), chunk_pairs: T.Tensor((B, H, C), "int32"),
        chunk_place: T.Tensor((B, H, C), "int32"), chunk_item: T.Tensor((B, H, C), "int32"),
        items: T.Tensor((B, H, ROW_ITEMS, 4), "int32"), places: T.Tensor((B, H, ROW_PLACES, 2), "int32"),
    ):  # fmt: skip
        with T.Kernel(SEGMENTS, H, B, threads=NT) as (s, h, b):
            masks = T.alloc_shared((WINDOW,), "int32")
            begin = T.alloc_shared((WINDOW,), "int32")  # where the segment's next pair of a chunk belongs
            doubled = T.alloc_shared((1,), "int32")
            chunk = T.alloc_local((EACH,), "int32")
            ahead = T.alloc_local((EACH,), "int32")
            place = T.alloc_local((EACH,), "int32")
            leads = T.alloc_local((EACH,), "int32")
            grad = T.alloc_local((EACH,), "float32")
            first = T.alloc_var("int32")
            tokens = T.alloc_var("int32")
            if EACH == 1:
                T.annotate_min_blocks_per_sm(3)
            tx = T.get_thread_binding()
            tokens = T.truncdiv(L + SEGMENTS - 1, SEGMENTS)
            first = s * tokens
            tokens = T.max(T.min(tokens, L - first), 0)
            for i in T.serial((T.min(C, WINDOW) + NT - 1) // NT):
                if i * NT + tx < WINDOW:
                    masks[i * NT + tx] = 0
            if tx == 0:
                doubled[0] = 0
            for w in T.serial((C + WINDOW - 1) // WINDOW):
                for i in T.serial((T.min(C - w * WINDOW, WINDOW) + NT - 1) // NT):
                    if i * NT + tx < T.min(C - w * WINDOW, WINDOW):
                        begin[i * NT + tx] = (
                            chunk_place[b, h, w * WINDOW + i * NT + tx] + counts[b, h, s, w * WINDOW + i * NT + tx]
                        )
                T.sync_threads()
                read(indices, ahead, b, h, first, tokens, 0, w, tx)
                for i in T.serial((tokens + TILE_TOKENS - 1) // TILE_TOKENS):
                    for e in T.unroll(EACH):
                        chunk[e] = ahead[e]
                    mark(grad_scores, masks, doubled, chunk, grad, b, h, first, i, w, tx)
                    read(indices, ahead, b, h, first, tokens, i + 1, w, tx)
                    T.sync_threads()
                    rank(masks, begin, chunk, place, leads, w, tx)
                    T.sync_threads()
                    write(
                        grad_scores, indices, masks, begin, doubled, chunk, place, leads, grad, places, b, h, first,
                        i, w, tx,
                    )  # fmt: skip
                    T.sync_threads()
            cut(chunk_pairs, chunk_place, chunk_item, items, b, h, s, tx)

    return list_place
