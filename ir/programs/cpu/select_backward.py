"""Chunk selection on CPUs, backward: queries gather the landmarks they selected, landmarks the queries that did.

Landmarks walk lists of pairs, so there are no atomics and results repeat to the bit.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import CpuTile, Program, Stage
from hsa_compile.ir.programs.cpu.blocks import add_row
from hsa_compile.ir.programs.cpu.pairs import pair_regions, pair_stage

TENSORS = ("grad_scores", "q_r", "landmark", "indices", "d_q_r", "d_landmark")


def slot_gradient(problem: ChunkSelect) -> Any:
    """g[0] = the gradient of a slot's score, times the score's factor. A selection that all kv heads share sums theirs."""
    Hkv, K = problem.kv_heads, problem.top_k
    shared, scale = Hkv // problem.retrieval_heads, problem.scale

    @T.inline
    def gradient(g, grad, token, r, s):
        g[0] = T.float32(0)
        for h in T.serial(shared):
            g[0] = g[0] + grad[(token * Hkv + r * shared + h) * K + s] * T.float32(scale)

    return gradient


def query_stage(problem: ChunkSelect, tile: CpuTile) -> Stage:
    """dq_r, a unit for every token."""
    Hkv, Hr, Dr, K = problem.kv_heads, problem.retrieval_heads, problem.retrieval_dim, problem.top_k
    add = add_row(tile, Dr)
    gradient = slot_gradient(problem)

    @T.prim_func(s_tir=True)
    def queries_pass(
        grad_ptr: T.handle("float32"), landmark_ptr: T.handle("float32"), indices_ptr: T.handle("int32"),
        d_q_r_ptr: T.handle("float32"), B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        grad = T.decl_buffer((B * L * Hkv * K,), "float32", data=grad_ptr)
        landmark = T.decl_buffer((B * C * Hr * Dr,), "float32", data=landmark_ptr)
        indices = T.decl_buffer((B * L * Hkv * K,), "int32", data=indices_ptr)
        d_q_r = T.decl_buffer((B * L * Hr * Dr,), "float32", data=d_q_r_ptr)
        for unit in T.serial(end - begin):
            token = begin + unit
            g = T.alloc_buffer((1,), "float32", scope="local")
            for r in T.serial(Hr):
                for d in T.serial(Dr):
                    d_q_r[(token * Hr + r) * Dr + d] = T.float32(0)
                for s in T.serial(K):
                    c = indices[(token * Hkv + r * (Hkv // Hr)) * K + s]
                    if c >= 0:
                        gradient(g, grad, token, r, s)
                        add(d_q_r, (token * Hr + r) * Dr, landmark, ((token // L * C + c) * Hr + r) * Dr, g[0])

    return Stage("queries", queries_pass, "B * L", ("grad_scores", "landmark", "indices", "d_q_r"))


def landmark_stage(problem: ChunkSelect, tile: CpuTile) -> Stage:
    """dlandmark, a unit for every retrieval head of every chunk."""
    Hkv, Hr, Dr, K = problem.kv_heads, problem.retrieval_heads, problem.retrieval_dim, problem.top_k
    add = add_row(tile, Dr)
    gradient = slot_gradient(problem)

    @T.prim_func(s_tir=True)
    def landmarks_pass(
        grad_ptr: T.handle("float32"), q_r_ptr: T.handle("float32"), d_landmark_ptr: T.handle("float32"),
        ends_ptr: T.handle("int32"), pairs_ptr: T.handle("int32"),
        B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        grad = T.decl_buffer((B * L * Hkv * K,), "float32", data=grad_ptr)
        q_r = T.decl_buffer((B * L * Hr * Dr,), "float32", data=q_r_ptr)
        d_landmark = T.decl_buffer((B * C * Hr * Dr,), "float32", data=d_landmark_ptr)
        ends = T.decl_buffer((B * Hr * (C + 1),), "int32", data=ends_ptr)
        pairs = T.decl_buffer((B * Hr * L * K,), "int32", data=pairs_ptr)
        for unit in T.serial(end - begin):
            c = (begin + unit) % C
            r = (begin + unit) // C % Hr
            b = (begin + unit) // C // Hr
            list = (begin + unit) // C
            row = ((b * C + c) * Hr + r) * Dr
            g = T.alloc_buffer((1,), "float32", scope="local")
            at: T.int64 = 0
            if c > 0:
                at = T.cast(ends[list * (C + 1) + c - 1], "int64")
            for d in T.serial(Dr):
                d_landmark[row + d] = T.float32(0)
            while at < T.cast(ends[list * (C + 1) + c], "int64"):
                pair = T.cast(pairs[list * L * K + at], "int64")
                token = b * L + pair // K
                gradient(g, grad, token, r, pair % K)
                add(d_landmark, row, q_r, (token * Hr + r) * Dr, g[0])
                at = at + 1

    arguments = ("grad_scores", "q_r", "d_landmark", "pairs_end", "pairs")
    return Stage("landmarks", landmarks_pass, f"B * {Hr} * C", arguments)


def program(problem: ChunkSelect, tile: CpuTile) -> Program:
    """The lists of pairs, then the queries' gradients, then the landmarks'."""
    Hr, K = problem.retrieval_heads, problem.top_k
    stages = (pair_stage(Hr, problem.kv_heads, K), query_stage(problem, tile), landmark_stage(problem, tile))
    return Program(TENSORS, pair_regions(Hr, K), (), stages)
