"""The tuner's laboratory on a GPU: candidates are compiled on all cores but two, while others are checked and timed in
a process that any of them may take down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hsa_compile.schedules import builder
from hsa_compile.schedules.candidates import CandidateError, Job, Limits, ProcessLaboratory
from hsa_compile.schedules.choice import Tile
from hsa_compile.schedules.gpu_costs import GpuMachine
from hsa_compile.schedules.measure import default_threads
from hsa_compile.schedules.target import TargetError, resolve_gpu
from hsa_compile.schedules.triton import TritonTile
from hsa_compile.schedules.worker import Worker, WorkerError

MEASURER = "hsa_compile.gpu_measure"
LEAST_RUNS, ROUND_SECONDS = 5, 0.03


class TilePairs(Worker):
    """A TileLang compiler and, started when it is first needed, a process that compiles Triton programs."""

    def __init__(self, compiler: str, preparer: str) -> None:
        super().__init__(compiler)
        self.preparer = Worker(preparer)

    def close(self) -> None:
        super().close()
        self.preparer.close()


class GpuLaboratory(ProcessLaboratory):
    """Of the first GPU.

    Args:
        target: what the GPU runs.
        limits: seconds that each step of a candidate may take.
        compilers: processes that build, by default one for each core but two.
        measurer: module of the measuring process.
        require: refuse to begin where the GPU or the compilers are missing; tests do without.

    Raises:
        BuildError: there is no compiler, or the measuring process does not start.
        TargetError: the target is unknown, or this machine has no GPU that runs it.
    """

    rounds = (5, 9)

    def __init__(
        self,
        target: str,
        limits: Limits | None = None,
        compilers: int | None = None,
        measurer: str = MEASURER,
        require: bool = True,
    ) -> None:
        level = resolve_gpu(target)
        if require:
            _require(level.name)
        count = compilers or max(1, default_threads() - 2)
        pairs = [TilePairs(builder.compiler_module(level.name), measurer) for _ in range(count)]
        super().__init__([*pairs], Worker(measurer), limits or Limits())
        self.clock = "device"
        try:
            found = self._look(copy=True)
        except BaseException:
            self.close()
            raise
        self._machine = GpuMachine(found["processors"], found["flops"], found["bandwidth"])

    @property
    def machine(self) -> GpuMachine:
        return self._machine

    def _look(self, copy: bool) -> dict[str, Any]:
        try:
            return self._measurer.ask({"do": "look", "copy": copy}, self.limits.build)
        except WorkerError as error:
            raise builder.BuildError(f"the measuring process does not start: {error}") from None

    def _compile(self, worker: Worker, job: Job, tile: Tile, directory: Path) -> dict[str, Any]:
        if isinstance(tile, TritonTile):
            assert isinstance(worker, TilePairs)
            built: dict[str, Any] = {"tile": dataclasses.asdict(tile)}
            message = {"do": "prepare", "problem": job.problem.to_dict(), "pass": job.pass_name, "seed": 0}
            worker.preparer.ask({**message, **built, "load": _load(job)}, self.limits.build)
            return built
        built = super()._compile(worker, job, tile, directory)
        return built | {"resources": _largest(directory / "resources.json")}

    def _send(self, job: Job, built: dict[str, Any], do: str, seconds: float, **more: Any) -> dict[str, Any]:
        sent = {name: value for name, value in built.items() if name != "resources"}
        return self._ask(job, sent, do, seconds, load=_load(job), **more)

    def check(self, job: Job, tile: Tile, built: dict[str, Any]) -> None:
        """Compares a candidate with the reference on a small problem, and on the timed inputs."""
        answer = self._send(job, built, "check", self.limits.check)
        if answer["wrong"]:
            raise CandidateError("wrong", answer["wrong"])
        if answer["resources"]:
            built["resources"] = answer["resources"]

    def time(self, job: Job, tile: Tile, built: dict[str, Any]) -> list[float]:
        """Milliseconds of a few runs, by the device's clock."""
        more = {"least": LEAST_RUNS, "round_seconds": ROUND_SECONDS}
        return self._send(job, built, "time", self.limits.time, **more)["device"]

    def resources(self, built: dict[str, Any]) -> dict[str, int]:
        return built.get("resources", {})

    def rate(self) -> float | None:
        return self._look(copy=False)["flops"]


def _load(job: Job) -> list[int]:
    return list(dataclasses.astuple(job.load))


def _largest(path: Path) -> dict[str, int]:
    """Of the kernels' resources: most registers, spills and shared memory."""
    try:
        kernels = list(json.loads(path.read_text()).values())
    except (OSError, ValueError):
        return {}
    return {
        "registers": max(kernel["registers"] for kernel in kernels),
        "spill_bytes": max(kernel["spill_bytes"] for kernel in kernels),
        "shared_bytes": max(kernel["dynamic_shared_bytes"] + kernel["static_shared_bytes"] for kernel in kernels),
    }


def _require(target: str) -> None:
    import torch

    builder.require_compilers(target)
    if not torch.cuda.is_available():
        raise TargetError(f"tuning {target} needs a GPU that runs it, and PyTorch finds none here")
    capability = torch.cuda.get_device_capability()
    if not resolve_gpu(target).runs_on(capability):
        raise TargetError(
            f"{torch.cuda.get_device_name()} has compute capability {capability}, which {target} is not for"
        )
