"""Looking into a model: ``diagnose``, ``margins``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa_compile.cli.common import Checkpoint, Output, Seed, console, friendly, spinner, tokens


def diagnose(
    checkpoint: Checkpoint,
    text: Annotated[
        Path | None, typer.Option(help="A text file. Default: a book with hidden pairs, as training sees it.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face tokenizer.json. Default: the checkpoint's, or bytes.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens to read. Default: all of a file, 4096 of the book.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Tokens to measure at, drawn from all.")] = 256,
    seed: Seed = 0,
    output: Output = Path("runs/diagnose"),
) -> None:
    """Measure how well a model selects: its scores beside the attention mass of every chunk, layer by layer.

    Says how the scores correlate with the true mass, how many of the best chunks are selected, how much of full
    attention they hold, and how sharp and how full the selections are.
    """
    with friendly():
        from hsa_compile import diagnosis
        from hsa_compile.bench.record import write_suite
        from hsa_compile.model.checkpoint import load_checkpoint
        from hsa_compile.model.diagnose import diagnose as measure

        model = load_checkpoint(checkpoint)
        ids = diagnosis.read_tokens(model.config, checkpoint, text, tokenizer, length, seed)
        with spinner(f"reading {len(ids):,} tokens"):
            measured = measure(model, ids, queries, seed)
        rows = diagnosis.rows(measured, model.config, len(ids), seed)
        console.print(diagnosis.table(rows))
        written = write_suite(output / "diagnose.jsonl", rows)
        console.print(f"{written}, {diagnosis.plot(measured, output / 'diagnose.png')}")


def margins(
    checkpoint: Checkpoint,
    tasks: Annotated[str, typer.Option(help="Of eval's, such as hide facts.")] = "s-n,mk",
    lengths: Annotated[str, typer.Option(help="Tokens of context, as in 4K,64K,1M.")] = "4K",
    n: Annotated[int, typer.Option("-n", help="Questions a task and length.")] = 12,
    text: Annotated[
        Path | None, typer.Option(help="Text to hide facts in, its last 5 %. Default: that of the training, or a book.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face tokenizer.json. Default: the checkpoint's, or bytes.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, bfloat16 on a GPU.")] = None,
    segment: Annotated[int, typer.Option(help="Tokens a prefill step.")] = 8192,
    seed: Seed = 0,
    output: Output = Path("runs/margins"),
) -> None:
    """Measure why a model misses at length: how far the chunks that an answer needs score above all others.

    Asks what `eval` asks, feeds it the right answers, and says layer by layer how far the right chunk's score lies
    above the others' mean, in their standard deviations, how far it would have to, and whether it was selected. Writes
    margins.jsonl and margins.png.
    """
    with friendly():
        from hsa_compile.bench.record import write_suite
        from hsa_compile.evaluation import margin_report
        from hsa_compile.evaluation.margins import ask_all
        from hsa_compile.evaluation.plan import Plan
        from hsa_compile.evaluation.setup import prepare

        names = tuple(name.strip() for name in tasks.split(","))
        plan = Plan(names, tuple(tokens(x) for x in lengths.split(",")), n, seed, segment)
        subject = prepare(checkpoint, plan, text, tokenizer, device, dtype)
        with spinner("asking") as say:
            asked = list(ask_all(subject.model, subject.samples, plan, say))
        top_k = subject.model.config.top_k
        rows = margin_report.rows(asked, top_k, subject.train_length, seed, device)
        console.print(margin_report.table(rows))
        written = write_suite(output / "margins.jsonl", rows)
        console.print(f"{written}, {margin_report.plot(rows, output / 'margins.png')}")
