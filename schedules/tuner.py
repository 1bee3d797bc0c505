"""The search: candidates are proposed, built, checked and timed until the time is up; the best of them take turns in
rounds with the hand-picked tile, and the winner becomes a record.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hsa_compile.ir import ChunkAttention
from hsa_compile.ir.programs import CpuTile
from hsa_compile.schedules import builder, gpu_costs
from hsa_compile.schedules.candidates import CandidateError, Job, Laboratory
from hsa_compile.schedules.choice import ScheduleError, Tile, backend_of, backends, bucket, tile_from_dict
from hsa_compile.schedules.costs import Machine, estimate_ms, seen_chunks, waiting_factor
from hsa_compile.schedules.device import device_for
from hsa_compile.schedules.fingerprint import program_digest
from hsa_compile.schedules.gpu_costs import GpuMachine
from hsa_compile.schedules.gpu_space import GpuSpace
from hsa_compile.schedules.journal import Journal, Trial
from hsa_compile.schedules.records import Measured, Record
from hsa_compile.schedules.space import Space, space_for
from hsa_compile.schedules.strategies import Strategy
from hsa_compile.schedules.target import resolve_any

FINALS_SHARE = 0.2  # of the time
FINALISTS = 4
WON = 0.8  # share of the rounds that a candidate has to win against the hand-picked tile
NOISE = 0.02  # a candidate has to be faster than the hand-picked tile by this share: medians repeat to about half of it
BATCH = 2  # candidates a compiler between looks at the clock, or in hand

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Final:
    """A candidate's milliseconds in the final rounds."""

    tile: Tile
    runs: list[float]

    @property
    def ms(self) -> float:
        return statistics.median(self.runs)


@dataclass
class Outcome:
    """What a search found.

    Args:
        finals: the best candidates and the hand-picked one, the first is the record's: the fastest, or the
            hand-picked one where none is clearly faster.
        trials: all, those of earlier runs first.
        space_size: how many candidates there are.
        resumed: trials that were there from earlier runs.
        failed: how many candidates failed, by what.
        resources: of the finals' largest kernels, where they are known.
        rate_after: operations a second of a matrix product after the finals, None where it was not measured.
    """

    job: Job
    strategy: str
    clock: str
    finals: list[Final]
    default: Tile
    trials: list[Trial]
    space_size: int
    seconds: float
    matmul_flops: float
    threads: int
    resumed: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    resources: dict[Tile, dict[str, int]] = field(default_factory=dict)
    rate_after: float | None = None

    @property
    def best(self) -> Final:
        return self.finals[0]

    @property
    def default_ms(self) -> float:
        return next(final.ms for final in self.finals if final.tile == self.default)

    def flops(self) -> float:
        """Of a run of the job."""
        return job_flops(self.job)


def job_flops(job: Job) -> float:
    """Operations of a run, multiply-adds counted as two; a selection's scores over the chunks that are visible."""
    p, load = job.problem, job.load
    if isinstance(p, ChunkAttention):
        return p.flops(load.B, load.L) if job.pass_name == "forward" else p.backward_flops(load.B, load.L)
    if job.pass_name == "backward":
        return 4 * load.B * load.L * p.kv_heads * p.top_k * p.retrieval_dim
    return p.flops(load.B, load.L, 1) * seen_chunks(p, load)


def journal_for(job: Job, lab: Laboratory) -> Journal:
    """The journal of all searches that measure the same."""
    level = resolve_any(job.target)
    used = backends(job.problem, level)
    key = {
        "problem": job.problem.to_dict(),
        "pass": job.pass_name,
        "target": level.name,
        "device": asdict(device_for(level.name)),
        "load": asdict(job.load),
        "clock": lab.clock,
        "threads": lab.machine.threads,
        "program": " ".join(program_digest(job.problem.op, job.pass_name, level.name, name) for name in used),
        "versions": {k: v for name in used for k, v in builder.compiler_versions(level.name, name).items()},
    }
    return Journal(builder.cache_directory() / "tuning", key)


