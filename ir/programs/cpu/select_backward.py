"""Chunk selection on CPUs, backward: queries gather the landmarks they selected, landmarks the queries that did.

Landmarks walk lists of pairs, so there are no atomics and results repeat to the bit.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import CpuTile, Program, Stage
from hsa_compile.ir.programs.cpu.blocks import add_row, clear, store_row
from hsa_compile.ir.programs.cpu.layout import SelectLayout
from hsa_compile.ir.programs.cpu.pairs import each_chunk, pair_regions, pair_stage
from hsa_compile.ir.programs.cpu.stages import stage

TENSORS = ("grad_scores", "q_r", "landmark", "indices", "d_q_r", "d_landmark")


def slot_gradient(problem: ChunkSelect) -> Any:
    """g[0] = the gradient of a slot's score, times the score's factor. A selection that all kv heads share sums theirs."""
    Hkv, K = problem.kv_heads, problem.top_k
    shared, scale = Hkv // problem.retrieval_heads, problem.scale

    @T.inline
    def gradient(g, grad_scores, token, r, s):
        g[0] = T.float32(0)
        for h in T.serial(shared):
            g[0] = g[0] + grad_scores[(token * Hkv + r * shared + h) * K + s] * T.float32(scale)

    return gradient


def query_stage(lay: SelectLayout) -> Stage:
    """dq_r, a unit for every token."""
    p, tile = lay.problem, lay.tile
    Hkv, Hr, Dr, K = p.kv_heads, p.retrieval_heads, p.retrieval_dim, p.top_k
    zero, add, store = clear(tile, 0.0), add_row(tile, Dr), store_row(tile, Dr)
    gradient = slot_gradient(p)

    @T.inline
    def gather_landmarks(token, m):
        g = T.alloc_buffer((1,), "float32", scope="local")
        for r in T.serial(Hr):
            zero(m.sums, lay.width)
            for s in T.serial(K):
                c = m.indices[(token * Hkv + r * (Hkv // Hr)) * K + s]
                if c >= 0:
                    gradient(g, m.grad_scores, token, r, s)
                    add(m.sums, 0, m.landmark, ((token // m.L * m.C + c) * Hr + r) * Dr, g[0])
            store(m.d_q_r, (token * Hr + r) * Dr, m.sums, 0)

    names = ("grad_scores", "landmark", "indices", "d_q_r", "sums")
    return stage("queries", "B * L", gather_landmarks, lay.regions(*names))


def landmark_stage(lay: SelectLayout) -> Stage:
    """dlandmark, a unit for every retrieval head of every chunk."""
    p, tile = lay.problem, lay.tile
    Hr, Dr, K = p.retrieval_heads, p.retrieval_dim, p.top_k
    zero, add, store = clear(tile, 0.0), add_row(tile, Dr), store_row(tile, Dr)
    gradient = slot_gradient(p)

    @T.inline
    def gather_queries(m, b, r, c, first, last):
        g = T.alloc_buffer((1,), "float32", scope="local")
        zero(m.sums, lay.width)
        for i in T.serial(last - first):
            pair = T.cast(m.pairs[first + i], "int64")
            token = b * m.L + pair // K
            gradient(g, m.grad_scores, token, r, pair % K)
            add(m.sums, 0, m.q_r, (token * Hr + r) * Dr, g[0])
        store(m.d_landmark, ((b * m.C + c) * Hr + r) * Dr, m.sums, 0)

    arguments = lay.regions("grad_scores", "q_r", "d_landmark", "sums") + pair_regions(Hr, K)
    return stage("landmarks", f"B * {Hr} * C", each_chunk(Hr, K, gather_queries), arguments)


def program(problem: ChunkSelect, tile: CpuTile) -> Program:
    """The lists of pairs, then the queries' gradients, then the landmarks'."""
    lay = SelectLayout(problem, tile)
    Hr, K = problem.retrieval_heads, problem.top_k
    stages = (
        pair_stage(Hr, problem.kv_heads, K, *lay.regions("indices")),
        query_stage(lay),
        landmark_stage(lay),
    )
    return Program(TENSORS, pair_regions(Hr, K), lay.workspace("backward"), stages)
