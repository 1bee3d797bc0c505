"""Builds all kernels of a model at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from hsa_compile.ir import Problem
from hsa_compile.ir.operators import Dtype
from hsa_compile.model.config import ModelConfig
from hsa_compile.schedules import Artifact, build


def required(config: ModelConfig, training: bool, dtype: Dtype = "float32") -> list[tuple[Problem, str]]:
    """(problem, pass) of every kernel that the model needs, for inference alone or for training too."""
    wanted: list[tuple[Problem, str]] = [(problem, "forward") for problem in config.problems(dtype=dtype)]
    if training:
        trained = config.problems(training=True, dtype=dtype)
        wanted += [(problem, name) for problem in trained for name in ("forward", "backward")]
    return list(dict.fromkeys(wanted))


def build_all(
    config: ModelConfig, training: bool = True, target: str = "cpu:native", dtype: Dtype | None = None
) -> Iterator[Artifact]:
    """Yields the kernels as they are done, built side by side, one worker process a core.

    Args:
        dtype: of the tensors; by default float32 on CPUs, bfloat16 on GPUs.

    Raises:
        BuildError: one of them cannot be built.
        TargetError: the target is unknown.
    """
    dtype = dtype or ("bfloat16" if target.startswith("cuda:") else "float32")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(build, problem, name, target) for problem, name in required(config, training, dtype)]
        for job in as_completed(jobs):
            yield job.result()
