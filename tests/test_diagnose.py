"""What ``diagnose`` measures, against the definitions written out, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner, Result

from hsa_compile import diagnosis
from hsa_compile.cli import app
from hsa_compile.model import diagnose as module
from hsa_compile.model.checkpoint import save_checkpoint
from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.data import DataError
from hsa_compile.model.diagnose import Measured, correlation, diagnose, ranks
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel
from kit import LICENSE, SMALL, lively

pytestmark = pytest.mark.usefixtures("light")

WIDE = dataclasses.replace(SMALL, upper_layers=2, n_groups=2, hsa_heads=4, hsa_kv_heads=2, retrieval_heads=2)
NAMES = ("pearson", "spearman", "recall", "mass", "entropy", "empty")


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


def naive(model: HsaModel, ids: Tensor) -> list[dict[str, list[np.ndarray]]]:
    """The definitions, token by token and head by head, on one forward without a cache."""
    c, found = model.config, []

    def look(layer: HsaLayer, inputs: Any) -> None:
        x, memory, position, chunks = inputs
        with torch.no_grad():
            x = layer.norm(x)
            indices, scores = layer.select(x, memory, position, chunks, c.top_k)
            weights = layer.weigh(indices, scores)[0].double().numpy()
            q_r, q = layer.retrieval_queries(x)[0].double().numpy(), layer.queries(x)[0].double().numpy()
        k, landmark = memory.k[0].double().numpy(), memory.landmark[0].double().numpy()
        out: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
        for t in range(len(ids)):
            lag = c.window - c.chunk_size if c.leave_window else 0
            visible = [i for i in range(len(landmark)) if (i + 1) * c.chunk_size <= t - lag]
            for name, value in _token(c, q_r[t], q[t], k, landmark, visible, indices[0, t].numpy(), weights[t]).items():
                out[name].append(value)
        found.append(out)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, HsaLayer)]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return found


def _token(
    c: ModelConfig, q_r: np.ndarray, q: np.ndarray, k: np.ndarray, landmark: np.ndarray, visible: list[int],
    indices: np.ndarray, weights: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    S, K, n = c.chunk_size, c.top_k, len(visible)
    by_head: dict[str, list[float]] = {name: [] for name in NAMES}
    for h in range(c.hsa_heads):
        kv = h // (c.hsa_heads // c.hsa_kv_heads)
        r = kv if c.retrieval_heads > 1 else 0
        score = [q_r[r] @ landmark[i, r] / math.sqrt(c.retrieval_dim) for i in visible]
        Z = [np.exp(k[i * S : (i + 1) * S, kv] @ q[h] / math.sqrt(c.hsa_head_dim)).sum() for i in visible]
        chosen = {int(i) for i in indices[kv] if i >= 0}
        best = {visible[i] for i in np.argsort(Z)[::-1][:K]}
        places = [np.argsort(np.argsort(x)) for x in (score, Z)]
        by_head["pearson"].append(np.corrcoef(score, np.log(Z))[0, 1] if n > 2 else np.nan)
        by_head["spearman"].append(np.corrcoef(*places)[0, 1] if n > 2 else np.nan)
        by_head["recall"].append(len(best & chosen) / K if n > K else np.nan)
        by_head["mass"].append(sum(Z[i] for i in chosen) / sum(Z) if n else np.nan)
    for kv in range(c.hsa_kv_heads):
        w = weights[kv][indices[kv] >= 0]
        by_head["entropy"].append(-(w * np.log(w)).sum() if len(w) else np.nan)
        by_head["empty"].append((indices[kv] < 0).mean())
    return {name: np.array(values) for name, values in by_head.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"retrieval_heads": 1},
        {"leave_window": True},
        {"weights": "stick-breaking", "top_k": 3},
        {"qk_norm": False, "rank_decay": True},
        {"architecture": "mamba-hsa", "ssm_head_dim": 16, "ssm_state": 8},
    ],
)
def test_measurements_are_the_definitions(changes: dict[str, Any]) -> None:
    model, ids = lively(HsaModel(dataclasses.replace(WIDE, **changes))), text(150)
    got, want = diagnose(model, ids, queries=1000, segment=40), naive(model, ids)
    assert len(got) == len(want) == 2
    for measured, expected in zip(got, want):
        assert measured.position.tolist() == list(range(150))
        for name in NAMES:
            np.testing.assert_allclose(getattr(measured, name), np.array(expected[name]), rtol=1e-3, atol=2e-4)
        known = measured.pearson[~measured.pearson.isnan()]
        assert known.numel() > 200
        assert known.std() > 0.1  # the texts and weights tell heads and tokens apart


def test_a_sample_is_a_part_of_all_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lively(HsaModel(WIDE)), text(150)
    every = diagnose(model, ids, queries=1000)
    for block in (module.BLOCK_ELEMENTS, 1):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
        some, again, other = (diagnose(model, ids, queries=20, seed=seed) for seed in (1, 1, 2))
        assert len(some[0].position) == 20
        assert torch.equal(some[0].position, again[0].position)
        assert not torch.equal(some[0].position, other[0].position)
        for part, whole in zip(some, every):
            for field in dataclasses.fields(Measured):
                x, y = getattr(part, field.name), getattr(whole, field.name)[part.position]
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor of any operation; views are not new."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def test_measuring_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(measure: Callable[..., Any], *args: Any) -> Any:
        with Largest() as largest:
            found = measure(*args)
        seen.append(largest.elements)
        return found

    for name in ("retrieval", "_measure"):
        monkeypatch.setattr(module, name, partial(counted, getattr(module, name)))
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 4096)
    diagnose(lively(HsaModel(WIDE)), text(1500), queries=100)
    one_head_of_one_layer_at_once = 100 * 1500
    assert max(seen) <= 4 * 4096 < one_head_of_one_layer_at_once


def test_equal_values_share_their_rank() -> None:
    x = torch.tensor([[[3.0, 1.0, 3.0, 2.0, 9.0]]])
    seen = torch.tensor([[[True, True, True, True, False]]])
    assert ranks(x, seen)[..., :4].tolist() == [[[3.5, 1.0, 3.5, 2.0]]]


def test_correlations_without_meaning_are_left_out() -> None:
    x = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]], dtype=torch.float64)

    def over(count: int, y: Tensor = x) -> float:
        return correlation(x, y, torch.arange(4)[None, None] < count).item()

    assert over(3) == pytest.approx(1)
    assert over(3, -x) == pytest.approx(-1)
    assert math.isnan(over(2))
    assert math.isnan(over(4, torch.ones_like(x)))


def test_texts_without_chunks_and_models_without_layers() -> None:
    model = lively(HsaModel(SMALL))
    (found,) = diagnose(model, text(5))
    assert found.empty.eq(1).all()
    assert all(getattr(found, name).isnan().all() for name in NAMES if name != "empty")
    with pytest.raises(ValueError, match="L >= 1"):
        diagnose(model, [])
    with pytest.raises(ConfigError, match="measuring selections needs the architecture hsa or mamba-hsa; swa"):
        diagnose(HsaModel(dataclasses.replace(SMALL, architecture="swa")), [1])


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(lively(HsaModel(WIDE)), tmp_path / "checkpoint")


def test_the_command_shows_and_keeps_what_it_measured(checkpoint: Path, tmp_path: Path) -> None:
    output = call(
        checkpoint, "--text", LICENSE, "--length", 300, "--queries", 40, "--seed", 3, "--output", tmp_path
    ).output
    rows = [json.loads(line) for line in (tmp_path / "diagnose.jsonl").read_text().splitlines()]
    assert [(row["layer"], row["L"], row["queries"], row["seed"]) for row in rows] == [(0, 300, 40, 3), (1, 300, 40, 3)]
    measured = diagnose(lively(HsaModel(WIDE)), list(LICENSE.read_bytes()[:300]), 40, 3)
    for row, found in zip(rows, measured):
        for name in NAMES:
            heads = getattr(found, name).nanmean(0)
            assert row[f"{name}_by_head"] == pytest.approx(heads.tolist(), abs=1e-4)
            assert row[name] == pytest.approx(float(heads.mean()), abs=1e-4)
        assert 0 < row["recall_by_chance"] < 1
        assert f"{row['pearson']:.2f}" in output
    assert (tmp_path / "diagnose.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_makes_a_text_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    call(checkpoint, "--length", 200, "--queries", 10, "--output", tmp_path)
    (row, _) = [json.loads(line) for line in (tmp_path / "diagnose.jsonl").read_text().splitlines()]
    assert row["L"] == 200
    one, other = (diagnosis.read_tokens(WIDE, checkpoint, length=200, seed=seed).tolist() for seed in (0, 1))
    assert one != other
    assert bytes(one).count(b"{") > 5


def test_short_texts_leave_gaps_and_mistakes_are_told(checkpoint: Path, tmp_path: Path) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("five.")
    empty.write_text("")
    assert "–" in call(checkpoint, "--text", short, "--output", tmp_path).output
    row = json.loads((tmp_path / "diagnose.jsonl").read_text().splitlines()[0])
    assert row["recall"] is None
    assert row["pearson_by_head"] == [None] * 4
    assert "is empty" in call(checkpoint, "--text", empty, code=1).output
    assert "cannot read" in call(checkpoint, "--text", tmp_path / "none.txt", code=1).output
    assert "no checkpoint in" in call(tmp_path / "nowhere", code=1).output
    large = dataclasses.replace(WIDE, vocab_size=1000)
    with pytest.raises(DataError, match=r"1000 tokens, which are not bytes: give its tokenizer.json"):
        diagnosis.read_tokens(large, checkpoint, LICENSE)
    with pytest.raises(DataError, match="the text has token 122, the model knows 64"):
        diagnosis.read_tokens(dataclasses.replace(WIDE, vocab_size=64), checkpoint, LICENSE)


def test_the_checkpoints_tokenizer_reads_the_text(checkpoint: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "License": 7, "the": 9}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(checkpoint / "tokenizer.json"))
    config = dataclasses.replace(WIDE, vocab_size=10)
    ids = diagnosis.read_tokens(config, checkpoint, LICENSE)
    assert set(ids.tolist()) == {0, 7, 9}
    assert len(diagnosis.read_tokens(config, checkpoint, length=50)) == 50
