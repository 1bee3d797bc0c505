"""The pre-pass of chunk attention: what a tile of neighbouring tokens selects, as one list of chunks.

A tile is T neighbouring tokens of one kv head. Its list holds every chunk that at least one of them selected, once, in
ascending order; an *entry* is a place in that list. Every token's own slots are turned into (entry, weight) pairs in
ascending order of the entry, so that a kernel which walks the list meets each token's next slot in passing: one
comparison an entry, and memory in proportion to the slots however large T is (a weight for every entry and token would
be T times that).

A slot whose index is negative or not below C is empty; no such index reaches a load. A token's duplicates of a chunk
are one slot with their summed weight, added in the order of the slots.
"""

from dataclasses import dataclass
from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuTile, Launch, Region

EMPTY = 2**31 - 1  # in place of a chunk: sorts last; in place of an entry: ends a token's slots
KEYS_MAX = 4096  # (token, slot) pairs of a tile that one thread block sorts
ROW_GROUP = 16  # rows that a warp owns in a matrix product


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
        if self.slots > KEYS_MAX:
            raise ProblemError(f"tokens * top_k must be at most {KEYS_MAX} on GPUs, got {self.slots}")
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
        """The pre-pass: one thread block a tile."""
        arguments = ("k", "indices", "weights", *(r.name for r in self.regions()))
        dims = {"B": "B", "L": "L", "C": "C", "N": self.tiles}
        return Launch("unite", _unite(self), arguments, dims, OPTIONS)


# Every exchange through shared memory has its barrier written out.
OPTIONS = {"tl.disable_thread_storage_sync": True, "tl.disable_safe_memory_legalize": True}


