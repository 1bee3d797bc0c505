"""A short training run, and the evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hsa_compile.model import train as train_module
from hsa_compile.model.checkpoint import load_checkpoint, read_config
from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.data import DataError
from hsa_compile.model.evaluate import Accuracy, retrieval_accuracy, text_loss
from hsa_compile.model.model import HsaModel
from hsa_compile.model.train import TrainConfig, learning_rate, train

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    d_model=32, mlp_dim=64, lower_layers=1, upper_layers=1, swa_heads=2, swa_kv_heads=2, swa_head_dim=16, window=16,
    chunk_size=8, hsa_heads=2, hsa_head_dim=16, retrieval_dim=16, top_k=2, train_top_k=2,
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"), model=SMALL, steps=40, batch=4, length=96, short_length=48, warmup=5, pairs=2,
        lr=3e-3, min_lr=1e-4, text_share=0.25, answer_weight=10.0, eval_every=20, progress=False,
    )  # fmt: skip


def test_training_reduces_the_loss_and_leaves_its_files(recipe: TrainConfig) -> None:
    result = train(recipe)
    assert result.losses[0] == pytest.approx(5.5, abs=1.0)
    assert sum(result.losses[-5:]) / 5 < 3.6
    assert [step for step, _ in result.held_out] == [20, 40]
    assert result.held_out[1][1] < result.held_out[0][1]
    out = Path(recipe.out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
    ]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == result.losses
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_config(out)[1]["recipe"]["seed"] == 0
    ids = torch.arange(20)[None]
    assert torch.equal(load_checkpoint(out)(ids), result.model(ids))


def test_training_is_deterministic_from_its_seed(recipe: TrainConfig) -> None:
    short = dataclasses.replace(recipe, steps=6)
    losses = [train(dataclasses.replace(short, seed=seed)).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_an_interrupt_saves_what_there_is(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    update = train_module._Run.update

    def interrupted(run: train_module._Run) -> None:
        if run.step == 3:
            raise KeyboardInterrupt
        update(run)

    monkeypatch.setattr(train_module._Run, "update", interrupted)
    result = train(recipe)
    assert result.interrupted
    assert len(result.losses) == 3
    assert read_config(result.checkpoint)[1] | {"steps": 3, "interrupted": True} == read_config(result.checkpoint)[1]
    load_checkpoint(result.checkpoint)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"text_share": 2.0}, {"short_length": 0}, {"lr": 0.0}, {"answer_weight": -1.0}]
)
def test_recipes_that_cannot_work(recipe: TrainConfig, change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(recipe, **change)  # type: ignore[arg-type]


def test_data_that_does_not_fit(recipe: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        train(dataclasses.replace(recipe, data=str(tmp_path / "none.txt")))
    with pytest.raises(ConfigError, match="at least 256"):
        train(dataclasses.replace(recipe, model=dataclasses.replace(SMALL, vocab_size=100)))
    with pytest.raises(DataError, match="do not fit into 70% of 48"):
        train(dataclasses.replace(recipe, pairs=20))


def test_learning_rate_rises_and_falls(recipe: TrainConfig) -> None:
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[4] == recipe.lr == max(rates)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert learning_rate(recipe, recipe.steps) == pytest.approx(recipe.min_lr)


def test_untrained_models_find_nothing() -> None:
    model = HsaModel(SMALL).train()
    results = retrieval_accuracy(model, [150, 300], n=8, seed=1)
    assert model.training
    assert [(r.length, r.correct, r.total) for r in results.values()] == [(150, 0, 8), (300, 0, 8)]
    assert text_loss(model, b"In the beginning " * 50, 64) == pytest.approx(5.5, abs=1.0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        retrieval_accuracy(model, [150], n=0)


def test_accuracy_interval() -> None:
    low, high = Accuracy(100, 90, 100).interval
    assert (low, high) == pytest.approx((0.826, 0.945), abs=0.002)
    assert Accuracy(100, 10, 10).interval[1] == pytest.approx(1.0)