class Search:
    """One search. ``run`` does it; what it holds meanwhile is for tests and for whoever looks on."""

    def __init__(self, job: Job, lab: Laboratory, journal: Journal, strategy: str, seed: int = 0) -> None:
        self.job, self.lab, self.journal = job, lab, journal
        self.space: Space | GpuSpace = space_for(job.problem, job.pass_name, job.target, job.load.L)
        self.tiles = self.space.tiles()
        self.strategy = Strategy(strategy, self.tiles, self.estimate, seed)
        self.trials = [trial for trial in journal.read() if self.tile_of(trial) is not None]
        self.resumed = len(self.trials)
        self.scores: dict[Tile, float] = {}
        for trial in self.trials:
            self._note(trial)
        self.built: dict[Tile, Any] = {}
        self._first = [tile for tile in self.space.first if tile not in self.scores]

    def estimate(self, tile: Tile) -> float:
        """The cost model's milliseconds."""
        job, machine = self.job, self.lab.machine
        if isinstance(self.space, GpuSpace):
            assert isinstance(machine, GpuMachine)
            return gpu_costs.estimate_ms(job.problem, job.pass_name, tile, job.load, machine, self.space.target)  # type: ignore[arg-type]
        assert isinstance(tile, CpuTile)
        assert isinstance(machine, Machine)
        return estimate_ms(job.problem, job.pass_name, tile, job.load, machine)

    def propose(self, count: int) -> list[Tile]:
        """The hand-picked tiles before all others, then what the strategy says; fewer or none where few are left."""
        found, self._first = self._first[:count], self._first[count:]
        while len(found) < count and (more := self.strategy.propose(count - len(found), self.scores)):
            found += [tile for tile in more if tile not in self.space.first]
        return found

    def tile_of(self, trial: Trial) -> Tile | None:
        """A trial's tile; None if it makes no sense (journals are data that anyone may edit)."""
        try:
            return tile_from_dict(trial.tile, self.space.target, trial.backend)
        except ValueError:
            return None

    def _note(self, trial: Trial) -> None:
        tile = self.tile_of(trial)
        assert tile is not None
        self.scores[tile] = trial.score

    def score(self, tile: Tile, runs: list[float]) -> float:
        """The median; with processor time, also what threads that wait for each other would add."""
        if self.lab.clock == "wall" or not isinstance(tile, CpuTile):
            return statistics.median(runs)
        job, threads = self.job, self.lab.machine.threads
        return statistics.median(runs) * waiting_factor(job.problem, job.pass_name, tile, job.load, threads)

    def run(self, seconds: float, progress: Progress = lambda share, line: None) -> Outcome:
        """Searches for about that long.

        Raises:
            ScheduleError: not even the hand-picked tile works.
            JournalError: a trial can't be written down.
        """
        start = time.monotonic()
        searching = seconds * (1 - FINALS_SHARE)

        def elapsed() -> float:
            return time.monotonic() - start

        def tell() -> None:
            best = min(self.scores.values(), default=math.inf)
            found = f"best {best:.3g} ms" if math.isfinite(best) else "nothing yet"
            progress(min(1.0, elapsed() / seconds), f"{len(self.trials)} candidates, {found}")

        tell()
        if first := self.propose(len(self._first)) if self._first else []:
            self._try(first, tell)
        while elapsed() < searching:
            batch = self.propose(BATCH * self.lab.workers)
            if not batch:
                break
            self._try(batch, tell)
        return self.conclude(start + seconds, tell, start)

    def conclude(self, deadline: float, tell: Callable[[], None], start: float) -> Outcome:
        """The final rounds, up to about ``deadline``, and what the search since ``start`` found (monotonic seconds).

        Raises:
            ScheduleError: the hand-picked tile does not work.
        """
        finals = self._finals(deadline, tell)
        failed: dict[str, int] = {}
        for trial in self.trials:
            if trial.status != "ok":
                failed[trial.status] = failed.get(trial.status, 0) + 1
        machine = self.lab.machine
        resources = {final.tile: self.lab.resources(self.built[final.tile]) for final in finals}
        return Outcome(
            self.job, self.strategy.name, self.lab.clock, finals, self.space.base, self.trials, len(self.tiles),
            time.monotonic() - start, machine.flops, machine.threads, self.resumed, failed, resources, self.lab.rate(),
        )  # fmt: skip

    def _try(self, tiles: list[Tile], tell: Callable[[], None]) -> None:
        """Builds candidates side by side, then checks and times one after the other, while no compiler runs."""
        at = time.monotonic()
        results = list(self.lab.build(self.job, tiles))
        building = (time.monotonic() - at) / len(tiles)
        for tile, built in results:
            self.settle(tile, built, building)
            tell()

    def settle(self, tile: Tile, built: Any, building: float) -> None:
        """Checks and times a candidate and writes down what became of it.

        Args:
            built: by the laboratory, or the CandidateError that it failed by.
            building: seconds that it took.

        Raises:
            JournalError: it can't be written down.
        """
        at = time.monotonic()
        trial: dict[str, Any] = {"tile": asdict(tile), "estimate_ms": self.estimate(tile)}
        trial["backend"] = "triton" if backend_of(tile) == "triton" else ""
        try:
            if isinstance(built, CandidateError):
                raise built
            self.lab.check(self.job, tile, built)
            ms = self.score(tile, self.lab.time(self.job, tile, built))
            trial |= {"status": "ok", "ms": ms, "resources": self.lab.resources(built)}
            self.built[tile] = built
        except CandidateError as error:
            trial |= {"status": error.status, "detail": str(error)[-1000:]}
        done = Trial(**trial, seconds=building + time.monotonic() - at)
        self.journal.append(done)
        self.trials.append(done)
        self._note(done)

    def _finalists(self) -> dict[Tile, Any]:
        """The best candidates, the best of each backend and the hand-picked one, built and checked (those of earlier
        runs anew)."""
        ranked = sorted((tile for tile, ms in self.scores.items() if math.isfinite(ms)), key=self.scores.__getitem__)
        best = {backend_of(tile): tile for tile in reversed(ranked)}
        picked = list(dict.fromkeys([*ranked[:FINALISTS], *best.values(), self.space.base]))
        missing = [tile for tile in picked if tile not in self.built]
        for tile, built in self.lab.build(self.job, missing) if missing else ():
            if not isinstance(built, CandidateError):
                self.built[tile] = built
        ready = {}
        for tile in picked:
            try:
                if tile in self.built:
                    if tile in missing:
                        self.lab.check(self.job, tile, self.built[tile])
                    ready[tile] = self.built[tile]
            except CandidateError:
                continue
        return ready

    def _finals(self, deadline: float, tell: Callable[[], None]) -> list[Final]:
        """Rounds in which the finalists take turns, each round beginning with another, so that none always runs on
        a machine that another has warmed."""
        ready = self._finalists()
        runs: dict[Tile, list[float]] = {tile: [] for tile in ready}
        least, most = self.lab.rounds
        for number in range(most):
            if number >= least and time.monotonic() > deadline:
                break
            order = list(ready)
            for tile in order[number % len(order) :] + order[: number % len(order)] if order else ():
                try:
                    runs[tile].append(self.score(tile, self.lab.time(self.job, tile, ready[tile])))
                except CandidateError:
                    del ready[tile], runs[tile]  # one that fails now and then is not to be used
            tell()
        if self.space.base not in runs:
            reasons = {trial.detail for trial in self.trials if self.tile_of(trial) == self.space.base and trial.detail}
            raise ScheduleError(f"the hand-picked tile {self.space.base} does not work: {'; '.join(reasons)}")
        finals = [Final(tile, times) for tile, times in runs.items()]
        base = next(final for final in finals if final.tile == self.space.base)
        return sorted(finals, key=lambda final: (final is not base and not _clearly_faster(final, base), final.ms))


