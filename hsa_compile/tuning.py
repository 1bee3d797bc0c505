"""What the commands ``tune``, ``explain`` and ``records`` do: which jobs there are, and how results are told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hsa_compile.ir import Problem, ProblemError, problem_from_dict
from hsa_compile.ir.operators import Dtype
from hsa_compile.model.config import ConfigError, ModelConfig, preset
from hsa_compile.schedules import BuildError, TargetError, choose, gpu_target, records
from hsa_compile.schedules.builder import PASSES
from hsa_compile.schedules.candidates import Clock, CpuLaboratory, Job, Laboratory
from hsa_compile.schedules.choice import Choice
from hsa_compile.schedules.costs import Selection, Workload
from hsa_compile.schedules.device import device_for
from hsa_compile.schedules.space import searched, space_for
from hsa_compile.schedules.target import GPU_TARGETS, GpuTarget, resolve_any
from hsa_compile.schedules.together import search_together
from hsa_compile.schedules.tuner import Outcome, Search, best_so_far, job_flops, journal_for, records_of

LENGTHS = (256, 1024, 4096)
LEAST_CONTEXT = 4096  # tokens of memory that short segments, such as a decode's, are timed over
GPU_TOKENS, GPU_ROWS = 32768, 64  # that fill a GPU: tokens of all rows of the batch, and the most rows
Say = Callable[[float, str], None]


def parse_problems(text: str) -> list[Problem]:
    """Problems from JSON, or from a file of it: an object as ``Problem.to_dict`` gives it, or a list of such.

    Raises:
        ProblemError: it is neither, or a problem is invalid.
    """
    try:
        is_file = not text.lstrip().startswith(("{", "[")) and Path(text).is_file()
        data = json.loads(Path(text).read_text() if is_file else text)
        found = [problem_from_dict(one) for one in (data if isinstance(data, list) else [data])]
    except (ProblemError, OSError):
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise ProblemError(
            f"{text[:80]!r} is neither a file nor a problem in JSON ({error}); a problem looks like "
            '{"op": "chunk_attention", "q_heads": 16, "kv_heads": 1, "head_dim": 64, "chunk_size": 64, "top_k": 8}'
        ) from None
    if not found:
        raise ProblemError("the list of problems is empty")
    return found


def problems_for(problem: str | None, model: str, target: str) -> list[Problem]:
    """The problems given (see ``parse_problems``), else those of a model (see ``config_of``): in float32, on a GPU in
    bfloat16."""
    if problem:
        return parse_problems(problem)
    return problems_of(config_of(model), "bfloat16" if target.startswith("cuda") else "float32")


def problems_of(config: ModelConfig, dtype: Dtype = "float32") -> list[Problem]:
    """What a model's operators pose, at inference and while training."""
    return list(dict.fromkeys([*config.problems(dtype=dtype), *config.problems(training=True, dtype=dtype)]))


def full_target(name: str) -> str:
    """``cuda`` is the target of this machine's GPU, or the best known where there is none; other names are as they are.

    Raises:
        TargetError: the GPU is too old.
    """
    if name != "cuda":
        return name
    import torch

    if not torch.cuda.is_available():
        return GPU_TARGETS[0].name
    found = gpu_target(torch.cuda.get_device_capability())
    if found is None:
        raise TargetError(f"{torch.cuda.get_device_name()} is too old: kernels need compute capability 8.0")
    return found.name


