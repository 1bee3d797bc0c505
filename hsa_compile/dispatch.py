"""Which path computes an operator in PyTorch: a compiled kernel where one can be had, eager PyTorch elsewhere.

The NumPy reference is a third path, slow and only on demand: whole models are validated against it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hsa_compile import eager
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem, reference
from hsa_compile.native import Kernel
from hsa_compile.schedules import BuildError, build

log = logging.getLogger("hsa_compile")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Backend = Literal["auto", "compiled", "eager", "reference"]
_backend: Backend | None = None


def current_backend() -> Backend:
    """The path asked for: by ``use_backend``, else by ``$HSA_COMPILE_BACKEND``, else "auto".

    Raises:
        ValueError: the variable names no backend.
    """
    name = _backend or os.environ.get("HSA_COMPILE_BACKEND", "auto")
    if name not in get_args(Backend):
        raise ValueError(f"HSA_COMPILE_BACKEND must be one of {', '.join(get_args(Backend))}, got {name!r}")
    return name  # type: ignore[return-value]


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block, "compiled" demands kernels (or fails), "eager" uses none, "auto" prefers them,
    "reference" computes in float64 by the definitions in ``hsa_compile.ir.reference``."""
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {name!r}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("no compiled kernels, using the slower eager path: %s", reason)


@functools.cache
def _load(problem: Problem, pass_name: str) -> Kernel | str:
    """The kernel, or why it can't be had; remembered, so that a missing compiler costs one look."""
    try:
        return Kernel(build(problem, pass_name))
    except (BuildError, OSError) as error:
        return str(error)


def _by_definition(function: Callable[..., Any], problem: Problem, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    results = function(problem, *(x.numpy(force=True) for x in inputs))
    return [torch.from_numpy(x) for x in (results if isinstance(results, tuple) else (results,))]


def _kernel(problem: Problem, pass_name: str, q: Tensor, slots: int) -> Kernel | None:
    """The kernel to run, or None for the eager path. ``slots`` a row must be countable in 32 bits by a backward."""
    backend = current_backend()
    if backend == "eager":
        return None
    found: Kernel | str
    if q.device.type != "cpu" or q.dtype not in KERNEL_DTYPES:
        found = f"kernels run float32, float16 and bfloat16 on a CPU, not {q.dtype} on {q.device.type}"
    elif slots >= 2**31:
        found = f"L*K = {slots} does not fit 32 bits"
    else:
        found = _load(problem, pass_name)
    if isinstance(found, Kernel):
        return found
    if backend == "compiled":
        raise BuildError(found)
    _warn_once(found)
    return None


def select(
    problem: ChunkSelect, q_r: Tensor, landmark: Tensor, position: Tensor, chunks: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes ``hsa::chunk_select`` on checked arguments."""
    if current_backend() == "reference":
        indices, scores = _by_definition(reference.select, problem, (q_r, landmark, position, chunks))
        return indices, scores.float()
    B, L = q_r.shape[:2]
    kernel = _kernel(problem, "forward", q_r, L * problem.top_k)
    if kernel is None:
        p = problem
        return eager.select(q_r, landmark, position, chunks, p.kv_heads, p.chunk_size, p.top_k, p.visible_lag)
    indices = torch.empty((B, L, problem.kv_heads, problem.top_k), dtype=torch.int32)
    scores = torch.empty(indices.shape)
    inputs = (q_r, landmark, position, chunks)
    kernel((*(x.contiguous() for x in inputs), indices, scores), B, L, landmark.shape[1])
    return indices, scores


def select_backward(
    problem: ChunkSelect, grad_scores: Tensor, q_r: Tensor, landmark: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes ``hsa::chunk_select_backward`` on checked arguments."""
    if current_backend() == "reference":
        d_q, d_landmark = _by_definition(reference.select_backward, problem, (grad_scores, q_r, landmark, indices))
        return d_q.to(q_r.dtype), d_landmark.to(landmark.dtype)
    B, L = q_r.shape[:2]
    kernel = _kernel(problem, "backward", q_r, L * problem.top_k)
    if kernel is None:
        return eager.select_backward(grad_scores, q_r, landmark, indices)
    outputs = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q_r, landmark))
    inputs = (grad_scores, q_r, landmark, indices)
    kernel((*(x.contiguous() for x in inputs), *outputs), B, L, landmark.shape[1])
    return outputs  # type: ignore[return-value]


def attention(problem: ChunkAttention, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Computes ``hsa::chunk_attention`` on checked arguments."""
    if current_backend() == "reference":
        return _by_definition(reference.attention, problem, (q, k, v, indices, weights))[0].to(q.dtype)
    B, L = q.shape[:2]
    kernel = _kernel(problem, "forward", q, L * problem.top_k)
    if kernel is None:
        return eager.attention(q, k, v, indices, weights, problem.chunk_size, problem.off_by_one)
    o = torch.empty(q.shape, dtype=q.dtype)
    inputs = (q, k, v, indices, weights)
    kernel((*(x.contiguous() for x in inputs), o), B, L, k.shape[1] // problem.chunk_size)
    return o


def attention_backward(
    problem: ChunkAttention, grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes ``hsa::chunk_attention_backward`` on checked arguments."""
    if current_backend() == "reference":
        grads = _by_definition(reference.attention_backward, problem, (grad_o, q, k, v, indices, weights))
        return tuple(d.to(x.dtype) for d, x in zip(grads, (q, k, v, weights)))  # type: ignore[return-value]
    B, L = q.shape[:2]
    kernel = _kernel(problem, "backward", q, L * problem.top_k)
    if kernel is None:
        return eager.attention_backward(grad_o, q, k, v, indices, weights, problem.chunk_size, problem.off_by_one)
    outputs = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, weights))
    inputs = (grad_o, q, k, v, indices, weights)
    kernel((*(x.contiguous() for x in inputs), *outputs), B, L, k.shape[1] // problem.chunk_size)
    return outputs  # type: ignore[return-value]
