"""Builds, checks and times candidates, each in processes that it may take down with it."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from hsa_compile.ir import Problem
from hsa_compile.schedules import builder
from hsa_compile.schedules.choice import Tile
from hsa_compile.schedules.costs import Machine, Workload
from hsa_compile.schedules.device import cache_bytes
from hsa_compile.schedules.gpu_costs import GpuMachine
from hsa_compile.schedules.journal import Status
from hsa_compile.schedules.measure import default_threads, environment
from hsa_compile.schedules.target import resolve
from hsa_compile.schedules.worker import Worker, WorkerError

Clock = Literal["wall", "cpu", "device"]
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
    """What the tuner needs of a machine. ``CpuLaboratory`` is the one of this machine's CPU, ``GpuLaboratory`` (in
    ``hsa_compile.gpu_laboratory``) that of its GPU.

    ``rounds`` are the least and the most final ones.
    """

    clock: Clock
    rounds: tuple[int, int]

    @property
    def machine(self) -> Machine | GpuMachine:
        """Whose rates the cost model takes."""
        ...

    def build(self, job: Job, tiles: list[Tile]) -> Iterator[tuple[Tile, Any]]:
        """Yields each candidate, built, or the CandidateError that it failed by."""
        ...

    def check(self, job: Job, tile: Tile, built: Any) -> None:
        """Raises CandidateError where a candidate is wrong."""
        ...

    def time(self, job: Job, tile: Tile, built: Any) -> list[float]:
        """Milliseconds of a few runs; raises CandidateError."""
        ...

    def resources(self, built: Any) -> dict[str, int]:
        """What the largest kernel takes, where it is known: registers, spilled bytes, shared memory."""
        ...

    def rate(self) -> float | None:
        """Operations a second of a large matrix product now, against ``machine.flops`` in the beginning; None where
        it is not measured."""
        ...

    @property
    def workers(self) -> int:
        """How many candidates are built at once."""
        ...


class ProcessLaboratory:
    """Compilers side by side, and one process that measures; each may die of a candidate.

    Args:
        compilers: the processes that build, each one candidate at a time.
        measurer: the process that checks and times.
        limits: seconds that each step may take.
    """

    clock: Clock

    def __init__(self, compilers: list[Worker], measurer: Worker, limits: Limits) -> None:
        self.limits = limits
        self._directory = Path(tempfile.mkdtemp(prefix="hsa-tune-"))
        self._compilers, self._measurer = compilers, measurer
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in compilers:
            self._free.put(worker)
        self._numbers = itertools.count()

    @property
    def workers(self) -> int:
        return len(self._compilers)

    def build_one(self, job: Job, tile: Tile) -> dict[str, Any]:
        """Builds a candidate; may be called from as many threads as there are ``workers``.

        Raises:
            CandidateError: it does not compile, or not in time.
        """
        worker = self._free.get()
        directory = self._directory / str(next(self._numbers))
        directory.mkdir()
        try:
            return self._compile(worker, job, tile, directory)
        except WorkerError as error:
            status: Status = "hang" if error.kind == "hang" else "compile"
            raise CandidateError(status, f"compiling: {error}") from None
        finally:
            self._free.put(worker)

    def _compile(self, worker: Worker, job: Job, tile: Tile, directory: Path) -> dict[str, Any]:
        """What the measuring process needs to run a candidate; raises WorkerError."""
        request = builder.build_request(job.problem, job.pass_name, job.target, tile)
        symbol = worker.ask({"directory": str(directory), "request": request}, self.limits.build)["symbol"]
        return {"library": str(directory / "kernel.so"), "symbol": symbol}

    def build(self, job: Job, tiles: list[Tile]) -> Iterator[tuple[Tile, Any]]:
        """Yields candidates as they are done: a message for the measuring process, or a CandidateError."""

        def attempt(tile: Tile) -> tuple[Tile, Any]:
            try:
                return tile, self.build_one(job, tile)
            except CandidateError as error:
                return tile, error

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                yield from pool.map(attempt, tiles)
            except BaseException:  # Ctrl-C: end the compilers, for whom the pool would wait
                self.stop_building()
                pool.shutdown(cancel_futures=True)
                raise

    def stop_building(self) -> None:
        """Ends the compilers in the middle of what they do; the next candidate starts them anew."""
        for worker in self._compilers:
            worker.close()

    def resources(self, built: Any) -> dict[str, int]:
        return {}

    def rate(self) -> float | None:
        return None

    def _ask(self, job: Job, built: Mapping[str, Any], do: str, seconds: float, **more: Any) -> dict[str, Any]:
        message = {"do": do, "problem": job.problem.to_dict(), "pass": job.pass_name, "seed": 0, **built, **more}
        # A crash may be an earlier candidate's doing: it counts if it happens again in a fresh process.
        for again in (True, False):
            try:
                return self._measurer.ask(message, seconds)
            except WorkerError as error:
                if error.kind != "crash" or not again:
                    status: Status = "hang" if error.kind == "hang" else "crash"
                    if "OutOfResources" in str(error):  # Triton finds out when it loads a kernel
                        status = "compile"
                    raise CandidateError(status, f"{do}: {error}") from None
        raise AssertionError

    def close(self) -> None:
        """Ends all processes and removes what was built."""
        for worker in (*self._compilers, self._measurer):
            worker.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CpuLaboratory(ProcessLaboratory):
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

    rounds = (7, 15)

    def __init__(
        self, target: str, clock: Clock | None = None, threads: int | None = None, limits: Limits | None = None
    ) -> None:
        level = resolve(target)
        builder.require_compilers(level.name)
        self.threads = threads or default_threads()
        compilers = [Worker(builder.compiler_module(level.name)) for _ in range(default_threads())]
        measurer = Worker("hsa_compile.schedules.measure", environment(self.threads))
        super().__init__(compilers, measurer, limits or Limits())
        try:
            self.clock, self._machine = self._look_at_machine(clock)
        except BaseException:
            self.close()
            raise

    @property
    def machine(self) -> Machine:
        return self._machine

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

    def check(self, job: Job, tile: Tile, built: dict[str, str]) -> None:
        """Compares a candidate with the reference on small problems."""
        sizes = {"tokens": tile.tokens, "few": getattr(tile, "few", 0)}
        if wrong := self._ask(job, built, "check", self.limits.check, threads=self.threads, **sizes)["wrong"]:
            raise CandidateError("wrong", wrong)

    def time(self, job: Job, tile: Tile, built: dict[str, str]) -> list[float]:
        """Milliseconds of a few runs, by the laboratory's clock."""
        load = list(dataclasses.astuple(job.load))
        more: dict[str, Any] = {
            "threads": self.threads,
            "load": load,
            "least": LEAST_RUNS,
            "round_seconds": ROUND_SECONDS,
        }
        return self._ask(job, built, "time", self.limits.time, **more)[self.clock]
