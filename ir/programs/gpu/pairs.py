"""The (token, slot) pairs of a selection, grouped twice: by tiles of neighbouring tokens and by chunk.

A tile's *entries* are the distinct chunks that its T tokens selected, each with a bit mask of those tokens. A *place* is
the rank of a (token, chunk) pair in the order of chunks, then tokens; a chunk's places begin at a multiple of
``block_tokens``. The pairs of an entry lie side by side in that order, so that one number, the place of the first, and
the mask locate them all. A chunk's places are cut into work *items* of at most ``tile.pairs``.
A slot whose index is negative or not below C is empty.

It is a counting sort: counts of a segment of tokens, sums over segments, places. Where a sum's order could depend on it
no atomic is used, so gradients depend on nothing but the inputs. Duplicate slots of a token are one pair with the sum of
their weights.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuTile, Launch, Region

THREADS = 256
SCAN_THREADS = 1024
WARP_PAIRS = 128  # of a tile whose union a warp finds
WINDOW = 65536  # chunks that one bitmap in shared memory covers
SEGMENT_TOKENS = 128  # the least tokens of a segment; more where all segments' counts would outgrow the pairs
WHOLE = {"tl.disable_thread_storage_sync": True, "tl.disable_safe_memory_legalize": True}


class Pairs:
    """Sizes of the grouping of a problem under a tile, and its regions as C expressions.

    Args:
        problem: whose selection it is.
        tile: ``tokens`` T of a tile and ``pairs`` of a work item.

    Raises:
        ProblemError: a tile has more tokens than a mask has bits.
    """

    def __init__(self, problem: ChunkAttention, tile: GpuTile) -> None:
        if tile.tokens > 64:
            raise ProblemError(f"a tile has at most 64 tokens, got {tile.tokens}")
        G, K, Hkv = problem.groups, problem.top_k, problem.kv_heads
        self.problem, self.tokens, self.slots = problem, tile.tokens, tile.tokens * K
        self.block_tokens = block_tokens(G)
        self.item_pairs = -(-tile.pairs // self.block_tokens) * self.block_tokens
        n, pad = self.block_tokens, f"C * {self.block_tokens - 1}"
        self.tiles = f"((L + {tile.tokens - 1}) / {tile.tokens})"
        fine, coarse = f"(L + {SEGMENT_TOKENS - 1}) / {SEGMENT_TOKENS}", "(8 * L / (C + 1) + 1)"
        self.segments = f"({fine} < {coarse} ? {fine} : {coarse})"
        self.row_places = f"((L * {K} + {pad} + {n - 1}) / {n} * {n})"
        self.row_items = f"(L * {K} / {self.item_pairs} + C)"
        self.rows = f"B * {Hkv}"
        self.items = f"{self.rows} * {self.row_items}"
        self.places = f"{self.rows} * {self.row_places}"
        self.dims = {
            "B": "B", "L": "L", "C": "C", "TILES": self.tiles, "SEGMENTS": self.segments,
            "ROW_PLACES": self.row_places, "ROW_ITEMS": self.row_items,
        }  # fmt: skip

    def regions(self) -> tuple[Region, ...]:
        """Scratch of the grouping: linear in L*K, C and, through ``segments``, never more than 8 counts a token."""
        Hkv, K = self.problem.kv_heads, self.problem.top_k
        return (
            Region("entries", "int32", f"B * {Hkv} * {self.tiles} * {self.slots * 4}"),
            Region("entry_count", "int32", f"B * {Hkv} * {self.tiles}"),
            Region("place_of", "int32", f"B * L * {Hkv * K}"),
            Region("counts", "int32", f"B * {Hkv} * {self.segments} * C"),
            Region("chunk_pairs", "int32", f"B * {Hkv} * C"),
            Region("chunk_place", "int32", f"B * {Hkv} * C"),
            Region("chunk_item", "int32", f"B * {Hkv} * C"),
            Region("broken", "int32", f"B * {Hkv} * C"),
            Region("items", "int32", f"{self.items} * 4"),
            Region("order", "int32", self.items),
            Region("place_row", "int32", self.places),
            Region("place_weight", "float32", self.places),
        )

    def launch(self, function: Any, *arguments: str, **more: str) -> Launch:
        """A launch of this grouping: of ``dims`` and ``more``, the symbols that the function's buffers name."""
        named = {str(d) for buffer in function.buffer_map.values() for d in buffer.shape}
        dims = {name: text for name, text in {**self.dims, **more}.items() if name in named}
        return Launch(function.attrs["global_symbol"], function, arguments, dims, WHOLE)


