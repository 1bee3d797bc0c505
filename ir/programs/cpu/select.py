"""Chunk selection on CPUs, forward: scores of a tile of tokens against blocks of landmarks, with a running top K.

A unit of work is a tile of T tokens of one retrieval head. Landmark blocks are walked from the newest visible one to the
oldest, so that among equal scores the newer chunk is met first and stays. Memory is O(T*K), never L x C.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import CpuTile, Program, Region
from hsa_compile.ir.programs.cpu.blocks import LOWEST, copy_row, product, row_max, transpose
from hsa_compile.ir.programs.cpu.stages import each_token_tile, regions, stage, token_tiles


def insert(K) -> Any:
    """Puts (score, index) into a row's list of K, kept by falling score; what ties stays behind what came before."""

    @T.inline
    def put(best, best_index, row, score, index):
        place: T.int32 = K - 1
        while place > 0 and (best_index[row + T.max(place - 1, 0)] < 0 or best[row + T.max(place - 1, 0)] < score):
            best[row + place] = best[row + place - 1]
            best_index[row + place] = best_index[row + place - 1]
            place = place - 1
        best[row + place] = score
        best_index[row + place] = index

    return put


def newest_first(K) -> Any:
    """Sorts a row's list by falling index; empty slots (-1) come last."""

    @T.inline
    def sort(best, best_index, row):
        for i in T.serial(K - 1):
            index = best_index[row + i + 1]
            score = best[row + i + 1]
            place: T.int32 = i + 1
            while place > 0 and best_index[row + T.max(place - 1, 0)] < index:
                best[row + place] = best[row + place - 1]
                best_index[row + place] = best_index[row + place - 1]
                place = place - 1
            best[row + place] = score
            best_index[row + place] = index

    return sort


def tensor_regions(problem: ChunkSelect) -> dict[str, Region]:
    """The tensors of both passes."""
    row = problem.retrieval_heads * problem.retrieval_dim
    queries, landmarks = f"B * L * {row}", f"B * C * {row}"
    slots = f"B * L * {problem.kv_heads * problem.top_k}"
    return (
        regions("float32", q_r=queries, landmark=landmarks, scores=slots)
        | regions("float32", d_q_r=queries, d_landmark=landmarks, grad_scores=slots)
        | regions("int32", indices=slots)
        | regions("int64", position="B", chunks="B")
    )


def update_row(tile, K, BLOCK) -> Any:
    """Takes the scores ``products[row : row+BLOCK]`` of chunks c0, c0 + 1, ... into a token's list, newest first; only
    the first ``visible`` of them count."""
    V = tile.lanes
    maximum = row_max(tile, 1, LOWEST)
    put = insert(K)

    @T.inline
    def update(lane, best, best_index, list, products, row, c0, visible):
        for group in T.serial(BLOCK // V):
            low = (BLOCK // V - 1 - group) * V
            if low < visible:
                maximum(lane, products, row + low)
                # Seldom true once a row's list has filled: the K-th best only rises.
                if best_index[list + K - 1] < 0 or lane[0] > best[list + K - 1]:
                    for back in T.serial(V):
                        c = low + V - 1 - back
                        if c < visible:
                            if best_index[list + K - 1] < 0 or products[row + c] > best[list + K - 1]:
                                put(best, best_index, list, products[row + c], T.cast(c0 + c, "int32"))

    return update


def write_lists(problem: ChunkSelect) -> Any:
    """Writes a token's list, in order of chunks, for every kv head that its retrieval head selects for."""
    Hkv, K, scale = problem.kv_heads, problem.top_k, problem.scale
    shared = Hkv // problem.retrieval_heads
    sort = newest_first(K)

    @T.inline
    def write(m, token, r, list):
        sort(m.best, m.best_index, list)
        for h in T.serial(shared):
            for s in T.serial(K):
                at = (token * Hkv + r * shared + h) * K + s
                m.indices[at] = m.best_index[list + s]
                # Only here, so that what ties exactly still does while it is compared.
                m.scores[at] = m.best[list + s] * T.float32(scale)

    return write


def select_tile(problem: ChunkSelect, tile: CpuTile, WIDTH, BLOCK) -> Any:
    """Selects for a tile of tokens of one retrieval head."""
    Hr, Dr, S, K, lag = (
        problem.retrieval_heads, problem.retrieval_dim, problem.chunk_size, problem.top_k, problem.visible_lag,
    )  # fmt: skip
    V, MR = tile.lanes, tile.row_block
    pack_row = copy_row(tile, Dr)
    pack_landmarks = transpose(tile, Dr, BLOCK)
    score = product(tile, BLOCK, WIDTH)
    update = update_row(tile, K, BLOCK)
    write = write_lists(problem)

    @T.inline
    def select(m, b, r, t0, tokens):
        first = m.position[b] + t0 - lag  # of the tile's first token; its visible chunks end at or before this
        visible = T.min(T.max(first + tokens - 1, T.int64(0)) // S, m.chunks[b])
        lane = T.alloc_buffer((V,), "float32", scope="local")
        for t in T.serial(tokens):
            pack_row(m.queries, t * WIDTH, m.q_r, ((b * m.L + t0 + t) * Hr + r) * Dr, T.float32(1))
            for s in T.serial(K):
                m.best_index[t * K + s] = -1
                m.best[t * K + s] = T.float32(0)
        for step in T.serial((visible + BLOCK - 1) // BLOCK):
            c0 = ((visible + BLOCK - 1) // BLOCK - 1 - step) * BLOCK
            filled = T.cast(T.min(visible - c0, T.int64(BLOCK)), "int32")
            pack_landmarks(m.landmarks_t, m.landmark, ((b * m.C + c0) * Hr + r) * Dr, Hr * Dr, filled)
            score(m.products, m.best_index, m.queries, m.landmarks_t, (tokens + MR - 1) // MR, Dr)
            for t in T.serial(tokens):
                seen = T.min(T.max(first + t, T.int64(0)) // S, m.chunks[b])
                mine = T.cast(T.min(seen - c0, T.int64(BLOCK)), "int32")
                update(lane, m.best, m.best_index, t * K, m.products, t * BLOCK, c0, mine)
        for t in T.serial(tokens):
            write(m, b * m.L + t0 + t, r, t * K)

    return select


def program(problem: ChunkSelect, tile: CpuTile) -> Program:
    """One stage, a unit for every retrieval head of every tile of tokens."""
    Hr, K, TOKENS = problem.retrieval_heads, problem.top_k, tile.tokens
    WIDTH, BLOCK = tile.pad(problem.retrieval_dim), tile.pad(tile.landmarks)
    ROWS = -(-TOKENS // tile.row_block) * tile.row_block
    tensors = ("q_r", "landmark", "position", "chunks", "indices", "scores")
    workspace = regions("float32", queries=ROWS * WIDTH, landmarks_t=WIDTH * BLOCK, products=ROWS * BLOCK)
    workspace |= regions("float32", best=TOKENS * K) | regions("int32", best_index=TOKENS * K)
    arguments = (*(tensor_regions(problem)[name] for name in tensors), *workspace.values())
    compute = each_token_tile(Hr, TOKENS, select_tile(problem, tile, WIDTH, BLOCK))
    return Program(
        tensors, (), tuple(workspace.values()), (stage("select", token_tiles(Hr, TOKENS), compute, arguments),)
    )
