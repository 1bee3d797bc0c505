"""The (token, slot) pairs of a selection, listed by chunk: what chunk-major passes walk."""

from tvm.script import tirx as T

from hsa_compile.ir.programs import Region, Stage


def pair_regions(heads: int, K: int) -> tuple[Region, ...]:
    """Scratch for the lists: ``pairs`` holds ``token * K + slot``, grouped by chunk; chunk c's end at ``pairs_end[c]``."""
    return (
        Region("pairs_end", "int32", f"B * {heads} * (C + 1)"),
        Region("pairs", "int32", f"B * {heads} * L * {K}"),
    )


def pair_stage(heads: int, index_heads: int, K: int) -> Stage:
    """Counting sort of the pairs of ``heads`` heads (of the ``index_heads`` that ``indices`` has); a unit for each."""

    @T.prim_func(s_tir=True)
    def sort(
        indices_ptr: T.handle("int32"), end_ptr: T.handle("int32"), pairs_ptr: T.handle("int32"),
        B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        indices = T.decl_buffer((B * L * index_heads * K,), "int32", data=indices_ptr)
        ends = T.decl_buffer((B * heads * (C + 1),), "int32", data=end_ptr)
        pairs = T.decl_buffer((B * heads * L * K,), "int32", data=pairs_ptr)
        for unit in T.serial(end - begin):
            b = (begin + unit) // heads
            first = (b * L * index_heads + (begin + unit) % heads) * K
            mine = (begin + unit) * (C + 1)
            for c in T.serial(C + 1):
                ends[mine + c] = 0
            for t in T.serial(L):
                for s in T.serial(K):
                    # Counted one place up, so that the prefix sum gives where each list begins ...
                    if indices[first + t * index_heads * K + s] >= 0:
                        up = mine + indices[first + t * index_heads * K + s] + 1
                        ends[up] = ends[up] + 1
            for c in T.serial(C):
                ends[mine + c + 1] = ends[mine + c + 1] + ends[mine + c]
            for t in T.serial(L):
                for s in T.serial(K):
                    # ... and filling moves each beginning to its end.
                    if indices[first + t * index_heads * K + s] >= 0:
                        at = mine + indices[first + t * index_heads * K + s]
                        pairs[(begin + unit) * L * K + ends[at]] = T.cast(t * K + s, "int32")
                        ends[at] = ends[at] + 1

    return Stage("sort", sort, f"B * {heads}", ("indices", "pairs_end", "pairs"))
