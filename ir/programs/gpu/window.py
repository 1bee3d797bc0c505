"""The sliding window on GPUs.

A thread block takes a tile of T neighbouring tokens of one kv head, T*G query rows, and walks over the keys of all their
windows with a softmax that it carries along: by ``warpgroups`` on sm_90a, by ``rows`` (here) elsewhere. Of few tokens, of
a decoding step, every window is split into parts, a block each; another launch adds them up. The ring is written last:
present may be past.

By rows and parts, keys and values of places that no token sees count as zeros, whatever the memory holds there.
"""

from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ProblemError, SlidingWindow
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu import window_warpgroups
from hsa_compile.ir.programs.gpu.attention_walk import OPTIONS as WARPGROUPS
from hsa_compile.ir.programs.gpu.window_places import LOG2E, LOWEST, of_row

TENSORS = ("q", "k", "v", "past_k", "past_v", "position", "lengths", "o", "present_k", "present_v")
OPTIONS = {"tl.enable_fast_math": True, "tl.disable_warp_specialized": True, "tl.disable_wgmma": True}
KEYS = 64  # of a block of keys, and of a part
ROWS = 16  # of a matrix product
THREADS = 128


def require_supported(problem: SlidingWindow) -> None:
    """Says which problems the GPU program computes.

    Raises:
        ProblemError: fp32, or a head width that is not a multiple of 16 up to 256.
    """
    if problem.dtype == "float32":
        raise ProblemError("compiled GPU kernels are float16 or bfloat16")
    if problem.head_dim % 16 or problem.head_dim > 256:
        raise ProblemError(
            f"compiled GPU kernels need head_dim to be a multiple of 16 up to 256, got {problem.head_dim}"
        )


