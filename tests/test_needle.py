"""A model that really learns: `pytest -m slow tests/test_needle.py`, about eight minutes on two CPU cores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_compile.cli import app
from hsa_compile.model.recipe import read_recipe
from hsa_compile.model.train import train

RECIPE = Path(__file__).parents[1] / "benchmarks" / "recipes" / "needle.toml"


@pytest.mark.slow
@pytest.mark.needs_compiler
def test_a_tiny_model_learns_needles_at_512_tokens_and_keeps_them_at_4096(tmp_path: Path) -> None:
    recipe = dataclasses.replace(read_recipe(RECIPE), out=str(tmp_path / "run"), progress=False, save_every=0)
    train(recipe)
    command = ["eval", recipe.out, "--tasks", "s-n", "--lengths", "512,4K", "-n", "48", "-o", str(tmp_path / "eval")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "eval" / "length.jsonl").read_text().splitlines()]
    accuracy = {row["L"]: row["accuracy"] for row in rows}
    # Seen: 98 and 92 %; 98 and 91 % of 64.
    assert accuracy[512] >= 0.8
    assert accuracy[4096] >= 0.7
