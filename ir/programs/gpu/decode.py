"""Chunk attention on GPUs for few tokens: one token a thread block, its slots spread over blocks.

With a handful of tokens there is nothing to share between neighbours, and a block that walked all K chunks of its token
would leave the GPU idle. So every block takes some slots of one token and kv head, and a second launch adds the blocks'
partial outputs in the order of the slots: equal inputs give equal bits. It is bound by the K chunks' bytes.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.attention_walk import LOG2E, TENSORS, require_supported

ROWS = 16  # of a matrix product; a token's G query rows are padded to a multiple
SUM_THREADS = 256
OPTIONS = {"tl.enable_fast_math": True, "tl.disable_safe_memory_legalize": True, "tl.disable_warp_specialized": True}


def program(problem: ChunkAttention, tile: GpuTile) -> GpuProgram:
    """The forward pass for any B and L, meant for those with few tokens.

    Raises:
        ProblemError: see ``require_supported``.
    """
    require_supported(problem)
    splits = -(-problem.top_k // tile.slots)
    partial = Region("partial", "float32", f"B * L * {splits * problem.q_heads * problem.head_dim}")
    # B * L under a name of its own: a grid's size and the tensors' first dimension.
    dims = {"B": "B", "L": "L", "C": "C"}
    launches = (
        Launch("attend", _attend(problem, tile), ("q", "k", "v", "indices", "weights", "partial"), dims, OPTIONS),
        Launch("add", _add(problem, splits), ("partial", "o"), {"N": "B * L"}, OPTIONS),
    )
    return GpuProgram(TENSORS, (partial,), launches)


def _attend(p: ChunkAttention, tile: GpuTile) -> Any:
    """Partial outputs of ``slots`` slots. Four warps share a chunk: each takes a part of its keys, then of the width."""
    Hq, Hkv, D, S, K, G = p.q_heads, p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    SLOTS = tile.slots
    SPLITS = -(-K // SLOTS)
    PADDED = -(-G // ROWS) * ROWS
    WARPS = max(w for w in (4, 2, 1) if S % (16 * w) == 0 and D % (16 * w) == 0)
    COLUMNS = T.GemmWarpPolicy.FullCol
    scale = p.scale * LOG2E
    B, L, C = (T.dynamic(n, "int64") for n in ("B", "L", "C"))

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, C, S, Hkv, D), p.dtype),
        v: T.Tensor((B, C, S, Hkv, D), p.dtype), indices: T.Tensor((B, L, Hkv, K), "int32"),
        weights: T.Tensor((B, L, Hkv, K), "float32"), partial: T.Tensor((B, L, Hkv, SPLITS, G, D), "float32"),
    ):  # fmt: skip
        with T.Kernel(B * L, Hkv, SPLITS, threads=32 * WARPS) as (token, bh, split):
            queries = T.alloc_shared((PADDED, D), p.dtype)
            keys = T.alloc_shared((S, D), p.dtype)
            values = T.alloc_shared((S, D), p.dtype)
            probabilities = T.alloc_shared((PADDED, S), p.dtype)
            logits = T.alloc_fragment((PADDED, S), "float32")
            sums = T.alloc_fragment((PADDED, D), "float32")
            peak = T.alloc_fragment((PADDED,), "float32")
            total = T.alloc_fragment((PADDED,), "float32")
            b = T.cast(token, "int64") // L
            t = T.cast(token, "int64") % L
            for r, d in T.Parallel(PADDED, D):
                queries[r, d] = q[b, t, bh * G + T.min(r, G - 1), d]
            T.fill(sums, 0.0)
            for j in T.serial(SLOTS):
                slot = split * SLOTS + j
                c = T.cast(T.if_then_else(slot < K, indices[b, t, bh, T.min(slot, K - 1)], -1), "int64")
                if c >= 0 and c < C:
                    T.copy(k[b, c, :, bh, :], keys)
                    T.copy(v[b, c, :, bh, :], values)
                    T.gemm(queries, keys, logits, transpose_B=True, policy=COLUMNS, clear_accum=True)
                    T.reduce_max(logits, peak, dim=1, clear=True)
                    for r in T.Parallel(PADDED):
                        peak[r] = (T.max(peak[r], 0.0) if p.off_by_one else peak[r]) * scale
                    for r, s in T.Parallel(PADDED, S):
                        logits[r, s] = T.exp2(logits[r, s] * scale - peak[r])
                    T.reduce_sum(logits, total, dim=1)
                    for r in T.Parallel(PADDED):
                        total[r] = weights[b, t, bh, slot] / (total[r] + (T.exp2(-peak[r]) if p.off_by_one else 0.0))
                    for r, s in T.Parallel(PADDED, S):
                        probabilities[r, s] = logits[r, s] * total[r]
                    T.gemm(probabilities, values, sums, policy=COLUMNS)
            for r, d in T.Parallel(PADDED, D):
                if r < G:
                    partial[b, t, bh, split, r, d] = sums[r, d]

    return attend


def _add(p: ChunkAttention, splits: int) -> Any:
    """o[n, h, :, :] = the sum over splits of partial[n, h, split, :, :]."""
    Hkv, WIDTH = p.kv_heads, p.groups * p.head_dim
    N = T.dynamic("N", "int64")

    @T.prim_func
    def add(partial: T.Tensor((N, Hkv, splits, WIDTH), "float32"), o: T.Tensor((N, Hkv, WIDTH), p.dtype)):
        with T.Kernel(N, Hkv, T.ceildiv(WIDTH, SUM_THREADS), threads=SUM_THREADS) as (token, bh, part):
            total = T.alloc_var("float32")
            x = part * SUM_THREADS + T.get_thread_binding()
            n = T.cast(token, "int64")
            if x < WIDTH:
                total = 0.0
                for split in T.serial(splits):
                    total = total + partial[n, bh, split, x]
                o[n, bh, x] = T.cast(total, p.dtype)

    return add
