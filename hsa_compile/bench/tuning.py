"""Which order of search finds a fast tile after the fewest candidates: strategies, replayed on one table of timings;
and on a GPU what tuning gains for every shape of the benchmark of kernels.

A random sample of each search space is built, checked and timed once, by the tuner itself; every strategy then searches
that table, with many seeds. So all see the same timings, and noise can't favour one.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hsa_compile.bench.record import common_keys
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.schedules.candidates import CpuLaboratory, Job
from hsa_compile.schedules.choice import Tile, backend_of
from hsa_compile.schedules.costs import Workload
from hsa_compile.schedules.strategies import NAMES, Strategy
from hsa_compile.schedules.together import search_together
from hsa_compile.schedules.tuner import BATCH, Outcome, Search, journal_for

SEEDS = 50
COLORS = {"learned": "C0", "model": "C1", "random": "C2"}
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


def default_jobs() -> list[Job]:
    """A forward of the reference family, the tiny model's backward while it is trained, and a selection."""
    return [
        Job(ChunkAttention(16, 1, 64, 64, 8), "forward", "cpu:native", Workload(1, 1024, 16)),
        Job(ChunkAttention(2, 1, 32, 16, 4), "backward", "cpu:native", Workload(1, 256, 16)),
        Job(ChunkSelect(1, 1, 64, 64, 16), "forward", "cpu:native", Workload(1, 4096, 64)),
    ]


def run(
    jobs: Sequence[Job], seconds: float, seed: int = 0, progress: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Times samples of the jobs' spaces for ``seconds`` in all (going on where the journals end), then replays."""
    rows: list[dict[str, Any]] = []
    with CpuLaboratory("cpu:native") as lab:
        for job in jobs:
            search = Search(job, lab, journal_for(job, lab), "random", seed)
            name = f"{job.problem.op} {job.pass_name}, L {job.load.L}"
            outcome = search.run(seconds / len(jobs), lambda share, line, name=name: progress(f"{name}: {line}"))  # type: ignore[misc]
            shared = {
                **common_keys("tuning", seed), "problem": job.problem.to_dict(), "pass": job.pass_name,
                **dataclasses.asdict(job.load), "clock": outcome.clock, "threads": outcome.threads,
                "space": outcome.space_size, "sampled": len(search.scores),
            }  # fmt: skip
            costs = {t: trial.seconds for trial in search.trials if (t := search.tile_of(trial)) is not None}
            rows += [{**shared, **row} for row in replay(search, costs, BATCH * lab.workers)]
    return rows


def gpu_jobs(target: str, lengths: Sequence[int] = ()) -> list[Job]:
    """Every shape of the benchmark of kernels that a tile may differ for: both passes of attention and of selection."""
    from hsa_compile.bench import gpu_kernels

    loads: dict[tuple[Problem, int], Workload] = {}
    for shape in gpu_kernels.default_shapes(lengths):
        loads.setdefault((shape.problem, shape.L), Workload(shape.B, shape.L, shape.L // shape.chunk_size))
    for B, L, C, Dr in gpu_kernels.SELECT_SIZES:
        problem = ChunkSelect(1, 1, Dr, gpu_kernels.CHUNK, gpu_kernels.SELECTED, dtype="bfloat16")
        if not lengths or L in lengths:
            loads.setdefault((problem, L), Workload(B, L, C))
    return [
        Job(problem, name, target, load)
        for (problem, L), load in loads.items()
        for name in ("forward", "backward")
        if name == "forward" or load.C * problem.chunk_size == L
    ]


def run_gpu(
    jobs: Sequence[Job],
    seconds: float,
    strategy: str = "model",
    sampled: Sequence[Job] = (),
    seed: int = 0,
    progress: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]], Outcome], object] = lambda rows, outcome: None,
    lab: Any = None,
) -> list[dict[str, Any]]:
    """Tunes all jobs side by side for ``seconds``, and replays the strategies on those of ``sampled``, whose candidates
    are drawn at random instead. Returns the lines of the suite.

    Args:
        keep: is given the lines so far and what the last search found.
        lab: for tests.

    Raises:
        BuildError, TargetError: there is no GPU, or no compiler.
    """
    from hsa_compile.gpu_laboratory import GpuLaboratory

    rows: list[dict[str, Any]] = []
    with lab or GpuLaboratory(jobs[0].target) as lab:
        common = common_keys("tuning", seed, "cuda")
        searches = [
            Search(job, lab, journal_for(job, lab), "random" if job in sampled else strategy, seed) for job in jobs
        ]
        found = search_together(searches, lab, seconds, lambda share, line: progress(f"{share:.0%}: {line}"))
        for search, outcome in zip(searches, found):
            job = search.job
            shared = {**common, "problem": job.problem.to_dict(), "pass": job.pass_name, **dataclasses.asdict(job.load)}
            if not isinstance(outcome, Outcome):
                rows.append({**shared, "strategy": search.strategy.name, "failed": str(outcome)})
                continue
            shared |= {"clock": outcome.clock, "threads": outcome.threads, "space": outcome.space_size}
            rows.append({**shared, **_tuned(outcome)})
            if job in sampled:
                costs = {t: trial.seconds for trial in search.trials if (t := search.tile_of(trial)) is not None}
                shared |= {"sampled": len(search.scores)}
                rows += [{**shared, **row} for row in replay(search, costs, lab.workers)]
            keep(rows, outcome)
    return rows


