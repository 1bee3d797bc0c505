"""The counting sort of (token, chunk) pairs: sums of counts, places, and the launches of the whole grouping."""

import math
from typing import Any

import tilelang.language as T

from hsa_compile.ir.programs import Launch
from hsa_compile.ir.programs.gpu.pairs import (
    SCAN_THREADS,
    THREADS,
    Pairs,
    add_to,
    count,
    masked_before,
    ones,
    scan,
    symbols,
    unite,
)  # fmt: skip

COUNTED = 16384  # chunks whose next places fit into shared memory; more are placed in turns


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
        place_pair: T.Tensor((B, Hkv, ROW_PLACES, 2), "int32"),
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
                place_pair[b, h, 0, 0] = 0

    return sum_chunks


def place_entries(pairs: Pairs) -> Any:
    """A block a segment: places of its entries, and the items and the padding of its share of the chunks.

    A segment walks its tiles in order, one after another: within a tile chunks are distinct, so a tile's entries take
    their places side by side. The next place of every chunk lies in shared memory, and entries are read and written
    many tiles at a time: a step of the walk then waits for shared memory alone (device memory, a step: 715 us for 1M
    tokens on an H100).

    The keys of a broken chunk must not reach a matrix product, which turns 0 * NaN into NaN for all tokens of a tile: its
    entries are sent past the last chunk, where loads give zero.

    Writes ``entries[1]``, ``items`` (chunk, first place, pairs, whether it is the chunk's only one) and, for padding,
    a row of ``place_pair`` one past the last, and the log-sum-exps and deltas that add nothing.
    """
    Hkv, G = pairs.problem.kv_heads, pairs.problem.groups
    N, P, n_block = pairs.slots, pairs.item_pairs, pairs.block_tokens
    B, L, C, TILES, SEGMENTS = symbols("B", "L", "C", "TILES", "SEGMENTS")
    PLACES, ITEMS = symbols("PLACES", "ITEMS")
    BATCH = max(1, 1024 // N)  # tiles read at a time
    W = THREADS // 32

    @T.macro
    def read(entries, entry_count, found, b, h, first, tiles, low, high, tx):
        """``found``: chunk less ``low`` and pairs of the entries of ``tiles`` tiles; -1 where none or not below ``high``."""
        u = T.alloc_var("int32")
        c = T.alloc_var("int32")
        n = T.alloc_var("int32")
        for j in T.unroll((BATCH * N + THREADS - 1) // THREADS):
            u = j * THREADS + tx
            n = first + u // N
            c = -1
            if u < BATCH * N and u // N < tiles:
                if u % N < entry_count[b, h, n]:
                    if entries[b, h, n, u % N, 0] < high:
                        c = entries[b, h, n, u % N, 0] - low
                        found[1, u] = ones(entries[b, h, n, u % N, 2]) + ones(entries[b, h, n, u % N, 3])
            if u < BATCH * N:
                found[0, u] = c

    @T.macro
    def write(entries, found, broken, C, b, h, first, low, tx):
        u = T.alloc_var("int32")
        n = T.alloc_var("int32")
        for j in T.unroll((BATCH * N + THREADS - 1) // THREADS):
            u = j * THREADS + tx
            n = first + u // N
            if u < BATCH * N:
                if found[0, u] >= 0:
                    entries[b, h, n, u % N, 1] = found[1, u]
                    if broken[b, h, low + found[0, u]] != 0:
                        entries[b, h, n, u % N, 0] = C

    @T.macro
    def walk(found, next_place, tx):
        u = T.alloc_var("int32")
        c = T.alloc_var("int32")
        p = T.alloc_var("int32")
        for i in T.serial(BATCH):
            for j in T.unroll((N + THREADS - 1) // THREADS):
                u = i * N + j * THREADS + tx
                if j * THREADS + tx < N:
                    c = found[0, u]
                    if c >= 0:
                        p = next_place[c]
                        next_place[c] = p + found[1, u]
                        found[1, u] = p
            if N > 32:
                T.sync_threads()
            else:
                T.sync_warp()
        T.sync_threads()

    @T.macro
    def cut_chunks(chunk_pairs, chunk_place, chunk_item, items, place_pair, lse, delta, b, h, s, tx):
        c = T.alloc_var("int32")
        n = T.alloc_var("int32")
        first = T.alloc_var("int32")
        i = T.alloc_var("int32")
        item = T.alloc_var("int32")
        end = T.alloc_var("int32")
        for share in T.serial(T.truncdiv(T.truncdiv(C, SEGMENTS) + W, W)):
            c = (share * W + tx // 32) * SEGMENTS + s
            if c < C:
                n = chunk_pairs[b, h, c]
                first = chunk_place[b, h, c]
                item = chunk_item[b, h, c]
                for j in T.serial(T.truncdiv(T.truncdiv(n + P - 1, P) + 31, 32)):
                    i = j * 32 + tx % 32
                    if i * P < n:
                        items[item + i, 0] = c
                        items[item + i, 1] = first + i * P
                        items[item + i, 2] = T.min(n - i * P, P)
                        items[item + i, 3] = T.if_then_else(n <= P, 1, 0)
                end = T.truncdiv(n + n_block - 1, n_block) * n_block
                for j in T.serial(T.truncdiv((end - n) * G, 32) + 1):
                    i = n + T.truncdiv(j * 32 + tx % 32, G)
                    if i < end:
                        place_pair[first + i, 0] = B * L * Hkv
                        lse[first + i, T.truncmod(j * 32 + tx % 32, G)] = T.infinity("float32")
                        delta[first + i, T.truncmod(j * 32 + tx % 32, G)] = 0

    @T.prim_func
    def place_entries(
        entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"), entry_count: T.Tensor((B, Hkv, TILES), "int32"),
        counts: T.Tensor((B, Hkv, SEGMENTS, C), "int32"), chunk_pairs: T.Tensor((B, Hkv, C), "int32"),
        chunk_place: T.Tensor((B, Hkv, C), "int32"), chunk_item: T.Tensor((B, Hkv, C), "int32"),
        broken: T.Tensor((B, Hkv, C), "int32"), indices: T.Tensor((B, L, Hkv, pairs.problem.top_k), "int32"),
        place_pair: T.Tensor((PLACES, 2), "int32"), items: T.Tensor((ITEMS, 4), "int32"),
        lse: T.Tensor((PLACES, G), "float32"), delta: T.Tensor((PLACES, G), "float32"),
    ):  # fmt: skip
        with T.Kernel(SEGMENTS, Hkv, B, threads=THREADS) as (s, h, b):
            next_place = T.alloc_shared((COUNTED,), "int32")
            found = T.alloc_shared((2, BATCH * N), "int32")
            first = T.alloc_var("int32")
            tiles = T.alloc_var("int32")
            low = T.alloc_var("int32")
            high = T.alloc_var("int32")
            tx = T.get_thread_binding()
            tiles = T.truncdiv(TILES + SEGMENTS - 1, SEGMENTS)
            first = s * tiles
            tiles = T.min(tiles, TILES - first)
            low = 0
            while low < C:
                high = T.min(low + COUNTED, C)
                for i in T.serial(T.truncdiv(high - low + THREADS - 1, THREADS)):
                    if low + i * THREADS + tx < high:
                        next_place[i * THREADS + tx] = (
                            chunk_place[b, h, low + i * THREADS + tx] + counts[b, h, s, low + i * THREADS + tx]
                        )
                for i in T.serial(T.truncdiv(T.max(tiles, 0) + BATCH - 1, BATCH)):
                    read(entries, entry_count, found, b, h, first + i * BATCH, tiles - i * BATCH, low, high, tx)
                    T.sync_threads()
                    walk(found, next_place, tx)
                    write(entries, found, broken, C, b, h, first + i * BATCH, low, tx)
                    T.sync_threads()
                low = high
            cut_chunks(chunk_pairs, chunk_place, chunk_item, items, place_pair, lse, delta, b, h, s, tx)
            if tx == 0 and L < 0:  # a mention of the buffer whose extent is needed
                place_pair[0, 0] = indices[0, 0, 0, 0]

    return place_entries


def place_pairs(pairs: Pairs) -> Any:
    """A thread a pair: its place, from its entry's.

    The pairs of a broken chunk get a NaN for a weight, so that gradients of what selected it, and its own, are NaN and
    no others. Writes ``place_of`` (-1 in empty slots, whose ``d_weights`` become 0), ``place_pair``: the row of q,
    complemented where the weight is negative, and the bits of the weight, for one request of memory to write both.
    """
    Hkv, K, tokens, N = pairs.problem.kv_heads, pairs.problem.top_k, pairs.tokens, pairs.slots
    B, L, C, TILES, PLACES = symbols("B", "L", "C", "TILES", "PLACES")

    @T.prim_func
    def place_pairs(
        indices: T.Tensor((B, L, Hkv, K), "int32"), weights: T.Tensor((B, L, Hkv, K), "float32"),
        entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"), broken: T.Tensor((B, Hkv, C), "int32"),
        place_of: T.Tensor((B, L, Hkv, K), "int32"), place_pair: T.Tensor((PLACES, 2), "int32"),
        d_weights: T.Tensor((B, L, Hkv, K), "float32"),
    ):  # fmt: skip
        with T.Kernel((L * K + THREADS - 1) // THREADS, Hkv, B, threads=THREADS) as (i, h, b):
            t = T.alloc_var("int32")
            slot = T.alloc_var("int32")
            c = T.alloc_var("int32")
            n = T.alloc_var("int32")
            e = T.alloc_var("int32")
            p = T.alloc_var("int32")
            bad = T.alloc_var("int32")
            leads = T.alloc_var("int32")
            row = T.alloc_var("int32")
            w = T.alloc_var("float32")
            pair = T.alloc_local((2,), "int32")
            t = (i * THREADS + T.get_thread_binding()) // K
            slot = (i * THREADS + T.get_thread_binding()) % K
            if t < L:
                c = indices[b, t, h, slot]
                if c < 0 or c >= C:
                    place_of[b, t, h, slot] = -1
                    d_weights[b, t, h, slot] = 0
                else:
                    e = place_of[b, t, h, slot]
                    bad = broken[b, h, c]
                    n = t // tokens
                    p = entries[b, h, n, e, 1]
                    p = p + masked_before(entries[b, h, n, e, 2], entries[b, h, n, e, 3], t % tokens, tokens)
                    leads = 1
                    w = 0
                    for j in T.serial(K):
                        if indices[b, t, h, j] == c:
                            w = w + weights[b, t, h, j]
                            if j < slot:
                                leads = 0
                    if bad != 0:
                        w = T.float32(math.nan)
                        d_weights[b, t, h, slot] = w
                    place_of[b, t, h, slot] = T.if_then_else(bad != 0, -1, p)
                    if leads == 1:
                        row = (b * L + t) * Hkv + h
                        pair[0] = T.if_then_else(w < 0, -1 - row, row)
                        pair[1] = T.reinterpret(w, "int32")
                        for u in T.vectorized(2):
                            place_pair[p, u] = pair[u]

    return place_pairs


def arrange_items(pairs: Pairs) -> Any:
    """A block a batch row and kv head: the items in the order of their first tokens, so that those that run side by
    side gather rows of q and grad_o that lie side by side, and find some of them in the cache.

    Items are counted and put by atomics, in any order within 1024 ranges of tokens: it changes no result.
    """
    Hkv, NT, AHEAD = pairs.problem.kv_heads, SCAN_THREADS, 4
    B, L, ROW_ITEMS, PLACES = symbols("B", "L", "ROW_ITEMS", "PLACES")

    @T.macro
    def find_ranges(items, place_pair, b, L, h, ROW_ITEMS, first, width, ranges):
        """The ranges of the first tokens of items ``first``, ``first + NT`` and so on: the last one for an empty item,
        -1 beyond the last item. Their loads run side by side."""
        i = T.alloc_var("int32")
        for j in T.unroll(AHEAD):
            i = T.min(first + j * NT, ROW_ITEMS - 1)
            ranges[j] = -1
            if items[b, h, i, 2] > 0:
                ranges[j] = items[b, h, i, 1]
        for j in T.unroll(AHEAD):
            if ranges[j] >= 0:
                ranges[j] = place_pair[ranges[j], 0]
                ranges[j] = T.if_then_else(ranges[j] < 0, -1 - ranges[j], ranges[j])
                ranges[j] = T.truncdiv(T.truncdiv(ranges[j], Hkv) - b * L, width)
            else:
                ranges[j] = NT - 1
            if first + j * NT >= ROW_ITEMS:
                ranges[j] = -1

    @T.prim_func
    def arrange_items(
        items: T.Tensor((B, Hkv, ROW_ITEMS, 4), "int32"), place_pair: T.Tensor((PLACES, 2), "int32"),
        indices: T.Tensor((B, L, Hkv, pairs.problem.top_k), "int32"), order: T.Tensor((B, Hkv, ROW_ITEMS), "int32"),
    ):  # fmt: skip
        with T.Kernel(Hkv, B, threads=NT) as (h, b):
            begin = T.alloc_shared((NT,), "int32")
            warp_sums = T.alloc_shared((32,), "int32")
            x = T.alloc_local((2,), "int32")
            ranges = T.alloc_local((AHEAD,), "int32")
            r = T.alloc_var("int32")
            width = T.alloc_var("int32")
            tx = T.get_thread_binding()
            width = T.truncdiv(L, NT) + 1
            begin[tx] = 0
            T.sync_threads()
            for i in T.serial(T.truncdiv(ROW_ITEMS + NT * AHEAD - 1, NT * AHEAD)):
                find_ranges(items, place_pair, b, L, h, ROW_ITEMS, i * NT * AHEAD + tx, width, ranges)
                for j in T.unroll(AHEAD):
                    if ranges[j] >= 0:
                        r = add_to(begin[ranges[j]], 1)
            T.sync_threads()
            x[0] = begin[tx]
            scan(x, warp_sums, tx, NT)
            begin[tx] = x[0]
            T.sync_threads()
            for i in T.serial(T.truncdiv(ROW_ITEMS + NT * AHEAD - 1, NT * AHEAD)):
                find_ranges(items, place_pair, b, L, h, ROW_ITEMS, i * NT * AHEAD + tx, width, ranges)
                for j in T.unroll(AHEAD):
                    if ranges[j] >= 0:
                        r = add_to(begin[ranges[j]], 1)
                    order[b, h, r] = i
            if tx == 0 and ROW_ITEMS < 0:  # a mention of the buffer whose extent is needed
                order[b, h, 0] = indices[b, 0, h, 0]

    return arrange_items


def grouping_launches(pairs: Pairs) -> tuple[Launch, ...]:
    """All launches of the grouping, in order; ``lse`` and ``delta`` are fp32 [places, G]."""
    more = {"PLACES": pairs.places, "ITEMS": pairs.items}
    return (
        pairs.launch(unite(pairs), "indices", "entries", "entry_count", "place_of", "chunk_pairs"),
        pairs.launch(count(pairs), "k", "broken", "entries", "entry_count", "counts"),
        pairs.launch(sum_segments(pairs), "counts", "chunk_pairs"),
        pairs.launch(sum_chunks(pairs), "chunk_pairs", "chunk_place", "chunk_item", "items", "place_pair"),
        pairs.launch(
            place_entries(pairs), "entries", "entry_count", "counts", "chunk_pairs", "chunk_place", "chunk_item",
            "broken", "indices", "place_pair", "items", "lse", "delta", **more,
        ),
        pairs.launch(
            place_pairs(pairs), "indices", "weights", "entries", "broken", "place_of", "place_pair", "d_weights", **more,
        ),
        pairs.launch(arrange_items(pairs), "items", "place_pair", "indices", "order", **more),
    )  # fmt: skip
