"""Two processes train one model as one process does, and go on with each other's states."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hsa_compile.model.checkpoint import load_checkpoint
from hsa_compile.model.resume import states
from hsa_compile.model.train import train
from kit import interrupted, small_recipe

pytestmark = pytest.mark.usefixtures("light", "no_plots")

# Both processes get their signal in the same step; one of them would do.
UNTIL = """
import sys
from hsa_compile.cli import app
from kit import interrupted

with interrupted(int(sys.argv[2])):
    assert app(["train", sys.argv[1], "--resume"], standalone_mode=False) == 130
"""


def torchrun(*command: str) -> str:
    """What two processes say."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = {"HSA_COMPILE_BACKEND": "eager", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([*start, *command], env=os.environ | here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training_moves_between_one_process_and_two(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "two", steps=8, eval_every=4, accumulate=2, recompute=True)
    alone = train(dataclasses.replace(recipe, out=str(tmp_path / "one")))
    out = Path(recipe.out)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    script = tmp_path / "until.py"
    script.write_text(UNTIL)

    with interrupted(1):
        train(recipe)
    assert _files(out) == 1
    before = len(_losses(out))
    said = torchrun(str(script), str(file), str(before + 1))
    assert said.count("stopped at step") == 1  # only the main process speaks
    assert _files(out) == 2
    assert before + 2 <= len(_losses(out)) < recipe.steps
    train(recipe, resume=True)
    assert not states(out)

    assert _losses(out) == pytest.approx(alone.losses, rel=1e-5)
    model = load_checkpoint(out)
    for a, b in zip(alone.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def _files(out: Path) -> int:
    return len(list(states(out)[-1].glob("*.safetensors")))


def _losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
