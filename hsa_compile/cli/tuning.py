"""Tile sizes: ``tune``, ``explain``, and the ``records`` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from hsa_compile.cli.common import Output, TargetName, console, friendly

records_app = typer.Typer(help="Look at, merge and compare tuning records.", no_args_is_help=True)

ProblemText = Annotated[str | None, typer.Option(help="A problem as JSON, or a file with one or a list of them.")]
PresetName = Annotated[str, typer.Option(help="The problems of a preset such as tiny, or of a checkpoint.")]
Lengths = Annotated[list[int] | None, typer.Option("--length", help="Tokens of a segment; several times for several.")]
Records = Annotated[list[Path] | None, typer.Argument(help="Files. Default: the user's and the packaged ones.")]


def tune(
    target: TargetName = "cpu:native",
    problem: ProblemText = None,
    preset: PresetName = "tiny",
    lengths: Lengths = None,
    passes: Annotated[
        Literal["forward", "backward", "both"], typer.Option("--pass", help="Which passes to tune.")
    ] = "both",
    batch: Annotated[int | None, typer.Option(help="Rows. Default: 1, on a GPU as many as fill it.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of memory. Default: the length, at least 4096.")] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all.")] = 300.0,
    selection: Annotated[
        Literal["local", "random"],
        typer.Option(help="What neighbouring tokens select: much the same, as in trained models, or each for itself."),
    ] = "local",
    strategy: Annotated[Literal["learned", "model", "random"], typer.Option(help="Order of the search.")] = "model",
    clock: Annotated[
        Literal["auto", "wall", "cpu"], typer.Option(help="auto: the wall's, or processor time on a busy machine.")
    ] = "auto",
    records: Annotated[
        Path | None, typer.Option(help="Where to write records. Default: $HSA_COMPILE_RECORDS, or beside the cache.")
    ] = None,
    output: Output = Path("runs/tune"),
) -> None:
    """Search for faster tiles on this machine; what is found is used from then on, `explain` says where.

    The target cuda is this machine's GPU, where TileLang and Triton programs are searched together. What was tried is
    written down as it happens: after Ctrl-C the same command goes on from there.
    """
    with friendly():
        from rich.progress import BarColumn

        from hsa_compile import tuning

        problems = tuning.problems_for(problem, preset, target)
        names = ("forward", "backward") if passes == "both" else (passes,)
        jobs = tuning.jobs_for(problems, lengths or tuning.LENGTHS[:1], names, target, context, batch, selection)
        columns = (BarColumn(), TextColumn("{task.percentage:>3.0f} % {task.description}"), TimeElapsedColumn())
        outcomes, written = [], set()
        try:
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task("starting", total=1.0)
                for outcome, path in tuning.tune(
                    jobs, budget, strategy,
                    lambda share, line: bar.update(task, completed=share, description=escape(line)),
                    None if clock == "auto" else clock, records,
                ):  # fmt: skip
                    outcomes.append(outcome)
                    written.add(path)
        except KeyboardInterrupt:
            console.print(f"stopped after {len(outcomes)} of {len(jobs)} searches; the same command goes on from there")
        if outcomes:
            console.print(tuning.outcome_table(outcomes))
            picture = tuning.plot(outcomes, output / "tune.png")
            console.print(f"records {', '.join(map(str, sorted(written)))}, {picture}")
        if len(outcomes) < len(jobs):
            raise typer.Exit(130)


def explain(
    problem: ProblemText = None, preset: PresetName = "tiny", lengths: Lengths = None, target: TargetName = "cpu:native"
) -> None:
    """Say which tile a problem's kernels are built with here, from which record, and why not from others."""
    with friendly():
        from hsa_compile import tuning

        problems = tuning.problems_for(problem, preset, target)
        for table in tuning.explain(problems, lengths or (1, *tuning.LENGTHS), target):
            if table is not None:
                console.print(table)


@records_app.command("show")
def records_show(files: Records = None) -> None:
    """Show records, and whether they still fit the programs and the compiler."""
    with friendly():
        from hsa_compile import tuning
        from hsa_compile.schedules import records

        for path in tuning.record_files(files or []):
            shelf = records.load(path)
            console.print(tuning.records_table(shelf))
            for complaint in shelf.refused:
                console.print(f"[bold yellow]refused:[/] {escape(complaint)}", highlight=False)


@records_app.command("merge")
def records_merge(
    files: Annotated[list[Path], typer.Argument(help="Files of records, of any machines.")],
    into: Annotated[Path | None, typer.Option(help="A directory. Default: the user's.")] = None,
) -> None:
    """Take in the records of other files; of two for one thing the later stays."""
    with friendly():
        from hsa_compile.schedules import records

        for path, count in records.merge(files, into).items():
            console.print(f"{count} records taken into {path}")


@records_app.command("diff")
def records_diff(old: Path, new: Path) -> None:
    """Show what differs between two files of records."""
    with friendly():
        from hsa_compile import tuning

        console.print(tuning.changes(old, new))
