"""Parity of the operators on random inputs, outputs and gradients, with the NumPy reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hsa_compile import dispatch, ops
from hsa_compile.ir import ChunkAttention, ChunkSelect, reference
from hsa_compile.model.config import ModelConfig
from hsa_compile.tolerances import Check, Judge

LENGTHS = (100, 1)  # a segment and a decoded token: other kernels serve them


def check_operators(
    config: ModelConfig, legs: Sequence[dispatch.Backend], dtype: str, device: torch.device, seed: int
) -> Iterator[Check]:
    """All comparisons of the operators that a model poses, in a type, on a device; eager PyTorch is the first leg."""
    select, attention = config.problems(dtype=dtype)  # type: ignore[arg-type]
    for L in LENGTHS:
        yield from _select(select, legs, L, device, seed)
        yield from _attention(attention, legs, L, device, seed)


def _named(operator: str, output: str, L: int) -> str:
    return f"{operator} {output}" + (", one token" if L == 1 else "")


def _attention(
    p: ChunkAttention, legs: Sequence[dispatch.Backend], L: int, device: torch.device, seed: int
) -> Iterator[Check]:
    g, half, C = torch.Generator().manual_seed(seed), getattr(torch, p.dtype), 9
    q, grad = torch.randn(2, 2, L, p.q_heads, p.head_dim, generator=g).to(half)
    k, v = torch.randn(2, 2, C * p.chunk_size, p.kv_heads, p.head_dim, generator=g).to(half)
    indices = torch.randint(-1, C, (2, L, p.kv_heads, p.top_k), generator=g, dtype=torch.int32)
    inputs = (q, k, v, indices, torch.rand(indices.shape, generator=g))
    arrays = [_exact(x).numpy() for x in inputs]
    want = reference.attention(p, *arrays), *reference.attention_backward(p, _exact(grad).numpy(), *arrays)
    there, judge = [x.to(device) for x in inputs], Judge("operators", p.dtype)
    for leg in legs:
        with dispatch.use_backend(leg):
            o = ops.chunk_attention(*there, p.chunk_size, p.off_by_one)
            grads = ops.chunk_attention_backward(grad.to(device), *there, p.chunk_size, p.off_by_one)
        for name, mine, theirs in zip(("o", "dq", "dk", "dv", "dweights"), (o, *grads), want):
            yield judge.compared(leg, _named("chunk_attention", name, L), [(mine, theirs)])


def _select(
    p: ChunkSelect, legs: Sequence[dispatch.Backend], L: int, device: torch.device, seed: int
) -> Iterator[Check]:
    g, half, C = torch.Generator().manual_seed(seed), getattr(torch, p.dtype), 40
    # Small integers: their products are exact, so that the selection, ties and all, must be equal to the index.
    q_r = torch.randint(-3, 4, (2, L, p.retrieval_heads, p.retrieval_dim), generator=g).to(half)
    landmark = torch.randint(-3, 4, (2, C, p.retrieval_heads, p.retrieval_dim), generator=g).to(half)
    position, chunks = torch.tensor([0, C * p.chunk_size]), torch.tensor([C, C // 2])
    inputs = (q_r, landmark, position, chunks)
    want, want_scores = reference.select(p, *(_exact(x).numpy() for x in inputs))
    grad, chosen = torch.randn(want.shape, generator=g), torch.from_numpy(want)
    want_grads = reference.select_backward(p, grad.numpy(), _exact(q_r).numpy(), _exact(landmark).numpy(), want)
    there, judge = [x.to(device) for x in inputs], Judge("operators", p.dtype)
    for leg in legs:
        with dispatch.use_backend(leg):
            indices, scores = ops.chunk_select(*there, p.kv_heads, p.chunk_size, p.top_k, p.window)
            grads = ops.chunk_select_backward(grad.to(device), *there[:2], chosen.to(device), p.chunk_size)
        wrong = float((indices.cpu() != chosen).sum())
        equal = Check(leg, _named("chunk_select", "indices", L), wrong, wrong, 0.0, 0.0, p.dtype)
        yield replace(equal, note="" if not wrong else f"{wrong:.0f} differ")
        yield judge.compared(leg, _named("chunk_select", "scores", L), [(scores, want_scores)])
        for name, mine, theirs in zip(("dq_r", "dlandmark"), grads, want_grads):
            yield judge.compared(leg, _named("chunk_select", name, L), [(mine, theirs)])


def _exact(x: Tensor) -> Tensor:
    """What a tensor holds, in a type that NumPy has."""
    return x.double() if x.is_floating_point() else x