def program(problem: SlidingWindow, tile: GpuTile) -> GpuProgram:
    """The forward pass in the tile's form. Of the sizes, C is how many slots of every row's ring are written, from the
    newest backwards: W, or min(L, W) where present is past.

    Raises:
        ProblemError: see ``require_supported``.
    """
    require_supported(problem)
    dims = {"B": "B", "L": "L"}
    # A launch's sizes come from its buffers, and no tensor has C.
    slots = Region("slots", "int32", "C")
    ring = Launch(
        "ring", _ring(problem), (*TENSORS[1:7], "present_k", "present_v", "slots"), {**dims, "C": "C"}, OPTIONS
    )
    inputs = TENSORS[:7]
    if tile.form != "token":
        by_warpgroups = tile.form == "warpgroups"
        function = window_warpgroups.attend(problem, tile) if by_warpgroups else _attend(problem, tile)
        attend = Launch("attend", function, (*inputs, "o"), dims, WARPGROUPS if by_warpgroups else OPTIONS)
        return GpuProgram(TENSORS, (slots,), (attend, ring))
    rows = problem.q_heads * -(-problem.window // KEYS)
    parts = Region("parts", "float32", f"B * L * {rows * problem.head_dim}")
    peaks, totals = (Region(name, "float32", f"B * L * {rows}") for name in ("peaks", "totals"))
    names = ("parts", "peaks", "totals")
    attend = Launch("attend", _attend_parts(problem), (*inputs, *names), dims, OPTIONS)
    merge = Launch("merge", _merge(problem), (*names, "lengths", "o"), dims, OPTIONS)
    return GpuProgram(TENSORS, (parts, peaks, totals, slots), (attend, merge, ring))


class Keys:
    """Macros over the keys that a block of threads looks at."""

    def __init__(self, p: SlidingWindow) -> None:
        D, W = p.head_dim, p.window
        scale = p.scale * LOG2E

        @T.macro
        def load(ring, fresh, to, b, bh, s0, low, high, newest):
            """Rows of the places s0 … s0 + KEYS - 1; zeros outside of low … high - 1."""
            # Most blocks of keys lie in the segment or in the ring as a whole, and need one load of the two.
            if s0 >= 0:
                for j, d in T.Parallel(KEYS, D):
                    to[j, d] = T.if_then_else(s0 + j < high, fresh[b, s0 + j, bh, d], T.cast(0, p.dtype))
            else:
                for j, d in T.Parallel(KEYS, D):
                    slot = newest + 1 + T.max(T.min(s0 + j, -1), -W)
                    to[j, d] = T.if_then_else(
                        s0 + j >= low and s0 + j < 0,
                        ring[b, T.if_then_else(slot < 0, slot + W, slot), bh, d],
                        T.cast(0, p.dtype),
                    )
                if s0 + KEYS > 0:
                    T.sync_threads()
                    for j, d in T.Parallel(KEYS, D):
                        if s0 + j >= 0 and s0 + j < high:
                            to[j, d] = fresh[b, s0 + j, bh, d]

        @T.macro
        def weigh(logits, rows, peak, highest, factor, total):
            """Turns logits into exponentials; ``factor`` is what becomes of the sums until now."""
            T.reduce_max(logits, highest, dim=1, clear=True)
            for r in T.Parallel(rows):
                highest[r] = T.max(highest[r], peak[r])
                factor[r] = T.exp2((peak[r] - highest[r]) * scale)
                peak[r] = highest[r]
            for r, j in T.Parallel(rows, KEYS):
                logits[r, j] = T.exp2((logits[r, j] - peak[r]) * scale)
            T.reduce_sum(logits, highest, dim=1)
            for r in T.Parallel(rows):
                total[r] = total[r] * factor[r] + highest[r]

        self.load, self.weigh = load, weigh


def _attend(p: SlidingWindow, tile: GpuTile) -> Any:
    """Outputs of a tile's rows: row t*G + g is query head g of token t."""
    Hq, Hkv, D, W, G = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups
    TOKENS = tile.tokens
    M = -(-TOKENS * G // 64) * 64
    FULL_ROW = T.GemmWarpPolicy.FullRow
    keys_of = Keys(p)
    load, weigh = keys_of.load, keys_of.weigh
    B, L = (T.dynamic(n, "int64") for n in ("B", "L"))

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, L, Hkv, D), p.dtype), v: T.Tensor((B, L, Hkv, D), p.dtype),
        past_k: T.Tensor((B, W, Hkv, D), p.dtype), past_v: T.Tensor((B, W, Hkv, D), p.dtype),
        position: T.Tensor((B,), "int64"), lengths: T.Tensor((B,), "int64"), o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(L, TOKENS), Hkv, B, threads=M // ROWS * 32) as (bt, bh, bb):
            queries = T.alloc_shared((M, D), p.dtype)
            keys = T.alloc_shared((KEYS, D), p.dtype)
            values = T.alloc_shared((KEYS, D), p.dtype)
            logits = T.alloc_fragment((M, KEYS), "float32")
            P = T.alloc_fragment((M, KEYS), p.dtype)
            sums = T.alloc_fragment((M, D), "float32")
            peak = T.alloc_fragment((M,), "float32")
            highest = T.alloc_fragment((M,), "float32")
            factor = T.alloc_fragment((M,), "float32")
            total = T.alloc_fragment((M,), "float32")
            low = T.alloc_var("int32")
            high = T.alloc_var("int32")
            t0 = T.alloc_var("int32")
            b = T.cast(bb, "int64")
            t0 = T.cast(bt, "int32") * TOKENS
            newest, oldest, count = of_row(position, lengths, b, L, W)
            low = T.max(t0 - (W - 1), oldest)
            high = T.if_then_else(t0 < count, T.min(t0 + TOKENS, count), low)
            for r, d in T.Parallel(M, D):
                token = T.cast(t0 + T.min(r // G, TOKENS - 1), "int64")
                queries[r, d] = q[b, T.min(token, L - 1), bh * G + r % G, d]
            T.fill(sums, 0.0)
            T.fill(total, 0.0)
            T.fill(peak, LOWEST)
            for i in T.serial(T.ceildiv(high - low, KEYS)):
                load(past_k, k, keys, b, bh, low + i * KEYS, low, high, newest)
                load(past_v, v, values, b, bh, low + i * KEYS, low, high, newest)
                T.gemm(queries, keys, logits, transpose_B=True, policy=FULL_ROW, clear_accum=True)
                for r, j in T.Parallel(M, KEYS):
                    behind = t0 + r // G - (low + i * KEYS + j)
                    logits[r, j] = T.if_then_else(behind >= 0 and behind < W, logits[r, j], LOWEST)
                weigh(logits, M, peak, highest, factor, total)
                for r, j in T.Parallel(M, KEYS):
                    P[r, j] = logits[r, j]
                for r, d in T.Parallel(M, D):
                    sums[r, d] = sums[r, d] * factor[r]
                T.gemm(P, values, sums, policy=FULL_ROW)
            for r, d in T.Parallel(M, D):
                token = T.cast(t0 + r // G, "int64")
                if r < TOKENS * G and token < L:
                    o[b, token, bh * G + r % G, d] = T.if_then_else(token < count, sums[r, d] / total[r], 0.0)

    return attend


def _attend_parts(p: SlidingWindow) -> Any:
    """Peak, sum and weighted values of a part of a token's window, of every query head."""
    Hq, Hkv, D, W, G = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups
    M, PARTS = -(-G // ROWS) * ROWS, -(-W // KEYS)
    WARPS = max(w for w in (4, 2, 1) if D % (16 * w) == 0)
    COLUMNS = T.GemmWarpPolicy.FullCol
    keys_of = Keys(p)
    load, weigh = keys_of.load, keys_of.weigh
    B, L = (T.dynamic(n, "int64") for n in ("B", "L"))

    @T.prim_func
    def attend(
        q: T.Tensor((B, L, Hq, D), p.dtype), k: T.Tensor((B, L, Hkv, D), p.dtype), v: T.Tensor((B, L, Hkv, D), p.dtype),
        past_k: T.Tensor((B, W, Hkv, D), p.dtype), past_v: T.Tensor((B, W, Hkv, D), p.dtype),
        position: T.Tensor((B,), "int64"), lengths: T.Tensor((B,), "int64"),
        parts: T.Tensor((B, L, Hkv, PARTS, G, D), "float32"), peaks: T.Tensor((B, L, Hkv, PARTS, G), "float32"),
        totals: T.Tensor((B, L, Hkv, PARTS, G), "float32"),
    ):  # fmt: skip
        with T.Kernel(B * L, Hkv, PARTS, threads=32 * WARPS) as (row, bh, part):
            s0 = T.alloc_var("int32")
            queries = T.alloc_shared((M, D), p.dtype)
            keys = T.alloc_shared((KEYS, D), p.dtype)
            values = T.alloc_shared((KEYS, D), p.dtype)
            P = T.alloc_shared((M, KEYS), p.dtype)
            logits = T.alloc_fragment((M, KEYS), "float32")
            sums = T.alloc_fragment((M, D), "float32")
            peak = T.alloc_fragment((M,), "float32")
            highest = T.alloc_fragment((M,), "float32")
            factor = T.alloc_fragment((M,), "float32")
            total = T.alloc_fragment((M,), "float32")
            b = T.cast(row, "int64") // L
            t = T.cast(row, "int64") % L
            t32 = T.cast(t, "int32")
            newest, oldest, count = of_row(position, lengths, b, L, W)
            s0 = t32 - (W - 1) + part * KEYS
            for r, d in T.Parallel(M, D):
                queries[r, d] = q[b, t, bh * G + T.min(r, G - 1), d]
            load(past_k, k, keys, b, bh, s0, oldest, T.min(t32 + 1, count), newest)
            load(past_v, v, values, b, bh, s0, oldest, T.min(t32 + 1, count), newest)
            T.gemm(queries, keys, logits, transpose_B=True, policy=COLUMNS, clear_accum=True)
            for r, j in T.Parallel(M, KEYS):
                logits[r, j] = T.if_then_else(s0 + j >= oldest and s0 + j <= t32, logits[r, j], LOWEST)
            T.fill(total, 0.0)
            T.fill(peak, LOWEST)
            weigh(logits, M, peak, highest, factor, total)
            for r, j in T.Parallel(M, KEYS):
                P[r, j] = logits[r, j]
            T.gemm(P, values, sums, policy=COLUMNS, clear_accum=True)
            for r, d in T.Parallel(M, D):
                if r < G:
                    parts[b, t, bh, part, r, d] = sums[r, d]
            for r in T.Parallel(M):
                if r < G:
                    peaks[b, t, bh, part, r] = peak[r]
                    totals[b, t, bh, part, r] = total[r]

    return attend


def _merge(p: SlidingWindow) -> Any:
    """A token's output from the parts of its window."""
    Hq, Hkv, D, W, G = p.q_heads, p.kv_heads, p.head_dim, p.window, p.groups
    PARTS, scale = -(-W // KEYS), p.scale * LOG2E
    B, L = (T.dynamic(n, "int64") for n in ("B", "L"))

    @T.prim_func
    def merge(
        parts: T.Tensor((B, L, Hkv, PARTS, G, D), "float32"), peaks: T.Tensor((B, L, Hkv, PARTS, G), "float32"),
        totals: T.Tensor((B, L, Hkv, PARTS, G), "float32"), lengths: T.Tensor((B,), "int64"),
        o: T.Tensor((B, L, Hq, D), p.dtype),
    ):  # fmt: skip
        with T.Kernel(B * L, Hkv, T.ceildiv(G * D, THREADS), threads=THREADS) as (row, bh, bx):
            peak = T.alloc_var("float32")
            total = T.alloc_var("float32")
            sum = T.alloc_var("float32")
            weight = T.alloc_var("float32")
            x = bx * THREADS + T.get_thread_binding()
            b = T.cast(row, "int64") // L
            t = T.cast(row, "int64") % L
            if x < G * D:
                peak = LOWEST
                total = 0.0
                sum = 0.0
                for i in T.serial(PARTS):
                    peak = T.max(peak, peaks[b, t, bh, i, x // D])
                for i in T.serial(PARTS):
                    weight = T.exp2((peaks[b, t, bh, i, x // D] - peak) * scale)
                    total = total + totals[b, t, bh, i, x // D] * weight
                    sum = sum + parts[b, t, bh, i, x // D, x % D] * weight
                o[b, t, bh * G + x // D, x % D] = T.if_then_else(t < lengths[b], sum / total, 0.0)

    return merge


def _ring(p: SlidingWindow) -> Any:
    """The C newest slots of every row's ring, from the segment where it has them, else from the past."""
    W, WIDTH = p.window, p.kv_heads * p.head_dim
    B, L, C = (T.dynamic(n, "int64") for n in ("B", "L", "C"))

    @T.prim_func
    def ring(
        k: T.Tensor((B, L, WIDTH), p.dtype), v: T.Tensor((B, L, WIDTH), p.dtype),
        past_k: T.Tensor((B, W, WIDTH), p.dtype), past_v: T.Tensor((B, W, WIDTH), p.dtype),
        position: T.Tensor((B,), "int64"), lengths: T.Tensor((B,), "int64"),
        present_k: T.Tensor((B, W, WIDTH), p.dtype), present_v: T.Tensor((B, W, WIDTH), p.dtype),
        slots: T.Tensor((C,), "int32"),
    ):  # fmt: skip
        with T.Kernel(C, B, threads=THREADS) as (newest, bb):
            b = T.cast(bb, "int64")
            count = T.min(lengths[b], L)
            slot = (position[b] + count + (W - 1) - newest) % W
            for i in T.serial(T.ceildiv(WIDTH, THREADS)):
                x = i * THREADS + T.get_thread_binding()
                if x < WIDTH:
                    if newest < count:
                        present_k[b, slot, x] = k[b, count - 1 - newest, x]
                        present_v[b, slot, x] = v[b, count - 1 - newest, x]
                    else:
                        present_k[b, slot, x] = past_k[b, slot, x]
                        present_v[b, slot, x] = past_v[b, slot, x]

    return ring
