"""Which path computes an operator in PyTorch."""

from __future__ import annotations

from torch import Tensor

from hsa_compile import eager
from hsa_compile.ir import ChunkAttention, ChunkSelect


def select(problem: ChunkSelect, q_r: Tensor, landmark: Tensor, position: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    p = problem
    return eager.select(q_r, landmark, position, chunks, p.kv_heads, p.chunk_size, p.top_k, p.visible_lag)


def select_backward(
    problem: ChunkSelect, grad_scores: Tensor, q_r: Tensor, landmark: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    return eager.select_backward(grad_scores, q_r, landmark, indices)


def attention(problem: ChunkAttention, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return eager.attention(q, k, v, indices, weights, problem.chunk_size, problem.off_by_one)


def attention_backward(
    problem: ChunkAttention, grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return eager.attention_backward(grad_o, q, k, v, indices, weights, problem.chunk_size, problem.off_by_one)
