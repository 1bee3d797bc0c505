"""Chunk selection on CPUs, forward: scores of blocks of landmarks with a tile of tokens, and a running top K.

A unit of work is a tile of T tokens of one retrieval head. Landmark blocks are walked from the newest visible one to the
oldest, so that among equal scores the newer chunk is met first and stays. Tokens are the lanes: a vector holds the
scores of one landmark with as many tokens, and a slot of as many lists. Memory is O(T*K), never L x C.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import CpuTile, Program, Region
from hsa_compile.ir.programs.cpu.blocks import copy_row, panel_product, transpose
from hsa_compile.ir.programs.cpu.lists import empty_lists, newest_first, score_of, take_scores
from hsa_compile.ir.programs.cpu.stages import (
    STORAGE,
    each_token_tile,
    few_tokens,
    many_tokens,
    regions,
    stage,
    token_tiles,
)
from hsa_compile.ir.programs.cpu.token_select import merge_parts, part_regions, scan_part

BURST = 4


def tensor_regions(problem: ChunkSelect) -> dict[str, Region]:
    """The tensors of both passes."""
    row = problem.retrieval_heads * problem.retrieval_dim
    queries, landmarks = f"B * L * {row}", f"B * C * {row}"
    slots = f"B * L * {problem.kv_heads * problem.top_k}"
    stored = STORAGE[problem.dtype]
    return (
        regions(stored, q_r=queries, landmark=landmarks, d_q_r=queries, d_landmark=landmarks)
        | regions("float32", scores=slots, grad_scores=slots)
        | regions("int32", indices=slots)
        | regions("int64", position="B", chunks="B")
    )


def pack_landmarks(problem: ChunkSelect, tile: CpuTile) -> Any:
    """dst[rows, width] = rows c0, c0 + 1, ... of one head's landmarks."""
    Hr, Dr = problem.retrieval_heads, problem.retrieval_dim
    width = tile.pad(Dr)
    pack_row = copy_row(tile, Dr)

    @T.inline
    def pack(m, b, r, c0, rows):
        for c in T.serial(rows):
            pack_row(m.landmarks, c * width, m.landmark, ((b * m.C + c0 + c) * Hr + r) * Dr, T.float32(1))

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


def select_tile(problem: ChunkSelect, tile: CpuTile, TOKENS, BLOCK) -> Any:
    """Selects for a tile of tokens of one retrieval head."""
    Hr, Dr, S, K, lag = (
        problem.retrieval_heads, problem.retrieval_dim, problem.chunk_size, problem.top_k, problem.visible_lag,
    )  # fmt: skip
    V, MR = tile.lanes, tile.row_block
    pack_queries = transpose(tile, Dr, TOKENS)
    pack = pack_landmarks(problem, tile)
    score = panel_product(tile, TOKENS, tile.pad(Dr))
    PANEL = tile.vectors(TOKENS) * V
    empty = empty_lists(tile, K)
    take = take_scores(tile, K)
    sort = newest_first(V, K)
    write = write_lists(problem, V)

    @T.inline
    def select(m, b, r, t0, tokens):
        first = m.position[b] + t0 - lag  # of the tile's first token; its visible chunks end at or before this
        visible = T.min(T.max(first + tokens - 1, T.int64(0)) // S, m.chunks[b])
        pack_queries(m.queries_t, m.q_r, ((b * m.L + t0) * Hr + r) * Dr, Hr * Dr, tokens)
        empty(m.best, m.best_index, TOKENS // V)
        for t in T.serial(TOKENS):
            m.seen[t] = T.cast(T.min(T.max(first + t, T.int64(0)) // S, visible), "int32")
        for step in T.serial((visible + BLOCK - 1) // BLOCK):
            c0 = ((visible + BLOCK - 1) // BLOCK - 1 - step) * BLOCK
            filled = T.cast(T.min(visible - c0, T.int64(BLOCK)), "int32")
            pack(m, b, r, c0, filled)
            score(
                m.products, m.best_index, m.landmarks, m.queries_t, (filled + MR - 1) // MR, Dr,
                (tokens + PANEL - 1) // PANEL,
            )  # fmt: skip
            for vector in T.serial((tokens + V - 1) // V):
                take(
                    m.best, m.best_index, vector * V * K, m.products, vector * V, TOKENS, m.seen, vector * V,
                    T.cast(c0, "int32"), filled,
                )  # fmt: skip
        for vector in T.serial((tokens + V - 1) // V):
            sort(m.best, m.best_index, vector * V * K)
        for t in T.serial(tokens):
            write(m, b * m.L + t0 + t, r, t // V * V * K, t % V)

    return select


def program(problem: ChunkSelect, tile: CpuTile) -> Program:
    """A unit for every retrieval head of every tile of tokens; or, of a few tokens, for every part of the landmarks,
    and then for every list."""
    Hr, K = problem.retrieval_heads, problem.top_k
    TOKENS, WIDTH, BLOCK = (
        tile.pad(max(tile.tokens, tile.few)),
        tile.pad(problem.retrieval_dim),
        tile.pad(tile.landmarks),
    )
    tensors = ("q_r", "landmark", "position", "chunks", "indices", "scores")
    workspace = regions("float32", queries_t=WIDTH * TOKENS, landmarks=BLOCK * WIDTH, products=BLOCK * TOKENS)
    workspace |= regions("int32", best=TOKENS * K, best_index=TOKENS * K, seen=TOKENS)
    parts = part_regions(problem, tile)
    known = tensor_regions(problem) | workspace | parts

    def arguments(*names: str) -> tuple[Region, ...]:
        return tuple(known[name] for name in names)

    tiles = each_token_tile(Hr, TOKENS, select_tile(problem, tile, TOKENS, BLOCK))
    scan = scan_part(problem, tile, pack_landmarks(problem, tile))
    merge = merge_parts(problem, tile, write_lists(problem, 1))
    scanned = arguments(*tensors[:4], "queries_t", "landmarks", "seen", *parts)
    merged = arguments("indices", "scores", "best", "best_index", *parts)
    stages = (
        stage("tiles", many_tokens(tile.few, token_tiles(Hr, TOKENS)), tiles, arguments(*tensors, *workspace)),
        stage("scan", few_tokens(tile.few, f"B * {Hr * tile.segments}"), scan, scanned),
        stage("merge", few_tokens(tile.few, f"B * L * {Hr}"), merge, merged),
    )
    return Program(tensors, tuple(parts.values()), tuple(workspace.values()), stages)
