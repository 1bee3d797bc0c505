"""Building blocks of the CPU programs: register-blocked matrix products, packing, vector math.

All are factories: they take sizes and return a macro that TVMScript inlines. Buffers are flat; ``lanes`` consecutive
elements are one vector register. Accumulators are local buffers indexed by constants only, which LLVM keeps in registers.
"""

import math
from typing import Any

from tvm import tirx
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


def widen(x) -> Any:
    """A stored value as float32. bfloat16 is stored as uint16, the upper half of a float32, so that targets without
    the type load it by a shift."""
    if x.dtype == "uint16":
        return T.reinterpret("float32", T.cast(x, "uint32") << T.uint32(16))
    return T.cast(x, "float32")


def narrow(x, dtype) -> Any:
    """A float32 as it is stored, rounded to nearest, ties to even; NaN stays one, whatever its bits."""
    if dtype != "uint16":
        return T.cast(x, dtype)
    bits = T.reinterpret("uint32", x)
    rounded = (bits + ((bits >> T.uint32(16)) & T.uint32(1)) + T.uint32(0x7FFF)) >> T.uint32(16)
    return T.cast(T.Select(x == x, rounded, T.uint32(0x7FC0)), "uint16")


def any_lane(vector) -> Any:
    """Whether a vector of booleans has a true one: a test of a mask register, or of packed signs."""
    return T.call_llvm_pure_intrin("bool", "llvm.vector.reduce.or", vector)


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
    """C[rows, width] = A[rows, depth] · B[depth, width] in register blocks; ``blocks`` row blocks of A and C. See
    ``panel_product``."""
    multiply = panel_product(tile, width, a_row, a_depth, target)
    panels = width // (tile.vectors(width) * tile.lanes)

    @T.inline
    def multiply_all(C, rows, A, B, blocks, depth):
        multiply(C, rows, A, B, blocks, depth, panels)

    return multiply_all


def panel_product(tile, width, a_row, a_depth=1, target="store") -> Any:
    """The first ``panels`` panels of C[rows, width] = A[rows, depth] · B[depth, width]; a panel is
    ``tile.vectors(width)`` vectors wide.

    Element (i, d) of A lies at ``i*a_row + d*a_depth``, so that a transposed A costs nothing. ``target``: "store"
    overwrites C, "add" adds to it, "scatter" adds row i to row ``rows[i]`` of C.
    """
    V, MR, NV = tile.lanes, tile.row_block, tile.vectors(width)

    @T.inline
    def multiply(C, rows, A, B, blocks, depth, panels):
        for m in T.serial(blocks):
            for n in T.serial(panels):
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
    """dst[0:length] = src[0:length] * factor in float32, padded with zeros to whole vectors."""
    V, whole, tail = tile.lanes, length // tile.lanes, length % tile.lanes

    @T.inline
    def copy(dst, d0, src, s0, factor):
        for i in T.serial(whole):
            for v in T.vectorized(V):
                dst[d0 + i * V + v] = widen(src[s0 + i * V + v]) * factor
        if tail > 0:
            for i in T.serial(tail):
                dst[d0 + whole * V + i] = widen(src[s0 + whole * V + i]) * factor
            for i in T.serial(V - tail):
                dst[d0 + whole * V + tail + i] = T.float32(0)

    return copy


def store_row(tile, length) -> Any:
    """dst[0:length] = src[0:length], from float32 to what dst stores."""
    V, whole, tail = tile.lanes, length // tile.lanes, length % tile.lanes

    @T.inline
    def store(dst, d0, src, s0):
        for i in T.serial(whole):
            for v in T.vectorized(V):
                dst[d0 + i * V + v] = narrow(src[s0 + i * V + v], dst.dtype)
        for i in T.serial(tail):
            dst[d0 + whole * V + i] = narrow(src[s0 + whole * V + i], dst.dtype)

    return store


