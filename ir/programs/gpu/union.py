"""The pre-pass of chunk attention: what a tile of neighbouring tokens selects, as one list of chunks.

A tile is T neighbouring tokens of one kv head. Its list holds every chunk that at least one of them selected, once; an
*entry* is a place in that list. Every token's own slots are turned into (entry, weight) pairs in ascending order of the
entry, so that a kernel which walks the list meets each token's next slot in passing: one comparison an entry, and memory
in proportion to the slots however large T is (a weight for every entry and token would be T times that).

The order of a list depends on the selection alone: of first mention, by the first slots of all tokens, then their second
ones and so on, where tiles are small; of the chunks where they are large. Both let all tokens be busy at the same time.

A slot whose index is negative or not below C is empty; no such index reaches a load. A token's duplicates of a chunk
are one slot with their summed weight, added in the order of the slots.
"""

from dataclasses import dataclass
from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.pairs import ones, scan, set_bits

EMPTY = 2**31 - 1  # in place of a chunk: sorts last; in place of an entry: ends a token's slots
PAIRS_MAX = 4096  # (token, slot) pairs of a tile that one thread block lists
WARP_PAIRS = 64  # up to so many, a warp compares all with all; above, a block marks them in a bitmap of the chunks
ROW_GROUP = 16  # rows that a warp owns in a matrix product
WARPS = 8  # tiles of a thread block, where each has a warp
WINDOW = 16384  # chunks that one bitmap in shared memory covers


@dataclass(frozen=True)
class UnionLists:
    """Shapes of the lists for a problem and a tile; N = B * Hkv * ceil(L / T) tiles, ordered (b, h, tile).

    ``count`` int32 [N]: entries of the list.
    ``chunk`` int32 [N, T*K]: the chunk of an entry.
    ``active`` int32 [N, T*K]: bit i is set if a token with one of the rows 16*i .. 16*i+15 selected the entry's chunk;
        row t*G + g is query head g of token t.
    ``slot_entry`` int32 [N, T, K+1]: entries of a token's slots, ascending, then ``EMPTY``.
    ``slot_weight`` float32 [N, T, K+1]: their weights.

    Raises:
        ProblemError: a tile has more slots or rows than the lists can describe.
    """

    problem: ChunkAttention
    tile: GpuTile

    def __post_init__(self) -> None:
        if self.slots > PAIRS_MAX:
            raise ProblemError(f"tokens * top_k must be at most {PAIRS_MAX} on GPUs, got {self.slots}")
        if self.tile.tokens * self.problem.groups > 32 * ROW_GROUP:
            raise ProblemError(f"tokens * groups must be at most {32 * ROW_GROUP}")

    @property
    def slots(self) -> int:
        """T*K, the most entries of a list."""
        return self.tile.tokens * self.problem.top_k

    @property
    def tiles(self) -> str:
        """N as a C expression."""
        return f"B * {self.problem.kv_heads} * ((L + {self.tile.tokens - 1}) / {self.tile.tokens})"

    def regions(self) -> tuple[Region, ...]:
        """The lists as scratch memory."""
        per_token = self.tile.tokens * (self.problem.top_k + 1)
        return (
            Region("count", "int32", self.tiles),
            Region("chunk", "int32", f"{self.tiles} * {self.slots}"),
            Region("active", "int32", f"{self.tiles} * {self.slots}"),
            Region("slot_entry", "int32", f"{self.tiles} * {per_token}"),
            Region("slot_weight", "float32", f"{self.tiles} * {per_token}"),
        )

    def launch(self) -> Launch:
        """The pre-pass."""
        arguments = ("k", "indices", "weights", *(r.name for r in self.regions()))
        dims = {"B": "B", "L": "L", "C": "C", "N": self.tiles}
        function = _unite_in_warps(self) if self.slots <= WARP_PAIRS else _unite_in_blocks(self)
        return Launch("unite", function, arguments, dims, OPTIONS)


# Every exchange through shared memory has its barrier written out.
OPTIONS = {"tl.disable_thread_storage_sync": True, "tl.disable_safe_memory_legalize": True}


def ballot(condition: Any) -> Any:
    """The lanes of a warp where a condition holds, a bit each."""
    return T.call_extern("int32", "__ballot_sync", -1, condition)


