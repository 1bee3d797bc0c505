import dataclasses
from typing import Any

import numpy as np
import pytest

from hsa_compile.ir import (
    ChunkAttention,
    ChunkSelect,
    ProblemError,
    SlidingWindow,
    any_problem_from_dict,
    problem_from_dict,
    reference,
)
from kit import attention_inputs, select_inputs

ATTENTION = ChunkAttention(q_heads=4, kv_heads=2, head_dim=6, chunk_size=5, top_k=3)
SELECT = ChunkSelect(kv_heads=2, retrieval_heads=2, retrieval_dim=6, chunk_size=4, top_k=3)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (ATTENTION, {"top_k": 0}, "top_k must be a positive integer, got 0"),
        (ATTENTION, {"chunk_size": 0}, "chunk_size must be a positive integer"),
        (ATTENTION, {"q_heads": 5}, "q_heads \\(5\\) must be a multiple of kv_heads \\(2\\)"),
        (ATTENTION, {"dtype": "int8"}, "dtype must be one of float32"),
        (ATTENTION, {"head_dim": 2.5}, "head_dim must be a positive integer, got 2.5"),
        (SELECT, {"top_k": True}, "top_k must be a positive integer, got True"),
        (SELECT, {"retrieval_heads": 3}, "retrieval_heads must be 1 or kv_heads"),
        (SELECT, {"window": 3}, "window must be 0 or at least chunk_size"),
    ],
)
def test_what_no_kernel_can_serve_is_refused(base: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        dataclasses.replace(base, **change)


@pytest.mark.parametrize("problem", [ATTENTION, SELECT])
def test_problems_round_trip_through_plain_data(problem: Any) -> None:
    assert problem_from_dict(problem.to_dict()) == problem
    assert problem.digest == problem_from_dict(problem.to_dict()).digest
    assert problem.digest != dataclasses.replace(problem, top_k=4).digest
    with pytest.raises(ProblemError, match="unknown operator"):
        problem_from_dict({"op": "softmax"})
    with pytest.raises(ProblemError, match="colour"):
        problem_from_dict({**problem.to_dict(), "colour": 1})


def test_counts() -> None:
    problem = ChunkAttention(16, 1, 64, 64, 8)
    assert problem.flops(8, 4096) == 4 * 8 * 4096 * 8 * 64 * 16 * 64
    assert problem.backward_flops(8, 4096) * 2 == problem.flops(8, 4096) * 5
    assert ChunkSelect(1, 1, 64, 64, 8).flops(1, 4096, 64) == 2 * 4096 * 64 * 64
    assert ChunkAttention(1, 1, 1, 1, 1).bytes(1, 1, 1) == 4 * 4 + 8
    assert ChunkSelect(1, 1, 1, 1, 1).bytes(1, 1, 1) == 2 * 4 + 8


def test_a_chunk_is_visible_once_it_lies_wholly_in_the_past() -> None:
    assert [reference.visible_chunks(SELECT, t, 9) for t in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert reference.visible_chunks(SELECT, 1000, 9) == 9
    windowed = dataclasses.replace(SELECT, window=8)  # (i+1)*4 <= t - 8 + 4
    assert [reference.visible_chunks(windowed, t, 9) for t in (0, 7, 8, 11, 12)] == [0, 0, 1, 1, 2]


def test_selection_is_newest_first_and_ties_go_to_the_newer() -> None:
    problem = ChunkSelect(1, 1, 1, 1, 3)
    landmark = np.array([2.0, 1.0, 2.0, 2.0, 2.0]).reshape(1, 5, 1, 1)
    indices, scores = reference.select(problem, np.ones((1, 6, 1, 1)), landmark, np.array([0]), np.array([5]))
    assert indices[0, :, 0].tolist() == [
        [-1, -1, -1],
        [0, -1, -1],
        [1, 0, -1],
        [2, 1, 0],
        [3, 2, 0],
        [4, 3, 2],
    ]
    assert scores[0, 2, 0].tolist() == [1.0, 2.0, 0.0]


def _numerical(f: Any, x: np.ndarray, seed: np.ndarray) -> np.ndarray:
    gradient, step = np.zeros_like(x), 1e-6
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = ((f(up) - f(down)) * seed).sum() / (2 * step)
    return gradient


@pytest.mark.parametrize("off_by_one", [False, True])
def test_reference_attention_gradients_are_those_of_its_forward(off_by_one: bool) -> None:
    problem = ChunkAttention(2, 1, 3, 2, 2, off_by_one)
    q, k, v, indices, weights = (x.numpy() for x in attention_inputs(problem, 1, 3, 3))
    q, k, v, weights = (np.nan_to_num(x).astype(np.float64) for x in (q, k, v, weights))
    grad = np.random.default_rng(0).normal(size=q.shape)
    got = reference.attention_backward(problem, grad, q, k, v, indices, weights)
    args = [q, k, v, weights]
    for place, gradient in enumerate(got):

        def at(x: np.ndarray, place: int = place) -> np.ndarray:
            q, k, v, w = [x if i == place else a for i, a in enumerate(args)]
            return reference.attention(problem, q, k, v, indices, w)

        np.testing.assert_allclose(gradient, _numerical(at, args[place], grad), atol=1e-7)


def test_reference_selection_gradients_are_those_of_its_scores() -> None:
    problem = ChunkSelect(2, 1, 3, 2, 2)
    q_r, landmark, position, chunks = (np.nan_to_num(x.numpy()) for x in select_inputs(problem, 2, 3, 4))
    q_r, landmark = q_r.astype(np.float64), landmark.astype(np.float64)
    indices, scores = reference.select(problem, q_r, landmark, position, chunks)
    grad = np.random.default_rng(0).normal(size=scores.shape)
    d_q, d_landmark = reference.select_backward(problem, grad, q_r, landmark, indices)
    at_q = _numerical(lambda x: reference.select(problem, x, landmark, position, chunks)[1], q_r, grad)
    at_landmark = _numerical(lambda x: reference.select(problem, q_r, x, position, chunks)[1], landmark, grad)
    np.testing.assert_allclose(d_q, at_q, atol=1e-7)
    np.testing.assert_allclose(d_landmark, at_landmark, atol=1e-7)


def test_off_by_one_softmax_survives_extreme_logits() -> None:
    problem = ChunkAttention(1, 1, 1, 2, 1, off_by_one=True)
    for logit in (-1e4, 1e4):
        p = reference.chunk_softmax(problem, np.array([[1.0]]), np.array([[logit], [logit]]))
        np.testing.assert_allclose(p, 0.0 if logit < 0 else 0.5)


def test_sliding_windows_round_trip_but_are_not_tuned() -> None:
    problem = SlidingWindow(6, 2, 20, 64, "float16")
    assert any_problem_from_dict(problem.to_dict()) == problem
    assert any_problem_from_dict(ATTENTION.to_dict()) == ATTENTION
    with pytest.raises(ProblemError, match="unknown operator 'sliding_window'"):
        problem_from_dict(problem.to_dict())
    with pytest.raises(ProblemError, match="multiple of kv_heads"):
        SlidingWindow(5, 2, 20, 64)


def test_a_factor_of_the_logits_names_another_problem() -> None:
    scaled = dataclasses.replace(ATTENTION, logit_scale=0.25)
    assert scaled.scale == 0.25
    assert any_problem_from_dict(scaled.to_dict()) == scaled
    assert "logit_scale" not in ATTENTION.to_dict()
    with pytest.raises(ProblemError, match="logit_scale must be positive"):
        dataclasses.replace(ATTENTION, logit_scale=0.0)


def test_a_window_in_segments_equals_one_masked_attention() -> None:
    """Any split of a text into segments gives what a mask over all of its keys does."""
    problem, rng, L = SlidingWindow(4, 2, 3, 5), np.random.default_rng(0), 23
    q, k, v = (rng.standard_normal((1, L, h, 3)) for h in (4, 2, 2))
    i = np.arange(L)
    hidden = (i[:, None] < i) | (i[:, None] - i >= 5)
    s = np.einsum("ihd,jhd->hij", q[0], k[0].repeat(2, 1)) * problem.scale
    p = np.exp(np.where(hidden, -np.inf, s))
    want = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v[0].repeat(2, 1))
    ring_k, ring_v = np.full((2, 1, 5, 2, 3), np.nan)
    start, got = 0, []
    for length in (1, 4, 0, 11, 1, 6):
        # Tokens past the row's length count for nothing.
        x = (
            np.pad(t[:, start : start + length], ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=9) for t in (q, k, v)
        )
        counts = np.array([start]), np.array([length])
        o, ring_k, ring_v = reference.sliding_window(problem, *x, ring_k, ring_v, *counts)
        got.append(o[0, :length])
        start += length
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-12)
    np.testing.assert_array_equal(ring_k[0, [j % 5 for j in range(L - 5, L)]], k[0, -5:])