def add_row(tile, length) -> Any:
    """dst[0:length] += src[0:length] * factor, in float32."""
    V, whole, tail = tile.lanes, length // tile.lanes, length % tile.lanes

    @T.inline
    def add(dst, d0, src, s0, factor):
        for i in T.serial(whole):
            for v in T.vectorized(V):
                dst[d0 + i * V + v] = dst[d0 + i * V + v] + widen(src[s0 + i * V + v]) * factor
        for i in T.serial(tail):
            dst[d0 + whole * V + i] = dst[d0 + whole * V + i] + widen(src[s0 + whole * V + i]) * factor

    return add


def _interleave(lanes, rounds) -> Any:
    """Transposes a square of ``lanes`` vectors: each round zips the upper half with the lower one, a shuffle of two
    registers for each vector. Rounds go from ``a`` to ``b`` and back."""
    half = lanes // 2
    low = [place for i in range(half) for place in (i, lanes + i)]
    high = [half + place for place in low]
    rest = _interleave(lanes, rounds - 1) if rounds > 1 else None

    def zipped(x, y, places) -> Any:
        return tirx.Shuffle([x, y], [tirx.const(place, "int32") for place in places])

    @T.inline
    def mix(a, b):
        for i in T.unroll(half):
            b[T.Ramp(2 * i * lanes, 1, lanes)] = zipped(
                a[T.Ramp(i * lanes, 1, lanes)], a[T.Ramp((i + half) * lanes, 1, lanes)], low
            )
            b[T.Ramp((2 * i + 1) * lanes, 1, lanes)] = zipped(
                a[T.Ramp(i * lanes, 1, lanes)], a[T.Ramp((i + half) * lanes, 1, lanes)], high
            )
        if rounds > 1:
            rest(b, a)

    return mix


def transposed_sums(tile) -> Any:
    """total[lane] = the sum of vector ``lane`` of a square of vectors, which it overwrites."""
    V = tile.lanes
    rounds = V.bit_length() - 1
    interleave = _interleave(V, rounds)

    @T.inline
    def add(total, square):
        odd = T.alloc_buffer((V * V,), "float32", scope="local")
        interleave(square, odd)
        for v in T.vectorized(V):
            total[v] = T.float32(0)
        for i in T.unroll(V):
            for v in T.vectorized(V):
                total[v] = total[v] + (odd[i * V + v] if rounds % 2 == 1 else square[i * V + v])

    return add


def transpose(tile, depth, width) -> Any:
    """dst[depth, width] = src[rows, depth]ᵀ in float32, zeros in the columns past ``rows``; src's rows lie ``stride``
    apart. Whole squares of ``lanes`` go through registers: element by element this took longer than the product of 16
    rows with the result."""
    V = tile.lanes
    rounds = V.bit_length() - 1
    interleave = _interleave(V, rounds)

    @T.inline
    def square(dst, d0, src, s0, stride):
        even = T.alloc_buffer((V * V,), "float32", scope="local")
        odd = T.alloc_buffer((V * V,), "float32", scope="local")
        for i in T.unroll(V):
            for v in T.vectorized(V):
                even[i * V + v] = widen(src[s0 + i * stride + v])
        interleave(even, odd)
        for i in T.unroll(V):
            for v in T.vectorized(V):
                dst[d0 + i * width + v] = odd[i * V + v] if rounds % 2 == 1 else even[i * V + v]

    @T.inline
    def pack(dst, src, s0, stride, rows):
        for i in T.serial(rows // V):
            for d in T.serial(depth // V):
                square(dst, d * V * width + i * V, src, s0 + i * V * stride + d * V, stride)
            for d in T.serial(depth % V):
                for v in T.serial(V):
                    dst[(depth // V * V + d) * width + i * V + v] = widen(
                        src[s0 + (i * V + v) * stride + depth // V * V + d]
                    )
        for i in T.serial(rows % V):
            for d in T.serial(depth):
                dst[d * width + rows // V * V + i] = widen(src[s0 + (rows // V * V + i) * stride + d])
        for d in T.serial(depth):
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
