"""The K best of a stream that runs from newer to older chunks: lists of (key, chunk), one a lane of a vector.

Scores are compared as keys, integers in the order of the scores. A list is sorted by falling key; among equals the
newer chunk, which came first, stays ahead. The lists of a vector of lanes lie together, slot s at ``list + s*lanes``.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.programs.cpu.blocks import any_lane
from hsa_compile.ir.programs.cpu.layout import QUEUE

NO_KEY = -(2**31)  # below that of every score


def key_of(score) -> Any:
    """Integers in the order of float32 scores; a NaN counts as what its sign says."""
    bits = T.reinterpret("int32", score)
    return bits ^ ((bits >> 31) & T.int32(0x7FFFFFFF))


def score_of(key) -> Any:
    """Inverse of ``key_of``."""
    return T.reinterpret("float32", key ^ ((key >> 31) & T.int32(0x7FFFFFFF)))


def empty_lists(tile, K) -> Any:
    """Empties the lists of ``count`` vectors of lanes."""
    V = tile.lanes

    @T.inline
    def empty(best, best_index, count):
        for i in T.serial(count * K):
            for v in T.vectorized(V):
                best[i * V + v] = NO_KEY
                best_index[i * V + v] = -1

    return empty


def merge_queue(tile, K) -> Any:
    """Takes the candidates of a queue into the lists of a vector of lanes, and empties it.

    They pass the slots one behind the other, so that a slot is loaded and stored once for all of them. All is compare
    and select: of n random scores a list of K takes in ``K*(1 + ln(n/K))``, and a branch for each is mispredicted.
    """
    V = tile.lanes

    @T.inline
    def merge(best, best_index, list, key, index):
        held = T.alloc_buffer((V,), "int32", scope="local")
        held_index = T.alloc_buffer((V,), "int32", scope="local")
        lower = T.alloc_buffer((V,), "int32", scope="local")
        lower_index = T.alloc_buffer((V,), "int32", scope="local")
        entering = T.alloc_buffer((QUEUE * V,), "int32", scope="local")
        for i in T.unroll(QUEUE):
            for v in T.vectorized(V):
                entering[i * V + v] = key[i * V + v]
        for s in T.serial(K):
            for v in T.vectorized(V):
                held[v] = best[list + s * V + v]
                held_index[v] = best_index[list + s * V + v]
            for i in T.unroll(QUEUE):
                for v in T.vectorized(V):
                    # Not what is pushed down is compared but what enters: past its place, everything moves down by
                    # one, and among equals the oldest leaves.
                    lower_index[v] = T.Select(entering[i * V + v] > held[v], held_index[v], index[i * V + v])
                    held_index[v] = T.Select(entering[i * V + v] > held[v], index[i * V + v], held_index[v])
                    lower[v] = T.Select(entering[i * V + v] > held[v], held[v], key[i * V + v])
                    held[v] = T.Select(entering[i * V + v] > held[v], key[i * V + v], held[v])
                    key[i * V + v] = lower[v]
                    index[i * V + v] = lower_index[v]
            for v in T.vectorized(V):
                best[list + s * V + v] = held[v]
                best_index[list + s * V + v] = held_index[v]
        for i in T.unroll(QUEUE):
            for v in T.vectorized(V):
                key[i * V + v] = NO_KEY

    return merge


def take_scores(tile, K) -> Any:
    """Takes the scores of ``count`` chunks c0, c0 + 1, ..., newest first, into the lists of a vector of tokens.

    The score of chunk c0 + c lies at ``products[at + c*width + lane]``; ``seen[at_seen + lane]`` is the first chunk
    that a token does not see. What beats the K-th best of its list waits in a queue until one lane's is full.
    """
    V = tile.lanes
    merge = merge_queue(tile, K)

    @T.inline
    def take(best, best_index, list, products, at, width, seen, at_seen, c0, count):
        key = T.alloc_buffer((QUEUE * V,), "int32", scope="local")
        index = T.alloc_buffer((QUEUE * V,), "int32", scope="local")
        new = T.alloc_buffer((V,), "int32", scope="local")
        bound = T.alloc_buffer((V,), "int32", scope="local")
        waiting = T.alloc_buffer((V,), "int32", scope="local")
        for v in T.vectorized(V):
            bound[v] = best[list + (K - 1) * V + v]
            waiting[v] = 0
        for i in T.unroll(QUEUE):
            for v in T.vectorized(V):
                key[i * V + v] = NO_KEY
                index[i * V + v] = -1
        for step in T.serial(count):
            c = count - 1 - step
            for v in T.vectorized(V):
                new[v] = T.Select(c0 + c < seen[at_seen + v], key_of(products[at + c * width + v]), NO_KEY)
            if any_lane(new[T.Ramp(0, 1, V)] > bound[T.Ramp(0, 1, V)]):
                for i in T.unroll(QUEUE - 1):
                    for v in T.vectorized(V):
                        # The oldest candidate is the last in the queue's order, which merging keeps.
                        key[i * V + v] = T.Select(new[v] > bound[v], key[(i + 1) * V + v], key[i * V + v])
                        index[i * V + v] = T.Select(new[v] > bound[v], index[(i + 1) * V + v], index[i * V + v])
                for v in T.vectorized(V):
                    key[(QUEUE - 1) * V + v] = T.Select(new[v] > bound[v], new[v], key[(QUEUE - 1) * V + v])
                    index[(QUEUE - 1) * V + v] = T.Select(new[v] > bound[v], c0 + c, index[(QUEUE - 1) * V + v])
                    waiting[v] = waiting[v] + T.Select(new[v] > bound[v], 1, 0)
                if any_lane(waiting[T.Ramp(0, 1, V)] == T.Broadcast(QUEUE, V)):
                    merge(best, best_index, list, key, index)
                    for v in T.vectorized(V):
                        bound[v] = best[list + (K - 1) * V + v]
                        waiting[v] = 0
        if any_lane(waiting[T.Ramp(0, 1, V)] > T.Broadcast(0, V)):
            merge(best, best_index, list, key, index)

    return take


def newest_first(lanes, K) -> Any:
    """Sorts the lists of ``lanes`` lanes by falling index, empty slots (-1) last: K rounds of exchanges between
    neighbours, independent of each other within a round."""
    V = lanes
    each_lane = T.vectorized if lanes > 1 else T.serial

    @T.inline
    def sort(best, best_index, list):
        first = T.alloc_buffer((V,), "int32", scope="local")
        second = T.alloc_buffer((V,), "int32", scope="local")
        index = T.alloc_buffer((V,), "int32", scope="local")
        for round in T.serial(K):
            for pair in T.serial((K - round % 2) // 2):
                at = list + (2 * pair + round % 2) * V
                for v in each_lane(V):
                    first[v] = T.Select(best_index[at + V + v] > best_index[at + v], best[at + V + v], best[at + v])
                    second[v] = T.Select(best_index[at + V + v] > best_index[at + v], best[at + v], best[at + V + v])
                    best[at + v] = first[v]
                    best[at + V + v] = second[v]
                    index[v] = T.max(best_index[at + v], best_index[at + V + v])
                    best_index[at + V + v] = T.min(best_index[at + v], best_index[at + V + v])
                    best_index[at + v] = index[v]

    return sort
