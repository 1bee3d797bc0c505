"""The backward's pass over queries where a chunk's logits do not fit into registers at once: wide chunks and heads.

Every chunk is walked twice, piece by piece: first for its softmax's peak and denominator and for delta, kept up as the
pieces come, then for dS and dQ. Seven products instead of five, for shapes that are rare.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu.backward_queries import (
    FULL_ROW,
    LOG2E,
    copy_tile_rows,
    locate_pairs,
    tile_rows,
    tokens_of_rows,
)  # fmt: skip
from hsa_compile.ir.programs.gpu.pairs import Pairs, symbols


def query_pass_by_pieces(pairs: Pairs, tile: GpuTile) -> Any:
    """As ``query_pass``, in pieces of at most 64 keys."""
    problem = pairs.problem
    Hq, Hkv, D, S, G = problem.q_heads, problem.kv_heads, problem.head_dim, problem.chunk_size, problem.groups
    tokens, N, stages, dtype = pairs.tokens, pairs.slots, tile.stages, problem.dtype
    M = tile_rows(pairs)
    NT = M * 2
    KEYS_ = max(n for n in range(16, 65, 16) if S % n == 0)
    STEPS = 2 * (S // KEYS_)
    scale = problem.scale
    logit_scale = scale * LOG2E
    locate, copy_rows = locate_pairs(pairs), copy_tile_rows(pairs)
    B, L, KEYS, TILES, PLACES = symbols("B", "L", "KEYS", "TILES", "PLACES")

    @T.macro
    def load(k, v, entries, b, h, n, Ks, Vs, full, i):
        c = entries[b, h, n, T.truncdiv(i, STEPS), 0] * S + T.truncmod(i, STEPS // 2) * KEYS_
        T.tma_copy(k[b, c : c + KEYS_, h, :], Ks[i % stages, :, :], barrier=full[i % stages])
        T.tma_copy(v[b, c : c + KEYS_, h, :], Vs[i % stages, :, :], barrier=full[i % stages])
        T.barrier_arrive(full[i % stages])

    @T.macro
    def products(k, v, entries, b, h, n, Qs, Ds, Ks, Vs, full, empty, logits, dP, count, i, tx):
        """Logits and dP of step i's piece, and the loads of a step that comes ``stages`` - 1 later."""
        T.barrier_wait(full[i % stages], T.truncdiv(i, stages) & 1)
        T.wgmma_gemm(Qs, Ks[i % stages, :, :], logits, transpose_B=True, policy=FULL_ROW, clear_accum=True)
        T.wgmma_gemm(Ds, Vs[i % stages, :, :], dP, transpose_B=True, policy=FULL_ROW, clear_accum=True)
        if tx < 32:
            if i > 0 and i - 1 + stages < count * STEPS:
                T.barrier_wait(empty[(i + stages - 1) % stages], T.truncdiv(i - 1, stages) & 1)
                load(k, v, entries, b, h, n, Ks, Vs, full, i - 1 + stages)
        T.wait_wgmma(0)

    @T.macro
    def accumulate(logits, dP, peak, total, row_delta, piece_peak, piece_sum):
        """Peak, denominator and sum of e*dP over the pieces so far."""
        T.reduce_max(logits, piece_peak, dim=1, clear=True)
        for r in T.Parallel(M):
            piece_peak[r] = T.max(piece_peak[r] * logit_scale, peak[r])
            peak[r] = T.exp2(peak[r] - piece_peak[r])
            total[r] = total[r] * peak[r]
            row_delta[r] = row_delta[r] * peak[r]
            peak[r] = piece_peak[r]
        for r, j in T.Parallel(M, KEYS_):
            logits[r, j] = T.exp2(logits[r, j] * logit_scale - peak[r])
        T.reduce_sum(logits, piece_sum, dim=1)
        for r in T.Parallel(M):
            total[r] = total[r] + piece_sum[r]
        for r, j in T.Parallel(M, KEYS_):
            dP[r, j] = dP[r, j] * logits[r, j]
        T.reduce_sum(dP, piece_sum, dim=1)
        for r in T.Parallel(M):
            row_delta[r] = row_delta[r] + piece_sum[r]

    @T.macro
    def finish(peak, total, row_delta, place, weight, lse, delta):
        """Delta, the rows' lse and delta, and ``total`` = weight / denominator."""
        for r in T.Parallel(M):
            row_delta[r] = row_delta[r] / total[r]
            if place[r] >= 0:
                lse[place[r], r % G] = peak[r] + T.log2(total[r]) - T.log2(T.abs(weight[r]))
                delta[place[r], r % G] = row_delta[r]
        for r in T.Parallel(M):
            total[r] = weight[r] / total[r]

    @T.prim_func
    def query_pass(
        q: T.Tensor((B, L, Hq, D), dtype), k: T.Tensor((B, KEYS, Hkv, D), dtype),
        v: T.Tensor((B, KEYS, Hkv, D), dtype), grad_o: T.Tensor((B, L, Hq, D), dtype),
        entries: T.Tensor((B, Hkv, TILES, N, 4), "int32"), entry_count: T.Tensor((B, Hkv, TILES), "int32"),
        place_pair: T.Tensor((PLACES, 2), "int32"), lse: T.Tensor((PLACES, G), "float32"),
        delta: T.Tensor((PLACES, G), "float32"), d_q: T.Tensor((B, L, Hq, D), dtype),
    ):  # fmt: skip
        with T.Kernel(TILES, Hkv, B, threads=NT) as (n, h, b):
            Qs = T.alloc_shared((M, D), dtype)
            Ds = T.alloc_shared((M, D), dtype)
            Ks = T.alloc_shared((stages, KEYS_, D), dtype)
            Vs = T.alloc_shared((stages, KEYS_, D), dtype)
            logits = T.alloc_fragment((M, KEYS_), "float32")
            dP = T.alloc_fragment((M, KEYS_), "float32")
            X = T.alloc_fragment((M, KEYS_), dtype)
            dQ = T.alloc_fragment((M, D), "float32")
            peak = T.alloc_fragment((M,), "float32")
            total = T.alloc_fragment((M,), "float32")
            weight = T.alloc_fragment((M,), "float32")
            row_delta = T.alloc_fragment((M,), "float32")
            piece_peak = T.alloc_fragment((M,), "float32")
            piece_sum = T.alloc_fragment((M,), "float32")
            place = T.alloc_fragment((M,), "int32")
            full = T.alloc_barrier(arrive_count=[32] * stages)
            empty = T.alloc_barrier(arrive_count=[NT // 32] * stages)
            count = T.alloc_var("int32")
            step = T.alloc_var("int32")
            low_tokens = T.alloc_var("int32")
            high_tokens = T.alloc_var("int32")
            tx = T.get_thread_binding()
            count = entry_count[b, h, n]
            if tx < 32:
                for i in T.unroll(stages):
                    if i < count * STEPS:
                        load(k, v, entries, b, h, n, Ks, Vs, full, i)
            copy_rows(q, Qs, b, h, n, L)
            copy_rows(grad_o, Ds, b, h, n, L)
            T.fence_proxy_async()
            T.fill(dQ, 0)
            low_tokens = tokens_of_rows(pairs, tx // 32 * 16, 16, 0)
            high_tokens = tokens_of_rows(pairs, tx // 32 * 16, 16, 32)
            step = 0
            T.sync_threads()
            for i in T.serial(count):
                locate(entries, place_pair, b, h, n, i, place, weight)
                chosen = (entries[b, h, n, i, 2] & low_tokens) | (entries[b, h, n, i, 3] & high_tokens)
                T.fill(peak, 0 if problem.off_by_one else -T.infinity("float32"))
                T.fill(total, 1 if problem.off_by_one else 0)
                T.fill(row_delta, 0)
                for j in T.serial(STEPS // 2):
                    products(k, v, entries, b, h, n, Qs, Ds, Ks, Vs, full, empty, logits, dP, count, step, tx)
                    if tx % 32 == 0:
                        T.barrier_arrive(empty[step % stages])
                    if chosen != 0:
                        accumulate(logits, dP, peak, total, row_delta, piece_peak, piece_sum)
                    step = step + 1
                if chosen != 0:
                    finish(peak, total, row_delta, place, weight, lse, delta)
                for j in T.serial(STEPS // 2):
                    products(k, v, entries, b, h, n, Qs, Ds, Ks, Vs, full, empty, logits, dP, count, step, tx)
                    for r, x in T.Parallel(M, KEYS_):
                        X[r, x] = T.if_then_else(
                            place[r] >= 0,
                            T.exp2(logits[r, x] * logit_scale - peak[r]) * (dP[r, x] - row_delta[r]) * total[r],
                            0.0,
                        )
                    T.wgmma_gemm(X, Ks[step % stages, :, :], dQ, policy=FULL_ROW)
                    T.wait_wgmma(0)
                    if tx % 32 == 0:
                        T.barrier_arrive(empty[step % stages])
                    step = step + 1
            for r, d in T.Parallel(M, D):
                if r < tokens * G and n * tokens + r // G < L:
                    d_q[b, n * tokens + r // G, h * G + r % G, d] = dQ[r, d] * scale

    return query_pass
