"""Building blocks of the CPU programs: register-blocked matrix products, packing, vector math.

All are factories: they take sizes and return a macro that TVMScript inlines. Buffers are flat; ``lanes`` consecutive
elements are one vector register. Accumulators are local buffers indexed by constants only, which LLVM keeps in registers.
"""

import math
from typing import Any

from tvm.script import tirx as T

LOG2E = math.log2(math.e)
LOWEST = -3.0e38
# Taylor coefficients of 2^f on |f| <= 1/2: the first term left out is below 6e-9, a twentieth of a float32 ulp.
_EXP2 = [math.log(2.0) ** i / math.factorial(i) for i in range(8)]


def exp2(x) -> Any:
    """2^x for x <= 127, as vector arithmetic (LLVM's own exp2 calls libm once a lane). Below -126 it is 2^-126 or less."""
    x = T.max(x, T.float32(-126.0))
    n = T.floor(x + T.float32(0.5))
    f = x - n
    y = T.float32(_EXP2[7])
    for c in _EXP2[6::-1]:
        y = y * f + T.float32(c)
    return y * T.reinterpret("float32", (T.cast(n, "int32") + 127) << 23)


def across(lanes, combine) -> Any:
    """lane[0] = all lanes of a local buffer combined, by halving, which LLVM turns into shuffles."""
    half = lanes // 2
    rest = across(half, combine) if half > 1 else None

    @T.inline
    def reduce(lane):
        if half > 1:
            for v in T.vectorized(half):
                lane[v] = combine(lane[v], lane[v + half])
            rest(lane)
        else:
            lane[0] = combine(lane[0], lane[1])

    return reduce


