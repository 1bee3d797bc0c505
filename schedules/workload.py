"""Inputs and expected results of the operators in NumPy, for the tuner's measuring process, which loads no PyTorch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem, reference
from hsa_compile.schedules.costs import REDRAWN, SHARED_TOKENS, Workload

# Largest error against float64, relative to the largest value: of float32 about ten times what correct programs show.
TOLERANCE = {"float32": 3e-5, "float16": 1e-2, "bfloat16": 8e-2}
EMPTY = 0.2  # share of empty slots in what is checked


@dataclass(frozen=True)
class Case:
    """Inputs and results of one call, in the order of ``host/kernel.h``; results hold the dtype and shape alone."""

    inputs: tuple[NDArray, ...]
    results: tuple[tuple[str, tuple[int, ...]], ...]


def stored(x: NDArray, dtype: str) -> NDArray:
    """Values as a kernel reads them; bfloat16, which NumPy lacks, as its bits."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(x, dtype)


def loaded(x: NDArray, dtype: str) -> NDArray:
    """Inverse of ``stored``, as float64."""
    if dtype == "bfloat16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def timed_selection(rng: np.random.Generator, load: Workload, heads: int, K: int) -> NDArray:
    """Indices int32 [B, L, heads, K], newest first. Local ones: neighbours share a draw, of which each keeps most, as
    in trained models (``bench/selections.py`` says how much). The segment ends where the memory does."""
    visible = (np.arange(load.L) + 1) * load.C // load.L
    shape = (load.B, load.L, heads, K)
    draws = rng.random(shape)
    if load.selection == "local":
        shared = np.repeat(draws[:, ::SHARED_TOKENS], SHARED_TOKENS, axis=1)[:, : load.L]
        draws = np.where(rng.random(shape) < REDRAWN, draws, shared)
    bound = visible[None, :, None, None]
    index = np.sort((draws * bound).astype(np.int64), -1)
    rank = np.arange(K)
    # Duplicates move to the next free chunk, and back below the bound.
    index = np.minimum(np.maximum.accumulate(index - rank, -1) + rank, bound - K + rank)
    return np.where(index >= 0, index, -1)[..., ::-1].astype(np.int32)


def timing_case(problem: Problem, pass_name: str, load: Workload, seed: int) -> Case:
    """Inputs to time: every slot filled where there are chunks enough."""
    rng = np.random.default_rng(seed)
    heads = problem.kv_heads
    indices = timed_selection(rng, load, heads, problem.top_k)
    return _case(problem, pass_name, load, rng, indices, position=max(0, load.C * problem.chunk_size - load.L))


