"""Which path computes an operator in PyTorch: a built kernel where one can be had, Triton on GPUs, else eager PyTorch.

CPU kernels are built when they are first needed, in seconds. GPU kernels are used where they were built before
(``hsa-compile build``) or are demanded: nvcc takes a minute, Triton serves at once.

Kernels are picked by the length of a segment, from a few buckets, as tuning records say; where PyTorch is asked for
deterministic algorithms, one kernel serves all lengths. On GPUs a record may say that a Triton program is the faster
one, and with which tile.

The NumPy reference is a third path, slow and only on demand: whole models are validated against it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hsa_compile import eager
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem, ProblemError, reference
from hsa_compile.native import CudaKernel, Kernel
from hsa_compile.schedules import (
    BuildError,
    ScheduleError,
    TargetError,
    bucket,
    build,
    choice,
    choose,
    find,
    gpu_target,
)
from hsa_compile.schedules.choice import VARIABLE, Tile
from hsa_compile.schedules.target import resolve_gpu
from hsa_compile.schedules.triton import TritonTile

log = logging.getLogger("hsa_compile")

KERNEL_DTYPES = {"cpu": (torch.float32, torch.float16, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Backend = Literal["auto", "compiled", "triton", "eager", "reference"]
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
    """Within the block, "compiled" demands built kernels (or fails), "triton" the Triton programs, "eager" uses none,
    "auto" prefers them, "reference" computes in float64 by the definitions in ``hsa_compile.ir.reference``."""
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
def _load(problem: Problem, pass_name: str, target: str, tile: Tile, compile: bool) -> Kernel | CudaKernel | str:
    """The kernel, or why it can't be had; remembered, so that a missing compiler costs one look."""
    try:
        artifact = (build if compile else find)(problem, pass_name, target, tile)
        if artifact is None:
            return f"no kernel is built for {problem} ({pass_name}); build it with: hsa-compile build"
        return CudaKernel(artifact) if target.startswith("cuda:") else Kernel(artifact)
    except (BuildError, ProblemError, OSError) as error:
        return str(error)


@functools.cache
def _resolve(
    problem: Problem,
    pass_name: str,
    target: str,
    length: int | None,
    backend: Backend,
    compile: bool,
    schedule: str | None,
) -> Kernel | CudaKernel | TritonTile | str:
    """What serves a bucket of lengths, None for all of them: a kernel, a tile of the Triton programs, or why there is
    no kernel. ``schedule`` is the variable's value, so that a change of it is seen."""
    if not target.startswith("cuda:"):
        try:
            return _load(problem, pass_name, target, choose(problem, pass_name, target, length).tile, compile)
        except TargetError as error:
            return str(error)
    # Where one is asked for, its own records count; else those of the fastest, as far as it can be had.
    wanted: dict[Backend, choice.Backend] = {"compiled": "tilelang", "triton": "triton"}
    tile = choose(problem, pass_name, target, length, wanted.get(backend)).tile
    if (
        isinstance(tile, TritonTile)
        and backend == "auto"
        and "tilelang" in choice.backends(problem, resolve_gpu(target))
    ):
        if _triton()[0] is not None:
            return tile
        tile = choose(problem, pass_name, target, length, "tilelang").tile
    if isinstance(tile, TritonTile):
        return tile
    found = _load(problem, pass_name, target, tile, compile)
    if not isinstance(found, str) or backend == "compiled":
        return found
    try:
        return choose(problem, pass_name, target, length, "triton").tile  # type: ignore[return-value]
    except ScheduleError:  # fields of the other's tile, from the variable
        return choice.default_tile(problem, pass_name, resolve_gpu(target), length, "triton")  # type: ignore[return-value]


