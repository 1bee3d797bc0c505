"""Making a model: ``train``, and ``tokenize`` before it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_compile.cli.common import Checkpoint, Output, console, friendly, spinner, text_of

if TYPE_CHECKING:
    from hsa_compile.model.train import TrainResult


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="TOML or JSON file of training fields; options go first."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write. Default: runs/tiny.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of the model: tiny (default), 25m, 60m, 240m or 345m.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Of that model, with as many parameters: 'no encoder', 'no bypass', SWA, Mamba-2, …"),
    ] = None,
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
        from hsa_compile.model.variants import variant as variant_config

        given: dict[str, Any] = {
            "out": text_of(output), "model": None if preset is None else preset_config(preset), "data": text_of(data),
            "tokenizer": text_of(tokenizer), "steps": steps, "length": length, "batch": batch, "text_share": text_share,
            "accumulate": accumulate, "dtype": dtype, "recompute": recompute, "save_every": save_every, "keep": keep,
            "device": device, "seed": seed,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        config = TrainConfig() if recipe is None else read_recipe(recipe)
        if resume and recipe is None:
            config = saved_recipe(given.get("out", config.out))
        config = dataclasses.replace(config, **given)
        if variant is not None:
            model = variant_config(config.model, variant, config.length, multiple=16)
            config = dataclasses.replace(config, model=model)
        result = run_training(config, resume)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
            _say_how_it_went(result)
        if result.interrupted:
            raise typer.Exit(130)


def _say_how_it_went(result: TrainResult) -> None:
    console.print(f"loss {result.losses[0]:.3f} → {result.losses[-1]:.3f} in {result.seconds:.0f} s")
    console.print(f"checkpoint {result.checkpoint}, loss plot {result.checkpoint / 'loss.png'}")
    if result.interrupted:
        console.print(f"stopped at step {len(result.losses)}; the same command with --resume goes on")


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


def publish(
    checkpoint: Checkpoint,
    output: Output = Path("runs/published"),
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    shard_mib: Annotated[float, typer.Option(help="Largest file of weights.", min=1)] = 15.0,
) -> None:
    """Write a checkpoint's weights in half precision and in small files; every command reads them, transformers too."""
    with friendly():
        from hsa_compile.evaluation.setup import DTYPES
        from hsa_compile.model.checkpoint import load_checkpoint, read_config, save_checkpoint, weight_files
        from hsa_compile.model.config import ConfigError
        from hsa_compile.model.train import TOKENIZER_NAME

        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        model = load_checkpoint(checkpoint).to(DTYPES[dtype])
        save_checkpoint(model, output, read_config(checkpoint)[1], int(shard_mib * 2**20))
        if (checkpoint / TOKENIZER_NAME).is_file():
            shutil.copyfile(checkpoint / TOKENIZER_NAME, output / TOKENIZER_NAME)
        files = weight_files(output)
        console.print(f"{model.parameter_count():,} parameters in {len(files)} files in {output}")