def check_case(problem: Problem, pass_name: str, load: Workload, seed: int) -> Case:
    """Inputs to check on: empty slots with NaN for their weights, duplicates, any order."""
    rng = np.random.default_rng(seed)
    shape = (load.B, load.L, problem.kv_heads, problem.top_k)
    indices = rng.integers(0, load.C, shape).astype(np.int32)
    indices[rng.random(shape) < EMPTY] = -1
    if isinstance(problem, ChunkSelect) and pass_name == "backward":
        indices[:] = indices[:, :, :1]  # kv heads that share a retrieval head share its selection
    return _case(problem, pass_name, load, rng, indices, position=load.C * problem.chunk_size // 2)


def _case(
    problem: Problem, pass_name: str, load: Workload, rng: np.random.Generator, indices: NDArray, position: int
) -> Case:
    B, L, C = load.B, load.L, load.C

    def normal(*shape: int) -> NDArray:
        return stored(rng.standard_normal(shape, np.float32), problem.dtype)

    slots = indices.shape
    if isinstance(problem, ChunkAttention):
        q = normal(B, L, problem.q_heads, problem.head_dim)
        k, v = (normal(B, C * problem.chunk_size, problem.kv_heads, problem.head_dim) for _ in range(2))
        weights = np.where(indices < 0, np.nan, rng.random(slots)).astype(np.float32)
        inputs: tuple[NDArray, ...] = (q, k, v, indices, weights)
        d = problem.dtype
        if pass_name == "forward":
            return Case(inputs, ((d, q.shape),))
        grads = ((d, q.shape), (d, k.shape), (d, v.shape), ("float32", slots))
        return Case((normal(*q.shape), *inputs), grads)
    q_r = normal(B, L, problem.retrieval_heads, problem.retrieval_dim)
    landmark = normal(B, C, problem.retrieval_heads, problem.retrieval_dim)
    if pass_name == "forward":
        bounds = (np.full(B, position), np.full(B, C))
        return Case((q_r, landmark, *bounds), (("int32", slots), ("float32", slots)))
    grad = rng.standard_normal(slots, np.float32)
    return Case((grad, q_r, landmark, indices), ((problem.dtype, q_r.shape), (problem.dtype, landmark.shape)))


@functools.lru_cache(32)
def expected(problem: Problem, pass_name: str, load: Workload, seed: int) -> tuple[Case, tuple[NDArray, ...]]:
    """A case to check on, and what the reference makes of it."""
    case = check_case(problem, pass_name, load, seed)
    arrays = [loaded(x, problem.dtype) if x.dtype.kind in "fu" and x.ndim == 4 else x for x in case.inputs]
    if isinstance(problem, ChunkAttention):
        arrays[-1] = case.inputs[-1]  # weights are float32 whatever the dtype
        function = reference.attention if pass_name == "forward" else reference.attention_backward
    else:
        arrays[0] = case.inputs[0] if pass_name == "backward" else arrays[0]
        function = reference.select if pass_name == "forward" else reference.select_backward  # type: ignore[assignment]
    results = function(problem, *arrays)  # type: ignore[arg-type]
    return case, results if isinstance(results, tuple) else (results,)


def error(problem: Problem, pass_name: str, case: Case, got: list[NDArray], want: tuple[NDArray, ...]) -> float:
    """Largest error of the results, relative to the largest value; infinite for what is plainly wrong."""
    if isinstance(problem, ChunkSelect) and pass_name == "forward":
        return _selection_error(problem, case, got)
    errors = []
    for x, (dtype, _), exact in zip(got, case.results, want):
        x = loaded(x, dtype)
        if not np.isfinite(x).all():
            return float("inf")
        errors.append(float(np.abs(x - exact).max(initial=0)) / max(1.0, float(np.abs(exact).max(initial=0))))
    return max(errors)


def _selection_error(problem: ChunkSelect, case: Case, got: list[NDArray]) -> float:
    """Selections may differ from the reference's where scores tie by rounding, so each is judged by exact scores."""
    indices, scores = got
    q_r, landmark = (loaded(x, problem.dtype) for x in case.inputs[:2])
    position, chunks = case.inputs[2:]
    exact = np.einsum("blhd,bchd->blhc", q_r, landmark) * problem.scale
    C, worst = landmark.shape[1], 0.0
    for b, t, h in np.ndindex(indices.shape[:3]):
        n = reference.visible_chunks(problem, int(position[b]) + t, int(chunks[b]))
        row, all_scores = indices[b, t, h], exact[b, t, h if problem.retrieval_heads > 1 else 0, :n]
        filled = row[: min(n, problem.top_k)]
        if (row[len(filled) :] != -1).any() or (filled < 0).any() or (filled >= min(n, C)).any():
            return float("inf")
        if (np.diff(filled) >= 0).any():
            return float("inf")  # not newest first, or one twice
        best = np.sort(all_scores)[::-1][: len(filled)]
        mine = all_scores[filled]
        differences = np.concatenate([np.sort(mine)[::-1] - best, scores[b, t, h, : len(filled)] - mine])
        worst = max(worst, float(np.abs(differences).max(initial=0)))
    return worst / max(1.0, float(np.abs(exact).max(initial=0)))
