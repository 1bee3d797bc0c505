"""Chunk selection on CPUs, forward, for the few tokens of a decoding step: a unit of work is a part of the landmarks.

So a single token's landmarks go out to all threads. Landmarks are the lanes: as many sums of products as a vector has
lanes are transposed and added up, and few of them reach the list, one by one. Each unit leaves its K best; a second
stage merges the parts, newer ones first.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.programs import Stage
from hsa_compile.ir.programs.cpu.blocks import any_lane, copy_row, transposed_sums
from hsa_compile.ir.programs.cpu.layout import SelectLayout, few_tokens
from hsa_compile.ir.programs.cpu.lists import NO_KEY, key_of, newest_first
from hsa_compile.ir.programs.cpu.stages import stage


def insert(K) -> Any:
    """Puts (key, index) into a list of K, kept by falling key, if it beats the last; what ties stays behind what came
    before."""

    @T.inline
    def put(best, best_index, list, key, index):
        if key > best[list + K - 1]:
            place: T.int32 = K - 1
            # Both sides of "and" are evaluated: at place 0 the right one looks at a place that there is.
            while place > 0 and best[list + T.max(place - 1, 0)] < key:
                best[list + place] = best[list + place - 1]
                best_index[list + place] = best_index[list + place - 1]
                place = place - 1
            best[list + place] = key
            best_index[list + place] = index

    return put


def clear_list(K) -> Any:
    """Empties a list."""

    @T.inline
    def clear(best, best_index, list):
        for s in T.serial(K):
            best[list + s] = NO_KEY
            best_index[list + s] = -1

    return clear


def score_landmarks(tile, width) -> Any:
    """new[lane] = key of queries[q : q+width] · landmarks[lane]; rows of landmarks are packed."""
    V = tile.lanes
    total = transposed_sums(tile)

    @T.inline
    def score(new, queries, q, landmarks):
        sums = T.alloc_buffer((V * V,), "float32", scope="local")
        dots = T.alloc_buffer((V,), "float32", scope="local")
        for i in T.unroll(V):
            for v in T.vectorized(V):
                sums[i * V + v] = T.float32(0)
        for d in T.serial(width // V):
            for i in T.unroll(V):
                for v in T.vectorized(V):
                    sums[i * V + v] = sums[i * V + v] + queries[q + d * V + v] * landmarks[i * width + d * V + v]
        total(dots, sums)
        for v in T.vectorized(V):
            new[v] = key_of(dots[v])

    return score


def scan_stage(lay: SelectLayout, pack) -> Stage:
    """The K best of a part of the landmarks, of every token of a row: those of token t of a unit lie at
    ``(unit*L + t)*K``. ``pack(m, b, r, c0, rows)`` packs landmarks."""
    p, tile, WIDTH, PARTS = lay.problem, lay.tile, lay.width, lay.tile.segments
    Hr, Dr, S, K, lag, V = p.retrieval_heads, p.retrieval_dim, p.chunk_size, p.top_k, p.visible_lag, tile.lanes
    pack_row = copy_row(tile, Dr)
    clear, score, put = clear_list(K), score_landmarks(tile, WIDTH), insert(K)

    @T.inline
    def scan(unit, m):
        b = unit // PARTS // Hr
        r = unit // PARTS % Hr
        new = T.alloc_buffer((V,), "int32", scope="local")
        # The part is one of the last token's visible chunks, rounded up to whole vectors.
        visible = T.min(T.max(m.position[b] + m.L - 1 - lag, T.int64(0)) // S, m.chunks[b])
        part = (visible + PARTS * V - 1) // (PARTS * V) * V
        low = T.min(unit % PARTS * part, visible)
        high = T.min(low + part, visible)
        for t in T.serial(m.L):
            pack_row(m.queries, t * WIDTH, m.q_r, ((b * m.L + t) * Hr + r) * Dr, T.float32(1))
            clear(m.part_best, m.part_index, (unit * m.L + t) * K)
        for step in T.serial((high - low + V - 1) // V):
            c0 = low + ((high - low + V - 1) // V - 1 - step) * V
            pack(m, b, r, c0, T.cast(T.min(high - c0, T.int64(V)), "int32"))
            for t in T.serial(m.L):
                list = (unit * m.L + t) * K
                seen = T.cast(T.min(T.max(m.position[b] + t - lag, T.int64(0)) // S, high) - c0, "int32")
                score(new, m.queries, t * WIDTH, m.landmarks)
                for v in T.vectorized(V):
                    new[v] = T.Select(v < seen, new[v], NO_KEY)
                if any_lane(new[T.Ramp(0, 1, V)] > T.Broadcast(m.part_best[list + K - 1], V)):
                    for v in T.vectorized(V):
                        m.seen[v] = new[v]
                    for back in T.serial(V):
                        put(m.part_best, m.part_index, list, m.seen[V - 1 - back], T.cast(c0 + V - 1 - back, "int32"))

    names = ("q_r", "landmark", "position", "chunks", "queries", "landmarks", "seen", "part_best", "part_index")
    return stage("scan", few_tokens(tile.few, f"B * {Hr * PARTS}"), scan, lay.regions(*names))


def merge_stage(lay: SelectLayout, write) -> Stage:
    """A token's list from those of its parts, a unit for each; ``write(m, token, r, list, lane)`` stores it."""
    Hr, K, PARTS = lay.problem.retrieval_heads, lay.problem.top_k, lay.tile.segments
    clear, put, sort = clear_list(K), insert(K), newest_first(1, K)

    @T.inline
    def merge(unit, m):
        token = unit // Hr
        r = unit % Hr
        clear(m.best, m.best_index, 0)
        for back in T.serial(PARTS):
            list = (((token // m.L * Hr + r) * PARTS + PARTS - 1 - back) * m.L + token % m.L) * K
            for s in T.serial(K):
                put(m.best, m.best_index, 0, m.part_best[list + s], m.part_index[list + s])
        sort(m.best, m.best_index, 0)
        write(m, token, r, 0, 0)

    names = ("indices", "scores", "best", "best_index", "part_best", "part_index")
    return stage("merge", few_tokens(lay.tile.few, f"B * L * {Hr}"), merge, lay.regions(*names))
