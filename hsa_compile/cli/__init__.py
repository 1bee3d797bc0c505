"""The command line. Every command is a few lines over a function that Python users call as well."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from hsa_compile.cli.benchmarks import bench_app
from hsa_compile.cli.deployment import build, export, run, serve, validate
from hsa_compile.cli.evaluation import compare, evaluate, harness
from hsa_compile.cli.inspection import diagnose, margins
from hsa_compile.cli.overview import demo, doctor
from hsa_compile.cli.training import publish, tokenize, train
from hsa_compile.cli.tuning import explain, records_app, tune

app = typer.Typer(
    help="Train, compile and deploy language models with hierarchical sparse attention.\n\n"
    "The way through: [bold]train[/] a model, [bold]build[/] its kernels, [bold]export[/] it as a bundle, "
    "[bold]run[/] or [bold]serve[/] that in ONNX Runtime, [bold]validate[/] that all agree, [bold]bench[/] how fast it "
    "is. [bold]demo[/] goes all of it; [bold]doctor[/] says what is missing.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
for command in (train, tokenize, build, export, run, serve, validate, diagnose, publish, tune, explain, doctor, demo):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(margins)
app.command()(harness)
app.add_typer(records_app, name="records")
app.add_typer(bench_app, name="bench")


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is built and why.")] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("hsa_compile").setLevel(logging.INFO if verbose else logging.WARNING)