def _clearly_faster(final: Final, base: Final) -> bool:
    """By the median and in nearly all rounds: kernels of 0.2 ms differed twofold from round to round on a busy
    machine, so that a median alone may be luck."""
    wins = sum(mine < theirs for mine, theirs in zip(final.runs, base.runs))
    return final.ms < (1 - NOISE) * base.ms and wins >= WON * len(base.runs)


def records_of(outcome: Outcome) -> list[Record]:
    """The records that a search ends with: the winner of each backend, the winner of all first."""
    winners = {backend_of(outcome.best.tile): outcome.best}
    for final in sorted(outcome.finals, key=lambda final: final.ms):
        winners.setdefault(backend_of(final.tile), final)
    return [record_of(outcome, final) for final in winners.values()]


def record_of(outcome: Outcome, final: Final | None = None) -> Record:
    """The record of one of the finals, by default of the winner, which may be the hand-picked tile itself."""
    job, best = outcome.job, final or outcome.best
    backend = backend_of(best.tile)
    level = resolve_any(job.target)
    gflops = outcome.flops() / best.ms / 1e6
    measured = Measured(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        strategy=outcome.strategy,
        candidates=len(outcome.trials),
        seconds=_figures(outcome.seconds),
        **asdict(job.load),
        threads=outcome.threads,
        clock=outcome.clock,  # type: ignore[arg-type]
        rounds=len(best.runs),
        ms=_figures(best.ms),
        ms_min=_figures(min(best.runs)),
        ms_max=_figures(max(best.runs)),
        default_ms=_figures(outcome.default_ms),
        gflops=_figures(gflops),
        matmul_gflops=_figures(outcome.matmul_flops / 1e9),
        matmul_gflops_after=_figures(outcome.rate_after / 1e9) if outcome.rate_after else None,
        resources=outcome.resources.get(best.tile, {}),
    )
    data = {
        "problem": job.problem.to_dict(),
        "pass": job.pass_name,
        "length": bucket(job.load.L),
        "backend": backend,
        "tile": asdict(best.tile),
        "program": program_digest(job.problem.op, job.pass_name, level.name, backend),
        "versions": builder.compiler_versions(level.name, backend),
        "measured": measured,
    }
    return Record.model_validate(data, context={"level": level})


def _figures(x: float) -> float:
    """Five significant ones."""
    return float(f"{x:.5g}")


def best_so_far(trials: list[Trial]) -> Iterator[tuple[int, float, float]]:
    """(candidates tried, seconds, best milliseconds) after each trial that has a best."""
    best, seconds = math.inf, 0.0
    for number, trial in enumerate(trials, 1):
        seconds += trial.seconds
        best = min(best, trial.score)
        if math.isfinite(best):
            yield number, seconds, best
