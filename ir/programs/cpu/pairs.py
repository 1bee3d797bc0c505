"""The (token, slot) pairs of a selection, listed by chunk: what chunk-major passes walk."""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.programs import Region, Stage
from hsa_compile.ir.programs.cpu.stages import stage


def pair_regions(heads: int, K: int) -> tuple[Region, ...]:
    """Scratch for the lists: ``pairs`` holds ``token * K + slot``, grouped by chunk; chunk c's end at ``pairs_end[c]``."""
    return (
        Region("pairs_end", "int32", f"B * {heads} * (C + 1)"),
        Region("pairs", "int32", f"B * {heads} * L * {K}"),
    )


def pair_stage(heads: int, index_heads: int, K: int, indices: Region) -> Stage:
    """Counting sort of the pairs of ``heads`` heads (of the ``index_heads`` that ``indices`` has); a unit for each."""

    @T.inline
    def sort(unit, m):
        b = unit // heads
        first = (b * m.L * index_heads + unit % heads) * K
        mine = unit * (m.C + 1)
        for c in T.serial(m.C + 1):
            m.pairs_end[mine + c] = 0
        for t in T.serial(m.L):
            for s in T.serial(K):
                # Counted one place up, so that the prefix sum gives where each list begins ...
                if m.indices[first + t * index_heads * K + s] >= 0:
                    up = mine + m.indices[first + t * index_heads * K + s] + 1
                    m.pairs_end[up] = m.pairs_end[up] + 1
        for c in T.serial(m.C):
            m.pairs_end[mine + c + 1] = m.pairs_end[mine + c + 1] + m.pairs_end[mine + c]
        for t in T.serial(m.L):
            for s in T.serial(K):
                # ... and filling moves each beginning to its end.
                if m.indices[first + t * index_heads * K + s] >= 0:
                    at = mine + m.indices[first + t * index_heads * K + s]
                    m.pairs[unit * m.L * K + m.pairs_end[at]] = T.cast(t * K + s, "int32")
                    m.pairs_end[at] = m.pairs_end[at] + 1

    return stage("sort", f"B * {heads}", sort, (indices, *pair_regions(heads, K)))


def each_chunk(heads, K, compute) -> Any:
    """Computes a unit that is a chunk of a head by ``compute(m, b, h, c, first, last)``: chunk c of row b, head h, which
    the pairs ``m.pairs[first : last]`` selected. There are ``B * heads * C`` such units."""

    @T.inline
    def locate(unit, m):
        c = unit % m.C
        h = unit // m.C % heads
        b = unit // m.C // heads
        list = unit // m.C
        last = list * m.L * K + m.pairs_end[list * (m.C + 1) + c]
        first: T.int64 = list * m.L * K
        if c > 0:
            first = list * m.L * K + m.pairs_end[list * (m.C + 1) + c - 1]
        compute(m, b, h, c, first, last)

    return locate
