"""Chunk selection on CPUs, forward: scores of a tile of tokens against blocks of landmarks, with a running top K.

A unit of work is a tile of T tokens of one retrieval head. Landmark blocks are walked from the newest visible one to the
oldest, so that among equal scores the newer chunk is met first and stays. Memory is O(T*K), never L x C.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkSelect
from hsa_compile.ir.programs import CpuTile, Program, Region, Stage
from hsa_compile.ir.programs.cpu.blocks import LOWEST, copy_row, product, row_max, transpose


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


def program(problem: ChunkSelect, tile: CpuTile) -> Program:
    """One stage, a unit for every retrieval head of every tile of tokens."""
    Hkv, Hr, Dr, S, K = (
        problem.kv_heads, problem.retrieval_heads, problem.retrieval_dim, problem.chunk_size, problem.top_k,
    )  # fmt: skip
    V, MR, TOKENS = tile.lanes, tile.row_block, tile.tokens
    WIDTH, BLOCK = tile.pad(Dr), tile.pad(tile.landmarks)
    ROWS = -(-TOKENS // MR) * MR
    shared = Hkv // Hr  # kv heads that a retrieval head selects for
    pack_row = copy_row(tile, Dr)
    pack_landmarks = transpose(tile, Dr, BLOCK)
    score = product(tile, BLOCK, WIDTH)
    maximum = row_max(tile, 1, LOWEST)
    put = insert(K)
    sort = newest_first(K)
    lag, scale = problem.visible_lag, problem.scale

    @T.prim_func(s_tir=True)
    def select(
        q_r_ptr: T.handle("float32"), landmark_ptr: T.handle("float32"), position_ptr: T.handle("int64"),
        chunks_ptr: T.handle("int64"), indices_ptr: T.handle("int32"), scores_ptr: T.handle("float32"),
        queries_ptr: T.handle("float32"), landmarks_t_ptr: T.handle("float32"), products_ptr: T.handle("float32"),
        best_ptr: T.handle("float32"), best_index_ptr: T.handle("int32"),
        B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        q_r = T.decl_buffer((B * L * Hr * Dr,), "float32", data=q_r_ptr)
        landmark = T.decl_buffer((B * C * Hr * Dr,), "float32", data=landmark_ptr)
        position = T.decl_buffer((B,), "int64", data=position_ptr)
        chunks = T.decl_buffer((B,), "int64", data=chunks_ptr)
        indices = T.decl_buffer((B * L * Hkv * K,), "int32", data=indices_ptr)
        scores = T.decl_buffer((B * L * Hkv * K,), "float32", data=scores_ptr)
        queries = T.decl_buffer((ROWS * WIDTH,), "float32", data=queries_ptr)
        landmarks_t = T.decl_buffer((WIDTH * BLOCK,), "float32", data=landmarks_t_ptr)
        products = T.decl_buffer((ROWS * BLOCK,), "float32", data=products_ptr)
        best = T.decl_buffer((TOKENS * K,), "float32", data=best_ptr)
        best_index = T.decl_buffer((TOKENS * K,), "int32", data=best_index_ptr)
        for unit in T.serial(end - begin):
            tiles = (L + TOKENS - 1) // TOKENS
            r = (begin + unit) % Hr
            b = (begin + unit) // Hr // tiles
            t0 = (begin + unit) // Hr % tiles * TOKENS
            tokens = T.cast(T.min(L - t0, T.int64(TOKENS)), "int32")
            blocks = (tokens + MR - 1) // MR
            first = position[b] + t0 - lag  # of the tile's first token; its visible chunks end at or before this
            visible = T.min(T.max(first + tokens - 1, T.int64(0)) // S, chunks[b])
            lane = T.alloc_buffer((V,), "float32", scope="local")
            for t in T.serial(tokens):
                pack_row(queries, t * WIDTH, q_r, ((b * L + t0 + t) * Hr + r) * Dr, T.float32(1))
                for s in T.serial(K):
                    best_index[t * K + s] = -1
                    best[t * K + s] = T.float32(0)
            for step in T.serial((visible + BLOCK - 1) // BLOCK):
                c0 = ((visible + BLOCK - 1) // BLOCK - 1 - step) * BLOCK
                filled = T.cast(T.min(visible - c0, T.int64(BLOCK)), "int32")
                pack_landmarks(landmarks_t, landmark, ((b * C + c0) * Hr + r) * Dr, Hr * Dr, filled)
                score(products, best_index, queries, landmarks_t, blocks, Dr)
                for t in T.serial(tokens):
                    mine = T.cast(
                        T.min(T.min(T.max(first + t, T.int64(0)) // S, chunks[b]) - c0, T.int64(BLOCK)), "int32"
                    )
                    for group in T.serial(BLOCK // V):
                        low = (BLOCK // V - 1 - group) * V
                        if low < mine:
                            maximum(lane, products, t * BLOCK + low)
                            # Seldom true once a row's list has filled: the K-th best only rises.
                            if best_index[t * K + K - 1] < 0 or lane[0] > best[t * K + K - 1]:
                                for back in T.serial(V):
                                    c = low + V - 1 - back
                                    if c < mine:
                                        if (
                                            best_index[t * K + K - 1] < 0
                                            or products[t * BLOCK + c] > best[t * K + K - 1]
                                        ):
                                            put(
                                                best,
                                                best_index,
                                                t * K,
                                                products[t * BLOCK + c],
                                                T.cast(c0 + c, "int32"),
                                            )
            for t in T.serial(tokens):
                sort(best, best_index, t * K)
                for h in T.serial(shared):
                    for s in T.serial(K):
                        at = ((b * L + t0 + t) * Hkv + r * shared + h) * K + s
                        indices[at] = best_index[t * K + s]
                        # Only here, so that what ties exactly still does while it is compared.
                        scores[at] = best[t * K + s] * T.float32(scale)

    tensors = ("q_r", "landmark", "position", "chunks", "indices", "scores")
    workspace = (
        Region("queries", "float32", str(ROWS * WIDTH)),
        Region("landmarks_t", "float32", str(WIDTH * BLOCK)),
        Region("products", "float32", str(ROWS * BLOCK)),
        Region("best", "float32", str(TOKENS * K)),
        Region("best_index", "int32", str(TOKENS * K)),
    )
    units = f"B * {Hr} * ((L + {TOKENS - 1}) / {TOKENS})"
    return Program(
        tensors, (), workspace, (Stage("select", select, units, tensors + tuple(r.name for r in workspace)),)
    )
