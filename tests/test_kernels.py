"""Compiled kernels and the eager path against the reference, on random valid inputs."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsa_compile import dispatch, eager, ops
from hsa_compile.ir import ChunkAttention, ChunkSelect, reference
from hsa_compile.schedules import resolve
from hsa_compile.schedules.cpu import tile_for
from kit import assert_as_good_as, attention_inputs, select_inputs, wide

BACKENDS = ["eager", pytest.param("compiled", marks=pytest.mark.needs_compiler)]

# (problem, B, L, C, skew)
ATTENTION = {
    "typical": (ChunkAttention(8, 2, 64, 64, 4), 1, 150, 5, 1.0),
    "G=1, odd widths, K above the chunks": (ChunkAttention(1, 1, 7, 5, 9), 2, 23, 3, 1.0),
    "off by one, L and S no multiples": (ChunkAttention(6, 2, 40, 24, 3, off_by_one=True), 2, 101, 7, 1.0),
    "G=12, D=96, one popular chunk": (ChunkAttention(12, 1, 96, 16, 2), 1, 90, 30, 8.0),
    "G above the rows gathered at a time": (ChunkAttention(80, 1, 16, 16, 2), 1, 21, 4, 1.0),
    "one token a chunk": (ChunkAttention(4, 4, 16, 1, 3), 2, 33, 40, 1.0),
}
SELECT = {
    "typical": (ChunkSelect(2, 2, 64, 16, 4), 2, 300, 150),
    "one head for all, window": (ChunkSelect(3, 1, 24, 8, 5, window=16), 2, 140, 40),
    "K above the chunks, odd width": (ChunkSelect(1, 1, 7, 4, 70), 2, 60, 20),
    "K=1": (ChunkSelect(2, 2, 16, 1, 1), 1, 40, 100),
}


def _by_dtype(table: dict[str, Any]) -> list[tuple[str, str]]:
    """Every case in float32; in half precisions, which differ from it by loads and stores alone, the first, with widths
    of whole vectors and of parts."""
    counts = {"float32": len(table), "bfloat16": 3, "float16": 2}
    return [(case, dtype) for dtype, count in counts.items() for case in list(table)[:count]]


def _attention_reference(problem: ChunkAttention, grad: Any, inputs: Any) -> tuple[Any, Any]:
    arrays = [wide(x) for x in inputs]
    return reference.attention(problem, *arrays), reference.attention_backward(problem, wide(grad), *arrays)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "dtype"), _by_dtype(ATTENTION))
def test_attention_matches_the_reference(backend: Any, dtype: str, case: str, poisoned: None) -> None:
    problem, B, L, C, skew = ATTENTION[case]
    *tensors, indices, weights = attention_inputs(problem, B, L, C, skew=skew)
    inputs = (*(x.to(getattr(torch, dtype)) for x in tensors), indices, weights)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    want, want_grads = _attention_reference(problem, grad, inputs)
    options = (problem.chunk_size, problem.off_by_one)
    low, low_grads = eager.attention(*inputs, *options), eager.attention_backward(grad, *inputs, *options)
    with dispatch.use_backend(backend):
        got = ops.chunk_attention(*inputs, *options)
        grads = ops.chunk_attention_backward(grad, *inputs, *options)
        again = ops.chunk_attention_backward(grad, *inputs, *options)
    assert_as_good_as(got, low, want)
    for mine, theirs, truth, like in zip(grads, low_grads, want_grads, (*inputs[:3], weights)):
        assert mine.dtype == like.dtype
        assert_as_good_as(mine, theirs, truth)
    if backend == "compiled":
        assert all(torch.equal(a, b) for a, b in zip(grads, again)), "gradients differ when repeated"


def _assert_same_selection(got: np.ndarray, want: np.ndarray, scores: np.ndarray) -> None:
    """Equal, but for chunks whose scores differ by rounding."""
    for row in np.argwhere((got != want).any(-1)):
        mine, theirs = set(got[tuple(row)]), set(want[tuple(row)])
        b, t, h = row
        swapped = [scores[b, t, h, c] for c in mine ^ theirs]
        assert len(mine) == len(theirs)
        assert np.ptp(swapped) <= 1e-5 * np.abs(swapped).max()


def _all_scores(problem: ChunkSelect, q_r: Any, landmark: Any) -> np.ndarray:
    scores = np.einsum("blhd,bchd->blhc", wide(q_r), wide(landmark.nan_to_num()))
    return np.broadcast_to(scores, (*scores.shape[:2], problem.kv_heads, scores.shape[3])) * problem.scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("case", "dtype"), _by_dtype(SELECT))
def test_selection_matches_the_reference(backend: Any, dtype: str, case: str, ties: bool, poisoned: None) -> None:
    problem, B, L, C = SELECT[case]
    q_r, landmark, *counts = select_inputs(problem, B, L, C, ties=ties)
    inputs = (q_r.to(getattr(torch, dtype)), landmark.to(getattr(torch, dtype)), *counts)
    want, want_scores = reference.select(problem, *(wide(x) for x in inputs))
    options = (problem.kv_heads, problem.chunk_size, problem.top_k, problem.window)
    with dispatch.use_backend(backend):
        indices, scores = ops.chunk_select(*inputs, *options)
    if ties:
        np.testing.assert_array_equal(indices.numpy(), want)
    _assert_same_selection(indices.numpy(), want, _all_scores(problem, *inputs[:2]))
    same = indices.numpy() == want
    np.testing.assert_allclose(scores.numpy()[same], want_scores[same], atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "dtype"), _by_dtype(SELECT))
def test_selection_gradients_match_the_reference(backend: Any, dtype: str, case: str, poisoned: None) -> None:
    problem, B, L, C = SELECT[case]
    q_r, landmark, position, chunks = select_inputs(problem, B, L, C)
    q_r, landmark = q_r.to(getattr(torch, dtype)), landmark.to(getattr(torch, dtype))
    indices, scores = reference.select(problem, *(wide(x) for x in (q_r, landmark, position, chunks)))
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    arguments = (grad, q_r, landmark.nan_to_num(), torch.from_numpy(indices))
    want = reference.select_backward(problem, *(wide(x) for x in arguments))
    low = eager.select_backward(*arguments)
    with dispatch.use_backend(backend):
        got = ops.chunk_select_backward(*arguments, problem.chunk_size)
    for mine, theirs, truth in zip(got, low, want):
        assert mine.dtype == q_r.dtype
        assert_as_good_as(mine, theirs, truth)


@pytest.mark.needs_compiler
@pytest.mark.parametrize(("case", "dtype"), _by_dtype(ATTENTION))
def test_a_few_tokens_attend_like_many(case: str, dtype: str, poisoned: None) -> None:
    problem, B, _, C, skew = ATTENTION[case]
    few = tile_for(problem, resolve("cpu:native")).few
    for L in (1, few - 1, few):
        *tensors, indices, weights = attention_inputs(problem, B, L, C, skew=skew)
        inputs = (*(x.to(getattr(torch, dtype)) for x in tensors), indices, weights)
        options = (problem.chunk_size, problem.off_by_one)
        with dispatch.use_backend("compiled"):
            got = ops.chunk_attention(*inputs, *options)
        want = reference.attention(problem, *(wide(x) for x in inputs))
        assert_as_good_as(got, eager.attention(*inputs, *options), want)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("case", "dtype"), _by_dtype(SELECT))
def test_a_few_tokens_select_like_many(case: str, dtype: str, ties: bool, poisoned: None) -> None:
    problem, B, _, C = SELECT[case]
    options = (problem.kv_heads, problem.chunk_size, problem.top_k, problem.window)
    few = tile_for(problem, resolve("cpu:native")).few
    for L in (1, few - 1, few, few + 1):
        for seed in range(4):
            q_r, landmark, *counts = select_inputs(problem, B, L, C, seed, ties)
            inputs = (q_r.to(getattr(torch, dtype)), landmark.to(getattr(torch, dtype)), *counts)
            want, want_scores = reference.select(problem, *(wide(x) for x in inputs))
            with dispatch.use_backend("compiled"):
                indices, scores = ops.chunk_select(*inputs, *options)
            if ties:
                np.testing.assert_array_equal(indices.numpy(), want)
            _assert_same_selection(indices.numpy(), want, _all_scores(problem, *inputs[:2]))
            same = indices.numpy() == want
            np.testing.assert_allclose(scores.numpy()[same], want_scores[same], atol=5e-6)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "few values"])
def test_selection_takes_scores_in_any_order(order: str) -> None:
    problem, place = ChunkSelect(1, 1, 1, 1, 6), torch.arange(500.0)
    rank = {"rising": place, "falling": -place, "equal": torch.ones(500), "few values": place * 17 % 31 % 5}[order]
    for L in (1, 40):
        inputs = (torch.ones(1, L, 1, 1), rank.view(1, 500, 1, 1), torch.tensor([500 - L]), torch.tensor([500]))
        want, want_scores = reference.select(problem, *(x.numpy() for x in inputs))
        with dispatch.use_backend("compiled"):
            got, scores = ops.chunk_select(*inputs, 1, 1, 6)
        np.testing.assert_array_equal(got.numpy(), want)
        np.testing.assert_array_equal(scores.numpy(), want_scores)


@pytest.mark.needs_compiler
def test_stored_values_are_rounded_to_nearest_even() -> None:
    wanted = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 1.0078, 3e38, -1e-40, 0.0, 65519.0])
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        # A chunk of one token gives its value times the weight: what is rounded is a product exact in float32.
        v = wanted.to(dtype).view(1, 1, 1, 8)
        weights = torch.full((1, 1, 1, 1), 1 + 2.0**-8)
        with dispatch.use_backend("compiled"):
            got = ops.chunk_attention(torch.zeros_like(v), torch.zeros_like(v), v, indices, weights, 1)
        torch.testing.assert_close(got, (v.float() * weights[0, 0, 0, 0]).to(dtype), rtol=0, atol=0)


@pytest.mark.needs_compiler
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(B=st.integers(1, 3), L=st.integers(1, 200), C=st.integers(1, 12), skew=st.floats(1, 9), seed=st.integers(0, 99))
def test_one_build_serves_all_lengths(B: int, L: int, C: int, skew: float, seed: int) -> None:
    problem = ATTENTION["off by one, L and S no multiples"][0]
    inputs = attention_inputs(problem, B, L, C, seed, skew)
    options = (problem.chunk_size, problem.off_by_one)
    with dispatch.use_backend("compiled"):
        got = ops.chunk_attention(*inputs, *options)
    low = eager.attention(*inputs, *options)
    exact = eager.attention(*(x.double() if x.is_floating_point() else x for x in inputs), *options)
    assert_as_good_as(got, low, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_chunks(backend: Any) -> None:
    problem = ATTENTION["typical"][0]
    select = SELECT["typical"][0]
    options = (select.kv_heads, select.chunk_size, select.top_k)
    with dispatch.use_backend(backend):
        for L, C in ((0, 3), (4, 0), (0, 0)):
            inputs = attention_inputs(problem, 2, L, C)
            inputs[3].fill_(-1)
            assert torch.equal(ops.chunk_attention(*inputs, 64), torch.zeros(inputs[0].shape))
            q_r = torch.randn(2, L, 2, 64)
            none = torch.zeros(2, dtype=torch.int64)
            indices, scores = ops.chunk_select(q_r, torch.randn(2, C, 2, 64), none + 10**9, none, *options)
            assert torch.all(indices == -1)
            assert torch.all(scores == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_arguments(backend: Any) -> None:
    problem = ATTENTION["typical"][0]
    q, k, v, indices, weights = attention_inputs(problem, 2, 70, 5)
    strided = (q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([k, v], -1)[..., :64], v, indices, weights)
    unaligned = torch.randn(q.numel() + 1)[1:].view(q.shape)
    with dispatch.use_backend(backend):
        assert torch.equal(ops.chunk_attention(*strided, 64), ops.chunk_attention(q, k, v, indices, weights, 64))
        got = ops.chunk_attention(unaligned, k, v, indices, weights, 64)
        torch.testing.assert_close(got, ops.chunk_attention(unaligned.clone(), k, v, indices, weights, 64))


@pytest.mark.needs_compiler
def test_positions_far_beyond_32_bits() -> None:
    problem = SELECT["typical"][0]
    q_r, landmark, position, chunks = select_inputs(problem, 2, 50, 150)
    options = (problem.kv_heads, problem.chunk_size, problem.top_k)
    with dispatch.use_backend("compiled"):
        far = ops.chunk_select(q_r, landmark, position + 2**40, chunks, *options)
        end = ops.chunk_select(q_r, landmark, torch.full_like(position, 10**6), chunks, *options)
    assert torch.equal(far[0], end[0])


@pytest.mark.needs_compiler
def test_memory_offsets_past_2_to_the_31() -> None:
    problem = dataclasses.replace(ATTENTION["typical"][0], q_heads=4, kv_heads=1)
    C = 2**31 // (64 * 64) + 3
    small = attention_inputs(problem, 1, 5, 4)
    # 8 GiB each, of which only the pages that are written or selected ever exist.
    k, v = torch.empty(1, C * 64, 1, 64), torch.empty(1, C * 64, 1, 64)
    k[:, -4 * 64 :], v[:, -4 * 64 :] = small[1], small[2]
    indices = torch.where(small[3] >= 0, small[3] + (C - 4), -1)
    with dispatch.use_backend("compiled"):
        got = ops.chunk_attention(small[0], k, v, indices, small[4], 64)
        assert torch.equal(got, ops.chunk_attention(*small, 64))


@pytest.mark.needs_compiler
def test_extreme_logits_stay_finite() -> None:
    problem = ATTENTION["off by one, L and S no multiples"][0]
    for factor in (1e3, -1e3):
        q, k, v, indices, weights = attention_inputs(problem, 1, 30, 4)
        inputs = (q.abs() * factor, k.abs(), v, indices, weights)
        with dispatch.use_backend("compiled"):
            got = ops.chunk_attention(*inputs, 24, True)
        exact = eager.attention(*(x.double() if x.is_floating_point() else x for x in inputs), 24, True)
        assert_as_good_as(got, eager.attention(*inputs, 24, True), exact)
