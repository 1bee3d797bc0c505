"""Training states: a run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hsa_compile.model import checkpoint
from hsa_compile.model.checkpoint import CheckpointError, load_checkpoint, read_config, save_checkpoint
from hsa_compile.model.model import HsaModel
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.resume import saved_recipe, states
from hsa_compile.model.stream import Batches
from hsa_compile.model.train import TrainResult, train
from kit import SMALL, interrupted, small_recipe

pytestmark = pytest.mark.usefixtures("light", "no_plots")


@pytest.fixture
def recipe(tmp_path: Path) -> TrainConfig:
    return small_recipe(tmp_path / "run", steps=8, save_every=3, eval_every=2)


def stopped_at(recipe: TrainConfig, step: int, number: int = signal.SIGINT) -> TrainResult:
    with interrupted(step, number):
        return train(recipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_run_goes_on_to_the_bit(recipe: TrainConfig, tmp_path: Path, step: int, number: int) -> None:
    whole = train(dataclasses.replace(recipe, out=str(tmp_path / "whole")))
    before = signal.getsignal(number)
    first = stopped_at(recipe, step, number)
    assert signal.getsignal(number) == before
    assert first.interrupted
    # The step in which the signal came is finished, and may be followed by the one that notices it.
    assert step + 1 <= len(first.losses) <= step + 2
    assert read_config(first.checkpoint)[1]["interrupted"] is True
    load_checkpoint(first.checkpoint)
    torch.manual_seed(99)
    second = train(recipe, resume=True)
    assert not second.interrupted
    assert second.losses == whole.losses
    assert second.held_out == whole.held_out
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(path.name for path in Path(recipe.out).iterdir()) == [
        "config.json", "loss.png", "metrics.jsonl", "model.safetensors",
    ]  # fmt: skip
    steps = [json.loads(line)["step"] for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_crash_goes_on_from_the_last_state(recipe: TrainConfig, tmp_path: Path) -> None:
    whole = train(dataclasses.replace(recipe, out=str(tmp_path / "whole")))
    _crash(recipe, 5)
    assert [path.name for path in states(Path(recipe.out))] == ["step-00000003"]
    metrics = Path(recipe.out) / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-7])  # the crash cut the last line short
    assert train(recipe, resume=True).losses == whole.losses


def _crash(recipe: TrainConfig, step: int) -> None:
    draw = Batches.__getitem__

    def drawing(batches: Batches, at: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if at == step:
            raise MemoryError
        return draw(batches, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__getitem__", drawing)
        with pytest.raises(MemoryError):
            train(recipe)


def test_only_the_newest_states_are_kept(recipe: TrainConfig) -> None:
    recipe = dataclasses.replace(recipe, save_every=1, keep=2)
    _crash(recipe, 5)
    assert [path.name for path in states(Path(recipe.out))] == ["step-00000004", "step-00000005"]
    assert len(list((Path(recipe.out) / "state").iterdir())) == 2


def test_no_states_where_none_are_wanted(recipe: TrainConfig) -> None:
    recipe = dataclasses.replace(recipe, save_every=0)
    assert stopped_at(recipe, 1).interrupted
    assert not (Path(recipe.out) / "state").exists()
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*leave out --resume"):
        train(recipe, resume=True)
    train(recipe)


def test_an_unfinished_run_is_not_overwritten(recipe: TrainConfig) -> None:
    stopped_at(recipe, 3)
    with pytest.raises(CheckpointError, match=r"holds an unfinished training, saved at step-0000000.: continue it"):
        train(recipe)
    shutil.rmtree(Path(recipe.out) / "state")
    train(recipe)


def test_another_recipe_or_text_is_refused(recipe: TrainConfig, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("One line of a text. " * 500)
    recipe = dataclasses.replace(recipe, data=str(data))
    stopped_at(recipe, 3)
    wrong = dataclasses.replace(recipe, steps=9, model=dataclasses.replace(SMALL, top_k=3))
    with pytest.raises(CheckpointError, match=r"another recipe .*steps: 9, 8; model.top_k: 3, 2"):
        train(wrong, resume=True)
    data.write_text("Another text. " * 500)
    with pytest.raises(CheckpointError, match="was on other data"):
        train(recipe, resume=True)
    assert saved_recipe(recipe.out) == recipe
    assert dataclasses.replace(recipe, save_every=1, eval_every=7, threads=1).differences(recipe) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _cut(next(path.glob("*.safetensors"))), r"safetensors is damaged: \d+ bytes instead of \d+"),
        (lambda path: next(path.glob("*.safetensors")).unlink(), "safetensors is damaged: 0 bytes instead of"),
        (lambda path: _cut(path / "state.json"), "state.json is damaged or missing"),
        (lambda path: (path / "state.json").unlink(), "state.json is damaged or missing"),
        (lambda path: (path / "state.json").write_text('{"step": 4}'), "is not an hsa-compile training state"),
        (lambda path: _edit(path, version=9), "has version 9, this program reads 1"),
        (lambda path: _scribble(next(path.glob("*.safetensors"))), "is damaged or of another model"),
    ],
    ids=["cut", "gone", "json-cut", "json-gone", "foreign", "version", "scribbled"],
)
def test_damaged_states(recipe: TrainConfig, damage: object, message: str) -> None:
    recipe = dataclasses.replace(recipe, save_every=2)
    _crash(recipe, 5)
    good, newest = states(Path(recipe.out))
    kept = {path.name: path.read_bytes() for path in good.iterdir()}
    damage(newest)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        train(recipe, resume=True)
    assert {path.name: path.read_bytes() for path in good.iterdir()} == kept
    shutil.rmtree(newest)
    assert len(train(recipe, resume=True).losses) == 8


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _scribble(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"x" * 100 + content[108:])


def _edit(path: Path, **changes: object) -> None:
    about = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(about | changes))


@contextmanager
def _full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the system fails the write as for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _no_space(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    out, once = Path(recipe.out), dataclasses.replace(recipe, save_every=0)
    train(once)
    good = {name: (out / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with _full_disk(16384), pytest.raises(CheckpointError, match=r"could not save .*File too large.*; make room"):
        save_checkpoint(HsaModel(recipe.model), out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", _no_space)  # after the weights were written
        with pytest.raises(CheckpointError, match=r"could not save .*No space left"):
            save_checkpoint(HsaModel(recipe.model), out)
    assert {name: (out / name).read_bytes() for name in good} == good
    assert not list(out.glob(".*")), "half of a file was left"
    with _full_disk(300), pytest.raises(CheckpointError, match=r"could not write .*metrics.jsonl: File too large"):
        train(dataclasses.replace(once, steps=40))
    assert {name: (out / name).read_bytes() for name in good} == good


def test_a_full_disk_leaves_the_last_state(recipe: TrainConfig) -> None:
    _crash(recipe, 5)
    # Metrics may grow so far, the weights may not.
    with (
        _full_disk(65536),
        pytest.raises(CheckpointError, match=r"could not save .*File too large; make room.*from step-00000003"),
    ):
        train(recipe, resume=True)
    assert [path.name for path in (Path(recipe.out) / "state").iterdir()] == ["step-00000003"]
    assert len(train(recipe, resume=True).losses) == 8
