"""The model behind the interface of Hugging Face transformers: same numbers, same files."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments, set_seed

from hsa_compile.model.checkpoint import CheckpointError, load_checkpoint, read_config, save_checkpoint
from hsa_compile.model.config import PRESETS, ConfigError, ModelConfig
from hsa_compile.model.data import text_sample
from hsa_compile.model.generate import generate
from hsa_compile.model.huggingface import HsaCache, HsaConfig, HsaForCausalLM
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.variants import ABLATIONS, BASELINES
from kit import LICENSE, SMALL, lively

pytestmark = pytest.mark.usefixtures("light")

LENGTHS = (21, 40, 33)
PAD = 256


def wrapped(config: ModelConfig = SMALL) -> HsaForCausalLM:
    """With weights that show; ``.model`` is the project's own model of the same weights."""
    return lively(HsaForCausalLM(HsaConfig(model=config.to_dict())))


@pytest.fixture(scope="module")
def model() -> HsaForCausalLM:
    return wrapped()


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    """What a tokenizer gives for several texts."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[b, place], mask[b, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def own(model: HsaForCausalLM, rows: Any, count: int, **options: Any) -> Tensor:
    return torch.stack(list(generate(model.model, rows, count, **options)), dim=1)


@pytest.mark.parametrize("tied", [True, False])
def test_one_folder_serves_both(tmp_path: Path, tied: bool) -> None:
    ours = lively(HsaModel(dataclasses.replace(SMALL, tie_embeddings=tied)))
    ids = torch.tensor(prompts((40,)))
    save_checkpoint(ours, tmp_path / "ours", {"steps": 3})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs, HsaForCausalLM)
    assert not theirs.training
    assert (theirs.model.head.weight is theirs.model.embedding.weight) == tied
    assert torch.equal(theirs(ids).logits, ours(ids))
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == (ours.config, {"steps": 3})
    assert torch.equal(load_checkpoint(tmp_path / "theirs")(ids), ours(ids))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(ids).logits, ours(ids))
    assert AutoConfig.from_pretrained(tmp_path / "theirs").sizes == ours.config


def test_the_dtype_is_kept_and_can_be_chosen(tmp_path: Path, model: HsaForCausalLM) -> None:
    save_checkpoint(HsaModel(SMALL).to(torch.bfloat16), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    save_checkpoint(HsaModel(SMALL), tmp_path)
    config = tmp_path / "config.json"
    good = config.read_text()
    config.write_text(good.replace('"lower_layers": 1', '"lower_layers": 2'))
    with pytest.raises(CheckpointError, match=r"model\.lower\.1.* is missing among the weights"):
        HsaForCausalLM.from_pretrained(tmp_path)
    config.write_text(good.replace('"encoder": "cls"', '"encoder": "none"'))
    with pytest.raises(CheckpointError, match="unexpected among the weights"):
        HsaForCausalLM.from_pretrained(tmp_path)
    config.write_text(good.replace('"version": 1', '"version": 9'))
    with pytest.raises(CheckpointError, match="version 9"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="chunk_size must be a positive"):
        HsaConfig(model={"chunk_size": 0})


def test_new_weights_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    ours = HsaModel(SMALL)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(HsaConfig(model=SMALL.to_dict()))
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.model.parameters(), strict=True))


@pytest.mark.parametrize("name", [*ABLATIONS, *BASELINES])
def test_greedy_tokens_are_those_of_the_own_generation(name: str) -> None:
    changes = {"ssm_head_dim": 16, "ssm_state": 8} | (ABLATIONS | BASELINES)[name]
    model, ids = wrapped(dataclasses.replace(SMALL, **changes)), torch.tensor(prompts((40, 40)))
    got = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(got[:, :40], ids)
    assert torch.equal(got[:, 40:], own(model, ids, 12))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_prompts_give_what_each_gives_alone(model: HsaForCausalLM, side: str, use_cache: bool) -> None:
    rows = prompts()
    got = model.generate(**padded(rows, side), max_new_tokens=12, do_sample=False, use_cache=use_cache)
    assert torch.equal(got[:, max(LENGTHS) :], own(model, rows, 12))
    for b, row in enumerate(rows):
        assert torch.equal(got[b, max(LENGTHS) :], own(model, row, 12)[0])


def test_texts_end_at_a_stop_token(model: HsaForCausalLM) -> None:
    rows = prompts()
    stop = int(own(model, rows, 6)[0, 4])
    got = model.generate(
        **padded(rows, "left"), max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=PAD
    )[:, max(LENGTHS) :]
    want = own(model, rows, 12, stop_ids=[stop])
    assert (want == -1).any()
    assert torch.equal(got.masked_fill((got == stop) | (got == PAD), -1), want)


def test_sampling_draws_from_the_models_own_distribution(model: HsaForCausalLM) -> None:
    inputs = padded(prompts(), "left")
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_k": 0}

    def draw(seed: int) -> Any:
        set_seed(seed)
        return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    for b, n in enumerate(LENGTHS):
        text = first.sequences[b, max(LENGTHS) - n :][None]
        want = model.model(text)[0, n - 1 : -1]
        torch.testing.assert_close(torch.stack(first.logits, dim=1)[b], want, rtol=1e-4, atol=1e-4)
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=1)
    assert torch.equal(greedy[:, max(LENGTHS) :], own(model, prompts(), 8))


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_with_a_cache_are_those_without(model: HsaForCausalLM, side: str) -> None:
    inputs, options = padded(prompts(), side), {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2}
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)
    greedy = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert not torch.equal(cached[::2], greedy)  # the beams found something that greed does not


def test_a_cache_in_host_memory_gives_the_same_tokens(model: HsaForCausalLM) -> None:
    inputs, options = padded(prompts(), "left"), {"max_new_tokens": 10, "num_beams": 2, "do_sample": False}
    cache = HsaCache(offload=True)
    got = model.generate(**inputs, **options, past_key_values=cache)
    assert cache.state is not None
    assert cache.state.offloaded
    assert torch.equal(got, model.generate(**inputs, **options))


def test_a_cache_goes_on_with_another_turn(model: HsaForCausalLM) -> None:
    first = model.generate(**padded(prompts(), "left"), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1  # the last token was not fed
    turn = torch.cat((first.sequences, torch.tensor(prompts((7, 7, 7)))), dim=1)
    mask = torch.cat((padded(prompts(), "left")["attention_mask"], torch.ones(3, 12, dtype=torch.int64)), dim=1)
    got = model.generate(turn, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    whole = [row[mask[b] == 1].tolist() for b, row in enumerate(turn)]
    assert torch.equal(got[:, turn.shape[1] :], own(model, whole, 5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_in_parts_are_those_of_the_whole(model: HsaForCausalLM, side: str) -> None:
    inputs = padded(prompts(), side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    alone = [model.model(torch.tensor([row]))[0] for row in prompts()]
    cache, parts = HsaCache(), []
    for first in range(0, ids.shape[1], 13):
        last = first + 13
        parts.append(model(ids[:, first:last], mask[:, :last], past_key_values=cache).logits)
    for logits in (model(**inputs).logits, torch.cat(parts, dim=1)):
        for b, want in enumerate(alone):
            torch.testing.assert_close(logits[b][mask[b] == 1], want, rtol=1e-4, atol=1e-4)
    kept = model(**inputs, logits_to_keep=3, use_cache=True).logits
    assert kept.shape[1] == 3
    for b, want in enumerate(alone):
        torch.testing.assert_close(kept[b, -1], want[-1], rtol=1e-4, atol=1e-4)


def test_caches_repeat_and_choose_rows(model: HsaForCausalLM) -> None:
    inputs = padded(prompts(), "left")
    cache = model(**inputs, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.batch_size == 2
    logits = model(torch.tensor([[1], [2]]), past_key_values=cache).logits[:, -1]
    rows = prompts()
    for got, row in zip(logits, (rows[2] + [1], rows[0] + [2])):
        torch.testing.assert_close(got, model.model(torch.tensor([row]))[0, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(1)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)


def test_the_loss_is_that_of_training(model: HsaForCausalLM) -> None:
    ids = torch.tensor(prompts((40, 40)))
    want = sequence_loss(model.model(ids[:, :-1]), ids[:, 1:])
    torch.testing.assert_close(model(ids, labels=ids).loss, want)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=39).loss, 2 * want)
    hidden = ids.clone()
    hidden[:, :30] = -100
    want = sequence_loss(model.model(ids)[:, 29:-1], ids[:, 30:])
    torch.testing.assert_close(model(ids, labels=hidden).loss, want)
    assert model(ids, labels=hidden, return_dict=False)[0] == model(ids, labels=hidden).loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_learnt(model: HsaForCausalLM, side: str) -> None:
    inputs = padded(prompts(), side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    parts = [sequence_loss(model.model(torch.tensor([r[:-1]])), torch.tensor([r[1:]])) for r in prompts()]
    want = sum((n - 1) * loss for n, loss in zip(LENGTHS, parts)) / sum(n - 1 for n in LENGTHS)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, want, rtol=1e-4, atol=1e-5)


def test_what_is_not_there_is_refused(model: HsaForCausalLM) -> None:
    ids = torch.tensor(prompts((9,)))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(TypeError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 4, 32), max_new_tokens=2)
    with pytest.raises(TypeError, match="position_ids"):
        model.generate(ids, position_ids=torch.arange(9)[None], max_new_tokens=2)
    for what in ("output_hidden_states", "output_attentions"):
        with pytest.raises(TypeError, match=what):
            model(ids, **{what: True})
    with pytest.raises(ValueError, match="must be an HsaCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="labels must be"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="1 to 9 tokens"):
        model.generate(ids.repeat(2, 1), attention_mask=torch.tensor([[1] * 9, [0] * 9]), max_new_tokens=2)
    training = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="a cache carries no gradients"):
        training(ids, use_cache=True)
    landmark = wrapped(dataclasses.replace(SMALL, architecture="landmark"))
    with pytest.raises(ConfigError, match="no ragged batch"):
        landmark.generate(**padded(prompts(), "left"), max_new_tokens=2)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_can_be_added(tmp_path: Path, tied: bool) -> None:
    model, ids = wrapped(dataclasses.replace(SMALL, tie_embeddings=tied)), torch.tensor(prompts((20,)))
    before = model(ids).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    after = model(ids).logits
    torch.testing.assert_close(after[..., :260], before)
    assert after.shape[-1] == model.config.vocab_size == model.model.config.vocab_size == 300
    model.save_pretrained(tmp_path)
    assert torch.equal(load_checkpoint(tmp_path)(ids), after)


def arguments(out: Path, **options: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 3e-3, "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(out), **fields | options)


def samples(count: int) -> list[dict[str, list[int]]]:
    rng, text = random.Random(0), LICENSE.read_bytes()
    rows = [list(text_sample(rng, text, 95).ids) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_and_its_checkpoints_are_the_projects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HsaForCausalLM(HsaConfig(model=PRESETS["tiny"].to_dict()))
    trainer = Trainer(model, arguments(tmp_path, save_steps=12), train_dataset=samples(48), eval_dataset=samples(4))
    trainer.train()
    found = losses(trainer)
    assert len(found) == 12
    assert sum(found[-3:]) < sum(found[:3]) - 3
    ids = torch.tensor([samples(1)[0]["input_ids"]])
    ours = load_checkpoint(tmp_path / "checkpoint-12")
    assert torch.equal(ours(ids), model.eval()(ids).logits)
    torch.testing.assert_close(trainer.evaluate()["eval_loss"], _text_loss(ours, samples(4)), rtol=1e-4, atol=1e-4)


def _text_loss(model: HsaModel, rows: list[dict[str, list[int]]]) -> float:
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        return float(sequence_loss(model(ids[:, :-1]), ids[:, 1:]))


def test_trainer_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    def trainer(out: Path, seed: int) -> Trainer:
        torch.manual_seed(seed)
        model = HsaForCausalLM(HsaConfig(model=SMALL.to_dict()))
        return Trainer(model, arguments(out, save_steps=6), train_dataset=samples(48))

    whole = trainer(tmp_path, 0)
    whole.train()
    resumed = trainer(tmp_path, 1)  # other weights, which the checkpoint's replace
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(x, y) for x, y in zip(whole.model.parameters(), resumed.model.parameters()))


def test_trainer_accumulates_and_recomputes_to_the_same_losses(tmp_path: Path) -> None:
    found = []
    for name, options in (
        ("plain", {}),
        ("parts", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("recomputed", {"gradient_checkpointing": True}),
    ):
        torch.manual_seed(0)
        model = HsaForCausalLM(HsaConfig(model=SMALL.to_dict()))
        settings = arguments(tmp_path / name, save_strategy="no", **options)
        trainer = Trainer(model, settings, train_dataset=samples(48))
        seen: list[bool] = []
        model.register_forward_pre_hook(lambda *_: seen.append(model.model.recompute))  # noqa: B023
        trainer.train()
        assert set(seen) == {name == "recomputed"}
        found.append(losses(trainer))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-3)
