"""Token shards, and text by a tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hsa_compile.cli import app
from hsa_compile.model.checkpoint import read_config
from hsa_compile.model.config import ConfigError
from hsa_compile.model.data import DataError, stack, text_sample
from hsa_compile.model.shards import Tokens, open_shards, write_shards
from hsa_compile.model.stream import Batches, load_corpus
from hsa_compile.model.train import train
from kit import LICENSE, bpe_tokenizer, small_recipe

pytestmark = pytest.mark.usefixtures("light", "no_plots")
IDS = np.random.default_rng(0).integers(0, 260, 5000)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    count = write_shards(tmp_path / "tokens", [IDS[:10], IDS[10:10], IDS[10:3000], IDS[3000:]], 260, shard_tokens=700)
    assert count == 5000
    return tmp_path / "tokens"


def test_slices_are_those_of_the_whole(shards: Path) -> None:
    tokens, _ = open_shards(shards, 300)
    assert len(list(shards.glob("*.npy"))) == 8
    assert all(isinstance(part, np.memmap) and part.dtype == np.uint16 for part in tokens.parts)
    rng = random.Random(0)
    for _ in range(100):
        start, stop = rng.randrange(5100), rng.randrange(5100)
        assert np.array_equal(tokens[start:stop], IDS[start:stop])
    first, last = tokens.split(0.1)
    assert np.array_equal(np.concatenate((first[0:9999], last[0:9999])), IDS)
    assert (len(first), len(last)) == (4500, 500)


def test_samples_of_tokens() -> None:
    tokens = Tokens([IDS[:50].astype(np.uint16)], 260, "few")
    long, short = (text_sample(random.Random(0), tokens, length) for length in (120, 20))
    assert np.array_equal(np.asarray(long.ids), np.tile(IDS[:50], 3)[:121])
    assert stack([short, short])[0].shape == (2, 20)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    write_shards(tmp_path / "t", [np.arange(68_000, 70_000)], 70_000)
    tokens, _ = open_shards(tmp_path / "t", 70_000)
    assert tokens.parts[0].dtype == np.uint32
    assert tokens[1999:2000].tolist() == [69_999]


def test_training_on_shards_resembles_training_on_their_bytes(tmp_path: Path) -> None:
    text = np.frombuffer(LICENSE.read_bytes(), np.uint8)
    write_shards(tmp_path / "tokens", [text], 256)
    recipe = small_recipe(tmp_path / "a", steps=3, text_share=1.0)
    on_shards = small_recipe(tmp_path / "b", steps=3, text_share=1.0, data=str(tmp_path / "tokens"))
    assert train(on_shards).losses == train(recipe).losses
    batches = [Batches(config, load_corpus(config).text) for config in (recipe, on_shards)]
    (a, *_), (b, *_) = (batch[0] for batch in batches)
    assert a.equal(b)


def _index(directory: Path, **changes: Any) -> None:
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "index.json").write_text("{"), r"index.json cannot be read"),
        (lambda at: _index(at, format="other"), "is not an index of hsa-compile tokens, version 1"),
        (lambda at: _index(at, shards=[{"file": "a.npy"}]), r"lacks or misspells a field \(KeyError\('tokens'\)\)"),
        (lambda at: _index(at, vocab_size=300), "has a vocabulary of 300, the model 260"),
        (lambda at: _index(at, shards=[]), "too few tokens"),
        (lambda at: (at / "shard-00001.npy").unlink(), "shard-00001.npy is missing or damaged"),
        (lambda at: (at / "shard-00001.npy").write_bytes(b"x" * 900), "shard-00001.npy is missing or damaged"),
        (lambda at: (at / "shard-00001.npy").write_bytes(b""), "shard-00001.npy is missing or damaged"),
        (lambda at: np.save(at / "shard-00001.npy", IDS[:700]), r"must be 1-D uint16 or uint32, got int64 \[700\]"),
        (lambda at: np.save(at / "shard-00001.npy", IDS[:600].astype("<u2")), "has 600 tokens, the index says 700"),
    ],
)
def test_damaged_shards(shards: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(shards)
    with pytest.raises(DataError, match=message):
        open_shards(shards, 260)


def test_ids_outside_the_vocabulary(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"token ids 5 … 9 are outside the vocabulary 0 … 7"):
        write_shards(tmp_path / "other", [np.array([5, 9])], 8)
    with pytest.raises(DataError, match="holds token shards already"):
        write_shards(shards, [IDS], 260)
    np.save(shards / "shard-00001.npy", np.full(700, 999, np.uint16))
    tokens, _ = open_shards(shards, 260)
    tokens[:700]
    with pytest.raises(DataError, match=r"has token id 999, the model's vocabulary is 0 … 259"):
        tokens[600:800]


def test_pairs_need_bytes(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="questions are written with the tokenizer: train on text"):
        train(small_recipe(tmp_path / "a", data=str(shards)))
    with pytest.raises(ConfigError, match="holds tokens already: leave out the tokenizer"):
        train(small_recipe(tmp_path / "a", data=str(shards), tokenizer="x.json"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return bpe_tokenizer(tmp_path / "tokenizer.json", 400)


def test_training_with_a_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 400 tokens: raise the model's vocab_size of 260"):
        train(small_recipe(tmp_path / "a", tokenizer=str(tokenizer), text_share=1.0))
    (tmp_path / "a.toml").write_text(
        f'data = "{LICENSE}"\ntokenizer = "{tokenizer}"\nsteps = 2\nbatch = 2\nlength = 64\nshort_length = 64\n'
        "text_share = 1.0\nprogress = false\n[model]\npreset = 'tiny'\nvocab_size = 400\n"
    )
    output = ("--output", str(tmp_path / "text"))
    assert CliRunner().invoke(app, ["train", str(tmp_path / "a.toml"), *output]).exit_code == 0
    assert (tmp_path / "text" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    tokens = str(tmp_path / "tokens")
    result = CliRunner().invoke(app, ["tokenize", str(LICENSE), "--tokenizer", str(tokenizer), "--output", tokens])
    assert "tokens of a vocabulary of 400" in result.output
    recipe = small_recipe(tmp_path / "b", data=str(LICENSE), tokenizer=str(tokenizer), text_share=1.0)
    model = read_config(tmp_path / "text")[0]
    changed = {"model": model, "text_share": 1.0}
    same = [
        load_corpus(small_recipe(tmp_path / "b", **changed, **where)).text
        for where in ({"data": tokens}, {"data": recipe.data, "tokenizer": str(tokenizer)})
    ]
    assert np.array_equal(same[0][0:99999], same[1][0:99999])


def test_tokenizers_that_are_none(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such tokenizer: nowhere.json"):
        train(small_recipe(tmp_path / "a", tokenizer="nowhere.json", text_share=1.0))
    tokenizer.write_text("{}")
    with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer.json"):
        train(small_recipe(tmp_path / "a", tokenizer=str(tokenizer), text_share=1.0))
