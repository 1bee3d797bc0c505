"""The backward's pass over the memory: dK and dV, chunk by chunk."""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.programs import GpuTile
from hsa_compile.ir.programs.gpu.backward_queries import copy_keys_of
from hsa_compile.ir.programs.gpu.pairs import Pairs, symbols

LOG2E = 1.4426950408889634
# Copy by cp.async, and leave commit and wait to the program.
ASYNC = {"parallel_prefer_async": True, "parallel_async_without_async_commit_wait": True}
FULL_ROW = T.GemmWarpPolicy.FullRow


def memory_pass(pairs: Pairs, tile: GpuTile) -> Any:
    """A block a work item and 64 keys of its chunk: keys are the rows, (token, head) pairs the columns of
    S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are already the left operands of dV += P^T dO, dK += dS^T Q.

    The rows of q and grad_o of ``pairs.block_tokens`` tokens are gathered ``tile.stages`` blocks ahead.
    """
    problem = pairs.problem
    Hkv, D, S, G = problem.kv_heads, problem.head_dim, problem.chunk_size, problem.groups
    tokens, P, stages, dtype = pairs.block_tokens, pairs.item_pairs, tile.memory_stages, problem.dtype
    W = tokens * G  # columns in use
    M = -(-W // 16) * 16
    PIECES = -(-S // 64)
    NT = 128
    scale = problem.scale
    logit_scale = scale * LOG2E
    bulk = tile.wgmma and G % 8 == 0  # the copy engine's swizzle repeats every 8 rows
    multiply = T.wgmma_gemm if tile.wgmma else T.gemm
    swizzle = next(w for w in (64, 32, 16) if D % w == 0)
    LINE = -(-M // 32) * 32
    # A block sums all columns of dK and dV, or, where they would not fit into registers, a part of them.
    WIDTH = max(w for w in range(16, min(D, 128) + 1, 16) if D % w == 0)
    PARTS = D // WIDTH
    copy_keys = copy_keys_of(pairs)
    B, C, KEYS, ROWS, BLOCKS, PLACES, ITEMS = symbols("B", "C", "KEYS", "ROWS", "BLOCKS", "PLACES", "ITEMS")
    ROW_ITEMS = symbols("ROW_ITEMS")[0]

    @T.macro
    def gather(q, grad_o, lse, delta, rows, first, Qs, Ds, Ls, i):
        """As ``load``, by all threads, 16 bytes at a time; rows past the last are zero."""
        for r, d in T.Parallel(W, D, annotations=ASYNC):
            Qs[i % stages, r, d] = T.if_then_else(
                rows[i * tokens + r // G] < ROWS,
                q[T.min(rows[i * tokens + r // G], ROWS - 1), r % G, d],
                T.cast(0, dtype),
            )
        for r, d in T.Parallel(W, D, annotations=ASYNC):
            Ds[i % stages, r, d] = T.if_then_else(
                rows[i * tokens + r // G] < ROWS,
                grad_o[T.min(rows[i * tokens + r // G], ROWS - 1), r % G, d],
                T.cast(0, dtype),
            )
        for r in T.Parallel(W, annotations=ASYNC):
            Ls[i % stages, 0, r] = lse[first + i, r]
        for r in T.Parallel(W, annotations=ASYNC):
            Ls[i % stages, 1, r] = delta[first + i, r]

    @T.macro
    def load(q, grad_o, lse, delta, rows, first, Qs, Ds, Ls, full, i):
        for t in T.unroll(tokens):
            row = rows[i * tokens + t]
            for e in T.unroll(D // swizzle):
                T.tma_copy(
                    q[row, :, e * swizzle : (e + 1) * swizzle],
                    Qs[i % stages, t * G : (t + 1) * G, e * swizzle : (e + 1) * swizzle],
                    barrier=full[i % stages],
                )
                T.tma_copy(
                    grad_o[row, :, e * swizzle : (e + 1) * swizzle],
                    Ds[i % stages, t * G : (t + 1) * G, e * swizzle : (e + 1) * swizzle],
                    barrier=full[i % stages],
                )
        T.tma_copy(lse[first + i, :], Ls[i % stages, 0, 0:W], barrier=full[i % stages])
        T.tma_copy(delta[first + i, :], Ls[i % stages, 1, 0:W], barrier=full[i % stages])
        T.barrier_arrive(full[i % stages])

    @T.macro
    def weigh(logits, Ls, P_, i, negative, signs):
        """Logits to w*p, in place and in the product's type."""
        for j, r in T.Parallel(64, M):
            logits[j, r] = T.exp2(logits[j, r] * logit_scale - Ls[i % stages, 0, r])
        if negative != 0:
            for j, r in T.Parallel(64, M):
                logits[j, r] = T.if_then_else(signs[i * tokens + r // G] < 0, -logits[j, r], logits[j, r])
        for j, r in T.Parallel(64, M):
            P_[j, r] = logits[j, r]

    @T.macro
    def differentiate(logits, dP, Ls, X, i):
        for j, r in T.Parallel(64, M):
            X[j, r] = logits[j, r] * (dP[j, r] - Ls[i % stages, 1, r])

    @T.prim_func
    def memory_pass(
        q: T.Tensor((ROWS, G, D), dtype), k: T.Tensor((B, KEYS, Hkv, D), dtype),
        v: T.Tensor((B, KEYS, Hkv, D), dtype), grad_o: T.Tensor((ROWS, G, D), dtype),
        items: T.Tensor((B, Hkv, ROW_ITEMS, 4), "int32"), order: T.Tensor((B, Hkv, ROW_ITEMS), "int32"),
        place_pair: T.Tensor((PLACES, 2), "int32"),
        lse: T.Tensor((BLOCKS, W), "float32"), delta: T.Tensor((BLOCKS, W), "float32"),
        partials: T.Tensor((B, Hkv, ROW_ITEMS, PIECES, 2, 64, D), "float32"),
        d_k: T.Tensor((B, C, S, Hkv, D), dtype), d_v: T.Tensor((B, C, S, Hkv, D), dtype),
    ):  # fmt: skip
        with T.Kernel(ROW_ITEMS * PIECES * PARTS, Hkv, B, threads=NT) as (n, h, b):
            Ks = T.alloc_shared((1, 64, D), dtype)
            Vs = T.alloc_shared((1, 64, D), dtype)
            Qs = T.alloc_shared((stages, M, D), dtype)
            Ds = T.alloc_shared((stages, M, D), dtype)
            Ls = T.alloc_shared((stages, 2, LINE), "float32")
            rows = T.alloc_shared((P,), "int32")
            signs = T.alloc_shared((P,), "int32")
            logits = T.alloc_fragment((64, M), "float32")
            dP = T.alloc_fragment((64, M), "float32")
            P_ = T.alloc_fragment((64, M), dtype)
            X = T.alloc_fragment((64, M), dtype)
            dK = T.alloc_fragment((64, WIDTH), "float32")
            dV = T.alloc_fragment((64, WIDTH), "float32")
            if tile.wgmma:
                ready = T.alloc_barrier(arrive_count=32)
                full = T.alloc_barrier(arrive_count=[32] * stages)
                empty = T.alloc_barrier(arrive_count=[NT // 32] * stages)
            item = T.alloc_var("int32")
            piece = T.alloc_var("int32")
            part = T.alloc_var("int32")
            chunk = T.alloc_var("int32")
            first = T.alloc_var("int32")
            count = T.alloc_var("int32")
            only = T.alloc_var("int32")
            negative = T.alloc_var("int32")
            row = T.alloc_var("int32")
            T.annotate_min_blocks_per_sm(tile.memory_blocks)
            tx = T.get_thread_binding()
            item = order[b, h, T.truncdiv(n, PIECES * PARTS)]
            piece = T.truncmod(T.truncdiv(n, PARTS), PIECES)
            part = T.truncmod(n, PARTS)
            count = T.truncdiv(items[b, h, item, 2] + tokens - 1, tokens)
            if count > 0:
                chunk = items[b, h, item, 0]
                first = items[b, h, item, 1]
                only = items[b, h, item, 3]
                negative = 0
                for i in T.serial((P + NT - 1) // NT):
                    if i * NT + tx < count * tokens:
                        row = place_pair[first + i * NT + tx, 0]
                        signs[i * NT + tx] = row
                        rows[i * NT + tx] = T.if_then_else(row < 0, -1 - row, row)
                        negative = negative | T.if_then_else(row < 0, 1, 0)
                negative = T.syncthreads_or(negative)
                if tile.wgmma:
                    if tx < 32:
                        c = chunk * S + piece * 64
                        T.tma_copy(k[b, c : c + 64, h, :], Ks[0, :, :], barrier=ready)
                        T.tma_copy(v[b, c : c + 64, h, :], Vs[0, :, :], barrier=ready)
                        T.barrier_arrive(ready)
                        if bulk:
                            for i in T.unroll(stages):
                                if i < count:
                                    load(q, grad_o, lse, delta, rows, T.truncdiv(first, tokens), Qs, Ds, Ls, full, i)
                else:
                    copy_keys(k, Ks, b, h, chunk * S + piece * 64, 64, KEYS)
                    copy_keys(v, Vs, b, h, chunk * S + piece * 64, 64, KEYS)
                T.fill(dK, 0)
                T.fill(dV, 0)
                if not bulk:
                    if W < M:
                        for i, r, d in T.Parallel(stages, M - W, D):
                            Qs[i, W + r, d] = 0
                            Ds[i, W + r, d] = 0
                        for i, r in T.Parallel(stages, M - W):
                            Ls[i, 0, W + r] = T.infinity("float32")
                            Ls[i, 1, W + r] = 0
                    for i in T.unroll(stages - 1):
                        if i < count:
                            gather(q, grad_o, lse, delta, rows, T.truncdiv(first, tokens), Qs, Ds, Ls, i)
                        T.ptx_commit_group()
                if tile.wgmma:
                    T.barrier_wait(ready, 0)
                for i in T.serial(count):
                    if bulk:
                        T.barrier_wait(full[i % stages], (i // stages) & 1)
                    else:
                        if i + stages - 1 < count:
                            gather(q, grad_o, lse, delta, rows, T.truncdiv(first, tokens), Qs, Ds, Ls, i + stages - 1)
                        T.ptx_commit_group()
                        T.ptx_wait_group(stages - 1)
                        if tile.wgmma:
                            T.fence_proxy_async()
                        T.sync_threads()
                    multiply(
                        Ks[0, :, :], Qs[i % stages, :, :], logits, transpose_B=True, policy=FULL_ROW, clear_accum=True
                    )
                    multiply(Vs[0, :, :], Ds[i % stages, :, :], dP, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                    if bulk and tx < 32:
                        if i > 0 and i - 1 + stages < count:
                            T.barrier_wait(empty[(i + stages - 1) % stages], ((i - 1) // stages) & 1)
                            load(
                                q, grad_o, lse, delta, rows, T.truncdiv(first, tokens), Qs, Ds, Ls, full,
                                i - 1 + stages,
                            )  # fmt: skip
                    if tile.wgmma:
                        T.wait_wgmma(1)
                    weigh(logits, Ls, P_, i, negative, signs)
                    if tile.wgmma:
                        T.wait_wgmma(0)
                    differentiate(logits, dP, Ls, X, i)
                    for e in T.unroll(PARTS):
                        if part == e:
                            multiply(P_, Ds[i % stages, :, e * WIDTH : (e + 1) * WIDTH], dV, policy=FULL_ROW)
                            multiply(X, Qs[i % stages, :, e * WIDTH : (e + 1) * WIDTH], dK, policy=FULL_ROW)
                    if tile.wgmma:
                        T.wait_wgmma(0)
                    if bulk:
                        if tx % 32 == 0:
                            T.barrier_arrive(empty[i % stages])
                    else:
                        T.sync_threads()
                if only == 1:
                    for j, d in T.Parallel(64, WIDTH):
                        if piece * 64 + j < S:
                            d_k[b, chunk, piece * 64 + j, h, part * WIDTH + d] = dK[j, d] * scale
                            d_v[b, chunk, piece * 64 + j, h, part * WIDTH + d] = dV[j, d]
                else:
                    for j, d in T.Parallel(64, WIDTH):
                        partials[b, h, item, piece, 0, j, part * WIDTH + d] = dK[j, d] * scale
                        partials[b, h, item, piece, 1, j, part * WIDTH + d] = dV[j, d]

    return memory_pass


def sum_items(pairs: Pairs) -> Any:
    """d_k and d_v of the chunks with no item or several: zero, or the sum of the items' partials in order."""
    Hkv, D, S, P = pairs.problem.kv_heads, pairs.problem.head_dim, pairs.problem.chunk_size, pairs.item_pairs
    dtype = pairs.problem.dtype
    PIECES = -(-S // 64)
    B, C, ITEMS = symbols("B", "C", "ITEMS")
    KEYS = 16

    @T.prim_func
    def sum_items(
        chunk_pairs: T.Tensor((B, Hkv, C), "int32"), chunk_item: T.Tensor((B, Hkv, C), "int32"),
        partials: T.Tensor((ITEMS, PIECES, 2, 64, D), "float32"), d_k: T.Tensor((B, C, S, Hkv, D), dtype),
        d_v: T.Tensor((B, C, S, Hkv, D), dtype),
    ):  # fmt: skip
        with T.Kernel(C * (S // KEYS), Hkv, B, threads=128) as (n, h, b):
            a = T.alloc_fragment((KEYS, D), "float32")
            z = T.alloc_fragment((KEYS, D), "float32")
            c = T.alloc_var("int32")
            y = T.alloc_var("int32")
            count = T.alloc_var("int32")
            c = T.truncdiv(n, S // KEYS)
            y = T.truncmod(n, S // KEYS) * KEYS
            count = T.truncdiv(chunk_pairs[b, h, c] + P - 1, P)
            if count != 1:
                T.fill(a, 0)
                T.fill(z, 0)
                for i in T.serial(count):
                    for j, d in T.Parallel(KEYS, D):
                        a[j, d] += partials[chunk_item[b, h, c] + i, y // 64, 0, y % 64 + j, d]
                        z[j, d] += partials[chunk_item[b, h, c] + i, y // 64, 1, y % 64 + j, d]
                for j, d in T.Parallel(KEYS, D):
                    d_k[b, c, y + j, h, d] = a[j, d]
                    d_v[b, c, y + j, h, d] = z[j, d]

    return sum_items