def _unite(lists: UnionLists) -> Any:
    """Sorts a tile's (chunk, pair) keys, numbers the distinct chunks, and gives every token its entries."""
    p, TOKENS = lists.problem, lists.tile.tokens
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    SLOTS = lists.slots
    LOG = max(6, (SLOTS - 1).bit_length())
    KEYS = 1 << LOG
    # A thread exchanges one pair of keys at a time; 256 threads leave several blocks on a multiprocessor.
    THREADS = min(256, KEYS // 2)
    EACH = KEYS // THREADS
    TOKEN_BIT, CHUNK_BIT = (K - 1).bit_length(), 20
    B, L, C, N = (T.dynamic(n, "int64") for n in ("B", "L", "C", "N"))

    def pair_of(value):
        """t*K + slot of a key."""
        low = T.cast(value & ((1 << CHUNK_BIT) - 1), "int32")
        return (low >> TOKEN_BIT) * K + (low & ((1 << TOKEN_BIT) - 1))

    @T.prim_func
    def unite(
        k: T.Tensor((B, C, S, Hkv, D), p.dtype), indices: T.Tensor((B, L, Hkv, K), "int32"),
        weights: T.Tensor((B, L, Hkv, K), "float32"), count: T.Tensor((N,), "int32"),
        chunk: T.Tensor((N, SLOTS), "int32"), active: T.Tensor((N, SLOTS), "int32"),
        slot_entry: T.Tensor((N, TOKENS, K + 1), "int32"), slot_weight: T.Tensor((N, TOKENS, K + 1), "float32"),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, TOKENS), Hkv, B, threads=THREADS) as (bt, bh, bb):
            key = T.alloc_shared((KEYS,), "int64")  # chunk << CHUNK_BIT | token << TOKEN_BIT | slot
            number = T.alloc_shared((KEYS,), "int32")  # distinct chunks up to a key
            entry = T.alloc_shared((KEYS,), "int32")  # of the pair t*K + slot
            weight = T.alloc_shared((KEYS,), "float32")  # likewise
            before = T.alloc_local((EACH,), "int32")
            # Variables, where expressions would do, spare the compiler's simplifier minutes.
            n = T.alloc_var("int64")
            t0 = T.alloc_var("int64")
            low = T.alloc_var("int32")
            high = T.alloc_var("int32")
            pair = T.alloc_var("int32")
            mine = T.alloc_var("int64")
            previous = T.alloc_var("int64")
            size = T.alloc_var("int32")
            distance = T.alloc_var("int32")
            bits = T.alloc_var("int32")
            place = T.alloc_var("int32")
            filled = T.alloc_var("int32")
            total = T.alloc_var("float32")
            tx = T.get_thread_binding()
            n = (T.cast(bb, "int64") * Hkv + bh) * T.ceildiv(L, TOKENS) + bt
            t0 = T.cast(bt, "int64") * TOKENS

            for u in T.unroll(EACH):
                pair = u * THREADS + tx
                key[pair] = T.int64(EMPTY) << CHUNK_BIT
                entry[pair] = EMPTY
                weight[pair] = 0.0
                if pair < SLOTS and t0 + pair // K < L:
                    c = T.cast(indices[bb, t0 + pair // K, bh, pair % K], "int64")
                    if c >= 0 and c < C:
                        key[pair] = (c << CHUNK_BIT) + ((pair // K) << TOKEN_BIT) + pair % K
                        weight[pair] = weights[bb, t0 + pair // K, bh, pair % K]
            T.sync_threads()

            size = 2
            for _ in T.serial(LOG):  # bitonic sort, ascending
                distance = size // 2
                while distance > 0:
                    for u in T.unroll(EACH // 2):
                        low = u * THREADS + tx
                        low = low + (low & -distance)
                        high = low + distance
                        mine = key[low]
                        previous = key[high]
                        if (mine > previous) == ((low & size) == 0):
                            key[low] = previous
                            key[high] = mine
                    T.sync_threads()
                    distance = distance // 2
                size = size * 2

            for u in T.unroll(EACH):
                i = u * THREADS + tx
                c = key[i] >> CHUNK_BIT
                previous = T.int64(-1)
                if i > 0:
                    previous = key[i - 1] >> CHUNK_BIT
                number[i] = T.if_then_else(c < EMPTY and previous < c, 1, 0)
            T.sync_threads()
            distance = 1
            for _ in T.serial(LOG):  # inclusive sum
                for u in T.unroll(EACH):
                    before[u] = 0
                    low = u * THREADS + tx - distance
                    if low >= 0:
                        before[u] = number[low]
                T.sync_threads()
                for u in T.unroll(EACH):
                    number[u * THREADS + tx] += before[u]
                T.sync_threads()
                distance = distance * 2

            for u in T.unroll(EACH):
                i = u * THREADS + tx
                mine = key[i]
                previous = T.int64(-1)
                if i > 0:
                    previous = key[i - 1]
                if (mine >> CHUNK_BIT) < EMPTY:
                    if (previous >> TOKEN_BIT) != (mine >> TOKEN_BIT):
                        # The first of a token's duplicates stands for all of them.
                        total = 0.0
                        place = i
                        while place < KEYS and (key[T.min(place, KEYS - 1)] >> TOKEN_BIT) == (mine >> TOKEN_BIT):
                            pair = pair_of(key[place])
                            total = total + weight[pair]
                            place = place + 1
                        pair = pair_of(mine)
                        entry[pair] = number[i] - 1
                        weight[pair] = total
                    if (previous >> CHUNK_BIT) != (mine >> CHUNK_BIT):
                        bits = 0
                        place = i
                        while place < KEYS and (key[T.min(place, KEYS - 1)] >> CHUNK_BIT) == (mine >> CHUNK_BIT):
                            low = pair_of(key[place]) // K * G
                            high = (low + G - 1) // ROW_GROUP
                            low = low // ROW_GROUP
                            while low <= high:
                                bits = bits | (1 << low)
                                low = low + 1
                            place = place + 1
                        chunk[n, number[i] - 1] = T.cast(mine >> CHUNK_BIT, "int32")
                        active[n, number[i] - 1] = bits
            if tx == 0:
                count[n] = number[KEYS - 1]
            T.sync_threads()

            for u in T.unroll(EACH):
                pair = u * THREADS + tx
                if pair < SLOTS:
                    place = 0
                    filled = 0
                    for j in T.serial(K):
                        other = entry[pair // K * K + j]
                        if other < entry[pair]:
                            place = place + 1
                        if other < EMPTY:
                            filled = filled + 1
                    if entry[pair] < EMPTY:
                        slot_entry[n, pair // K, place] = entry[pair]
                        slot_weight[n, pair // K, place] = weight[pair]
                    if pair % K == 0:
                        slot_entry[n, pair // K, filled] = EMPTY
                        slot_weight[n, pair // K, filled] = 0.0

    return unite
