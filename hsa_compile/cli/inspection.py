"""Looking into a model: ``diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa_compile.cli.common import Checkpoint, Output, Seed, console, friendly, spinner


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
