"""The CPU kernel of the sliding window against the reference: all lengths, any position, in place or not."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hsa_compile.ir import SlidingWindow, reference
from hsa_compile.schedules import build
from hsa_compile.schedules.workload import loaded, stored

pytestmark = pytest.mark.needs_compiler

PROBLEMS = {
    "typical": SlidingWindow(4, 2, 16, 8),
    "G=1, odd width": SlidingWindow(1, 1, 5, 3),
    "G=3": SlidingWindow(3, 1, 20, 70),
    "wide": SlidingWindow(2, 1, 64, 96),
    "float16": SlidingWindow(8, 1, 32, 40, "float16"),
    "bfloat16": SlidingWindow(6, 2, 20, 10, "bfloat16"),
}
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
FAR = 2**25 + 1, 2**33


class Call:
    """Random inputs of a call, with NaN where nothing may look, and what comes of them."""

    def __init__(self, problem: SlidingWindow, L: int, position: tuple[int, int], lengths: tuple[int, int]) -> None:
        rng, self.problem, self.L = np.random.default_rng(L), problem, L
        W, q, kv = problem.window, problem.q_heads, problem.kv_heads
        shapes = (2, L, q), (2, L, kv), (2, L, kv), (2, W, kv), (2, W, kv)
        wide = [rng.standard_normal((*shape, problem.head_dim), np.float32) for shape in shapes]
        for b in range(2):
            for ring in wide[3:]:
                ring[b, position[b] :] = np.nan
        self.inputs = [stored(x, problem.dtype) for x in wide]
        self.counts = np.array(position), np.array(lengths)
        self.lengths = lengths

    def run(self, in_place: bool) -> tuple[NDArray, NDArray, NDArray]:
        artifact = build(self.problem)
        library = ctypes.CDLL(str(artifact.library))
        kernel = ctypes.addressof(ctypes.c_char.in_dll(library, artifact.symbol))
        past = [x.copy() for x in self.inputs[3:]]
        present = past if in_place else [np.full_like(x, 7) for x in past]
        o = np.full_like(self.inputs[0], 0x7FC0 if self.problem.dtype == "bfloat16" else np.nan)
        tensors = [*self.inputs[:3], *past, *self.counts, o, *present]
        W, L = self.problem.window, self.L
        dims = (ctypes.c_int64 * 3)(2, L, min(L, W) if in_place else W)
        pointers = (ctypes.c_void_p * len(tensors))(*(x.ctypes.data for x in tensors))
        serial = ctypes.cast(library.hsa_parallel_serial, ctypes.c_void_p)
        library.hsa_execute.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int32] + [ctypes.c_void_p] * 2
        assert library.hsa_execute(kernel, pointers, dims, 1, serial, None) == 0
        return o, present[0], present[1]

    def check(self, in_place: bool) -> None:
        dtype = self.problem.dtype
        want = reference.sliding_window(self.problem, *(loaded(x, dtype) for x in self.inputs), *self.counts)
        got: Any = [loaded(x, dtype) for x in self.run(in_place)]
        assert np.isfinite(got[0]).all()
        for b, length in enumerate(self.lengths):
            np.testing.assert_allclose(got[0][b, :length], want[0][b, :length], atol=TOLERANCE[dtype], rtol=0)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", PROBLEMS)
def test_windows_match_the_reference(case: str, in_place: bool) -> None:
    problem = PROBLEMS[case]
    W = problem.window
    for L, position in itertools.product((0, 1, W - 1, W, W + 1, 3 * W + 5), ((0, 1), (W // 2, 7 * W + 3), FAR)):
        Call(problem, L, position, (L, L // 2)).check(in_place)
