"""The backward's pass over queries: dQ, and what the other pass and ``d_weights`` are made from."""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu.pairs import Pairs, masked, masked_before, symbols

LOG2E = 1.4426950408889634
FULL_ROW = T.GemmWarpPolicy.FullRow


def softmax_rows(M: int, S: int, logit_scale: float, off_by_one: bool) -> Any:
    """In a macro: logits [M, S] to e = exp2(scaled logit - peak), and a row's peak and sum of e."""

    @T.macro
    def softmax(logits, peak, total):
        T.reduce_max(logits, peak, dim=1, clear=True)
        for r in T.Parallel(M):
            peak[r] = T.max(peak[r] * logit_scale, 0.0) if off_by_one else peak[r] * logit_scale
        for r, j in T.Parallel(M, S):
            logits[r, j] = T.exp2(logits[r, j] * logit_scale - peak[r])
        T.reduce_sum(logits, total, dim=1)
        if off_by_one:
            for r in T.Parallel(M):
                total[r] = total[r] + T.exp2(-peak[r])

    return softmax


def tile_rows(pairs: Pairs) -> int:
    """Rows of a tile, T*G padded to whole warpgroups."""
    return -(-pairs.tokens * pairs.problem.groups // 64) * 64


def tokens_of_rows(pairs: Pairs, row: Any, rows: int, first: int) -> Any:
    """Mask of the tokens, from ``first`` on and 32 at most, that have any of ``rows`` rows of a tile from ``row`` on."""
    G = pairs.problem.groups
    begin = T.max(row // G - first, 0)
    end = T.min(T.min((row + rows - 1) // G + 1, pairs.tokens) - first, 32)
    ones = T.shift_right(T.Cast("uint32", 0xFFFFFFFF), T.Cast("uint32", 32 - T.max(end - begin, 1)))
    return T.if_then_else(end > begin, T.Cast("int32", T.shift_left(ones, T.Cast("uint32", T.min(begin, 31)))), 0)


def locate_pairs(pairs: Pairs) -> Any:
    """A macro: places and weights of all rows' pairs with entry i; -1 and 0 for rows that did not select it."""
    M, tokens, G = tile_rows(pairs), pairs.tokens, pairs.problem.groups

    @T.macro
    def locate(entries, place_pair, b, h, n, i, place, weight):
        first = entries[b, h, n, i, 1]
        low = entries[b, h, n, i, 2]
        high = entries[b, h, n, i, 3]
        for r in T.Parallel(M):
            place[r] = -1
            weight[r] = 0
            if r < tokens * G:
                if masked(low, high, r // G, tokens) == 1:
                    place[r] = first + masked_before(low, high, r // G, tokens)
                    weight[r] = T.reinterpret(place_pair[place[r], 1], "float32")

    return locate


def copy_tile_rows(pairs: Pairs) -> Any:
    """A macro: a tile's rows of q or grad_o to shared memory, zero in the padding and past the last token."""
    M, tokens, G, D = tile_rows(pairs), pairs.tokens, pairs.problem.groups, pairs.problem.head_dim

    @T.macro
    def copy_rows(source, target, b, h, n, L):
        for r, d in T.Parallel(M, D):
            target[r, d] = T.if_then_else(
                r < tokens * G and n * tokens + r // G < L,
                source[b, n * tokens + r // G, h * G + r % G, d],
                T.cast(0, pairs.problem.dtype),
            )

    return copy_rows


def copy_keys_of(pairs: Pairs) -> Any:
    """A macro: ``rows`` keys or values from key c on to shared memory, zero past the last one. ``target`` is [1, rows, D]."""

    @T.macro
    def copy_keys(source, target, b, h, c, rows, KEYS):
        for j, d in T.Parallel(rows, pairs.problem.head_dim):
            target[0, j, d] = T.if_then_else(c + j < KEYS, source[b, c + j, h, d], T.cast(0, pairs.problem.dtype))

    return copy_keys


def query_pass(pairs: Pairs, tile: GpuTile) -> Any:
    """A block a tile of T tokens: T*G query rows, padded to whole warpgroups, against one entry's chunk at a time.

    A warpgroup none of whose tokens selected the chunk only passes by: two that share a tile load its chunks once and
    multiply no more than two tiles would. S = QK^T and dP = dO V^T run on all 64 rows; a warp none of whose tokens
    selected the chunk skips the rest. The first warp loads chunks ``tile.stages`` ahead.
    """
    problem = pairs.problem
    Hq, Hkv, D, S, G = problem.q_heads, problem.kv_heads, problem.head_dim, problem.chunk_size, problem.groups
    tokens, N, dtype = pairs.tokens, pairs.slots, problem.dtype
    stages = tile.stages if tile.wgmma else 1
    M = tile_rows(pairs)
    NT = M * 2
    locate, copy_rows, copy_keys = locate_pairs(pairs), copy_tile_rows(pairs), copy_keys_of(pairs)
    multiply = T.wgmma_gemm if tile.wgmma else T.gemm
    scale = problem.scale
    softmax = softmax_rows(M, S, scale * LOG2E, problem.off_by_one)
    B, L, KEYS, TILES, PLACES = symbols("B", "L", "KEYS", "TILES", "PLACES")

    @T.macro
    def load(k, v, entries, b, h, n, Ks, Vs, full, i):
        c = entries[b, h, n, i, 0] * S
        T.tma_copy(k[b, c : c + S, h, :], Ks[i % stages, :, :], barrier=full[i % stages])
        T.tma_copy(v[b, c : c + S, h, :], Vs[i % stages, :, :], barrier=full[i % stages])
        T.barrier_arrive(full[i % stages])

    @T.macro
    def refill(k, v, entries, b, h, n, Ks, Vs, full, empty, count, i, tx):
        if tx < 32 and i > 0 and i - 1 + stages < count:
            T.barrier_wait(empty[(i + stages - 1) % stages], ((i - 1) // stages) & 1)
            load(k, v, entries, b, h, n, Ks, Vs, full, i - 1 + stages)

    @T.macro
    def differentiate(logits, dP, product, X, peak, total, place, weight, row_delta, lse, delta):
        """e and dP to X = w*p*(dP - delta), in the product's type, with p = e / total; and the rows' lse and delta.

        Instructions bound this pass: two multiply-adds and a product an element, for neither p nor p*dP is formed.
        """
        for r, j in T.Parallel(M, S):
            product[r, j] = dP[r, j] * logits[r, j]
        T.reduce_sum(product, row_delta, dim=1)
        for r in T.Parallel(M):
            total[r] = 1.0 / total[r]
            row_delta[r] = row_delta[r] * total[r]
            if place[r] >= 0:
                lse[place[r], r % G] = peak[r] - T.log2(total[r] * T.abs(weight[r]))
                delta[place[r], r % G] = row_delta[r]
        for r in T.Parallel(M):
            total[r] = total[r] * weight[r]
            row_delta[r] = row_delta[r] * total[r]
        if G % 16 == 0:  # the rows of a warp are one token's
            for r, j in T.Parallel(M, S):
                X[r, j] = logits[r, j] * (dP[r, j] * total[r] - row_delta[r])
        else:
            for r, j in T.Parallel(M, S):
                X[r, j] = T.if_then_else(place[r] >= 0, logits[r, j] * (dP[r, j] * total[r] - row_delta[r]), 0.0)

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
            Ks = T.alloc_shared((stages, S, D), dtype)
            Vs = T.alloc_shared((stages, S, D), dtype)
            logits = T.alloc_fragment((M, S), "float32")
            dP = T.alloc_fragment((M, S), "float32")
            product = T.alloc_fragment((M, S), "float32")
            X = T.alloc_fragment((M, S), dtype)
            dQ = T.alloc_fragment((M, D), "float32")
            peak = T.alloc_fragment((M,), "float32")
            total = T.alloc_fragment((M,), "float32")
            weight = T.alloc_fragment((M,), "float32")
            row_delta = T.alloc_fragment((M,), "float32")
            place = T.alloc_fragment((M,), "int32")
            if tile.wgmma:
                full = T.alloc_barrier(arrive_count=[32] * stages)
                empty = T.alloc_barrier(arrive_count=[NT // 32] * stages)
            count = T.alloc_var("int32")
            low_tokens = T.alloc_var("int32")
            high_tokens = T.alloc_var("int32")
            low_present = T.alloc_var("int32")
            high_present = T.alloc_var("int32")
            chosen = T.alloc_var("int32")
            present = T.alloc_var("int32")
            warpgroup = T.alloc_var("int32")
            T.annotate_min_blocks_per_sm(tile.blocks)
            tx = T.get_thread_binding()
            count = entry_count[b, h, n]
            if tile.wgmma and tx < 32:
                for i in T.unroll(stages):
                    if i < count:
                        load(k, v, entries, b, h, n, Ks, Vs, full, i)
            copy_rows(q, Qs, b, h, n, L)
            copy_rows(grad_o, Ds, b, h, n, L)
            if tile.wgmma:
                T.fence_proxy_async()
            T.fill(dQ, 0)
            low_tokens = tokens_of_rows(pairs, tx // 32 * 16, 16, 0)
            high_tokens = tokens_of_rows(pairs, tx // 32 * 16, 16, 32)
            # The shuffle shows the compiler that a warp goes one way: it serializes matrix products where it must doubt.
            warpgroup = T.shfl_sync(tx // 128, 0)
            low_present = tokens_of_rows(pairs, warpgroup * 64, 64, 0)
            high_present = tokens_of_rows(pairs, warpgroup * 64, 64, 32)
            present = 1
            T.sync_threads()
            for i in T.serial(count):
                locate(entries, place_pair, b, h, n, i, place, weight)
                chosen = (entries[b, h, n, i, 2] & low_tokens) | (entries[b, h, n, i, 3] & high_tokens)
                if tile.wgmma and M > 64:
                    present = (entries[b, h, n, i, 2] & low_present) | (entries[b, h, n, i, 3] & high_present)
                if tile.wgmma:
                    T.barrier_wait(full[i % stages], (i // stages) & 1)
                else:
                    copy_keys(k, Ks, b, h, entries[b, h, n, i, 0] * S, S, KEYS)
                    copy_keys(v, Vs, b, h, entries[b, h, n, i, 0] * S, S, KEYS)
                    T.sync_threads()
                if present != 0:
                    multiply(Qs, Ks[i % stages, :, :], logits, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    multiply(Ds, Vs[i % stages, :, :], dP, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    if tile.wgmma:
                        refill(k, v, entries, b, h, n, Ks, Vs, full, empty, count, i, tx)
                        T.wait_wgmma(1)
                    if chosen != 0:
                        softmax(logits, peak, total)
                    if tile.wgmma:
                        T.wait_wgmma(0)
                    if chosen != 0:
                        differentiate(logits, dP, product, X, peak, total, place, weight, row_delta, lse, delta)
                    else:
                        T.fill(X, 0)
                    multiply(X, Ks[i % stages, :, :], dQ, policy=FULL_ROW)
                    if tile.wgmma:
                        T.wait_wgmma(0)
                elif tile.wgmma:
                    refill(k, v, entries, b, h, n, Ks, Vs, full, empty, count, i, tx)
                if tile.wgmma:
                    if tx % 32 == 0:
                        T.barrier_arrive(empty[i % stages])
                else:
                    T.sync_threads()
            for r, d in T.Parallel(M, D):
                if r < tokens * G and n * tokens + r // G < L:
                    d_q[b, n * tokens + r // G, h * G + r % G, d] = dQ[r, d] * scale

    return query_pass


def sum_heads(pairs: Pairs) -> Any:
    """``d_weights`` of filled slots: the sum of delta over the group's heads. A thread a slot."""
    Hkv, K, G = pairs.problem.kv_heads, pairs.problem.top_k, pairs.problem.groups
    B, L, PLACES = symbols("B", "L", "PLACES")
    NT = 256
    tokens = max(1, NT // (Hkv * K))
    rows = tokens * Hkv * K

    @T.prim_func
    def sum_heads(
        place_of: T.Tensor((B, L, Hkv, K), "int32"), delta: T.Tensor((PLACES, G), "float32"),
        d_weights: T.Tensor((B, L, Hkv, K), "float32"),
    ):  # fmt: skip
        with T.Kernel((L + tokens - 1) // tokens, B, threads=NT) as (n, b):
            total = T.alloc_var("float32")
            part = T.alloc_local((4,), "float32")
            t = T.alloc_var("int32")
            slot = T.alloc_var("int32")
            p = T.alloc_var("int32")
            tx = T.get_thread_binding()
            for i in T.serial((rows + NT - 1) // NT):
                t = n * tokens + (i * NT + tx) // (Hkv * K)
                slot = (i * NT + tx) % (Hkv * K)
                if i * NT + tx < rows and t < L:
                    p = place_of[b, t, slot // K, slot % K]
                    if p >= 0:
                        total = 0
                        if G % 4 == 0:
                            for g in T.unroll(G // 4):
                                for u in T.vectorized(4):
                                    part[u] = delta[p, g * 4 + u]
                                total = total + ((part[0] + part[1]) + (part[2] + part[3]))
                        else:
                            for g in T.unroll(G):
                                total = total + delta[p, g]
                        d_weights[b, t, slot // K, slot % K] = total

    return sum_heads
