"""The ``bench`` commands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hsa_compile.cli.common import Bundle, Output, Seed, console, fail, friendly, spinner, tokens

if TYPE_CHECKING:
    from hsa_compile.bench.kernels import Shape

bench_app = typer.Typer(help="Measure models or kernels; saves JSON and a picture.", no_args_is_help=True)


def _save(module: Any, rows: list[dict[str, Any]], output: Path, suite: str) -> None:
    from hsa_compile.bench.record import write_suite

    console.print(module.table(rows))
    written = write_suite(output / f"{suite}.jsonl", rows)
    console.print(f"{written}, {module.plot(rows, output / f'{suite}.png')}")


@bench_app.command("e2e")
def bench_e2e(
    bundle: Bundle,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The same model for PyTorch. Default: new weights of the bundle's sizes.")
    ] = None,
    output: Output = Path("runs/bench"),
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of context, as in 4K,1M,32M. Default: 4K to 32K, on a GPU to 1M.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For all; what does not fit is left out.")] = 120.0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Of ONNX Runtime and PyTorch.")] = "cpu",
    seed: Seed = 0,
) -> None:
    """A bundle by length: prefill tokens/s, time to first token, decode ms a token, and memory, from 4 K tokens on.

    In ONNX Runtime, beside PyTorch with plain operators (eager) and with compiled ones, and beside a dense model of the
    same width, depth and heads in ONNX Runtime. Each runs in a process of its own and goes on to twice the length while
    its share of the time and the memory suffice.

    \b
    hsa-compile bench e2e runs/bundle --checkpoint runs/mine --device cuda --lengths 4K,64K,1M,32M --seconds 600
    """
    with friendly():
        from hsa_compile.bench import e2e
        from hsa_compile.bench.record import write_suite

        given = [tokens(length) for length in lengths.split(",")] if lengths else e2e.LENGTHS[device]
        with spinner("measuring") as say:
            keep = partial(write_suite, output / "e2e.jsonl")
            rows = e2e.run(bundle, checkpoint, given, seconds, device, seed, say, keep)
        if not rows:
            fail("nothing could be measured; the warnings above say why")
        _save(e2e, rows, output, "e2e")


@bench_app.command("model")
def bench_model(
    preset: Annotated[str, typer.Option(help="Of the model.")] = "240m",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    output: Output = Path("runs/bench"),
    parts: Annotated[list[str] | None, typer.Option("--part", help="train, decode, prefill; default: all.")] = None,
    train_lengths: Annotated[list[int] | None, typer.Option("--train-length", help="Tokens a sample.")] = None,
    prefill_lengths: Annotated[list[int] | None, typer.Option("--prefill-length", help="Tokens of context.")] = None,
    decode_lengths: Annotated[list[int] | None, typer.Option("--decode-length", help="Tokens of context.")] = None,
    train_tokens: Annotated[int | None, typer.Option(help="Tokens a step and process.")] = None,
    segment: Annotated[int | None, typer.Option(help="Tokens a prefill step.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For all; what does not fit is left out.")] = 600.0,
    seed: Seed = 0,
) -> None:
    """Training, prefill and decode of a preset: rates, share of the matmul rate, memory, latency by length.

    Training is beside sliding windows alone and full attention, of as many parameters. Decode is with the chunk memory
    on the device and in the host's. Under torchrun, training alone, sharded over the processes.
    """
    with friendly():
        from functools import partial

        from hsa_compile.bench import model
        from hsa_compile.bench.record import write_suite

        given: dict[str, Any] = {
            "parts": parts, "train_lengths": train_lengths, "prefill_lengths": prefill_lengths,
            "decode_lengths": decode_lengths,
        }  # fmt: skip
        given = {name: tuple(value) for name, value in given.items() if value} | {"seconds": seconds, "seed": seed}
        given |= {name: n for name, n in (("train_tokens", train_tokens), ("segment", segment)) if n is not None}
        plan = model.Plan(preset, device, **given)
        with spinner("measuring") as say:
            rows, main = model.run(plan, say, partial(write_suite, output / "model.jsonl"))
        if main:
            _save(model, rows, output, "model")


@bench_app.command("kernels")
def bench_kernels(
    output: Output = Path("runs/bench"),
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Tokens; may be given several times.")] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="cpu:native, or cuda for the first GPU.")
    ] = "cpu:native",
    model: Annotated[
        Path | None,
        typer.Option(help="A trained model (the directory that `train` wrote): measured on its selections, too."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="What it reads. Default: a book with hidden pairs.")] = None,
    seed: Seed = 0,
) -> None:
    """Rates of the operators, checked before they are timed, beside eager, dense and public implementations.

    On a CPU beside eager gather + einsum and dense attention; on a GPU beside fla-core, dense attention (cuDNN, FA2)
    and a composition of PyTorch's variable-length attention, where they are installed.
    """
    with friendly():
        from functools import partial

        from hsa_compile.bench import gpu_kernels, kernels
        from hsa_compile.bench.record import write_suite

        if target not in ("cpu:native", "cuda"):
            fail(f"kernels are measured on cpu:native or cuda, not on {target}")
        gpu = target == "cuda"
        with spinner("measuring") as say:
            if gpu:
                shapes = gpu_kernels.default_shapes(lengths or ())
            else:
                shapes = kernels.default_shapes(lengths) if lengths else kernels.default_shapes()
            if model is not None:
                for length in lengths or [4096]:
                    say(f"what the model selects of {length} tokens")
                    shapes += _captured(model, text, length, gpu, seed)
            rows = (gpu_kernels if gpu else kernels).run(
                shapes, seed, say, partial(write_suite, output / "kernels.jsonl")
            )
        _save(kernels, rows, output, "kernels")


@bench_app.command("plot")
def bench_plot(
    measurements: Annotated[
        Path, typer.Argument(help="A file that a bench command wrote.", exists=True, dir_okay=False)
    ],
) -> None:
    """Draw a suite's picture from its measurements, beside them."""
    with friendly():
        from hsa_compile.bench import e2e, kernels, model, tuning
        from hsa_compile.bench.record import read_suite

        suites: dict[str, Any] = {"kernels": kernels, "model": model, "e2e": e2e, "tuning": tuning}
        rows = read_suite(measurements)
        if (suite := rows[0]["suite"]) not in suites:
            fail(f"suite {suite!r} has no picture; those that have: {', '.join(suites)}")
        console.print(f"{suites[suite].plot(rows, measurements.with_suffix('.png'))}")


