"""Builds, checks and times candidates, each in processes that it may take down with it."""

from __future__ import annotations

import dataclasses
import queue
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hsa_compile.ir import Problem
from hsa_compile.schedules import builder
from hsa_compile.schedules.choice import Tile
from hsa_compile.schedules.costs import Machine, Workload
from hsa_compile.schedules.device import cache_bytes
from hsa_compile.schedules.journal import Status
from hsa_compile.schedules.measure import default_threads, environment
from hsa_compile.schedules.target import GpuTarget, resolve_any
from hsa_compile.schedules.worker import Worker, WorkerError

Clock = Literal["wall", "cpu"]
BUSY = 1.25  # time on the wall over processor time of a thread, from which the machine is busy
LEAST_RUNS, ROUND_SECONDS = 3, 0.05


@dataclass(frozen=True)
class Limits:
    """Seconds that a step of one candidate may take."""

    build: float = 180.0
    check: float = 30.0
    time: float = 60.0


class CandidateError(RuntimeError):
    """A candidate failed; ``status`` says by what."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status: Status = status


@dataclass(frozen=True)
class Job:
    """What is tuned: a pass of a problem on a target, under a load."""

    problem: Problem
    pass_name: str
    target: str
    load: Workload


class Laboratory(Protocol):
    """What the tuner needs of a machine. ``CpuLaboratory`` is the one of this machine's CPU."""

    clock: Clock
    machine: Machine

    def build(self, job: Job, tiles: list[Tile]) -> Iterator[tuple[Tile, Any]]:
        """Yields each candidate, built, or the CandidateError that it failed by."""
        ...

    def check(self, job: Job, tile: Tile, built: Any) -> None:
        """Raises CandidateError where a candidate is wrong."""
        ...

    def time(self, job: Job, tile: Tile, built: Any) -> list[float]:
        """Milliseconds of a few runs; raises CandidateError."""
        ...

    @property
    def workers(self) -> int:
        """How many candidates are built at once."""
        ...


class CpuLaboratory:
    """Compilers side by side, a process a core, and one process that measures while they rest.

    Args:
        target: a CPU target that this machine runs.
        clock: "wall", or "cpu" for the processor time of the threads, which other load hardly touches but which does
            not see threads that wait for each other (the tuner adds what the cost model says of that). None: the
            wall's, unless the machine is busy.
        threads: that kernels run on.

    Raises:
        BuildError: there is no compiler.
        TargetError: the target is not for this machine's CPU.
    """

    def __init__(
        self, target: str, clock: Clock | None = None, threads: int | None = None, limits: Limits | None = None
    ) -> None:
        level = resolve_any(target)
        if isinstance(level, GpuTarget):
            raise builder.BuildError(f"candidates are measured on CPUs; {target} cannot be tuned yet")
        builder.require_compilers(level.name)
        self.limits, self.threads = limits or Limits(), threads or default_threads()
        self._directory = Path(tempfile.mkdtemp(prefix="hsa-tune-"))
        self._compilers = [Worker(builder.compiler_module(level.name)) for _ in range(default_threads())]
        self._measurer = Worker("hsa_compile.schedules.measure", environment(self.threads))
        self._built = 0
        try:
            self.clock, self.machine = self._look_at_machine(clock)
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        return len(self._compilers)

    def _look_at_machine(self, clock: Clock | None) -> tuple[Clock, Machine]:
        try:
            runs = self._measurer.ask({"do": "matmul"}, self.limits.time)
        except WorkerError as error:
            raise builder.BuildError(f"the measuring process does not start: {error}") from None
        wall, cpu = (statistics.median(runs[kind]) for kind in ("wall", "cpu"))
        rate = self.threads * runs["flops"] / min(runs["cpu"]) * 1e3
        if clock is None:
            clock = "cpu" if wall > BUSY * cpu else "wall"
        return clock, Machine(self.threads, rate, cache_bytes(1, 32 << 10), cache_bytes(2, 1 << 20))

    def build(self, job: Job, tiles: list[Tile]) -> Iterator[tuple[Tile, Any]]:
        """Yields candidates as they are done: a message for the measuring process, or a CandidateError."""
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._compilers:
            free.put(worker)

        def compile_one(number: int, tile: Tile) -> tuple[Tile, Any]:
            worker = free.get()
            directory = self._directory / str(number)
            directory.mkdir()
            request = builder.build_request(job.problem, job.pass_name, job.target, tile)
            try:
                message = {"directory": str(directory), "request": request}
                symbol = worker.ask(message, self.limits.build)["symbol"]
                return tile, {"library": str(directory / "kernel.so"), "symbol": symbol}
            except WorkerError as error:
                status: Status = "hang" if error.kind == "hang" else "compile"
                return tile, CandidateError(status, f"compiling: {error}")
            finally:
                free.put(worker)

        first, self._built = self._built, self._built + len(tiles)
        with ThreadPoolExecutor(len(self._compilers)) as pool:
            try:
                yield from pool.map(compile_one, range(first, self._built), tiles)
            except BaseException:  # Ctrl-C: end the compilers, for whom the pool would wait
                for worker in self._compilers:
                    worker.close()
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, job: Job, built: dict[str, str], do: str, seconds: float, **more: Any) -> dict[str, Any]:
        message = {"do": do, "problem": job.problem.to_dict(), "pass": job.pass_name, "seed": 0, **built, **more}
        message["threads"] = self.threads
        # A crash may be an earlier candidate's doing: it counts if it happens again in a fresh process.
        for again in (True, False):
            try:
                return self._measurer.ask(message, seconds)
            except WorkerError as error:
                if error.kind != "crash" or not again:
                    status: Status = "hang" if error.kind == "hang" else "crash"
                    raise CandidateError(status, f"{do}: {error}") from None
        raise AssertionError

    def check(self, job: Job, tile: Tile, built: dict[str, str]) -> None:
        """Compares a candidate with the reference on small problems."""
        sizes = {"tokens": tile.tokens, "few": getattr(tile, "few", 0)}
        if wrong := self._ask(job, built, "check", self.limits.check, **sizes)["wrong"]:
            raise CandidateError("wrong", wrong)

    def time(self, job: Job, tile: Tile, built: dict[str, str]) -> list[float]:
        """Milliseconds of a few runs, by the laboratory's clock."""
        load = list(dataclasses.astuple(job.load))
        more: dict[str, Any] = {"load": load, "least": LEAST_RUNS, "round_seconds": ROUND_SECONDS}
        return self._ask(job, built, "time", self.limits.time, **more)[self.clock]

    def close(self) -> None:
        """Ends all processes and removes what was built."""
        for worker in (*self._compilers, self._measurer):
            worker.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> CpuLaboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