def block_tokens(G: int) -> int:
    """Tokens of a block of at most 64 rows in the chunk-major pass: rows a multiple of 16 where at least 48 can be so,
    else of 4, which is what the copy engine asks of a block's log-sum-exps."""
    most = max(1, 64 // G)
    for unit, least in ((16, 48), (4, 0)):
        fitting = [n for n in range(1, most + 1) if n * G % unit == 0 and n * G >= least]
        if fitting:
            return fitting[-1]
    return 1


def ones(word: Any) -> Any:
    """Set bits of a 32-bit word."""
    return T.call_extern("int32", "__popc", word)


def set_bits(word: Any, bits: Any) -> Any:
    """Sets bits of a 32-bit word in shared memory, atomically. TileLang's own ``atomic_or`` is for global memory alone:
    it writes ``red.global``, which faults elsewhere."""
    return T.call_extern("int32", "atomicOr", T.address_of(word), bits)


def add_to(word: Any, amount: Any) -> Any:
    """Adds to a 32-bit word, atomically; its value before."""
    return T.call_extern("int32", "atomicAdd", T.address_of(word), amount)


def symbols(*names: str) -> tuple[Any, ...]:
    return tuple(T.dynamic(name) for name in names)


def masked_before(low: Any, high: Any, t: Any, tokens: int) -> Any:
    """Set bits of a mask of ``tokens`` bits below bit t."""
    below = T.shift_left(1, t % 32) - 1
    if tokens <= 32:
        return ones(low & below)
    return T.if_then_else(t < 32, ones(low & below), ones(low) + ones(high & below))


def masked(low: Any, high: Any, t: Any, tokens: int) -> Any:
    """Bit t of a mask of ``tokens`` bits, 0 or 1."""
    word = low if tokens <= 32 else T.if_then_else(t < 32, low, high)
    return T.bitwise_and(T.shift_right(word, t % 32), 1)


@T.macro
def scan(x, warp_sums, tx, threads):
    """x[0] = exclusive sum of x[0] over the block's threads, x[1] = their total."""
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
    for w in T.serial(threads // 32):
        if w < tx // 32:
            x[0] = x[0] + warp_sums[w]
        x[1] = x[1] + warp_sums[w]
    T.sync_threads()


def ballot(condition: Any) -> Any:
    """The lanes of a warp where a condition holds, a bit each."""
    return T.call_extern("int32", "__ballot_sync", -1, condition)


def unite(pairs: Pairs) -> Any:
    """Writes ``entries`` (chunk, -, mask, mask above 32 tokens), ``entry_count`` and, a pair, the entry in ``place_of``."""
    return unite_in_warps(pairs) if pairs.slots <= WARP_PAIRS else unite_in_blocks(pairs)


def unite_in_warps(pairs: Pairs) -> Any:
    """A warp a tile: every pair looks for the first one with its chunk, and those first ones are numbered."""
    Hkv, K, tokens, N = pairs.problem.kv_heads, pairs.problem.top_k, pairs.tokens, pairs.slots
    B, L, C, TILES = symbols("B", "L", "C", "TILES")
    EACH, W = -(-N // 32), 4

    @T.prim_func
    def unite(
        indices: T.Tensor((B, L, Hkv, K), "int32"), entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"),
        entry_count: T.Tensor((B, Hkv, TILES), "int32"), place_of: T.Tensor((B, L, Hkv, K), "int32"),
        chunk_pairs: T.Tensor((B, Hkv, C), "int32"),
    ):  # fmt: skip
        with T.Kernel((TILES + W - 1) // W, Hkv, B, threads=32 * W) as (block, h, b):
            chunks = T.alloc_shared((W, 32 * EACH), "int32")
            number = T.alloc_shared((W, 32 * EACH), "int32")
            mine = T.alloc_local((EACH,), "int32")
            leader = T.alloc_local((EACH,), "int32")  # the first pair with the same chunk
            masks = T.alloc_local((2, EACH), "int32")
            others = T.alloc_local((4,), "int32")
            n = T.alloc_var("int32")
            t = T.alloc_var("int32")
            pair = T.alloc_var("int32")
            found = T.alloc_var("int32")
            votes = T.alloc_var("int32")
            tx = T.get_thread_binding()
            warp, lane = tx // 32, tx % 32
            n = block * W + warp
            if n < TILES:
                for j in T.unroll(EACH):
                    pair = j * 32 + lane
                    t = n * tokens + pair // K
                    mine[j] = -1
                    if pair < N and t < L:
                        mine[j] = indices[b, t, h, pair % K]
                    if mine[j] >= C:
                        mine[j] = -1
                    chunks[warp, pair] = mine[j]
                    leader[j] = N
                    masks[0, j] = 0
                    masks[1, j] = 0
                T.sync_warp()
                for i in T.unroll((N + 3) // 4):
                    for u in T.vectorized(4):
                        others[u] = chunks[warp, i * 4 + u]
                    for u in T.unroll(4):
                        for j in T.unroll(EACH):
                            if others[u] == mine[j]:
                                leader[j] = T.min(leader[j], i * 4 + u)
                                if (i * 4 + u) // K < 32:
                                    masks[0, j] = masks[0, j] | T.shift_left(1, (i * 4 + u) // K % 32)
                                else:
                                    masks[1, j] = masks[1, j] | T.shift_left(1, (i * 4 + u) // K % 32)
                T.sync_warp()  # the compiler lays ``number`` over ``chunks``
                found = 0
                for j in T.unroll(EACH):
                    pair = j * 32 + lane
                    votes = ballot(mine[j] >= 0 and leader[j] == pair)
                    if mine[j] >= 0 and leader[j] == pair:
                        t = found + ones(votes & (T.shift_left(1, lane) - 1))
                        number[warp, pair] = t
                        entries[b, h, n, t, 0] = mine[j]
                        entries[b, h, n, t, 2] = masks[0, j]
                        entries[b, h, n, t, 3] = masks[1, j]
                    found = found + ones(votes)
                if lane == 0:
                    entry_count[b, h, n] = found
                T.sync_warp()
                for j in T.unroll(EACH):
                    pair = j * 32 + lane
                    if mine[j] >= 0:
                        place_of[b, n * tokens + pair // K, h, pair % K] = number[warp, leader[j]]
                if tx == 0 and L < 0:  # a mention of the buffer whose extent is needed
                    chunk_pairs[b, h, 0] = 0

    return unite


def unite_in_blocks(pairs: Pairs) -> Any:
    """A block a tile: marks the chunks of its pairs in a bitmap, ranks them by population count, and collects masks."""
    Hkv, K, tokens, N = pairs.problem.kv_heads, pairs.problem.top_k, pairs.tokens, pairs.slots
    B, L, C, TILES = symbols("B", "L", "C", "TILES")
    NT = min(THREADS, max(64, -(-N // 32) * 32))
    WORDS = WINDOW // 32
    ROUNDS = -(-N // NT)

    @T.prim_func
    def unite(
        indices: T.Tensor((B, L, Hkv, K), "int32"), entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"),
        entry_count: T.Tensor((B, Hkv, TILES), "int32"), place_of: T.Tensor((B, L, Hkv, K), "int32"),
        chunk_pairs: T.Tensor((B, Hkv, C), "int32"),
    ):  # fmt: skip
        with T.Kernel(TILES, Hkv, B, threads=NT) as (n, h, b):
            bits = T.alloc_shared((WORDS,), "int32")
            ahead = T.alloc_shared((WORDS,), "int32")
            found = T.alloc_shared((3, N), "int32")
            warp_sums = T.alloc_shared((32,), "int32")
            top = T.alloc_shared((1,), "int32")
            chunk = T.alloc_local((ROUNDS,), "int32")
            x = T.alloc_local((2,), "int32")
            words = T.alloc_var("int32")
            share = T.alloc_var("int32")
            total = T.alloc_var("int32")
            high = T.alloc_var("int32")
            word = T.alloc_var("int32")
            bit = T.alloc_var("int32")
            e = T.alloc_var("int32")
            tx = T.get_thread_binding()
            total = 0
            high = -1
            if tx == 0:
                top[0] = -1
            T.sync_threads()
            for i in T.unroll(ROUNDS):
                chunk[i] = -1
                if i * NT + tx < N:
                    if n * tokens + (i * NT + tx) // K < L:
                        chunk[i] = indices[b, n * tokens + (i * NT + tx) // K, h, (i * NT + tx) % K]
                    if chunk[i] >= C:
                        chunk[i] = -1
                    found[1, i * NT + tx] = 0
                    found[2, i * NT + tx] = 0
                high = T.max(high, chunk[i])
            T.atomic_max(top[0], high)
            T.sync_threads()
            for w in T.serial((top[0] + WINDOW) // WINDOW):
                words = T.min(WORDS, T.truncdiv(top[0] - w * WINDOW, 32) + 1)
                share = T.truncdiv(words + NT - 1, NT)
                for i in T.serial(share):
                    if i * NT + tx < words:
                        bits[i * NT + tx] = 0
                T.sync_threads()
                for i in T.unroll(ROUNDS):
                    if chunk[i] >= 0 and chunk[i] // WINDOW == w:
                        set_bits(bits[chunk[i] % WINDOW // 32], T.shift_left(1, chunk[i] % 32))
                T.sync_threads()
                x[0] = 0
                for i in T.serial(share):
                    if tx * share + i < words:
                        x[0] = x[0] + ones(bits[tx * share + i])
                scan(x, warp_sums, tx, NT)
                x[0] = x[0] + total
                for i in T.serial(share):
                    if tx * share + i < words:
                        ahead[tx * share + i] = x[0]
                        x[0] = x[0] + ones(bits[tx * share + i])
                T.sync_threads()
                for i in T.unroll(ROUNDS):
                    if chunk[i] >= 0 and chunk[i] // WINDOW == w:
                        word = chunk[i] % WINDOW // 32
                        bit = T.shift_left(1, chunk[i] % 32)
                        e = ahead[word] + ones(bits[word] & (bit - 1))
                        found[0, e] = chunk[i]
                        set_bits(found[1 + (i * NT + tx) // K // 32, e], T.shift_left(1, (i * NT + tx) // K % 32))
                        place_of[b, n * tokens + (i * NT + tx) // K, h, (i * NT + tx) % K] = e
                total = total + x[1]
                T.sync_threads()
            for i in T.unroll(ROUNDS):
                if i * NT + tx < total:
                    entries[b, h, n, i * NT + tx, 0] = found[0, i * NT + tx]
                    entries[b, h, n, i * NT + tx, 2] = found[1, i * NT + tx]
                    entries[b, h, n, i * NT + tx, 3] = found[2, i * NT + tx]
            if tx == 0:
                entry_count[b, h, n] = total
            if tx == 0 and L < 0:  # a mention of the buffer whose extent is needed
                chunk_pairs[b, h, 0] = 0

    return unite


def count(pairs: Pairs) -> Any:
    """A block a segment of tiles: ``counts``, its pairs by chunk (a warp takes a tile; the atomics only count), and
    ``broken``, whether keys of its share of the chunks are infinite or NaN."""
    Hkv, N, S, D = pairs.problem.kv_heads, pairs.slots, pairs.problem.chunk_size, pairs.problem.head_dim
    dtype = pairs.problem.dtype
    B, C, TILES, SEGMENTS = symbols("B", "C", "TILES", "SEGMENTS")
    W = THREADS // 32
    VECTORS = D // 8

    @T.macro
    def inspect(k, broken, b, h, s, tx):
        c = T.alloc_var("int32")
        x = T.alloc_local((8,), dtype)
        nothing = T.alloc_var("float32")  # a zero that the compiler does not multiply with
        total = T.alloc_var("float32")
        nothing = 0
        for i in T.serial(T.truncdiv(T.truncdiv(C, SEGMENTS) + W, W)):
            c = (i * W + tx // 32) * SEGMENTS + s
            if c < C:
                total = 0
                for j in T.serial((S * VECTORS + 31) // 32):
                    if j * 32 + tx % 32 < S * VECTORS:
                        for u in T.vectorized(8):
                            x[u] = k[b, c, (j * 32 + tx % 32) // VECTORS, h, (j * 32 + tx % 32) % VECTORS * 8 + u]
                        for u in T.unroll(8):
                            total = total + T.cast(x[u], "float32") * nothing
                total = T.warp_reduce_sum(total)
                if tx % 32 == 0:
                    broken[b, h, c] = T.if_then_else(total == 0, 0, 1)

    @T.prim_func
    def count(
        k: T.Tensor((B, C, S, Hkv, D), dtype), broken: T.Tensor((B, Hkv, C), "int32"),
        entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"), entry_count: T.Tensor((B, Hkv, TILES), "int32"),
        counts: T.Tensor((B, Hkv, SEGMENTS, C), "int32"),
    ):  # fmt: skip
        with T.Kernel(SEGMENTS, Hkv, B, threads=THREADS) as (s, h, b):
            n = T.alloc_var("int32")
            share = T.alloc_var("int32")
            tx = T.get_thread_binding()
            share = T.truncdiv(TILES + SEGMENTS - 1, SEGMENTS)
            for i in T.serial((C + THREADS - 1) // THREADS):
                if i * THREADS + tx < C:
                    counts[b, h, s, i * THREADS + tx] = 0
            inspect(k, broken, b, h, s, tx)
            T.sync_threads()
            for i in T.serial((share + W - 1) // W):
                n = s * share + i * W + tx // 32
                if i * W + tx // 32 < share and n < TILES:
                    for j in T.serial((entry_count[b, h, n] + 31) // 32):
                        if j * 32 + tx % 32 < entry_count[b, h, n]:
                            T.atomic_add(
                                counts[b, h, s, entries[b, h, n, j * 32 + tx % 32, 0]],
                                ones(entries[b, h, n, j * 32 + tx % 32, 2])
                                + ones(entries[b, h, n, j * 32 + tx % 32, 3]),
                            )

    return count
