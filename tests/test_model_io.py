"""Tokenizer, checkpoints and generation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsa_compile.cli import app
from hsa_compile.model.checkpoint import CheckpointError, load_checkpoint, read_config, save_checkpoint, weight_files
from hsa_compile.model.config import ModelConfig, preset
from hsa_compile.model.generate import generate, sample
from hsa_compile.model.model import HsaModel
from hsa_compile.model.tokenizer import ByteTokenizer
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    d_model=32, mlp_dim=48, lower_layers=1, upper_layers=1, swa_heads=2, swa_kv_heads=2, swa_head_dim=8, window=6,
    chunk_size=4, hsa_heads=2, hsa_head_dim=8, retrieval_dim=8, top_k=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> HsaModel:
    return lively(HsaModel(SMALL))


def test_tokenizer_round_trip_and_streaming() -> None:
    tokenizer = ByteTokenizer()
    text = "naïve — 長い文 🙂"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.BOS, *ids, tokenizer.EOS]) == text
    stream = tokenizer.stream()
    parts = [stream.push([i]) for i in ids]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_tokenizer_replaces_and_refuses() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\ud800b") == [97, 63, 98]
    assert tokenizer.decode([0xC3, 0x28]) == "\ufffd("
    stream = tokenizer.stream()
    assert stream.push([0xE2, 0x82]) == ""
    assert stream.finish() == "\ufffd"
    with pytest.raises(ValueError, match="token id 260 is outside"):
        tokenizer.decode([260])


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tmp_path: Path, tied: bool) -> None:
    model = HsaModel(dataclasses.replace(SMALL, tie_embeddings=tied)).eval()
    save_checkpoint(model, tmp_path / "run", {"steps": 3})
    save_checkpoint(model, tmp_path / "run", {"steps": 4})
    again = load_checkpoint(tmp_path / "run")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), model(ids))
    assert read_config(tmp_path / "run") == (model.config, {"steps": 4})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_checkpoint_keeps_the_dtype(tmp_path: Path, model: HsaModel) -> None:
    half = HsaModel(SMALL).to(torch.bfloat16)
    assert load_checkpoint(save_checkpoint(half, tmp_path)).embedding.weight.dtype == torch.bfloat16


def test_checkpoint_errors(tmp_path: Path, model: HsaModel) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    save_checkpoint(model, tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good = config.read_text()
    for text, message in (
        ("{", "damaged"),
        ("[]", "not an hsa-compile checkpoint"),
        ('{"architectures": ["Other"]}', "not an hsa-compile checkpoint"),
        (good.replace('"version": 1', '"version": 9'), "version 9"),
        (good.replace('"chunk_size": 4', '"chunk_size": 0'), "chunk_size must be a positive"),
        (good.replace('"d_model": 32', '"d_model": 64'), "the config says"),
        (good.replace('"lower_layers": 1', '"lower_layers": 2'), "lacks lower"),
        (good.replace('"encoder_layers": 1', '"encoder_layers": 1, "depth": 1'), "unknown model config fields depth"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    config.write_text(json.dumps(json.loads(good) | {"model": None}))
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        load_checkpoint(tmp_path)
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        load_checkpoint(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="writing was not finished"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("segment", [5, 512])
def test_greedy_generation_equals_uncached(model: HsaModel, segment: int) -> None:
    ids = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(0))
    got = torch.stack(list(generate(model, ids, 12, segment=segment)), dim=1)
    for _ in range(12):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, ids[:, 21:])


def test_generation_is_repeatable_and_streams(model: HsaModel) -> None:
    draws = [[int(i) for i in generate(model, [1, 2, 3], 8, temperature=1.0, top_p=0.9, seed=s)] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    stream = generate(model, [1, 2, 3], 10**9)
    assert next(stream).shape == (1,)
    assert list(generate(model, [1], 0)) == []


def test_sampling_stays_in_the_nucleus() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.3, 0.15]])).expand(500, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, 1.0, 0.75, generator).tolist()) == {1, 2}
    assert set(sample(logits, 1.0, 1e-6, generator).tolist()) == {1}
    assert set(sample(logits, 1.0, 1.0, generator).tolist()) == {0, 1, 2, 3}
    counts = sample(logits, 1.0, 0.75, generator).bincount(minlength=4) / 500
    assert counts[1] == pytest.approx(0.5 / 0.8, abs=0.08)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([5, 260], {}, "ids must lie in 0 … 259, found 5 … 260"),
        ([5, -1], {}, "found -1 … 5"),
        ([1], {"segment": 0}, "segment must be at least 1"),
        ([1], {"temperature": -1.0}, "temperature >= 0"),
        ([1], {"top_p": 0.0}, "top_p <= 1"),
    ],
)
def test_generation_refuses(model: HsaModel, prompt: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(model, prompt, 1, **options))  # type: ignore[arg-type]


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    model = HsaModel(preset("tiny"))
    save_checkpoint(model, tmp_path, {"steps": 3})
    save_checkpoint(model, tmp_path, {"steps": 3}, shard_bytes=200_000)
    files = weight_files(tmp_path)
    assert len(files) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert all(path.stat().st_size < 210_000 for path in files)
    ids = torch.arange(40)[None]
    assert torch.equal(load_checkpoint(tmp_path)(ids), model.eval()(ids))
    files[1].unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path)
    save_checkpoint(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_publishing_halves_the_weights(tmp_path: Path) -> None:
    save_checkpoint(HsaModel(preset("tiny")), tmp_path / "a", {"steps": 3})
    done = CliRunner().invoke(app, ["publish", str(tmp_path / "a"), "-o", str(tmp_path / "b"), "--shard-mib", "1"])
    assert done.exit_code == 0, done.output
    assert load_checkpoint(tmp_path / "b").embedding.weight.dtype == torch.bfloat16
    assert read_config(tmp_path / "b")[1] == {"steps": 3}