def _captured(directory: Path, text: Path | None, length: int, gpu: bool, seed: int) -> list[Shape]:
    from hsa_compile import diagnosis
    from hsa_compile.bench import kernels
    from hsa_compile.model.checkpoint import load_checkpoint

    loaded = load_checkpoint(directory)
    ids = diagnosis.read_tokens(loaded.config, directory, text, None, length, seed)
    if gpu:
        return kernels.captured_shapes(loaded.cuda(), ids, "bfloat16")
    return kernels.captured_shapes(loaded, ids)


@bench_app.command("tuning")
def bench_tuning(
    output: Output = Path("runs/bench"),
    seconds: Annotated[float, typer.Option(help="Time for all; a later run goes on with the samples of this.")] = 240.0,
    lengths: Annotated[list[int] | None, typer.Option("--length", help="On a GPU: shapes of these alone.")] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="cpu:native, or cuda for this machine's GPU.")] = (
        "cpu:native"
    ),
    seed: Seed = 0,
) -> None:
    """Compare the tuner's strategies: best time by candidates tried, on samples of three search spaces.

    On a GPU also tune every shape of the benchmark of kernels, side by side; what is found is saved as records.
    """
    with friendly():
        from hsa_compile import tuning as driver
        from hsa_compile.bench import tuning

        if target.startswith("cuda"):
            jobs = tuning.gpu_jobs(driver.full_target(target), lengths or ())
            with spinner("measuring") as say:
                rows = tuning.run_gpu(
                    jobs, seconds, sampled=jobs[:2], seed=seed, progress=say, keep=lambda _, found: driver.save(found)
                )
            console.print(tuning.tuned_table(rows))
            _save(tuning, rows, output, "tuning")
            return
        with spinner("measuring") as say:
            rows = tuning.run(tuning.default_jobs(), seconds, seed, say)
        _save(tuning, rows, output, "tuning")