@functools.cache
def _target(device: torch.device) -> str:
    """Name of the target that kernels for a device are built for, "" if there is none."""
    if device.type == "cpu":
        return "cpu:native"
    found = gpu_target(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    return found.name if found else ""


@functools.cache
def _triton() -> tuple[ModuleType | None, str]:
    """The launchers of the Triton programs, or why there are none; found out once, when first needed."""
    try:
        from hsa_compile import triton_kernels
    except ImportError as error:
        return None, f"{error} (pip install 'hsa-compile[cuda]')"
    return triton_kernels, ""


@functools.cache
def _device_lacks(device: torch.device) -> str:
    """Why Triton can't drive a CUDA device, "" if it can. It builds a helper with the machine's C compiler first."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton programs need compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    import triton

    try:
        with torch.cuda.device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a missing compiler, header or driver makes of it
        return f"Triton can't use {device}: {error}"
    return ""


def triton_lacks(q: Tensor) -> str:
    """Why the Triton programs can't serve tensors like ``q``, "" if they can."""
    module, reason = _triton()
    if module is None:
        return reason
    if q.dtype not in module.DTYPES:
        return f"Triton programs are for float32, float16 and bfloat16, not {q.dtype}"
    if q.is_cuda:
        return _device_lacks(q.device)
    if not module.interpreted():
        return f"Triton programs run on CUDA tensors (or with TRITON_INTERPRET=1), not on {q.device.type}"
    # Its stand-in for the matrix product takes their bits for integers.
    return "Triton's interpreter can't multiply bfloat16" if q.dtype == torch.bfloat16 else ""


def fuses(x: Tensor) -> bool:
    """Whether Triton programs may take the place of PyTorch's compositions on tensors like ``x``."""
    backend = current_backend()
    if backend in ("eager", "reference") or not (x.is_cuda or backend == "triton"):
        return False
    return not triton_lacks(x)


def _plain(function: str, q: Tensor, tile: TritonTile | None, *arguments: Any) -> Any:
    """Runs ``function`` where no built kernel does: in Triton on a GPU, or if asked to, else eagerly. ``tile`` is for
    Triton; None for the hand-picked one."""
    backend = current_backend()
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = triton_lacks(q)
        if not reason:
            return _run_triton(function, arguments, tile, demanded=backend == "triton")
        if backend == "triton":
            raise RuntimeError(reason)
        _warn_once(reason)
    return getattr(eager, function)(*arguments)


def _run_triton(function: str, arguments: tuple[Any, ...], tile: TritonTile | None, demanded: bool) -> Any:
    module, _ = _triton()
    assert module is not None
    try:
        return getattr(module, function)(*arguments, tile)
    except module.OutOfResources as error:  # a chunk and a width that no multiprocessor of this GPU can hold
        if demanded:
            raise
        _warn_once(f"Triton: {error}")
    return getattr(eager, function)(*arguments)


def _by_definition(function: Callable[..., Any], problem: Problem, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    results = function(problem, *(x.numpy(force=True) for x in inputs))
    device = inputs[0].device
    return [torch.from_numpy(x).to(device) for x in (results if isinstance(results, tuple) else (results,))]


def _kernel(problem: Problem, pass_name: str, q: Tensor) -> Kernel | CudaKernel | TritonTile | None:
    """The built kernel, a tile for the Triton programs, or None for the other paths and hand-picked tiles. Slots of a
    row must be countable in 32 bits by a backward."""
    backend = current_backend()
    if backend == "eager" or (backend == "triton" and not q.is_cuda):
        return None
    target = _target(q.device)
    found: Kernel | CudaKernel | TritonTile | str
    dtypes = KERNEL_DTYPES[q.device.type] if backend == "compiled" or q.device.type == "cpu" else TRITON_DTYPES
    if not target or q.dtype not in dtypes:
        found = f"kernels are built for {_served()}, not {q.dtype} on {q.device}"
    elif (slots := q.shape[1] * problem.top_k) >= 2**31:
        found = f"L*K = {slots} does not fit 32 bits"
    else:
        length = None if torch.are_deterministic_algorithms_enabled() else bucket(q.shape[1])
        compile = backend == "compiled" or not q.is_cuda
        found = _resolve(problem, pass_name, target, length, backend, compile, os.environ.get(VARIABLE))
    if not isinstance(found, str):
        return found
    if backend == "compiled":
        raise BuildError(found)
    if not q.is_cuda:  # there the next path is the slow one; on GPUs Triton's follows
        _warn_once(found)
    return None


def _served() -> str:
    return "; ".join(
        f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} on {device}"
        for device, dtypes in KERNEL_DTYPES.items()
    )


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous outputs in the shapes, dtypes and on the device of tensors."""
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)


def select(
    problem: ChunkSelect, q_r: Tensor, landmark: Tensor, position: Tensor, chunks: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes ``hsa::chunk_select`` on checked arguments."""
    if current_backend() == "reference":
        indices, scores = _by_definition(reference.select, problem, (q_r, landmark, position, chunks))
        return indices, scores.float()
    B, L = q_r.shape[:2]
    kernel = _kernel(problem, "forward", q_r)
    if kernel is None or isinstance(kernel, TritonTile):
        p = problem
        options = (p.kv_heads, p.chunk_size, p.top_k, p.visible_lag)
        return _plain("select", q_r, kernel, q_r, landmark, position, chunks, *options)
    indices = torch.empty((B, L, problem.kv_heads, problem.top_k), dtype=torch.int32, device=q_r.device)
    scores = torch.empty(indices.shape, device=q_r.device)
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
    kernel = _kernel(problem, "backward", q_r)
    if kernel is None or isinstance(kernel, TritonTile):
        return _plain("select_backward", q_r, kernel, grad_scores, q_r, landmark, indices)
    outputs = _empty_like(q_r, landmark)
    inputs = (grad_scores, q_r, landmark, indices)
    kernel((*(x.contiguous() for x in inputs), *outputs), B, L, landmark.shape[1])
    return outputs  # type: ignore[return-value]


def attention(problem: ChunkAttention, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Computes ``hsa::chunk_attention`` on checked arguments."""
    if current_backend() == "reference":
        return _by_definition(reference.attention, problem, (q, k, v, indices, weights))[0].to(q.dtype)
    B, L = q.shape[:2]
    kernel = _kernel(problem, "forward", q)
    if kernel is None or isinstance(kernel, TritonTile):
        return _plain("attention", q, kernel, q, k, v, indices, weights, problem.chunk_size, problem.off_by_one)
    (o,) = _empty_like(q)
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
    kernel = _kernel(problem, "backward", q)
    if kernel is None or isinstance(kernel, TritonTile):
        options = (problem.chunk_size, problem.off_by_one)
        return _plain("attention_backward", q, kernel, grad_o, q, k, v, indices, weights, *options)
    outputs = _empty_like(q, k, v, weights)
    inputs = (grad_o, q, k, v, indices, weights)
    kernel((*(x.contiguous() for x in inputs), *outputs), B, L, k.shape[1] // problem.chunk_size)
    return outputs  # type: ignore[return-value]
