"""Builds all kernels of a model at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from hsa_compile.ir import Problem
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


def tiles(problem: Problem, pass_name: str, target: str = "cpu:native") -> list[Tile]:
    """The different tiles that a pass of a problem is built with, over the buckets of lengths: on GPUs also where a
    record says that Triton is faster, for who demands kernels or has no Triton."""
    buckets = [4**i for i in range(16)]
    backend: Backend = "tilelang" if target.startswith("cuda:") else "tvm"
    return list(dict.fromkeys(choose(problem, pass_name, target, length, backend).tile for length in buckets))
