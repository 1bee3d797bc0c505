"""The whole at a glance: ``doctor`` and ``demo``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hsa_compile.cli.common import Data, Output, Seed, console, fail, friendly, spinner, text_of


def doctor() -> None:
    """Say what is installed, what this machine can do and what is missing."""
    from hsa_compile.doctor import report

    table, complete = report()
    console.print(table)
    if not complete:
        fail("something above is missing")


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
        config = TrainConfig(out=str(output / "checkpoint"), data=text_of(data), seed=seed, save_every=0)
        if steps is not None:
            config = dataclasses.replace(config, steps=steps)
        if not run_demo(config, output, console, spinner):
            fail("the parity table has failures")
