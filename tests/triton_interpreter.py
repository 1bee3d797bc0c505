"""Numbers of the Triton programs, on CPU tensors through Triton's interpreter.

Not collected with the other tests: TRITON_INTERPRET must be set before Triton is imported, so ``test_triton.py`` runs
this file in a process of its own. Half precision is float16 here, for the interpreter can't multiply bfloat16.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsa_compile import dispatch, eager, ops, triton_kernels
from hsa_compile.ir import ChunkAttention, ChunkSelect, reference
from hsa_compile.schedules import triton as schedule
from kit import assert_as_good_as, attention_inputs, select_inputs

HALF = 5e-3  # float16 rounds the softmax before it is multiplied, which the eager path does not

ATTENTION = [  # problem, (B, L, C), skew
    (ChunkAttention(16, 1, 16, 16, 4), (1, 18, 6), 1.0),
    (ChunkAttention(4, 2, 8, 4, 3, off_by_one=True), (2, 13, 5), 1.0),
    (ChunkAttention(6, 2, 20, 5, 3, off_by_one=True), (2, 9, 5), 3.0),
    (ChunkAttention(2, 2, 96, 3, 4), (1, 18, 4), 1.0),
    (ChunkAttention(8, 1, 80, 1, 2), (1, 11, 30), 1.0),
    (ChunkAttention(12, 1, 16, 70, 3), (1, 7, 3), 1.0),
    (ChunkAttention(24, 1, 16, 16, 2), (1, 5, 3), 1.0),
    (ChunkAttention(1, 1, 16, 4, 7), (1, 60, 1), 1.0),  # over 256 pairs on one chunk
    (ChunkAttention(16, 1, 16, 8, 33, off_by_one=True), (1, 5, 12), 1.0),
]
SELECT = [  # problem, (B, L, C)
    (ChunkSelect(2, 2, 6, 4, 3), (2, 13, 5)),
    (ChunkSelect(2, 1, 16, 4, 4, 8), (1, 70, 60)),
    (ChunkSelect(2, 2, 20, 4, 5), (1, 100, 40)),
    (ChunkSelect(1, 1, 150, 4, 20), (1, 17, 40)),
    (ChunkSelect(3, 3, 16, 4, 1), (1, 1, 130)),
    (ChunkSelect(1, 1, 16, 4, 9), (2, 5, 3)),
]


@pytest.fixture(autouse=True)
def _triton(poisoned: None) -> Any:
    assert triton_kernels.interpreted()
    with dispatch.use_backend("triton"):
        yield


def _numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [x.float().numpy() for x in tensors]


def _check_attention(problem: ChunkAttention, inputs: tuple[Tensor, ...], floor: float) -> None:
    q, k, v, indices, weights = inputs
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    chosen = (indices.numpy(), weights.numpy())
    tail = (indices, weights, problem.chunk_size, problem.off_by_one)
    o = triton_kernels.attention(q, k, v, *tail)
    assert o.dtype == q.dtype
    low = eager.attention(q, k, v, *tail)
    assert_as_good_as(o, low, reference.attention(problem, *_numpy(q, k, v), *chosen), floor)
    got = triton_kernels.attention_backward(grad, q, k, v, *tail)
    lows = eager.attention_backward(grad, q, k, v, *tail)
    want = reference.attention_backward(problem, *_numpy(grad, q, k, v), *chosen)
    for mine, plain, exact in zip(got, lows, want):
        assert_as_good_as(mine, plain, exact, floor)


@pytest.mark.parametrize(("problem", "shape", "skew"), ATTENTION)
def test_attention(problem: ChunkAttention, shape: tuple[int, int, int], skew: float) -> None:
    inputs = attention_inputs(problem, *shape, skew=skew)
    inputs[3][:, 2] = -1  # a token without any chunk
    inputs[4][:, 2] = torch.nan
    _check_attention(problem, inputs, 2e-6)


def test_attention_in_half_precision() -> None:
    problem = ATTENTION[1][0]
    q, k, v, *rest = attention_inputs(problem, 2, 13, 5)
    _check_attention(problem, (q.half(), k.half(), v.half(), *rest), HALF)


def test_popular_chunks_are_cut_in_items() -> None:
    indices = torch.tensor([[0] * 700 + [2] * 3 + [-1] * 2 + [9]], dtype=torch.int32).view(1, -1, 1, 1)
    items = triton_kernels.work_items(indices, 4, schedule.ITEM_PAIRS)
    cut = -(-700 // schedule.ITEM_PAIRS)
    assert items.start.tolist() == [0, 700, 700, 703, 703]
    assert items.first.tolist() == [0, cut, cut, cut + 1, cut + 1]
    assert items.owner.tolist()[: cut + 2] == [0] * cut + [2, 4]
    assert items.pairs[:703].tolist() == list(range(703))


def test_nan_reaches_only_the_tokens_that_selected_it() -> None:
    problem = ChunkAttention(4, 2, 8, 4, 3)
    q, k, v, indices, weights = attention_inputs(problem, 1, 24, 5)
    q[:, 3] = torch.nan
    k[:, 8:12] = torch.inf
    v[:, 8:12] = torch.nan
    o = triton_kernels.attention(q, k, v, indices, weights, 4, False)
    with np.errstate(invalid="ignore"):
        want = reference.attention(problem, *_numpy(q, k, v), indices.numpy(), weights.numpy())
    assert np.array_equal(np.isnan(o.numpy()), np.isnan(want))
    got = triton_kernels.attention_backward(torch.ones_like(o), q, k, v, indices, weights, 4, False)
    with np.errstate(invalid="ignore"):
        inputs = _numpy(torch.ones_like(o), q, k, v)
        exact = reference.attention_backward(problem, *inputs, indices.numpy(), weights.numpy())
    for mine, theirs in zip(got, exact):
        assert np.array_equal(np.isnan(mine.numpy()), np.isnan(theirs))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("problem", "shape"), SELECT)
def test_select(problem: ChunkSelect, shape: tuple[int, int, int], ties: bool) -> None:
    inputs = select_inputs(problem, *shape, ties=ties)
    options = (problem.kv_heads, problem.chunk_size, problem.top_k, problem.visible_lag)
    indices, scores = triton_kernels.select(*inputs, *options)
    want, exact = reference.select(problem, *(x.numpy() for x in inputs))
    assert np.array_equal(indices.numpy(), want)
    low = eager.select(*inputs, *options)[1]
    assert_as_good_as(scores, low, exact)


@pytest.mark.parametrize(("problem", "shape"), SELECT)
def test_select_backward(problem: ChunkSelect, shape: tuple[int, int, int]) -> None:
    q_r, landmark, position, chunks = (x.nan_to_num() for x in select_inputs(problem, *shape))
    indices, scores = eager.select(
        q_r, landmark, position, chunks, problem.kv_heads, problem.chunk_size, problem.top_k, problem.visible_lag
    )
    grad = torch.randn(scores.shape)
    got = triton_kernels.select_backward(grad, q_r, landmark, indices)
    low = eager.select_backward(grad, q_r, landmark, indices)
    want = reference.select_backward(problem, *_numpy(grad, q_r, landmark), indices.numpy())
    for mine, plain, exact in zip(got, low, want):
        assert_as_good_as(mine, plain, exact)


def test_selection_is_split_over_the_landmarks_only_for_few_rows() -> None:
    problem = ChunkSelect(3, 3, 16, 4, 1)
    few, many = (schedule.select_tile(problem, L) for L in (1, 4096))
    assert schedule.select_splits(problem, few, 1, 1, 1 << 19, 132) == 88
    assert schedule.select_splits(problem, few, 1, 1, 130, 8) > 1  # as in the case above
    assert schedule.select_splits(problem, many, 1, 4096, 64, 132) == 1
    many_slots = ChunkSelect(1, 1, 16, 4, 64)
    assert schedule.select_splits(many_slots, few, 1, 1, 1 << 19, 1000) * 64 <= schedule.MERGE_CANDIDATES


@pytest.mark.parametrize("shape", [(2, 5, 0), (1, 0, 3), (0, 4, 3)])
def test_nothing_to_select_from(shape: tuple[int, int, int]) -> None:
    B, L, C = shape
    q, k = torch.randn(B, L, 2, 8, requires_grad=True), torch.randn(B, C * 4, 1, 8, requires_grad=True)
    q_r, landmark = torch.randn(B, L, 1, 8, requires_grad=True), torch.randn(B, C, 1, 8, requires_grad=True)
    position, chunks = torch.full((B,), 100), torch.full((B,), C)
    indices, scores = ops.chunk_select(q_r, landmark, position, chunks, 1, 4, 4)
    weights = scores.masked_fill(indices < 0, 0.0)
    o = ops.chunk_attention(q, k, k, indices, weights, 4)
    (o.sum() + scores.sum()).backward()
    assert indices.shape == (B, L, 1, 4)
    assert C > 0 or bool((indices == -1).all())
    assert C > 0 or not o.any()
    assert C > 0 or (not q.grad.any() and not q_r.grad.any())  # type: ignore[union-attr]


def test_strided_arguments_and_gradients_through_the_ops() -> None:
    problem = ChunkAttention(4, 2, 8, 4, 3)
    q, k, v, indices, weights = (x.nan_to_num() for x in attention_inputs(problem, 2, 13, 5))
    mixed = torch.cat((k, v), 2)

    def gradients() -> list[Tensor]:
        leaves = [q.clone().requires_grad_(), mixed.clone().requires_grad_(), weights.clone().requires_grad_()]
        o = ops.chunk_attention(leaves[0], *leaves[1].chunk(2, dim=2), indices, leaves[2], 4)
        o.transpose(1, 2).square().sum().backward()
        return [x.grad for x in leaves]  # type: ignore[misc]

    mine = gradients()
    with dispatch.use_backend("eager"):
        torch.testing.assert_close(mine, gradients(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_without_a_program_are_refused_by_name(dtype: torch.dtype) -> None:
    q = torch.randn(1, 4, 2, 8, dtype=dtype)
    weights = torch.ones(1, 4, 2, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with pytest.raises(RuntimeError, match="float64" if dtype == torch.float64 else "bfloat16"):
        ops.chunk_attention(q, q, q, torch.zeros(1, 4, 2, 1, dtype=torch.int32), weights, 4)
