"""How a model does on long texts: ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hsa_compile.cli.common import Checkpoint, Output, Seed, console, fail, friendly, tokens

if TYPE_CHECKING:
    from hsa_compile.evaluation.run import Evaluation


def evaluate(
    checkpoint: Checkpoint,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of pairs, s-n, mk, mq, mv, vt, cwe, fwe, niah, qa1 … qa5, ppl. Default: most of them."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of context, as in 4K,64K,1M.")] = "4K",
    n: Annotated[int, typer.Option("-n", help="Questions a task and length.")] = 64,
    text: Annotated[
        Path | None, typer.Option(help="Text to hide facts in, its last 5 %. Default: that of the training, or a book.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face tokenizer.json. Default: the checkpoint's, or bytes.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = None,
    segment: Annotated[int, typer.Option(help="Tokens a prefill step.")] = 8192,
    patch_from: Annotated[
        str, typer.Option(help="From this length on, facts are written over one haystack that is read once.")
    ] = "128K",
    offload: Annotated[bool, typer.Option("--offload", help="Keep the chunk memory in the host's.")] = False,
    check: Annotated[int, typer.Option(help="Patched questions a task and length to ask after a full prefill.")] = 0,
    decoded: Annotated[
        int | None, typer.Option(help="Questions a task and length decoded token by token, as sets always are. All.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Begin nothing after so many; the same command goes on. 0: all.")] = 0,
    variant: Annotated[str, typer.Option(help="What the model is called in the results.")] = "hsa",
    seed: Seed = 0,
    output: Output = Path("runs/eval"),
) -> None:
    """Ask a model for facts hidden in texts of any length, and measure its perplexity after them.

    RULER-style tasks (s-n, mk, mq, mv, vt, cwe, fwe), BABILong-style ones (qa1 … qa5) and perplexity (ppl); exact match
    by greedy decoding, of the sets that mv, cwe and fwe ask for in any order. Writes samples.jsonl, which the same
    command goes on from after Ctrl-C, length.jsonl, accuracy.png and depth.png.
    """
    with friendly():
        from hsa_compile.evaluation.journal import Journal
        from hsa_compile.evaluation.plan import DEFAULT_TASKS, Plan
        from hsa_compile.evaluation.run import Evaluation
        from hsa_compile.evaluation.setup import prepare

        names = DEFAULT_TASKS if tasks is None else tuple(name.strip() for name in tasks.split(","))
        plan = Plan(
            names, tuple(tokens(x) for x in lengths.split(",")), n, seed, segment, patch_from=tokens(patch_from),
            offload=offload, check=check, decoded=decoded, seconds=seconds,
        )  # fmt: skip
        subject = prepare(checkpoint, plan, text, tokenizer, device, dtype)
        journal = Journal(output / "samples.jsonl", subject.about)
        evaluation = Evaluation(subject.model, subject.samples, plan, journal)
        try:
            whole = _with_progress(evaluation)
        except KeyboardInterrupt:
            whole = False
        journal.close()
        _report(evaluation, output, variant, subject.train_length, device)
        if not whole:
            console.print("stopped before the end; the same command goes on")
            raise typer.Exit(130)


def _with_progress(evaluation: Evaluation) -> bool:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("asking", total=evaluation.total)
        evaluation.progress = lambda line, done: bar.update(task, description=line, advance=done)
        return evaluation.run()


def _report(evaluation: Evaluation, output: Path, variant: str, train_length: int | None, device: str) -> None:
    from hsa_compile.bench.record import write_suite
    from hsa_compile.evaluation import report

    lines = evaluation.journal.lines
    rows = report.rows(lines, variant, train_length, evaluation.plan.seed, device)
    if not rows:
        fail("nothing was measured; give it more time")
    console.print(report.table(rows))
    if (costs := report.costs_table(rows)) is not None:
        console.print(costs)
    paths = [write_suite(output / "length.jsonl", rows), *report.plot(rows, lines, output)]
    console.print(", ".join(map(str, paths)))


def compare(
    results: Annotated[list[Path], typer.Argument(help="Files length.jsonl that `eval` wrote.", show_default=False)],
    tasks: Annotated[str, typer.Option(help="What the mean is of.")] = "s-n,mq,vt",
) -> None:
    """Show evaluations of several models in one table: rows are variants, columns are lengths."""
    with friendly():
        from hsa_compile.evaluation import report
        from hsa_compile.evaluation.journal import read_rows

        rows = [row for path in results for row in read_rows(path)]
        console.print(report.comparison(rows, [task.strip() for task in tasks.split(",")]))


def harness(
    checkpoint: Checkpoint,
    tasks: Annotated[str, typer.Option(help="Of the harness, as in niah_single_1,niah_multikey_2.")] = "niah_single_1",
    lengths: Annotated[str, typer.Option(help="4K, 8K, … 128K.")] = "4K",
    n: Annotated[int, typer.Option("-n", help="Samples a task.")] = 50,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Output = Path("runs/harness"),
) -> None:
    """Let lm-evaluation-harness judge a model whose tokens are bytes, by its own RULER tasks.

    No download need niah_single_1, niah_multikey_2, niah_multikey_3, ruler_fwe, and from 16K on ruler_vt and
    ruler_cwe. Writes harness.jsonl.
    """
    with friendly():
        from hsa_compile.bench.record import common_keys, write_suite
        from hsa_compile.evaluation.harness import run_harness
        from hsa_compile.model.checkpoint import load_checkpoint

        model = load_checkpoint(checkpoint, device)
        if device == "cuda":
            model = model.bfloat16()
        names = [name.strip() for name in tasks.split(",")]
        found = run_harness(model, names, [tokens(x) for x in lengths.split(",")], n)
        rows = [
            {**common_keys("harness", 0, device), "task": task, "L": int(L), "n": n, "score": round(score, 4)}
            for task, scores in found.items() for L, score in scores.items()
        ]  # fmt: skip
        for row in rows:
            console.print(f"{row['task']} at {row['L']:,} tokens: {row['score']:.0%} of {n}")
        console.print(str(write_suite(output / "harness.jsonl", rows)))
