"""The main job, end to end: from a book to a served model, with what came of it on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hsa_compile import validate
from hsa_compile.bench import e2e
from hsa_compile.bench.record import write_suite
from hsa_compile.evaluation.journal import Journal
from hsa_compile.evaluation.plan import Plan
from hsa_compile.evaluation.report import rows as accuracy_rows
from hsa_compile.evaluation.run import Evaluation
from hsa_compile.evaluation.setup import prepare
from hsa_compile.export import Session, export_bundle, load_tokenizer
from hsa_compile.kernels import build_all, exported
from hsa_compile.model.data import load_text, split_text
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.train import PLOT_NAME, TrainResult, train

Spinner = Callable[[str], AbstractContextManager[Callable[[str], None]]]

MULTIPLES = (1, 4, 16)  # of the training length
QUESTIONS = 64
BENCH_SECONDS = 40.0
PROMPT_BYTES, SAMPLE_TOKENS = 200, 200


def run_demo(config: TrainConfig, output: Path, console: Console, spinner: Spinner) -> bool:
    """Builds the kernels, trains on them, exports, samples, questions, validates and measures.

    Args:
        config: what to train; its ``out`` is the checkpoint's place.
        output: directory of everything else: ``bundle``, ``samples.jsonl``, ``length.jsonl``,
            ``parity.jsonl``, ``e2e.jsonl``, ``e2e.png``.

    Returns:
        Whether all parity checks passed.
    """
    started = time.perf_counter()
    text = load_text(config.data)
    with spinner("compiling kernels") as say:
        for artifact in build_all(config.model):
            say(f"{artifact.problem.op} {artifact.pass_name} is done")
    result = train(config)
    model = result.model.eval()
    bundle = output / "bundle"
    with spinner("exporting"):
        export_bundle(model, bundle, exported(model.config))
    sample = _sample(bundle, split_text(text)[1], console)
    with spinner("asking for hidden values") as say:
        plan = Plan(("pairs",), tuple(m * config.length for m in MULTIPLES), QUESTIONS, config.seed)
        subject = prepare(result.checkpoint, plan)
        (output / "samples.jsonl").unlink(missing_ok=True)  # of a model before
        journal = Journal(output / "samples.jsonl", subject.about)
        Evaluation(subject.model, subject.samples, plan, journal, lambda line, done: say(line)).run()
        journal.close()
        accuracies = accuracy_rows(journal.lines, "hsa", config.length, config.seed)
    write_suite(output / "length.jsonl", accuracies)
    with spinner("validating") as say:
        parity = validate.run(model, bundle, split_text(text)[1], config.seed, say)
    write_suite(output / "parity.jsonl", validate.rows(parity, config.seed))
    with spinner("measuring") as say:
        rows = e2e.run(bundle, Path(config.out), seconds=BENCH_SECONDS, seed=config.seed, progress=say)
    write_suite(output / "e2e.jsonl", rows)
    plot = e2e.plot(rows, output / "e2e.png")
    summary = _summary(config, result, accuracies, time.perf_counter() - started)
    parts = (Text(sample), validate.table(parity), e2e.table(rows), summary, Text(f"speed plot  {plot}"))
    console.print(Panel(Group(*parts), title="hsa-compile", expand=False))
    return not parity.failed


def _sample(bundle: Path, text: bytes, console: Console) -> str:
    """Streams what ONNX Runtime makes of a few words of the held-out text, and returns it."""
    session = Session(bundle)
    tokenizer = load_tokenizer(bundle, session.manifest)
    prompt = text[:PROMPT_BYTES].decode(errors="replace")
    tokens = session.generate(tokenizer.encode(prompt), SAMPLE_TOKENS, temperature=0.7, top_p=0.9)
    console.print(prompt, end="", style="dim", highlight=False, markup=False)
    decoder, pieces = tokenizer.stream(), []
    for token in tokens:
        pieces.append(decoder.push([token]))
        print(pieces[-1], end="", flush=True)
    print()
    return f"… {prompt[-60:]}█{''.join(pieces)}"


def _summary(config: TrainConfig, result: TrainResult, accuracies: list[dict[str, Any]], seconds: float) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("loss", f"{result.losses[0]:.3f} → {result.losses[-1]:.3f} in {result.seconds:.0f} s")
    table.add_row("loss curve", str(Path(config.out) / PLOT_NAME))
    for row in accuracies:
        times = f"{row['L'] // config.length}× the training length"
        interval = f"{row['ci_low']:.0%} … {row['ci_high']:.0%}"
        table.add_row(f"retrieval at {row['L']:,} tokens", f"{row['accuracy']:.0%} ({interval}), {times}")
    table.add_row("all of it took", f"{seconds:.0f} s")
    return table
