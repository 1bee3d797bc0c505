"""The counting sort of (token, chunk) pairs: sums of counts, places, and the launches of the whole grouping."""

import math
from typing import Any

import tilelang.language as T

from hsa_compile.ir.programs import Launch
from hsa_compile.ir.programs.gpu.pairs import (
    SCAN_THREADS,
    THREADS,
    Pairs,
    count,
    masked_before,
    ones,
    scan,
    symbols,
    unite,
)  # fmt: skip


def sum_segments(pairs: Pairs) -> Any:
    """Turns ``counts`` into the pairs of earlier segments, and leaves their sums in ``chunk_pairs``.

    32 chunks a block, a warp a sixteenth of the segments.
    """
    Hkv = pairs.problem.kv_heads
    B, C, SEGMENTS = symbols("B", "C", "SEGMENTS")
    W = 16

    @T.prim_func
    def sum_segments(
        counts: T.Tensor((B, Hkv, SEGMENTS, C), "int32"), chunk_pairs: T.Tensor((B, Hkv, C), "int32"),
    ):  # fmt: skip
        with T.Kernel((C + 31) // 32, Hkv, B, threads=32 * W) as (n, h, b):
            sums = T.alloc_shared((W, 32), "int32")
            total = T.alloc_var("int32")
            own = T.alloc_var("int32")
            tx = T.get_thread_binding()
            c = n * 32 + tx % 32
            w = tx // 32
            share = T.alloc_var("int32")
            share = T.truncdiv(SEGMENTS + W - 1, W)
            total = 0
            if c < C:
                for i in T.serial(T.min(share, SEGMENTS - w * share)):
                    total = total + counts[b, h, w * share + i, c]
            sums[w, tx % 32] = total
            T.sync_threads()
            total = 0
            for i in T.serial(w):
                total = total + sums[i, tx % 32]
            if c < C:
                if w == W - 1:
                    chunk_pairs[b, h, c] = total + sums[w, tx % 32]
                for i in T.serial(T.min(share, SEGMENTS - w * share)):
                    own = counts[b, h, w * share + i, c]
                    counts[b, h, w * share + i, c] = total
                    total = total + own

    return sum_segments


def sum_chunks(pairs: Pairs) -> Any:
    """A block a batch row and kv head: where each chunk's places and items begin; items beyond the last are empty."""
    Hkv, n, P = pairs.problem.kv_heads, pairs.block_tokens, pairs.item_pairs
    B, C, ROW_ITEMS, ROW_PLACES = symbols("B", "C", "ROW_ITEMS", "ROW_PLACES")
    NT = SCAN_THREADS

    @T.prim_func
    def sum_chunks(
        chunk_pairs: T.Tensor((B, Hkv, C), "int32"), chunk_place: T.Tensor((B, Hkv, C), "int32"),
        chunk_item: T.Tensor((B, Hkv, C), "int32"), items: T.Tensor((B, Hkv, ROW_ITEMS, 4), "int32"),
        place_row: T.Tensor((B, Hkv, ROW_PLACES), "int32"),
    ):  # fmt: skip
        with T.Kernel(Hkv, B, threads=NT) as (h, b):
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
                    x[0] = x[0] + (chunk_pairs[b, h, c] + n - 1) // n * n
                    y[0] = y[0] + (chunk_pairs[b, h, c] + P - 1) // P
            scan(x, warp_sums, tx, NT)
            scan(y, warp_sums, tx, NT)
            x[0] = x[0] + (b * Hkv + h) * ROW_PLACES
            for i in T.serial(share):
                c = tx * share + i
                if c < C:
                    chunk_place[b, h, c] = x[0]
                    chunk_item[b, h, c] = (b * Hkv + h) * ROW_ITEMS + y[0]
                    x[0] = x[0] + (chunk_pairs[b, h, c] + n - 1) // n * n
                    y[0] = y[0] + (chunk_pairs[b, h, c] + P - 1) // P
            for i in T.serial((ROW_ITEMS + NT - 1) // NT):
                if i * NT + tx >= y[1] and i * NT + tx < ROW_ITEMS:
                    items[b, h, i * NT + tx, 2] = 0
            if tx == 0 and ROW_PLACES < 0:  # a mention of the buffer whose extent is needed
                place_row[b, h, 0] = 0

    return sum_chunks


def place(pairs: Pairs) -> Any:
    """A block a segment: places of its entries (tile by tile, whose chunks are distinct), then of its pairs; and the
    items and the padding of its share of the chunks.

    The keys of a broken chunk must not reach a matrix product, which turns 0 * NaN into NaN for all tokens of a tile: its
    entries are sent past the last chunk, where loads give zero, and its pairs get a NaN for a weight, so that gradients
    of what selected it, and its own, are NaN and no others.

    Writes ``entries[1]``, ``place_of`` (-1 in empty slots, whose ``d_weights`` become 0), ``place_row`` (the row of q,
    complemented where the weight is negative; one past the last in padding), ``place_weight``, ``items`` (chunk, first
    place, pairs, whether it is the chunk's only one), and for padding the log-sum-exps and deltas that add nothing.
    """
    Hkv, K, G = pairs.problem.kv_heads, pairs.problem.top_k, pairs.problem.groups
    tokens, N, P, n_block = pairs.tokens, pairs.slots, pairs.item_pairs, pairs.block_tokens
    B, L, C, TILES, SEGMENTS = symbols("B", "L", "C", "TILES", "SEGMENTS")
    PLACES, ITEMS = symbols("PLACES", "ITEMS")
    ROUNDS = -(-N // THREADS)
    W = THREADS // 32

    @T.macro
    def place_entries(entries, entry_count, counts, chunk_place, broken, b, h, s, share, tx):
        c = T.alloc_var("int32")
        first = T.alloc_var("int32")
        for i in T.serial(T.min(share, TILES - s * share)):
            for j in T.unroll(ROUNDS):
                if j * THREADS + tx < entry_count[b, h, s * share + i]:
                    c = entries[b, h, s * share + i, j * THREADS + tx, 0]
                    first = counts[b, h, s, c]
                    entries[b, h, s * share + i, j * THREADS + tx, 1] = chunk_place[b, h, c] + first
                    counts[b, h, s, c] = (
                        first
                        + ones(entries[b, h, s * share + i, j * THREADS + tx, 2])
                        + ones(entries[b, h, s * share + i, j * THREADS + tx, 3])
                    )
                    if broken[b, h, c] != 0:
                        entries[b, h, s * share + i, j * THREADS + tx, 0] = C
            T.sync_threads()

    @T.macro
    def place_pairs(
        indices, weights, entries, broken, place_of, place_row, place_weight, d_weights, b, h, s, share, tx
    ):
        t = T.alloc_var("int32")
        slot = T.alloc_var("int32")
        c = T.alloc_var("int32")
        e = T.alloc_var("int32")
        p = T.alloc_var("int32")
        leads = T.alloc_var("int32")
        w = T.alloc_var("float32")
        for i in T.serial((share * N + THREADS - 1) // THREADS):
            t = s * share * tokens + (i * THREADS + tx) // K
            slot = (i * THREADS + tx) % K
            if i * THREADS + tx < share * N and t < L:
                c = indices[b, t, h, slot]
                if c < 0 or c >= C:
                    place_of[b, t, h, slot] = -1
                    d_weights[b, t, h, slot] = 0
                else:
                    e = place_of[b, t, h, slot]
                    p = entries[b, h, t // tokens, e, 1] + masked_before(
                        entries[b, h, t // tokens, e, 2], entries[b, h, t // tokens, e, 3], t % tokens, tokens
                    )
                    leads = 1
                    w = 0
                    for j in T.serial(K):
                        if indices[b, t, h, j] == c:
                            w = w + weights[b, t, h, j]
                            if j < slot:
                                leads = 0
                    place_of[b, t, h, slot] = T.if_then_else(broken[b, h, c] != 0, -1, p)
                    if broken[b, h, c] != 0:
                        w = T.float32(math.nan)
                        d_weights[b, t, h, slot] = w
                    if leads == 1:
                        row = (b * L + t) * Hkv + h
                        place_row[p] = T.if_then_else(w < 0, -1 - row, row)
                        place_weight[p] = w

    @T.macro
    def cut_chunks(chunk_pairs, chunk_place, chunk_item, items, place_row, lse, delta, b, h, s, tx):
        c = T.alloc_var("int32")
        n = T.alloc_var("int32")
        first = T.alloc_var("int32")
        for i in T.serial(T.truncdiv(T.truncdiv(C, SEGMENTS) + W, W)):
            c = (i * W + tx // 32) * SEGMENTS + s
            if c < C:
                n = chunk_pairs[b, h, c]
                first = chunk_place[b, h, c]
                for j in T.serial(((n + P - 1) // P + 31) // 32):
                    if (j * 32 + tx % 32) * P < n:
                        items[chunk_item[b, h, c] + j * 32 + tx % 32, 0] = c
                        items[chunk_item[b, h, c] + j * 32 + tx % 32, 1] = first + (j * 32 + tx % 32) * P
                        items[chunk_item[b, h, c] + j * 32 + tx % 32, 2] = T.min(n - (j * 32 + tx % 32) * P, P)
                        items[chunk_item[b, h, c] + j * 32 + tx % 32, 3] = T.if_then_else(n <= P, 1, 0)
                for j in T.serial(((n + n_block - 1) // n_block * n_block - n) * G // 32 + 1):
                    if n + (j * 32 + tx % 32) // G < (n + n_block - 1) // n_block * n_block:
                        place_row[first + n + (j * 32 + tx % 32) // G] = B * L * Hkv
                        lse[first + n + (j * 32 + tx % 32) // G, (j * 32 + tx % 32) % G] = T.infinity("float32")
                        delta[first + n + (j * 32 + tx % 32) // G, (j * 32 + tx % 32) % G] = 0

    @T.prim_func
    def place(
        indices: T.Tensor((B, L, Hkv, K), "int32"), weights: T.Tensor((B, L, Hkv, K), "float32"),
        entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"), entry_count: T.Tensor((B, Hkv, TILES), "int32"),
        counts: T.Tensor((B, Hkv, SEGMENTS, C), "int32"), chunk_pairs: T.Tensor((B, Hkv, C), "int32"),
        chunk_place: T.Tensor((B, Hkv, C), "int32"), chunk_item: T.Tensor((B, Hkv, C), "int32"),
        broken: T.Tensor((B, Hkv, C), "int32"), place_of: T.Tensor((B, L, Hkv, K), "int32"), place_row: T.Tensor((PLACES,), "int32"),
        place_weight: T.Tensor((PLACES,), "float32"), items: T.Tensor((ITEMS, 4), "int32"),
        lse: T.Tensor((PLACES, G), "float32"), delta: T.Tensor((PLACES, G), "float32"),
        d_weights: T.Tensor((B, L, Hkv, K), "float32"),
    ):  # fmt: skip
        with T.Kernel(SEGMENTS, Hkv, B, threads=THREADS) as (s, h, b):
            share = T.alloc_var("int32")
            tx = T.get_thread_binding()
            share = T.truncdiv(TILES + SEGMENTS - 1, SEGMENTS)
            place_entries(entries, entry_count, counts, chunk_place, broken, b, h, s, share, tx)
            place_pairs(
                indices, weights, entries, broken, place_of, place_row, place_weight, d_weights, b, h, s, share, tx
            )
            cut_chunks(chunk_pairs, chunk_place, chunk_item, items, place_row, lse, delta, b, h, s, tx)

    return place


def grouping_launches(pairs: Pairs) -> tuple[Launch, ...]:
    """All launches of the grouping, in order; ``lse`` and ``delta`` are fp32 [places, G]."""
    more = {"PLACES": pairs.places, "ITEMS": pairs.items}
    return (
        pairs.launch(unite(pairs), "k", "indices", "entries", "entry_count", "place_of"),
        pairs.launch(count(pairs), "k", "broken", "entries", "entry_count", "counts"),
        pairs.launch(sum_segments(pairs), "counts", "chunk_pairs"),
        pairs.launch(sum_chunks(pairs), "chunk_pairs", "chunk_place", "chunk_item", "items", "place_row"),
        pairs.launch(
            place(pairs), "indices", "weights", "entries", "entry_count", "counts", "chunk_pairs", "chunk_place",
            "chunk_item", "broken", "place_of", "place_row", "place_weight", "items", "lse", "delta", "d_weights", **more,
        ),
    )  # fmt: skip
