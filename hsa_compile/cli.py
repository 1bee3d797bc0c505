"""The command line. Every command is a few lines over a function that Python users call as well."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from hsa_compile.model.train import TrainResult

app = typer.Typer(
    help="Train, compile and deploy language models with hierarchical sparse attention.\n\n"
    "The way through: [bold]train[/] a model, [bold]build[/] its kernels, [bold]export[/] it as a bundle, "
    "[bold]run[/] that in ONNX Runtime, [bold]validate[/] that all agree, [bold]bench[/] how fast it is. "
    "[bold]demo[/] goes all of it; [bold]doctor[/] says what is missing.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
records_app = typer.Typer(help="Look at, merge and compare tuning records.", no_args_is_help=True)
app.add_typer(records_app, name="records")
bench_app = typer.Typer(help="Measure models or kernels; saves JSON and a picture.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
# Tables that go to a file or a pipe are not squeezed into 80 columns.
console = Console(width=None if Console().is_terminal else 110)

Checkpoint = Annotated[Path, typer.Argument(help="Directory that `train` wrote.", show_default=False)]
Bundle = Annotated[Path, typer.Argument(help="Directory that `export` wrote.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="cpu:native, or a level such as cpu:x86-64-v3.")]
AnyTargetName = Annotated[str, typer.Option("--target", "-t", help="A CPU level as for export, or cuda:sm_90a.")]
Data = Annotated[Path | None, typer.Option(help="A text file or a directory of them. Default: a public-domain book.")]
ProblemText = Annotated[str | None, typer.Option(help="A problem as JSON, or a file with one or a list of them.")]
PresetName = Annotated[str, typer.Option(help="The problems of a preset such as tiny, or of a checkpoint.")]
Lengths = Annotated[list[int] | None, typer.Option("--length", help="Tokens of a segment; several times for several.")]
Records = Annotated[list[Path] | None, typer.Argument(help="Files. Default: the user's and the packaged ones.")]
Seed = Annotated[int, typer.Option(help="Makes the run repeatable.")]

# What users can cause and mend: told in a line, without a traceback. Looked up by name, so that the modules that
# define them are not imported to say --help.
_USER_ERRORS = {
    "BuildError", "BundleError", "CheckpointError", "ConfigError", "DataError", "JournalError", "LibraryError",
    "ProblemError", "RecordError", "ScheduleError", "TargetError", "TrainingError",
}  # fmt: skip
_EXTRAS = {
    "torch": "train", "safetensors": "train", "matplotlib": "train", "tokenizers": "tokenizers", "onnx": "export",
    "onnxscript": "export", "pydantic": "compile",
}  # fmt: skip


@contextmanager
def friendly() -> Iterator[None]:
    """Turns errors that users can mend into one red line and exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'hsa-compile[{_EXTRAS[error.name]}]'")
    except Exception as error:
        if type(error).__name__ not in _USER_ERRORS:
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a line that changes; the function it gives sets the line."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text)
        yield lambda line: bar.update(task, description=escape(f"{text}: {line}"))


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is built and why.")] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("hsa_compile").setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="TOML or JSON file of training fields; options go first."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write. Default: runs/tiny.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of the model: tiny (default), 25m, 60m, 240m or 345m.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A text file, a directory of them, or of token shards. Default: a book.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer.json. Default: bytes.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates. Default: the recipe's, minutes for tiny.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sample.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples an update.")] = None,
    text_share: Annotated[float | None, typer.Option(help="Part of a batch without hidden pairs.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts that a batch is computed in.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), or bfloat16 by autocast.")] = None,
    recompute: Annotated[bool | None, typer.Option(help="Make activations again, to save memory.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between states to resume from; 0: none.")] = None,
    keep: Annotated[int | None, typer.Option(help="States that are kept.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default) or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the run repeatable. Default: 0.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished training in the output.")] = False,
) -> None:
    """Train a model on text with hidden key-value pairs; writes a checkpoint, metrics and a loss plot.

    Ctrl-C and SIGTERM save what is needed to go on; the same command with --resume does. Under torchrun the model is
    sharded over the processes.
    """
    with friendly():
        from hsa_compile.model.config import preset as preset_config
        from hsa_compile.model.recipe import TrainConfig, read_recipe
        from hsa_compile.model.resume import saved_recipe
        from hsa_compile.model.train import train as run_training

        given: dict[str, Any] = {
            "out": _text(output), "model": None if preset is None else preset_config(preset), "data": _text(data),
            "tokenizer": _text(tokenizer), "steps": steps, "length": length, "batch": batch, "text_share": text_share,
            "accumulate": accumulate, "dtype": dtype, "recompute": recompute, "save_every": save_every, "keep": keep,
            "device": device, "seed": seed,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        config = TrainConfig() if recipe is None else read_recipe(recipe)
        if resume and recipe is None:
            config = saved_recipe(given.get("out", config.out))
        result = run_training(dataclasses.replace(config, **given), resume)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
            _say_how_it_went(result)
        if result.interrupted:
            raise typer.Exit(130)


def _say_how_it_went(result: TrainResult) -> None:
    console.print(f"loss {result.losses[0]:.3f} → {result.losses[-1]:.3f} in {result.seconds:.0f} s")
    console.print(f"checkpoint {result.checkpoint}, loss plot {result.checkpoint / 'loss.png'}")
    if result.interrupted:
        console.print(f"stopped at step {len(result.losses)}; the same command with --resume goes on")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@app.command()
def tokenize(
    data: Annotated[Path, typer.Argument(help="A text file or a directory of them.", show_default=False)],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer.json.", show_default=False)],
    output: Output = Path("runs/tokens"),
) -> None:
    """Write text as token shards, which training maps into memory instead of loading them."""
    with friendly():
        from hsa_compile.model.data import text_files
        from hsa_compile.model.shards import encode_files, write_shards

        with spinner("tokenizing") as say:
            pieces, vocab_size = encode_files(text_files(data), tokenizer, say)
            count = write_shards(output, pieces, vocab_size, str(tokenizer))
        console.print(f"{count:,} tokens of a vocabulary of {vocab_size:,} in {output}")


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A checkpoint, or a preset such as tiny.")] = "tiny",
    target: AnyTargetName = "cpu:native",
    training: Annotated[bool, typer.Option(help="Also the backward passes.")] = True,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the tensors. Default: float32 on CPUs, bfloat16 on GPUs."),
    ] = None,
) -> None:
    """Compile the kernels that a model needs; they are kept and found again.

    GPU targets such as cuda:sm_90a need nvcc and TileLang, but no GPU.
    """
    with friendly():
        from rich.table import Table

        from hsa_compile.kernels import build_all
        from hsa_compile.tuning import config_of

        config = config_of(model)
        table = Table("operator", "pass", "target", "library")
        with spinner("compiling") as say:
            for artifact in build_all(config, training, target, dtype, every_length=True):
                say(f"{artifact.problem.op} {artifact.pass_name} is done")
                table.add_row(artifact.problem.op, artifact.pass_name, artifact.target, str(artifact.library))
        console.print(table)


