"""Chunk selection on CPUs, forward: scores of blocks of landmarks with a tile of tokens, and a running top K.

A unit of work is a tile of T tokens of one retrieval head. Landmark blocks are walked from the newest visible one to the
oldest, so that among equal scores the newer chunk is met first and stays. Tokens are the lanes: a vector holds the
scores of one landmark with as many tokens, and a slot of as many lists. Memory is O(T*K), never L x C.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import CpuTile, Program
from hsa_compile.ir.programs.cpu.blocks import copy_row, panel_product, transpose
from hsa_compile.ir.programs.cpu.layout import SelectLayout, many_tokens
from hsa_compile.ir.programs.cpu.lists import empty_lists, newest_first, score_of, take_scores
from hsa_compile.ir.programs.cpu.stages import each_token_tile, stage, token_tiles
from hsa_compile.ir.programs.cpu.token_select import merge_stage, scan_stage

TENSORS = ("q_r", "landmark", "position", "chunks", "indices", "scores")


def pack_landmarks(lay: SelectLayout) -> Any:
    """landmarks[rows, width] = rows c0, c0 + 1, ... of one head's landmarks."""
    Hr, Dr, WIDTH = lay.problem.retrieval_heads, lay.problem.retrieval_dim, lay.width
    pack_row = copy_row(lay.tile, Dr)

    @T.inline
    def pack(m, b, r, c0, rows):
        for c in T.serial(rows):
            pack_row(m.landmarks, c * WIDTH, m.landmark, ((b * m.C + c0 + c) * Hr + r) * Dr, T.float32(1))

    return pack


def write_lists(problem: ChunkSelect, lanes: int) -> Any:
    """Writes a token's sorted list, lane ``v`` of the ``lanes`` at ``list``, for every kv head that its retrieval head
    selects for."""
    Hkv, K, scale, V = problem.kv_heads, problem.top_k, problem.scale, lanes
    shared = Hkv // problem.retrieval_heads

    @T.inline
    def write(m, token, r, list, v):
        for h in T.serial(shared):
            for s in T.serial(K):
                at = (token * Hkv + r * shared + h) * K + s
                m.indices[at] = m.best_index[list + s * V + v]
                # Scaled only here, so that what ties exactly still does while it is compared.
                m.scores[at] = T.Select(
                    m.best_index[list + s * V + v] >= 0,
                    score_of(m.best[list + s * V + v]) * T.float32(scale),
                    T.float32(0),
                )

    return write


def select_tile(lay: SelectLayout) -> Any:
    """Selects for a tile of tokens of one retrieval head."""
    p, tile, TOKENS, BLOCK = lay.problem, lay.tile, lay.tokens, lay.block
    Hr, Dr, S, K, lag = p.retrieval_heads, p.retrieval_dim, p.chunk_size, p.top_k, p.visible_lag
    V, MR, PANEL = tile.lanes, tile.row_block, tile.vectors(TOKENS) * tile.lanes
    pack_queries, pack = transpose(tile, Dr, TOKENS), pack_landmarks(lay)
    score = panel_product(tile, TOKENS, lay.width)
    empty, take, sort = empty_lists(tile, K), take_scores(tile, K), newest_first(V, K)
    write = write_lists(p, V)

    @T.inline
    def select(m, b, r, t0, tokens):
        first = m.position[b] + t0 - lag  # of the tile's first token; its visible chunks end at or before this
        visible = T.min(T.max(first + tokens - 1, T.int64(0)) // S, m.chunks[b])
        vectors = (tokens + V - 1) // V
        panels = (tokens + PANEL - 1) // PANEL
        pack_queries(m.queries_t, m.q_r, ((b * m.L + t0) * Hr + r) * Dr, Hr * Dr, tokens)
        empty(m.best, m.best_index, TOKENS // V)
        for t in T.serial(TOKENS):
            m.seen[t] = T.cast(T.min(T.max(first + t, T.int64(0)) // S, visible), "int32")
        for step in T.serial((visible + BLOCK - 1) // BLOCK):
            c0 = ((visible + BLOCK - 1) // BLOCK - 1 - step) * BLOCK
            rows = T.cast(T.min(visible - c0, T.int64(BLOCK)), "int32")
            pack(m, b, r, c0, rows)
            score(m.products, m.best_index, m.landmarks, m.queries_t, (rows + MR - 1) // MR, Dr, panels)
            for vector in T.serial(vectors):
                at = vector * V
                take(m.best, m.best_index, at * K, m.products, at, TOKENS, m.seen, at, T.cast(c0, "int32"), rows)
        for vector in T.serial(vectors):
            sort(m.best, m.best_index, vector * V * K)
        for t in T.serial(tokens):
            write(m, b * m.L + t0 + t, r, t // V * V * K, t % V)

    return select


def program(problem: ChunkSelect, tile: CpuTile) -> Program:
    """A unit for every retrieval head of every tile of tokens; or, of a few tokens, for every part of the landmarks,
    and then for every list."""
    lay = SelectLayout(problem, tile)
    heads, workspace = problem.retrieval_heads, lay.workspace("forward")
    units = many_tokens(tile.few, token_tiles(heads, lay.tokens))
    compute = each_token_tile(heads, lay.tokens, select_tile(lay))
    tiles = stage("tiles", units, compute, lay.regions(*TENSORS) + workspace)
    stages = (tiles, scan_stage(lay, pack_landmarks(lay)), merge_stage(lay, write_lists(problem, 1)))
    return Program(TENSORS, lay.regions("part_best", "part_index"), workspace, stages)