def product(tile, width, a_row, a_depth=1, target="store") -> Any:
    """C[rows, width] = A[rows, depth] · B[depth, width] in register blocks; ``blocks`` row blocks of A and C.

    Element (i, d) of A lies at ``i*a_row + d*a_depth``, so that a transposed A costs nothing. ``target``: "store"
    overwrites C, "add" adds to it, "scatter" adds row i to row ``rows[i]`` of C.
    """
    V, MR, NV = tile.lanes, tile.row_block, tile.vectors(width)

    @T.inline
    def multiply(C, rows, A, B, blocks, depth):
        for m in T.serial(blocks):
            for n in T.serial(width // (NV * V)):
                acc = T.alloc_buffer((MR * NV * V,), "float32", scope="local")
                for i in T.unroll(MR * NV):
                    for v in T.vectorized(V):
                        acc[i * V + v] = T.float32(0)
                for d in T.serial(depth):
                    for i in T.unroll(MR):
                        for j in T.unroll(NV):
                            for v in T.vectorized(V):
                                acc[(i * NV + j) * V + v] = (
                                    acc[(i * NV + j) * V + v]
                                    + A[(m * MR + i) * a_row + d * a_depth] * B[d * width + (n * NV + j) * V + v]
                                )
                for i in T.unroll(MR):
                    row = T.alloc_buffer((1,), "int32", scope="local")
                    row[0] = rows[m * MR + i] if target == "scatter" else m * MR + i
                    for j in T.unroll(NV):
                        for v in T.vectorized(V):
                            if target == "store":
                                C[row[0] * width + (n * NV + j) * V + v] = acc[(i * NV + j) * V + v]
                            else:
                                C[row[0] * width + (n * NV + j) * V + v] = (
                                    C[row[0] * width + (n * NV + j) * V + v] + acc[(i * NV + j) * V + v]
                                )

    return multiply


def clear(tile, value, dtype="float32") -> Any:
    """Fills ``count`` elements, a multiple of the lanes."""
    V = tile.lanes

    @T.inline
    def fill(X, count):
        for i in T.serial(count // V):
            for v in T.vectorized(V):
                X[i * V + v] = T.cast(value, dtype)

    return fill


def copy_row(tile, length) -> Any:
    """dst[0:length] = src[0:length] * factor, padded with zeros to whole vectors."""
    V, whole, tail = tile.lanes, length // tile.lanes, length % tile.lanes

    @T.inline
    def copy(dst, d0, src, s0, factor):
        for i in T.serial(whole):
            for v in T.vectorized(V):
                dst[d0 + i * V + v] = src[s0 + i * V + v] * factor
        if tail > 0:
            for i in T.serial(tail):
                dst[d0 + whole * V + i] = src[s0 + whole * V + i] * factor
            for i in T.serial(V - tail):
                dst[d0 + whole * V + tail + i] = T.float32(0)

    return copy


def add_row(tile, length) -> Any:
    """dst[0:length] += src[0:length] * factor."""
    V, whole, tail = tile.lanes, length // tile.lanes, length % tile.lanes

    @T.inline
    def add(dst, d0, src, s0, factor):
        for i in T.serial(whole):
            for v in T.vectorized(V):
                dst[d0 + i * V + v] = dst[d0 + i * V + v] + src[s0 + i * V + v] * factor
        for i in T.serial(tail):
            dst[d0 + whole * V + i] = dst[d0 + whole * V + i] + src[s0 + whole * V + i] * factor

    return add


def transpose(tile, depth, width) -> Any:
    """dst[depth, width] = src[rows, depth]ᵀ, zeros in the columns past ``rows``; src's rows lie ``stride`` apart."""
    V = tile.lanes

    @T.inline
    def pack(dst, src, s0, stride, rows):
        for d in T.serial(depth):
            for i in T.serial(rows // V):
                for v in T.vectorized(V):
                    dst[d * width + i * V + v] = src[s0 + (i * V + v) * stride + d]
            for i in T.serial(rows % V):
                dst[d * width + rows // V * V + i] = src[s0 + (rows // V * V + i) * stride + d]
            for i in T.serial(width - rows):
                dst[d * width + rows + i] = T.float32(0)

    return pack


def row_max(tile, vectors, start) -> Any:
    """lane[0] = max(start, X[x0 : x0 + vectors*lanes])."""
    V = tile.lanes
    reduce = across(V, T.max)

    @T.inline
    def maximum(lane, X, x0):
        for v in T.vectorized(V):
            lane[v] = T.float32(start)
        for i in T.unroll(vectors):
            for v in T.vectorized(V):
                lane[v] = T.max(lane[v], X[x0 + i * V + v])
        reduce(lane)

    return maximum


def softmax_row(tile, length, width, off_by_one) -> Any:
    """Softmax, base 2, of ``X[x0 : x0+length]`` in place, times ``factor``; the padding up to ``width`` becomes 0."""
    V, vectors = tile.lanes, width // tile.lanes
    maximum = row_max(tile, vectors, 0.0 if off_by_one else LOWEST)
    add_lanes = across(V, lambda a, b: a + b)

    @T.inline
    def softmax(X, x0, factor):
        peak = T.alloc_buffer((V,), "float32", scope="local")
        total = T.alloc_buffer((V,), "float32", scope="local")
        for i in T.serial(width - length):
            X[x0 + length + i] = T.float32(LOWEST)
        maximum(peak, X, x0)
        for v in T.vectorized(V):
            total[v] = T.float32(0)
        for i in T.unroll(vectors):
            for v in T.vectorized(V):
                X[x0 + i * V + v] = exp2(X[x0 + i * V + v] - peak[0])
        for i in T.serial(width - length):
            X[x0 + length + i] = T.float32(0)
        for i in T.unroll(vectors):
            for v in T.vectorized(V):
                total[v] = total[v] + X[x0 + i * V + v]
        add_lanes(total)
        if off_by_one:
            total[0] = total[0] + T.exp2(T.float32(0) - peak[0])
        total[0] = factor / total[0]
        for i in T.unroll(vectors):
            for v in T.vectorized(V):
                X[x0 + i * V + v] = X[x0 + i * V + v] * total[0]

    return softmax