def row_groups(token: Any, G: int) -> Any:
    """The groups of 16 rows that hold a row of a token, a bit each."""
    low = T.cast(token * G // ROW_GROUP, "uint32")
    high = T.cast((token * G + G - 1) // ROW_GROUP, "uint32")
    every = T.uint32(0xFFFFFFFF)
    return T.cast(T.shift_right(every, T.uint32(31) - high) & T.shift_left(every, low), "int32")


def _unite_in_warps(lists: UnionLists) -> Any:
    """A warp a tile: every pair looks for the first one with its chunk, and those first ones are numbered. Pair
    slot * T + token is that token's slot."""
    p, TOKENS = lists.problem, lists.tile.tokens
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    SLOTS = lists.slots
    EACH = -(-SLOTS // 32)
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    @T.prim_func
    def unite(
        k: T.Tensor((B, C, S, Hkv, D), p.dtype), indices: T.Tensor((B, L, Hkv, K), "int32"),
        weights: T.Tensor((B, L, Hkv, K), "float32"), count: T.Tensor((N,), "int32"),
        chunk: T.Tensor((N, SLOTS), "int32"), active: T.Tensor((N, SLOTS), "int32"),
        slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"), slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(T.ceildiv(L, TOKENS), WARPS), Hkv, B, threads=32 * WARPS) as (bt, bh, bb):
            chunks = T.alloc_shared((WARPS, 32 * EACH), "int32")
            entry = T.alloc_shared((WARPS, 32 * EACH), "int32")
            number = T.alloc_shared((WARPS, 32 * EACH), "int32")
            weight = T.alloc_shared((WARPS, 32 * EACH), "float32")
            mine = T.alloc_local((EACH,), "int32")
            leader = T.alloc_local((EACH,), "int32")  # the first pair with the same chunk
            groups = T.alloc_local((EACH,), "int32")  # row groups of the pairs with that chunk
            total = T.alloc_local((EACH,), "float32")
            own = T.alloc_local((EACH,), "int32")  # entry
            others = T.alloc_local((4,), "int32")
            n = T.alloc_var("int64")
            t = T.alloc_var("int64")
            pair = T.alloc_var("int32")
            found = T.alloc_var("int32")
            votes = T.alloc_var("int32")
            place = T.alloc_var("int32")
            other = T.alloc_var("int32")
            tx = T.get_thread_binding()
            warp, lane = tx // 32, tx % 32
            t = T.cast(bt, "int64") * WARPS + warp
            if t < T.ceildiv(L, TOKENS):
                n = (T.cast(bb, "int64") * Hkv + bh) * T.ceildiv(L, TOKENS) + t
                t = t * TOKENS
                for j in T.unroll(EACH):
                    pair = j * 32 + lane
                    mine[j] = -1
                    weight[warp, pair] = 0.0
                    if pair < SLOTS and t + pair % TOKENS < L:
                        mine[j] = indices[bb, t + pair % TOKENS, bh, pair // TOKENS]
                        weight[warp, pair] = weights[bb, t + pair % TOKENS, bh, pair // TOKENS]
                    if mine[j] >= C:
                        mine[j] = -1
                    chunks[warp, pair] = mine[j]
                    leader[j] = EMPTY
                    groups[j] = 0
                T.sync_warp()
                for i in T.unroll(EACH * 8):
                    for u in T.vectorized(4):
                        others[u] = chunks[warp, i * 4 + u]
                    for u in T.unroll(4):
                        for j in T.unroll(EACH):
                            if others[u] == mine[j]:
                                leader[j] = T.min(leader[j], i * 4 + u)
                                groups[j] = groups[j] | row_groups((i * 4 + u) % TOKENS, G)
                found = 0
                for j in T.unroll(EACH):
                    pair = j * 32 + lane
                    votes = ballot(mine[j] >= 0 and leader[j] == pair)
                    if mine[j] >= 0 and leader[j] == pair:
                        number[warp, pair] = found + ones(votes & (T.shift_left(1, lane) - 1))
                        chunk[n, number[warp, pair]] = mine[j]
                        active[n, number[warp, pair]] = groups[j]
                    found = found + ones(votes)
                if lane == 0:
                    count[n] = found
                T.sync_warp()
                for j in T.unroll(EACH):
                    # The first of a token's duplicates stands for all of them.
                    pair = j * 32 + lane
                    own[j] = EMPTY
                    total[j] = 0.0
                    if mine[j] >= 0:
                        own[j] = number[warp, leader[j]]
                        for d in T.serial(K):
                            if chunks[warp, d * TOKENS + pair % TOKENS] == mine[j]:
                                total[j] = total[j] + weight[warp, d * TOKENS + pair % TOKENS]
                                if d < pair // TOKENS:
                                    own[j] = EMPTY
                    entry[warp, pair] = own[j]
                T.sync_warp()
                for j in T.unroll(EACH):
                    pair = j * 32 + lane
                    if pair < SLOTS:
                        place = 0
                        for d in T.serial(K):
                            other = entry[warp, d * TOKENS + pair % TOKENS]
                            if other < own[j] or (other == EMPTY and own[j] == EMPTY and d < pair // TOKENS):
                                place = place + 1
                        slot_entry[n, pair % TOKENS, place] = own[j]
                        slot_weight[n, pair % TOKENS, place] = total[j]
                    if pair < TOKENS:
                        slot_entry[n, pair, K] = EMPTY
                        slot_weight[n, pair, K] = 0.0

    return unite


def _unite_in_blocks(lists: UnionLists) -> Any:
    """A block a tile: marks the chunks of its pairs in a bitmap, whose population counts number them. Pair
    token * K + slot is that token's slot."""
    p, TOKENS = lists.problem, lists.tile.tokens
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    SLOTS = lists.slots
    THREADS = 128 if SLOTS <= 128 else 256 if SLOTS <= 1024 else 512
    ROUNDS = -(-SLOTS // THREADS)
    WORDS = WINDOW // 32
    SHUFFLED = 32 % K == 0  # a token's slots are in one warp
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    @T.macro
    def place_in_warp(n, pair, own, total, slot_entry, slot_weight):
        """Writes 32 pairs to their places in the lists of their tokens."""
        lane = pair % 32
        same = T.alloc_var("int32")
        before = T.alloc_var("int32")
        votes = T.alloc_var("int32")
        entry = T.alloc_var("int32")
        place = T.alloc_var("int32")
        weight = T.alloc_var("float32")
        other = T.alloc_var("float32")
        entry = own
        weight = total
        before = T.shift_left(1, lane) - 1
        same = T.cast(T.match_any_sync(T.if_then_else(own < EMPTY, own * 32 + lane // K, -1 - lane)), "int32")
        votes = ballot((same & before) != 0)
        if votes != 0:
            # The first of a token's duplicates stands for all of them.
            weight = 0.0
            for d in T.serial(32):
                other = T.shfl_sync(total, d)
                if (T.shift_right(same, d) & 1) != 0:
                    weight = weight + other
            if (same & before) != 0:
                entry = EMPTY
        votes = ballot(entry == EMPTY)
        place = 0
        for d in T.unroll(K):
            if T.shfl_sync(entry, lane // K * K + d) < entry:
                place = place + 1
        if entry == EMPTY:
            place = place + ones(votes & before & T.shift_left(-1, lane // K * K))
        if pair < SLOTS:
            slot_entry[n, pair // K, place] = entry
            slot_weight[n, pair // K, place] = weight
            if pair % K == 0:
                slot_entry[n, pair // K, K] = EMPTY
                slot_weight[n, pair // K, K] = 0.0

    @T.macro
    def place_in_block(n, tx, entry, mine, total, weights, b, h, t, slot_entry, slot_weight):
        """Writes all pairs to their places; ``entry`` holds their entries."""
        place = T.alloc_var("int32")
        own = T.alloc_var("int32")
        pair = T.alloc_var("int32")
        for i in T.unroll(ROUNDS):
            pair = i * THREADS + tx
            if pair < SLOTS:
                own = entry[pair]
                mine[i] = own
                for d in T.serial(K):
                    if own < EMPTY and entry[pair // K * K + d] == own:
                        if d < pair % K:
                            mine[i] = EMPTY
                        if d > pair % K:
                            total[i] = total[i] + weights[b, t + pair // K, h, d]
        T.sync_threads()
        for i in T.unroll(ROUNDS):
            if i * THREADS + tx < SLOTS:
                entry[i * THREADS + tx] = mine[i]
        T.sync_threads()
        for i in T.unroll(ROUNDS):
            pair = i * THREADS + tx
            if pair < SLOTS:
                place = 0
                for d in T.serial(K):
                    own = entry[pair // K * K + d]
                    if own < mine[i] or (own == EMPTY and mine[i] == EMPTY and d < pair % K):
                        place = place + 1
                slot_entry[n, pair // K, place] = mine[i]
                slot_weight[n, pair // K, place] = total[i]
                if pair % K == 0:
                    slot_entry[n, pair // K, K] = EMPTY
                    slot_weight[n, pair // K, K] = 0.0

    @T.prim_func
    def unite(
        k: T.Tensor((B, C, S, Hkv, D), p.dtype), indices: T.Tensor((B, L, Hkv, K), "int32"),
        weights: T.Tensor((B, L, Hkv, K), "float32"), count: T.Tensor((N,), "int32"),
        chunk: T.Tensor((N, SLOTS), "int32"), active: T.Tensor((N, SLOTS), "int32"),
        slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"), slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, TOKENS), Hkv, B, threads=THREADS) as (bt, bh, bb):
            bits = T.alloc_shared((WORDS,), "int32")
            ahead = T.alloc_shared((WORDS,), "int32")
            found = T.alloc_shared((SLOTS,), "int32")  # chunk of an entry
            groups = T.alloc_shared((SLOTS,), "int32")  # row groups of an entry
            entry = T.alloc_shared((1 if SHUFFLED else SLOTS,), "int32")  # of a pair
            warp_sums = T.alloc_shared((32,), "int32")
            top = T.alloc_shared((1,), "int32")
            mine = T.alloc_local((ROUNDS,), "int32")
            own = T.alloc_local((ROUNDS,), "int32")
            total = T.alloc_local((ROUNDS,), "float32")
            x = T.alloc_local((2,), "int32")
            n = T.alloc_var("int64")
            t = T.alloc_var("int64")
            words = T.alloc_var("int32")
            share = T.alloc_var("int32")
            entries = T.alloc_var("int32")
            pair = T.alloc_var("int32")
            high = T.alloc_var("int32")
            word = T.alloc_var("int32")
            e = T.alloc_var("int32")
            T.annotate_min_blocks_per_sm(1024 // THREADS)  # or the unrolled rounds take registers for half as many
            tx = T.get_thread_binding()
            n = (T.cast(bb, "int64") * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            t = T.cast(bt, "int64") * TOKENS
            entries = 0
            high = -1
            if tx == 0:
                top[0] = -1
            T.sync_threads()
            for i in T.unroll(ROUNDS):
                pair = i * THREADS + tx
                mine[i] = -1
                own[i] = EMPTY
                total[i] = 0.0
                if pair < SLOTS:
                    if t + pair // K < L:
                        mine[i] = indices[bb, t + pair // K, bh, pair % K]
                        total[i] = weights[bb, t + pair // K, bh, pair % K]
                    if mine[i] >= C:
                        mine[i] = -1
                    groups[pair] = 0
                high = T.max(high, mine[i])
            T.call_extern("int32", "atomicMax", T.address_of(top[0]), high)
            T.sync_threads()
            for w in T.serial((top[0] + WINDOW) // WINDOW):
                words = T.min(WORDS, T.truncdiv(top[0] - w * WINDOW, 32) + 1)
                share = T.truncdiv(words + THREADS - 1, THREADS)
                for i in T.serial(share):
                    if i * THREADS + tx < words:
                        bits[i * THREADS + tx] = 0
                T.sync_threads()
                for i in T.unroll(ROUNDS):
                    if mine[i] >= 0 and mine[i] // WINDOW == w:
                        set_bits(bits[mine[i] % WINDOW // 32], T.shift_left(1, mine[i] % 32))
                T.sync_threads()
                x[0] = 0
                for i in T.serial(share):
                    if tx * share + i < words:
                        x[0] = x[0] + ones(bits[tx * share + i])
                scan(x, warp_sums, tx, THREADS)
                x[0] = x[0] + entries
                for i in T.serial(share):
                    if tx * share + i < words:
                        ahead[tx * share + i] = x[0]
                        x[0] = x[0] + ones(bits[tx * share + i])
                T.sync_threads()
                for i in T.unroll(ROUNDS):
                    if mine[i] >= 0 and mine[i] // WINDOW == w:
                        word = mine[i] % WINDOW // 32
                        e = ahead[word] + ones(bits[word] & (T.shift_left(1, mine[i] % 32) - 1))
                        found[e] = mine[i]
                        own[i] = e
                        set_bits(groups[e], row_groups((i * THREADS + tx) // K, G))
                entries = entries + x[1]
                T.sync_threads()
            for i in T.unroll(ROUNDS):
                pair = i * THREADS + tx
                if pair < entries:
                    chunk[n, pair] = found[pair]
                    active[n, pair] = groups[pair]
            if tx == 0:
                count[n] = entries
            if SHUFFLED:
                for i in T.unroll(ROUNDS):
                    place_in_warp(n, i * THREADS + tx, own[i], total[i], slot_entry, slot_weight)
            else:
                T.sync_threads()  # the compiler lays ``entry`` over what was read above
                for i in T.unroll(ROUNDS):
                    if i * THREADS + tx < SLOTS:
                        entry[i * THREADS + tx] = own[i]
                T.sync_threads()
                place_in_block(n, tx, entry, mine, total, weights, bb, bh, t, slot_entry, slot_weight)

    return unite
