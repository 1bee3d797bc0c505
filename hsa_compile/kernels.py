"""Builds all kernels of a model at once: for PyTorch, and for an operator library."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from hsa_compile.export.library import Served
from hsa_compile.ir import AnyProblem, Problem, SlidingWindow
from hsa_compile.ir.operators import Dtype
from hsa_compile.model.config import ModelConfig
from hsa_compile.schedules import Artifact, BuildError, build, choose
from hsa_compile.schedules.choice import COMPILED_DTYPES, Backend, Tile

log = logging.getLogger("hsa_compile")

LENGTHS = [4**i for i in range(16)]  # the buckets


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


def deployed_problems(config: ModelConfig, dtype: Dtype = "float32") -> list[AnyProblem]:
    """What an exported model's operators pose."""
    window = SlidingWindow(config.swa_heads, config.swa_kv_heads, config.swa_head_dim, config.window, dtype)
    return [*config.problems(dtype=dtype), window]


def deployed(problems: Sequence[AnyProblem], targets: Sequence[str] = ("cpu:native",)) -> Iterator[Served]:
    """Yields what ``export.build_library`` links, as it is done: forward kernels of the problems for several targets.

    A GPU gets one for each length at which another tile is faster. GPU kernels are float16 or bfloat16, of head widths
    that matrix instructions take; the library's plain kernels compute the rest.

    Raises:
        BuildError: one of them cannot be built.
        TargetError: a target is unknown.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            pool.submit(_build_served, problem, target, tile): length
            for problem in dict.fromkeys(problems)
            for target in dict.fromkeys(targets)
            for length, tile in _by_length(problem, target)
        }
        for job in as_completed(jobs):
            if artifact := job.result():
                yield Served(artifact, jobs[job])


def exported(config: ModelConfig, targets: Sequence[str] = ("cpu:native",), dtype: Dtype = "float32") -> list[Served]:
    """The kernels of a bundle of that type.

    No program for GPUs is in float32: the library's plain kernels compute it, beside compiled ones in bfloat16, by
    which it knows that it is for GPUs.

    Raises:
        BuildError: one of them cannot be built.
        TargetError: a target is unknown.
    """
    served: list[Served] = []
    for target in dict.fromkeys(targets):
        kind: Dtype = "bfloat16" if target.startswith("cuda:") and dtype == "float32" else dtype
        served += deployed(deployed_problems(config, kind), [target])
    return sorted(served, key=lambda one: (one.kernel.target, one.kernel.problem.op, one.length))


def _build_served(problem: AnyProblem, target: str, tile: Tile | None) -> Artifact | None:
    try:
        return build(problem, "forward", target, tile)
    except BuildError as error:
        if not target.startswith("cuda:") or "ProblemError: " not in str(error):
            raise
        log.warning("%s: %s; a plain kernel serves it", problem, str(error).rsplit("ProblemError: ")[-1].strip())
        return None


def _by_length(problem: AnyProblem, target: str) -> Iterator[tuple[int, Tile | None]]:
    """(least tokens of a segment, tile) of every kernel of a problem; one serves all lengths on a CPU."""
    if not target.startswith("cuda:"):
        yield 0, None
        return
    if problem.dtype not in COMPILED_DTYPES:
        return
    last = None
    for length in LENGTHS:
        tile = choose(problem, "forward", target, length, "tilelang").tile
        if tile != last:
            yield length if last else 0, tile
        last = tile


def tiles(problem: Problem, pass_name: str, target: str = "cpu:native") -> list[Tile]:
    """The different tiles that a pass of a problem is built with, over the buckets of lengths: on GPUs also where a
    record says that Triton is faster, for who demands kernels or has no Triton."""
    backend: Backend = "tilelang" if target.startswith("cuda:") else "tvm"
    return list(dict.fromkeys(choose(problem, pass_name, target, length, backend).tile for length in LENGTHS))