def _tuned(outcome: Outcome) -> dict[str, Any]:
    """Tuned against hand-picked: the line of a search."""
    best = outcome.best
    of_backend: dict[str, float] = {}
    for final in sorted(outcome.finals, key=lambda final: final.ms):
        of_backend.setdefault(f"{backend_of(final.tile)}_ms", round(final.ms, 5))
    return {
        "strategy": f"{outcome.strategy}, tuned", "candidates": len(outcome.trials), "failed": outcome.failed,
        "seconds": round(sum(trial.seconds for trial in outcome.trials), 1), "best_ms": round(best.ms, 5),
        "best_ms_min": round(min(best.runs), 5), "best_ms_max": round(max(best.runs), 5),
        "default_ms": round(outcome.default_ms, 5), **of_backend, "backend": backend_of(best.tile),
        "tile": dataclasses.asdict(best.tile), "resources": outcome.resources.get(best.tile, {}),
        "tflops": round(outcome.flops() / best.ms / 1e9, 2), "ceiling_tflops": round(outcome.matmul_flops / 1e12, 1),
        "ceiling_tflops_after": round(outcome.rate_after / 1e12, 1) if outcome.rate_after else None,
    }  # fmt: skip


def replay(search: Search, seconds: dict[Tile, float], batch: int, seeds: int = SEEDS) -> Iterator[dict[str, Any]]:
    """Lines of the suite: for each strategy and number of candidates the median over seeds of the best time found; and
    what it would be without the hand-picked tiles (``unaided``)."""
    scores, base = search.scores, search.space.base
    for name, unaided in itertools.product(NAMES, (False, True)):
        orders = [_order(name, search, batch, seed, unaided) for seed in range(seeds)]
        for count in COUNTS:
            # A strategy that has run out has found what it will find.
            cut = [order[:count] for order in orders]
            if count > max(map(len, orders)):
                break
            best = [min(scores[tile] for tile in order) for order in cut]
            yield {
                "strategy": f"{name}, unaided" if unaided else name, "candidates": count,
                "best_ms": statistics.median(best), "best_ms_min": min(best),
                "best_ms_max": max(best), "default_ms": scores[base], "sample_best_ms": min(scores.values()),
                "seconds": round(statistics.median(sum(seconds[tile] for tile in order) for order in cut), 1),
            }  # fmt: skip


def _order(name: str, search: Search, batch: int, seed: int, unaided: bool = False) -> list[Tile]:
    """The order in which a strategy would have tried the sample: the hand-picked tile first, or not at all."""
    first = search.space.first if unaided else []
    strategy = Strategy(name, [tile for tile in search.scores if tile not in first], search.estimate, seed)
    base = search.space.base
    seen = {} if unaided else {base: search.scores[base]}
    while len(seen) < COUNTS[-1] and (proposed := strategy.propose(batch, seen)):
        seen |= {tile: search.scores[tile] for tile in proposed}
    return list(seen)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Best time by candidates tried, over the best of the sample."""
    counts = sorted({row["candidates"] for row in rows if "sample_best_ms" in row})
    out = Table(title="Best time after so many candidates, over the sample's best", caption=f"median of {SEEDS} seeds")
    for name in ("problem", "pass", "strategy"):
        out.add_column(name)
    for count in counts:
        out.add_column(str(count), justify="right")
    for key, group in _groups(rows).items():
        cells = {row["candidates"]: f"{row['best_ms'] / row['sample_best_ms']:.3f}" for row in group}
        out.add_row(*key, *(cells.get(count, "") for count in counts))
    return out


def tuned_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tuned against hand-picked, a line a search."""
    out = Table(title="Tuned against hand-picked tiles")
    for name in ("problem", "pass", "B", "L", "backend"):
        out.add_column(name)
    for name in ("ms", "default ms", "faster", "tried", "failed"):
        out.add_column(name, justify="right")
    for row in rows:
        if row["strategy"].endswith(", tuned"):
            sizes = "/".join(str(int(x)) for k, x in row["problem"].items() if k not in ("op", "dtype"))
            out.add_row(
                f"{row['problem']['op']} {sizes}", row["pass"], str(row["B"]), str(row["L"]), row["backend"],
                f"{row['best_ms']:.4g}", f"{row['default_ms']:.4g}", f"{row['default_ms'] / row['best_ms']:.2f}×",
                str(row["candidates"]), str(sum(row["failed"].values())),
            )  # fmt: skip
    return out


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "sample_best_ms" not in row:
            continue
        name = f"{row['problem']['op']}, L {row['L']}"
        groups.setdefault((name, row["pass"], row["strategy"]), []).append(row)
    return groups


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Best time over the sample's best by candidates tried; a panel a problem."""
    from matplotlib.figure import Figure

    groups = _groups(rows)
    panels = list(dict.fromkeys(key[:2] for key in groups))
    figure = Figure(figsize=(4 * max(1, len(panels)), 3.5), layout="constrained")
    for axis, panel in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels):
        for (problem, pass_name, strategy), group in groups.items():
            if (problem, pass_name) == panel:
                line = [(row["candidates"], row["best_ms"] / row["sample_best_ms"]) for row in group]
                name, _, unaided = strategy.partition(", ")
                axis.plot(*zip(*line), COLORS[name], marker="o", label=strategy, linestyle="--" if unaided else "-")
        axis.set(title=", ".join(panel), xlabel="candidates tried", ylabel="best time / sample's best", xscale="log")
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