@app.command()
def export(checkpoint: Checkpoint, output: Output = Path("runs/bundle"), target: TargetName = "cpu:native") -> None:
    """Write a bundle: ONNX graph, operator library and description, for machines without PyTorch or a compiler."""
    with friendly():
        from hsa_compile.export import export_bundle
        from hsa_compile.kernels import build_all
        from hsa_compile.model.checkpoint import load_checkpoint
        from hsa_compile.schedules import resolve

        resolve(target)  # bundles hold CPU kernels: other names are refused before any work
        with spinner("exporting") as say:
            model = load_checkpoint(checkpoint).eval()
            say("kernels")
            kernels = list(build_all(model.config, training=False, target=target))
            say("graph")
            export_bundle(model, output, kernels)
        console.print(f"bundle {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


@app.command()
def run(
    bundle: Bundle,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability.")] = 1.0,
    seed: Seed = 0,
    fused: Annotated[bool, typer.Option(help="The bundle's kernels, or the graph's function bodies.")] = True,
) -> None:
    """Stream text from a bundle in ONNX Runtime."""
    with friendly():
        from hsa_compile.export import Session
        from hsa_compile.model.tokenizer import ByteTokenizer

        tokenizer = ByteTokenizer()
        ids = tokenizer.encode(prompt)
        if not ids:
            _fail("the prompt is empty; give at least one character")
        session = Session(bundle, fused=fused)
        decoder = tokenizer.stream()
        try:
            tokens = session.generate(ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        except ValueError as error:
            _fail(str(error))
        console.print(prompt, end="", style="dim", highlight=False, markup=False)
        for token in tokens:
            print(decoder.push([token]), end="", flush=True)
        print(decoder.finish())


@app.command()
def validate(
    checkpoint: Checkpoint,
    bundle: Bundle,
    data: Data = None,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the table as JSON Lines.")] = None,
) -> None:
    """Check that reference, eager, compiled and ONNX Runtime agree; exits with 1 where they don't."""
    with friendly():
        from hsa_compile import validate as parity
        from hsa_compile.bench.record import write_suite
        from hsa_compile.model.checkpoint import load_checkpoint
        from hsa_compile.model.data import load_text, split_text

        with spinner("validating") as say:
            held_out = split_text(load_text(data))[1]
            checks = parity.run(load_checkpoint(checkpoint).eval(), bundle, held_out, seed, say)
        console.print(parity.table(checks))
        if output is not None:
            write_suite(output, parity.rows(checks, seed))
        if failed := sum(not check.passed for check in checks):
            _fail(f"{failed} of {len(checks)} comparisons failed")


def _save(module: Any, rows: list[dict[str, Any]], output: Path, suite: str) -> None:
    from hsa_compile.bench.record import write_suite

    console.print(module.table(rows))
    written = write_suite(output / f"{suite}.jsonl", rows)
    console.print(f"{written}, {module.plot(rows, output / f'{suite}.png')}")


@bench_app.command("models")
def bench_models(
    checkpoint: Checkpoint,
    bundle: Bundle,
    output: Output = Path("runs/bench"),
    longest: Annotated[int, typer.Option(min=1024, help="Longest context.")] = 32768,
    seconds: Annotated[float, typer.Option(help="Time for all.")] = 60.0,
    seed: Seed = 0,
) -> None:
    """Prefill and decode by length: eager, compiled, ONNX Runtime, and a dense model of the same size."""
    with friendly():
        from hsa_compile.bench import models
        from hsa_compile.model.checkpoint import load_checkpoint

        lengths = [1024 << i for i in range((longest // 1024).bit_length())]
        with spinner("measuring") as say:
            rows = models.run(load_checkpoint(checkpoint).eval(), bundle, lengths, seconds, seed, say)
        _save(models, rows, output, "e2e")


@bench_app.command("kernels")
def bench_kernels(
    output: Output = Path("runs/bench"),
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Tokens; may be given several times.")] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="cpu:native, or cuda for the first GPU.")
    ] = "cpu:native",
    seed: Seed = 0,
) -> None:
    """Rates of the operators, checked before they are timed, beside eager, dense and public implementations.

    On a CPU beside eager gather + einsum and dense attention; on a GPU beside fla-core, dense attention (cuDNN, FA2)
    and a composition of PyTorch's variable-length attention, where they are installed.
    """
    with friendly():
        from hsa_compile.bench import gpu_kernels, kernels

        if target not in ("cpu:native", "cuda"):
            _fail(f"kernels are measured on cpu:native or cuda, not on {target}")
        bench: Any = gpu_kernels if target == "cuda" else kernels
        shapes = bench.default_shapes(lengths) if lengths else bench.default_shapes()
        with spinner("measuring") as say:
            rows = bench.run(shapes, seed, say)
        _save(kernels, rows, output, "kernels")


@bench_app.command("tuning")
def bench_tuning(
    output: Output = Path("runs/bench"),
    seconds: Annotated[float, typer.Option(help="Time for all; a later run goes on with the samples of this.")] = 240.0,
    seed: Seed = 0,
) -> None:
    """Compare the tuner's strategies: best time by candidates tried, on samples of three search spaces."""
    with friendly():
        from hsa_compile.bench import tuning

        with spinner("measuring") as say:
            rows = tuning.run(tuning.default_jobs(), seconds, seed, say)
        _save(tuning, rows, output, "tuning")


@app.command()
def tune(
    target: TargetName = "cpu:native",
    problem: ProblemText = None,
    preset: PresetName = "tiny",
    lengths: Lengths = None,
    passes: Annotated[
        Literal["forward", "backward", "both"], typer.Option("--pass", help="Which passes to tune.")
    ] = "both",
    context: Annotated[int | None, typer.Option(help="Tokens of memory. Default: the length, at least 4096.")] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all.")] = 300.0,
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

    What was tried is written down as it happens: after Ctrl-C the same command goes on from there.
    """
    with friendly():
        from rich.progress import BarColumn

        from hsa_compile import tuning

        problems = tuning.parse_problems(problem) if problem else tuning.problems_of(tuning.config_of(preset))
        names = ("forward", "backward") if passes == "both" else (passes,)
        jobs = tuning.jobs_for(problems, lengths or tuning.LENGTHS[:1], names, target, context)
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


@app.command()
def explain(
    problem: ProblemText = None, preset: PresetName = "tiny", lengths: Lengths = None, target: TargetName = "cpu:native"
) -> None:
    """Say which tile a problem's kernels are built with here, from which record, and why not from others."""
    with friendly():
        from hsa_compile import tuning

        problems = tuning.parse_problems(problem) if problem else tuning.problems_of(tuning.config_of(preset))
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


@app.command()
def doctor() -> None:
    """Say what is installed, what this machine can do and what is missing."""
    from hsa_compile.doctor import report

    table, complete = report()
    console.print(table)
    if not complete:
        _fail("something above is missing")


@app.command()
def demo(
    output: Output = Path("runs/demo"),
    data: Data = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the training; fewer for a quick look.")] = None,
    seed: Seed = 0,
) -> None:
    """Go all of the way: train, build, export, run, validate, bench; ends with one screen."""
    with friendly():
        from hsa_compile.demo import run_demo
        from hsa_compile.model.recipe import TrainConfig

        # A demo that was stopped starts anew.
        config = TrainConfig(out=str(output / "checkpoint"), data=_text(data), seed=seed, save_every=0)
        if steps is not None:
            config = dataclasses.replace(config, steps=steps)
        if not run_demo(config, output, console, spinner):
            _fail("the parity table has failures")


if __name__ == "__main__":
    app()
