"""Builds all kernels of a model at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from hsa_compile.export.library import Served
from hsa_compile.ir import AnyProblem, Problem
from hsa_compile.ir.operators import Dtype
from hsa_compile.model.config import ModelConfig
from hsa_compile.schedules import Artifact, build, choose
from hsa_compile.schedules.choice import Backend, Tile


def required(config: ModelConfig, training: bool, dtype: Dtype = "float32") -> list[tuple[Problem, str]]:
    """(problem, pass) of every kernel that the model needs, for inference alone or for training too."""
    wanted: list[tuple[Problem, str]] = [(problem, "forward") for problem in config.problems(dtype=dtype)]
    if training:
        trained = config.problems(training=True, dtype=dtype)
        wanted += [(problem, name) for problem in trained for name in ("forward", "backward")]
    return list(dict.fromkeys(wanted))


def build_all(
    config: ModelConfig,
    training: bool = True,
    target: str = "cpu:native",
    dtype: Dtype | None = None,
    every_length: bool = False,
) -> Iterator[Artifact]:
    """Yields the kernels as they are done, built side by side, one worker process a core.

    Args:
        dtype: of the tensors; by default float32 on CPUs, bfloat16 on GPUs.
        every_length: all that ``dispatch`` picks from by length, where tuning records differ by it; else the one
            kernel of a problem that serves all lengths.

    Raises:
        BuildError: one of them cannot be built.
        TargetError: the target is unknown.
    """
    dtype = dtype or ("bfloat16" if target.startswith("cuda:") else "float32")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(build, problem, name, target, tile)
            for problem, name in required(config, training, dtype)
            for tile in (tiles(problem, name, target) if every_length else [None])
        ]
        for job in as_completed(jobs):
            yield job.result()


def exported(config: ModelConfig, targets: Sequence[str] = ("cpu:native",), dtype: Dtype = "float32") -> list[Served]:
    """The kernels of a bundle: all of the model's operators, for each target, and by length where the tiles differ.

    For GPUs no program is compiled in float32: the library's plain kernels serve there, beside compiled ones of
    bfloat16, by which it knows that it is to have any.

    Args:
        dtype: of the bundle.

    Raises:
        BuildError: one of them cannot be built.
        TargetError: a target is unknown.
    """
    wanted: list[tuple[AnyProblem, str]] = []
    for target in targets:
        on_gpu = target.startswith("cuda:")
        kind: Dtype = "bfloat16" if on_gpu and dtype == "float32" else dtype
        wanted += [(problem, target) for problem in (*config.problems(dtype=kind), config.window_problem(kind))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            (length, pool.submit(build, problem, "forward", target, tile))
            for problem, target in wanted
            for tile, length in _by_length(problem, target)
        ]
        return [Served(job.result(), length) for length, job in jobs]


def _by_length(problem: AnyProblem, target: str) -> list[tuple[Tile, int]]:
    """The tiles that serve segments from so many tokens on, the shortest first."""
    backend: Backend = "tilelang" if target.startswith("cuda:") else "tvm"
    found: list[tuple[Tile, int]] = []
    for length in (0, *(4**i for i in range(1, 16))):
        tile = choose(problem, "forward", target, max(1, length), backend).tile
        if not found or tile != found[-1][0]:
            found.append((tile, length))
    return found


def tiles(problem: Problem, pass_name: str, target: str = "cpu:native") -> list[Tile]:
    """The different tiles that a pass of a problem is built with, over the buckets of lengths: on GPUs also where a
    record says that Triton is faster, for who demands kernels or has no Triton."""
    buckets = [4**i for i in range(16)]
    backend: Backend = "tilelang" if target.startswith("cuda:") else "tvm"
    return list(dict.fromkeys(choose(problem, pass_name, target, length, backend).tile for length in buckets))
