"""Lists of candidates in shared memory: scores that beat a row's bar are put on its list, which is cut when it is full.

A list is a row of ``value`` and ``index`` [rows, capacity] in any order; its row's bar, ``level`` in shared memory, is a
score that it needs none below or equal to. Rows belong to warps, 16 each, as accumulators of ``T.gemm`` with
``GemmWarpPolicy.FullRow`` do, so lists need no barrier of the whole block. A thread has elements of two rows, 8 apart:
16 of each where a tile has 64 columns, so that their bits fill one word of a mask, and as many more where it has more.
"""

import functools
from typing import Any

import tilelang.language as T

WARP_ROWS = 16
COLUMNS = 64
LOWEST = float("-inf")


def capacity(K) -> int:
    """Entries of a row's list: K and room for as many as should be met before it is cut, whole warps of them."""
    return max(32, -(-(K + 16) // 32) * 32)


def below(x):
    """A little less than ``x``, by a few units in the last place: what ties with ``x`` is above it. -inf stays."""
    y = T.min(x, T.float32(3.0e38))
    return y - T.abs(y) * T.float32(2.0**-22) - T.float32(1e-37)


class Masks:
    """Bits of a thread's elements of a tile of 64, 128 or 256 ``columns``, in words; its first row's come first."""

    def __init__(self, columns: int) -> None:
        self.words = columns // 64

        @T.macro
        def add(mask, i, j, condition):
            """Sets an element's bit where ``condition`` holds."""
            if columns == COLUMNS:
                mask[0] = mask[0] | T.if_then_else(condition, T.shift_left(1, i // 8 % 2 * 16 + j // 8 * 2 + j % 2), 0)
            elif columns == 2 * COLUMNS:
                if i // 8 % 2 == 0:
                    mask[0] = mask[0] | T.if_then_else(condition, T.shift_left(1, j // 8 * 2 + j % 2), 0)
                else:
                    mask[1] = mask[1] | T.if_then_else(condition, T.shift_left(1, j // 8 * 2 + j % 2), 0)
            elif i // 8 % 2 == 0:
                if j // 8 < 16:
                    mask[0] = mask[0] | T.if_then_else(condition, T.shift_left(1, j // 8 % 16 * 2 + j % 2), 0)
                else:
                    mask[1] = mask[1] | T.if_then_else(condition, T.shift_left(1, j // 8 % 16 * 2 + j % 2), 0)
            else:
                if j // 8 < 16:
                    mask[2] = mask[2] | T.if_then_else(condition, T.shift_left(1, j // 8 % 16 * 2 + j % 2), 0)
                else:
                    mask[3] = mask[3] | T.if_then_else(condition, T.shift_left(1, j // 8 % 16 * 2 + j % 2), 0)

        @T.macro
        def drop(mask, first, second):
            """Clears bits, so many of each row, the lowest first; all where there are fewer."""
            low = T.alloc_var("int32")
            high = T.alloc_var("int32")
            if columns == COLUMNS:
                low = mask[0] & 0xFFFF
                high = T.shift_right(mask[0], 16) & 0xFFFF
                for k in T.serial(T.min(first, columns // 4)):
                    low = low & (low - 1)
                for k in T.serial(T.min(second, columns // 4)):
                    high = high & (high - 1)
                mask[0] = T.bitwise_or(low, T.shift_left(high, 16))
            elif columns == 2 * COLUMNS:
                for k in T.serial(T.min(first, columns // 4)):
                    mask[0] = mask[0] & (mask[0] - 1)
                for k in T.serial(T.min(second, columns // 4)):
                    mask[1] = mask[1] & (mask[1] - 1)
            else:
                for k in T.serial(T.min(first, columns // 4)):
                    if mask[0] != 0:
                        mask[0] = mask[0] & (mask[0] - 1)
                    else:
                        mask[1] = mask[1] & (mask[1] - 1)
                for k in T.serial(T.min(second, columns // 4)):
                    if mask[2] != 0:
                        mask[2] = mask[2] & (mask[2] - 1)
                    else:
                        mask[3] = mask[3] & (mask[3] - 1)

        self.add, self.drop = add, drop

    def has(self, mask: Any, i: Any, j: Any) -> Any:
        """Whether an element's bit is set. ``mask & (1 << bit) != 0`` is taken for a sign test, which misses bit 31."""
        if self.words == 1:
            return T.bitwise_and(T.shift_right(mask[0], i // 8 % 2 * 16 + j // 8 * 2 + j % 2), 1) != 0
        if self.words == 2:
            word = T.if_then_else(i // 8 % 2 == 0, mask[0], mask[1])
            return T.bitwise_and(T.shift_right(word, j // 8 * 2 + j % 2), 1) != 0
        first, second = (T.if_then_else(j // 8 < 16, mask[w], mask[w + 1]) for w in (0, 2))
        word = T.if_then_else(i // 8 % 2 == 0, first, second)
        return T.bitwise_and(T.shift_right(word, j // 8 % 16 * 2 + j % 2), 1) != 0

    def some(self, mask: Any) -> Any:
        """Not zero where a bit is set."""
        return functools.reduce(T.bitwise_or, [mask[w] for w in range(self.words)])

    def ones(self, mask: Any) -> Any:
        """Bits set of the first row, and of the second times 65536."""
        if self.words == 1:
            return ones(mask[0] & 0xFFFF) + ones(T.shift_right(mask[0], 16) & 0xFFFF) * 65536
        if self.words == 2:
            return ones(mask[0]) + ones(mask[1]) * 65536
        return ones(mask[0]) + ones(mask[1]) + (ones(mask[2]) + ones(mask[3])) * 65536


def ones(word):
    """Set bits of a 32-bit word."""
    return T.call_extern("int32", "__popc", word)


def ranks(CAPACITY):
    """Ranks a row's entries by falling value, equal ones by falling index, each lane those at ``lane + 32 * e``. For a
    warp. Leaves ``mine``, ``whose`` and ``rank``; ``n`` entries are ranked, the rest of the row is made to come last."""
    EACH = CAPACITY // 32

    @T.macro
    def rank_entries(value, index, row, n, lane, mine, whose, rank):
        four = T.alloc_local((4,), "float32")
        four_index = T.alloc_local((4,), "int32")
        for e in T.unroll(EACH):
            mine[e] = value[row, e * 32 + lane]
            whose[e] = index[row, e * 32 + lane]
            rank[e] = 0
            if e * 32 + lane >= n:
                value[row, e * 32 + lane] = LOWEST
                index[row, e * 32 + lane] = -1
        T.sync_warp()
        for o in T.unroll(CAPACITY // 4) if CAPACITY == 32 else T.serial(T.min((n + 3) // 4, CAPACITY // 4)):
            for u in T.vectorized(4):
                four[u] = value[row, o * 4 + u]
            for u in T.vectorized(4):
                four_index[u] = index[row, o * 4 + u]
            for u in T.unroll(4):
                for e in T.unroll(EACH):
                    rank[e] = rank[e] + T.bitwise_or(
                        T.cast(four[u] > mine[e], "int32"),
                        T.bitwise_and(T.cast(four[u] == mine[e], "int32"), T.cast(four_index[u] > whose[e], "int32")),
                    )
        T.sync_warp()

    return rank_entries


def cut(K, CAPACITY):
    """Cuts a row's list of ``count[row]`` to its K best, best first; of equal ones the newer is better. For a warp."""
    EACH = CAPACITY // 32
    rank_entries = ranks(CAPACITY)

    @T.macro
    def keep_best(value, index, count, level, row, lane):
        mine = T.alloc_local((EACH,), "float32")
        whose = T.alloc_local((EACH,), "int32")
        rank = T.alloc_local((EACH,), "int32")
        n = T.min(count[row], CAPACITY)
        rank_entries(value, index, row, n, lane, mine, whose, rank)
        for e in T.unroll(EACH):
            if e * 32 + lane < n and rank[e] < K:
                value[row, T.min(rank[e], K - 1)] = mine[e]
                index[row, T.min(rank[e], K - 1)] = whose[e]
                if rank[e] == K - 1:
                    level[row] = mine[e]
        if lane == 0:
            count[row] = T.min(n, K)
        T.sync_warp()

    return keep_best


def places(K, CAPACITY):
    """The K best of a row's list by falling index: leaves each entry's place in ``rank``, CAPACITY for those beyond
    the K best. For a warp."""
    EACH = CAPACITY // 32
    GROUPS = -(-K // 4)
    rank_entries = ranks(CAPACITY)

    @T.macro
    def place_entries(value, index, row, n, lane, mine, whose, rank):
        four_index = T.alloc_local((4,), "int32")
        rank_entries(value, index, row, n, lane, mine, whose, rank)
        for e in T.unroll(EACH):
            if e * 32 + lane < n and rank[e] < K:
                index[row, T.min(rank[e], K - 1)] = whose[e]
            else:
                rank[e] = CAPACITY
        if K % 4 != 0 and lane < GROUPS * 4 - K:
            index[row, K + lane] = -1
        T.sync_warp()
        for e in T.unroll(EACH):
            rank[e] = T.if_then_else(rank[e] < K, 0, CAPACITY)
        for o in T.unroll(GROUPS):
            for u in T.vectorized(4):
                four_index[u] = index[row, o * 4 + u]
            for u in T.unroll(4):
                for e in T.unroll(EACH):
                    rank[e] = rank[e] + T.cast(four_index[u] > whose[e], "int32")

    return place_entries


def put(M, K, CAPACITY, N=COLUMNS):
    """Puts what beats its row's bar of a tile of scores [M, N] on the lists; ``c0`` is the index of the first column.

    ``s`` and ``bar`` are fragments of accumulators; ``counts`` holds the lengths of a thread's two lists, 16 bits each.
    A list that overflows is cut, and what then still beats the bar tries again: no order of scores needs more room.
    Tiles must come newest first, as a score that only ties with the bar does not enter.
    """
    masks = Masks(N)
    keep_best = cut(K, CAPACITY)

    @T.macro
    def find_places(mask, counts, own, total, lane):
        """own = where the thread's entries of its two lists begin, total = entries of all four threads of a row."""
        up = T.alloc_var("int32")
        total[0] = masks.ones(mask)
        own[0] = total[0]
        up = T.shfl_up(total[0], 1)
        if lane % 4 >= 1:
            total[0] = total[0] + up
        up = T.shfl_up(total[0], 2)
        if lane % 4 >= 2:
            total[0] = total[0] + up
        own[0] = counts[0] + total[0] - own[0]
        total[0] = T.shfl_sync(total[0], T.bitwise_or(lane, 3))

    @T.macro
    def put_masked(s, value, index, mask, own, c0):
        """Puts what fits."""
        at0 = T.alloc_var("int32")
        at1 = T.alloc_var("int32")
        at0 = own[0] & 0xFFFF
        at1 = T.shift_right(own[0], 16)
        for i, j in T.Parallel(M, N):
            if masks.has(mask, i, j):
                if i // 8 % 2 == 0:
                    if at0 < CAPACITY:
                        value[i, T.min(at0, CAPACITY - 1)] = s[i, j]
                        index[i, T.min(at0, CAPACITY - 1)] = c0 + j
                    at0 = at0 + 1
                else:
                    if at1 < CAPACITY:
                        value[i, T.min(at1, CAPACITY - 1)] = s[i, j]
                        index[i, T.min(at1, CAPACITY - 1)] = c0 + j
                    at1 = at1 + 1

    @T.macro
    def make_room(s, bar, value, index, count, level, counts, mask, own, warp, lane):
        """Cuts lists that are full; leaves bits of what was not put and beats the new bar."""
        still = T.alloc_local((masks.words,), "int32")
        masks.drop(mask, T.max(CAPACITY - (own[0] & 0xFFFF), 0), T.max(CAPACITY - T.shift_right(own[0], 16), 0))
        if lane % 4 == 0:
            count[warp * WARP_ROWS + lane // 4] = counts[0] & 0xFFFF
            count[warp * WARP_ROWS + 8 + lane // 4] = T.shift_right(counts[0], 16)
        T.sync_warp()
        for row in T.serial(WARP_ROWS):
            if count[warp * WARP_ROWS + row] > CAPACITY:
                keep_best(value, index, count, level, warp * WARP_ROWS + row, lane)
        counts[0] = count[warp * WARP_ROWS + lane // 4] + count[warp * WARP_ROWS + 8 + lane // 4] * 65536
        # What is left of this tile may be newer than what it ties with on the list.
        for i in T.Parallel(M):
            bar[i] = below(level[i])
        for w in T.unroll(masks.words):
            still[w] = 0
        for i, j in T.Parallel(M, N):
            masks.add(still, i, j, s[i, j] > bar[i])
        for w in T.unroll(masks.words):
            mask[w] = mask[w] & still[w]

    @T.macro
    def put_tile(s, bar, value, index, count, level, counts, c0, warp, lane):
        mask = T.alloc_local((masks.words,), "int32")
        own = T.alloc_local((1,), "int32")
        total = T.alloc_local((1,), "int32")
        full = T.alloc_var("int32")
        for w in T.unroll(masks.words):
            mask[w] = 0
        for i, j in T.Parallel(M, N):
            masks.add(mask, i, j, s[i, j] > bar[i])
        full = 0
        while T.any_sync(masks.some(mask)) != 0:
            find_places(mask, counts, own, total, lane)
            put_masked(s, value, index, mask, own, c0)
            counts[0] = counts[0] + total[0]
            if T.any_sync(T.max(counts[0] & 0xFFFF, T.shift_right(counts[0], 16)) > CAPACITY) != 0:
                make_room(s, bar, value, index, count, level, counts, mask, own, warp, lane)
                full = 1
            else:
                for w in T.unroll(masks.words):
                    mask[w] = 0
        if full != 0:
            for i in T.Parallel(M):
                bar[i] = level[i]

    return put_tile