def jobs_for(
    problems: Sequence[Problem],
    lengths: Sequence[int],
    passes: Sequence[str],
    target: str,
    context: int | None = None,
    batch: int | None = None,
    selection: Selection = "local",
) -> list[Job]:
    """A job for every problem, pass and length that has anything to choose.

    Args:
        context: tokens of memory; default: as long as the segment, at least 4096.
        batch: rows; default: one, on a GPU as many as fill it.
        selection: what candidates are timed on; the record says it.

    Raises:
        ConfigError: a length or the context makes no sense.
        TargetError: the target is unknown.
    """
    if bad := [length for length in (*lengths, *([context] if context is not None else [])) if length < 1]:
        raise ConfigError(f"lengths are at least 1, got {bad[0]}")
    if batch is not None and batch < 1:
        raise ConfigError(f"a batch has at least 1 row, got {batch}")
    target = full_target(target)
    gpu = isinstance(resolve_any(target), GpuTarget)

    def rows(L: int) -> int:
        return batch or (max(1, min(GPU_ROWS, GPU_TOKENS // L)) if gpu else 1)

    def load(problem: Problem, L: int) -> Workload:
        return Workload(rows(L), L, max(1, max(L, context or LEAST_CONTEXT) // problem.chunk_size), selection)

    return [
        Job(problem, name, target, load(problem, L))
        for problem in problems
        for L in lengths
        for name in passes
        if len(space_for(problem, name, target, L).tiles()) > 1
    ]


def tune(
    jobs: Sequence[Job], seconds: float, strategy: str, say: Say, clock: Clock | None = None, out: Path | None = None
) -> Iterator[tuple[Outcome, Path]]:
    """Searches for each job in turn, an equal share of the time each, on a GPU for all at once; writes and yields each
    record as it is found.

    Raises:
        BuildError: there is nothing to tune, or no compiler.
        JournalError, RecordError: results can't be written down.
    """
    if not jobs:
        raise BuildError("there is nothing to tune: the programs of these problems and passes have no choices")
    if isinstance(resolve_any(jobs[0].target), GpuTarget):
        yield from tune_gpu(jobs, seconds, strategy, say, out)
        return
    with CpuLaboratory(jobs[0].target, clock) as lab:
        for number, job in enumerate(jobs):
            yield tune_one(job, lab, seconds / len(jobs), strategy, _share(say, number, len(jobs), job), out)


def tune_gpu(
    jobs: Sequence[Job], seconds: float, strategy: str, say: Say, out: Path | None = None, lab: Any = None
) -> Iterator[tuple[Outcome, Path]]:
    """As ``tune``, of jobs on this machine's GPU; ``lab`` is for tests.

    Raises:
        BuildError: a job's hand-picked tile does not work, or the time was too short for it; the others are done.
    """
    from hsa_compile.gpu_laboratory import GpuLaboratory

    failures = []
    with lab or GpuLaboratory(jobs[0].target) as lab:
        searches = [Search(job, lab, journal_for(job, lab), strategy) for job in jobs]
        for found in search_together(searches, lab, seconds, say):
            if isinstance(found, Outcome):
                yield found, save(found, out)
            else:
                failures.append(str(found))
    if failures:
        raise BuildError("; ".join(failures))


def save(outcome: Outcome, out: Path | None = None) -> Path:
    """Writes the records of a search; returns their file.

    Raises:
        RecordError: it can't be written.
    """
    level = resolve_any(outcome.job.target)
    return records.save(records_of(outcome), device_for(level.name), level.name, out)


def _share(say: Say, number: int, count: int, job: Job) -> Say:
    name = f"{job.problem.op} {job.pass_name}, L {job.load.L}"
    return lambda share, line: say((number + share) / count, f"{name}: {line}")


def tune_one(
    job: Job, lab: Laboratory, seconds: float, strategy: str, say: Say, out: Path | None = None
) -> tuple[Outcome, Path]:
    """One search; returns what it found and the file that its record went to."""
    outcome = Search(job, lab, journal_for(job, lab), strategy).run(seconds, say)
    return outcome, save(outcome, out)


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """The best of each search beside the hand-picked tile, in cells of two lines, to fit into 80 columns."""
    out = Table(title="Best tiles", caption=_caption(outcomes))
    for name in ("search", "tile"):
        out.add_column(name, overflow="fold")
    for name in ("ms\nrange", "GFLOP/s\nmatmul", "faster\nthan", "tried\nof"):
        out.add_column(name, justify="right", no_wrap=True)
    if gpu := any(o.resources for o in outcomes):
        out.add_column("regs\nspills\nshared", justify="right", no_wrap=True)
    for o in outcomes:
        flops, best = job_flops(o.job), o.best
        failed = f"\n{sum(o.failed.values())} failed" if o.failed else ""
        out.add_row(
            f"{short_name(o.job.problem)}\n{o.job.pass_name}, L {o.job.load.L}",
            searched(best.tile, o.job.problem, o.job.pass_name, o.job.target, o.job.load.L),
            f"{best.ms:.3g}\n{min(best.runs):.3g}–{max(best.runs):.3g}",
            f"{flops / best.ms / 1e6:.1f}\n{flops / best.ms * 1e3 / o.matmul_flops:.0%}",
            f"{o.default_ms / best.ms:.2f}×\n{o.default_ms:.3g}", f"{len(o.trials)}\n{o.space_size}{failed}",
            *([_resources(o)] if gpu else []),
        )  # fmt: skip
    return out


def _resources(outcome: Outcome) -> str:
    """Of the winner: registers of a thread, spilled bytes, shared memory."""
    taken = outcome.resources.get(outcome.best.tile)
    if not taken:
        return "–"
    return f"{taken['registers']}\n{taken['spill_bytes']} B\n{taken['shared_bytes'] / 1024:.0f} KiB"


def _caption(outcomes: Sequence[Outcome]) -> str:
    if outcomes[0].clock == "device":
        rate = f"matmul: {outcomes[0].matmul_flops / 1e12:.0f} TFLOP/s at first"
        after = [o.rate_after for o in outcomes if o.rate_after]
        return f"{rate}, {min(after) / 1e12:.0f} to {max(after) / 1e12:.0f} after the final rounds" if after else rate
    matmul = f"matmul, one core's rate times the threads: {outcomes[0].matmul_flops / 1e9:.0f} GFLOP/s"
    if outcomes[0].clock == "wall":
        return matmul
    return f"{matmul}; the machine is busy with other work: processor time instead of the wall's clock"


def short_name(problem: Problem) -> str:
    """The operator and its sizes."""
    sizes = {name: value for name, value in problem.to_dict().items() if name not in ("op", "dtype")}
    return f"{problem.op} {'/'.join(str(int(value)) for value in sizes.values())} {problem.dtype}"  # type: ignore[call-overload]


def plot(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Best time so far by candidates tried, relative to the hand-picked tile's; a line a search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for o in outcomes:
        default = next((t.score for t in o.trials if t.tile == dataclasses.asdict(o.default)), math.nan)
        line = [(number, best / default) for number, _, best in best_so_far(o.trials)]
        label = f"{o.job.problem.op} {o.job.pass_name}, L {o.job.load.L}"
        axes.step(*zip(*line), where="post", label=label)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlabel="candidates tried", ylabel="best time / hand-picked tile's", title="Tuning")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def explain(problems: Sequence[Problem], lengths: Sequence[int], target: str) -> tuple[Table, Table | None]:
    """Which tile each problem, pass and length resolves to and why; and the records that were passed over.

    Raises:
        TargetError: the target is unknown.
        ScheduleError: ``$HSA_COMPILE_SCHEDULE`` makes no sense.
    """
    level = resolve_any(full_target(target))
    target = level.name
    out = Table(title=f"{level.name} on {device_for(level.name).name or 'no GPU'}")
    for name in ("problem", "pass", "L", "tile", "from", "why"):
        out.add_column(name, overflow="fold")
    seen: dict[str, str] = {}
    for problem in problems:
        for name in PASSES:
            rows: dict[tuple[str, ...], list[str]] = {}
            for length in (*lengths, None):
                found = choose(problem, name, target, length)
                shown = "any" if length is None else str(length)
                tile = searched(found.tile, problem, name, target, length)
                rows.setdefault((tile, found.origin, found.reason), []).append(shown)
                seen |= _passed_over(found)
            for row, shown_lengths in rows.items():
                out.add_row(short_name(problem), name, ", ".join(shown_lengths), *row)
    if not seen:
        return out, None
    others = Table("record", "passed over because", title="Other records of these problems")
    for line, reason in seen.items():
        others.add_row(line, reason)
    return out, others


def _passed_over(found: Choice) -> Iterator[tuple[str, str]]:
    for stored, reason in found.passed_over:
        record = stored.record
        name = f"{short_name(record.parsed_problem)} {record.pass_name}, L >= {record.length}, {stored.shelf.path.name}"
        if not reason.startswith(records.LONGER) and "record of L" not in reason:
            yield name, reason


def records_table(shelf: records.Shelf) -> Table:
    """A file of records."""
    table = Table(title=f"{shelf.device.name}, {shelf.target}", caption=str(shelf.path))
    for name in ("problem", "pass", "L >=", "tile"):
        table.add_column(name, overflow="fold")
    for name in ("ms", "GFLOP/s", "of matmul", "vs default", "date", "state"):
        table.add_column(name, justify="right")
    for record in shelf.records:
        m = record.measured
        state = "current" if records.current(record, shelf.target) else "stale"
        table.add_row(
            short_name(record.parsed_problem), record.pass_name, str(record.length), _fields(record, shelf.target),
            f"{m.ms:.3g}",
            f"{m.gflops:.1f}", f"{m.gflops / m.matmul_gflops:.0%}", f"{m.default_ms / m.ms:.2f}×", m.date[:10], state,
        )  # fmt: skip
    return table


def record_files(paths: Sequence[Path]) -> list[Path]:
    """The files given, or those in the user's and the packaged directory."""
    if paths:
        return list(paths)
    return [path for where in (records.user_directory(), records.PACKAGED) for path in sorted(where.glob("*.json"))]


def changes(old: Path, new: Path) -> Table:
    """What differs between two files of records.

    Raises:
        RecordError: one can't be read.
    """
    table = Table("record", "old", "new", title=f"{old.name} → {new.name}")
    for what, *sides in records.diff(old, new):
        cells = [
            f"{r.measured.ms:.3g} ms: {', '.join(f'{k} {v}' for k, v in r.tile.items())}" if r else "–" for r in sides
        ]
        table.add_row(what, *cells)
    return table


def _fields(record: records.Record, target: str) -> str:
    tile = record.tile_for(resolve_any(target))
    return searched(tile, record.parsed_problem, record.pass_name, target, record.length)


def config_of(model: str) -> ModelConfig:
    """The configuration of a checkpoint's directory, or of a preset.

    Raises:
        ConfigError: it is neither.
    """
    if Path(model).exists():
        from hsa_compile.model.checkpoint import read_config

        return read_config(model)[0]
    return preset(model)
