"""A short training run, and the evaluation."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hsa_compile.model.checkpoint import load_checkpoint, read_config
from hsa_compile.model.config import ConfigError, preset
from hsa_compile.model.data import DataError
from hsa_compile.model.evaluate import text_loss
from hsa_compile.model.metrics import forward_flops, matmul_rate, watch_selections
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.optimizer import learning_rate
from hsa_compile.model.recipe import TrainConfig, read_recipe
from hsa_compile.model.resume import states
from hsa_compile.model.train import TrainingError, train
from kit import SMALL, lively, small_recipe

pytestmark = pytest.mark.usefixtures("light")


@pytest.fixture
def recipe(tmp_path: Path) -> TrainConfig:
    return small_recipe(tmp_path / "run")


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
    measured = [record for record in records if "mfu" in record]
    assert [record["step"] for record in measured] == [20, 40]
    for record in measured:
        assert 0 < record["mfu"] < 1
        assert record["tokens_per_second"] > 0
        assert 0 < record["empty_slots"] < 1
        assert 0 < record["selection_entropy"] <= math.log(2)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_config(out)[1]["recipe"]["seed"] == 0
    ids = torch.arange(20)[None]
    assert torch.equal(load_checkpoint(out)(ids), result.model(ids))


@pytest.mark.usefixtures("no_plots")
def test_training_is_deterministic_from_its_seed(recipe: TrainConfig) -> None:
    short = dataclasses.replace(recipe, steps=6)
    losses = [train(dataclasses.replace(short, seed=seed)).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"text_share": 2.0}, {"short_length": 0}, {"lr": 0.0}, {"answer_weight": -1.0},
     {"dtype": "float16"}, {"keep": 0}, {"save_every": -1}, {"accumulate": 0}, {"steps": 2.5}, {"recompute": 1},
     {"batch": True}, {"data": 3}, {"tasks": {"s-n": 0}}, {"tasks": {}}, {"workers": -1}],
)  # fmt: skip
def test_recipes_that_cannot_work(recipe: TrainConfig, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(recipe, **change)


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


def test_held_out_loss_of_an_untrained_model() -> None:
    model = HsaModel(SMALL).train()
    assert text_loss(model, b"In the beginning " * 50, 64) == pytest.approx(5.5, abs=1.0)
    assert model.training


def _gradients(model: HsaModel, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    sequence_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = lively(HsaModel(SMALL)).train()
    ids = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    kept = _gradients(model, ids)
    model.recompute = True
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        again = _gradients(model, ids)
    model.recompute = False
    everything: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: everything.append(x.numel()) or x, lambda x: x):
        model(ids)
    assert len(kept) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert sum(saved) < 0.5 * sum(everything)


@pytest.mark.usefixtures("no_plots")
def test_training_starts_from_given_weights(recipe: TrainConfig, tmp_path: Path) -> None:
    first = train(dataclasses.replace(recipe, steps=12))
    more = dataclasses.replace(recipe, steps=2, warmup=2, lr=1e-6, min_lr=0.0, out=str(tmp_path / "more"))
    assert train(dataclasses.replace(more, init=recipe.out)).losses[0] < first.losses[0] - 0.5
    for change in ({"window": 9}, {"d_model": 48}):
        other = dataclasses.replace(more, init=recipe.out, model=dataclasses.replace(SMALL, **change))
        with pytest.raises(ConfigError, match="is of another model"):
            train(other)


@pytest.mark.usefixtures("no_plots")
def test_training_goes_on_from_weights_with_what_answers_do_not_depend_on(recipe: TrainConfig, tmp_path: Path) -> None:
    first = train(dataclasses.replace(recipe, steps=12))
    model = dataclasses.replace(SMALL, selection_noise=0.7, train_top_k=1)
    more = dataclasses.replace(recipe, steps=2, warmup=2, lr=1e-6, min_lr=0.0, out=str(tmp_path / "more"), model=model)
    went_on = train(dataclasses.replace(more, init=recipe.out))
    assert went_on.losses[0] < first.losses[0] - 0.5
    assert went_on.model.config == load_checkpoint(more.out).config == model


@pytest.mark.usefixtures("no_plots")
def test_accumulated_parts_are_one_batch(recipe: TrainConfig) -> None:
    whole = train(dataclasses.replace(recipe, steps=6))
    parts = train(dataclasses.replace(recipe, steps=6, accumulate=3))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match=r"at least accumulate × processes \(5 × 1\)"):
        train(dataclasses.replace(recipe, accumulate=5))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"weights": "stick-breaking"}, {"tie_embeddings": False}])
def test_autocast_stays_near_float32(changes: dict[str, Any]) -> None:
    model = HsaModel(dataclasses.replace(SMALL, **changes)).train()
    ids = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    exact = _gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        near = _gradients(model, ids)
    assert logits.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in near)
    # A swapped chunk moves a few of them further than rounding does: the direction as a whole is what must hold.
    a, b = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (exact, near))
    assert torch.cosine_similarity(a, b, dim=0) > 0.98


@pytest.mark.usefixtures("no_plots")
def test_training_in_bfloat16(recipe: TrainConfig) -> None:
    exact = train(dataclasses.replace(recipe, steps=6))
    result = train(dataclasses.replace(recipe, steps=6, dtype="bfloat16", recompute=True))
    assert exact.losses != result.losses == pytest.approx(exact.losses, rel=0.02)
    assert next(result.model.parameters()).dtype == torch.float32


def test_a_loss_that_is_no_number_stops(recipe: TrainConfig) -> None:
    with pytest.raises(TrainingError, match=r"step \d+ has the loss nan and a gradient of norm nan: lower lr"):
        train(dataclasses.replace(recipe, lr=1e38, warmup=1))


def test_a_gradient_that_is_no_number_is_not_saved(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss shows it a step later, when a state of it might have replaced the last good one."""
    real, calls = torch.nn.utils.clip_grad_norm_, iter(range(100))

    def poison(parameters: Any, clip: float) -> torch.Tensor:
        return real(parameters, clip) * (torch.nan if next(calls) == 3 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    with pytest.raises(TrainingError, match=r"step 4 has .* norm nan: .*; the state of step-00000002 is from before"):
        train(dataclasses.replace(recipe, steps=6, save_every=2, keep=1))
    assert [path.name for path in states(Path(recipe.out))] == ["step-00000002"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_groups": 2, "upper_layers": 2, "encoder_layers": 2, "retrieval_heads": 1},
        {"architecture": "swa"},
        {"architecture": "attention"},
    ],
)
def test_flop_count_is_that_of_the_model(changes: dict[str, Any]) -> None:
    # In one window, PyTorch's counter sees all products but the operators' and counts the masked triangle as well.
    length = 40
    config = dataclasses.replace(SMALL, window=length, **changes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        HsaModel(config).train()(torch.zeros(1, length, dtype=torch.int64))
    visible = [t // 8 for t in range(length)]
    select = 2 * 16 * sum(visible)
    attention = 4 * 2 * 16 * 8 * sum(min(2, chunks) for chunks in visible)
    hidden = 4 * 2 * 16 * (length**2 - length * (length + 1) // 2)
    operators = config.n_groups * (select + attention) if config.has_memory else 0
    others = operators - (config.lower_layers + config.upper_layers) * hidden
    assert forward_flops(config, length) == counter.get_total_flops() + others


def test_selections_of_known_scores() -> None:
    model = lively(HsaModel(SMALL))
    with watch_selections(model) as seen, torch.no_grad():
        model(torch.arange(24)[None])
    # Tokens 0-7 see no chunk, 8-15 one, 16-23 two of two slots.
    assert (seen.slots, seen.empty, seen.rows) == (48, 24, 16)
    assert 0 < seen.mean_entropy < math.log(2) / 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_matmul_rate_is_one() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e14


def test_recipe_files(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text('steps = 7\nlr = 1\n[model]\npreset = "60m"\nvocab_size = 300\n')
    read = read_recipe(toml)
    assert (read.steps, read.lr, read.model) == (7, 1, dataclasses.replace(preset("60m"), vocab_size=300))
    as_json.write_text(json.dumps(read.to_dict()))
    assert read_recipe(as_json) == read
    toml.write_text('model = "25m"')
    assert read_recipe(toml).model == preset("25m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown training fields stepz; known: accumulate, answer_weight, batch"),
        ('steps = "3"', "steps must be int, got '3'"),
        ("min_lr = nan", "min_lr must be a finite number, got nan"),
        ("[model]\nrope_base = inf", "rope_base must be a number above 1, got inf"),
        ("[model]\nwidth = 3", "unknown model config fields width; known: architecture, bypass"),
        ('model = "huge"', "unknown preset 'huge'"),
        ('[model]\npreset = "huge"', "unknown preset 'huge'"),
        ("model = 3", "must be a JSON object"),
        ("steps = ", "is not valid TOML"),
    ],
)
def test_recipe_files_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "a.toml")


def test_recipe_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a table of training fields, got list"):
        read_recipe(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_recipe(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("architecture", "known"), [("mamba", set()), ("swa", {"mfu"}), ("mamba-hsa", {"empty_slots", "selection_entropy"})]
)
def test_of_other_architectures_what_is_known_is_recorded(
    recipe: TrainConfig, architecture: Any, known: set[str]
) -> None:
    model = dataclasses.replace(recipe.model, architecture=architecture)
    result = train(dataclasses.replace(recipe, model=model, steps=2, eval_every=2))
    last = json.loads((Path(recipe.out) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_loss"] == result.held_out[-1][1] > 0
    assert {"mfu", "empty_slots", "selection_entropy"} & set(last) == known
