"""Margins of selections: against scores set by hand and against the definitions written out; rows, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from hsa_compile.cli import app
from hsa_compile.evaluation import margin_report
from hsa_compile.evaluation.margins import Asked, ask_all
from hsa_compile.evaluation.plan import Plan
from hsa_compile.evaluation.samples import Samples
from hsa_compile.model.checkpoint import save_checkpoint
from hsa_compile.model.config import ConfigError
from hsa_compile.model.diagnose import joined
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.margin import Margin, needed, watched_margins
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import prefill
from hsa_compile.model.tasks.haystack import Bytes
from hsa_compile.model.tasks.registry import TASKS
from kit import LICENSE, SMALL, lively

pytestmark = pytest.mark.usefixtures("light")

TEXT = np.frombuffer(LICENSE.read_bytes(), np.uint8)
WIDE = dataclasses.replace(SMALL, upper_layers=2, n_groups=2, hsa_heads=4, hsa_kv_heads=2, retrieval_heads=2)
S = SMALL.chunk_size
SCORES = [0.5, -1.0, 3.0, 2.0, 0.0, 4.0, 1.0, -2.0]  # of eight chunks


def _by_hand(
    monkeypatch: pytest.MonkeyPatch, facts: Sequence[tuple[int, int]], scores: Sequence[float] = SCORES, **change: Any
) -> Margin:
    """The margin at one token after chunks of these scores."""
    model, L = lively(HsaModel(dataclasses.replace(SMALL, **change))), len(scores) * S + 3
    ids = torch.randint(0, 256, (1, L + 1), generator=torch.Generator().manual_seed(0))
    _, state = prefill(model, ids[:, :L], 64)
    state.landmark[0, : len(scores)] = 0
    state.landmark[0, : len(scores), 0, 0] = torch.tensor(scores)
    one = torch.zeros(1, 1, 1, SMALL.retrieval_dim)
    one[..., 0] = math.sqrt(SMALL.retrieval_dim)
    monkeypatch.setattr(HsaLayer, "retrieval_queries", lambda layer, x: one.expand(*x.shape[:2], -1, -1))
    with watched_margins(model, [L], facts) as parts:
        model.step(ids[:, L:], state)
    ((found,),) = parts
    assert (found.position.tolist(), found.visible.tolist()) == ([L], [len(scores)])
    return found


def _values(found: Margin) -> dict[str, Any]:
    return {field.name: getattr(found, field.name).squeeze().item() for field in dataclasses.fields(Margin)}


def test_scores_set_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _values(_by_hand(monkeypatch, [(2 * S + 1, 3 * S)]))
    others = np.array([x for x in SCORES if x != 3.0])
    mean, spread = others.mean(), others.std()
    assert found["z"] == pytest.approx((3 - mean) / spread)
    assert found["tail"] == pytest.approx((4 - mean) / spread)
    assert found["bar"] == pytest.approx((2 - mean) / spread)  # K = 2
    assert (found["right"], found["rank"], found["selected"]) == (1, 2, 1)
    assert found["weight"] == pytest.approx(1 / (1 + math.e))


def test_a_chunk_that_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _values(_by_hand(monkeypatch, [(3 * S, 4 * S)]))
    others = np.array([x for x in SCORES if x != 2.0])
    assert found["z"] == pytest.approx((2 - others.mean()) / others.std())
    assert found["bar"] > found["z"]
    assert (found["rank"], found["selected"], found["weight"]) == (3, 0, 0)


def test_a_fact_across_a_border_and_facts_that_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    across = _values(_by_hand(monkeypatch, [(2 * S - 1, 2 * S + 1)]))  # chunks 1 and 2
    others = np.array([x for x in SCORES if x not in (-1.0, 3.0)])
    assert across["z"] == pytest.approx((3 - others.mean()) / others.std())
    assert (across["right"], across["rank"]) == (2, 2)
    both = _values(_by_hand(monkeypatch, [(2 * S, 2 * S + 3), (5 * S, 5 * S + 3)]))
    assert (both["right"], both["rank"], both["selected"]) == (2, 1, 1)
    assert both["weight"] == pytest.approx(1)


def test_more_slots_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _values(_by_hand(monkeypatch, [(7 * S, 8 * S)], top_k=20))
    assert (found["rank"], found["selected"]) == (8, 1)
    assert found["weight"] == pytest.approx(math.exp(-2) / sum(map(math.exp, SCORES)), rel=1e-5)
    assert math.isnan(found["bar"])
    seven = _values(_by_hand(monkeypatch, [(7 * S, 8 * S)], top_k=7))  # as many as there are others
    assert seven["bar"] == pytest.approx((-1 - np.mean(SCORES[:-1])) / np.std(SCORES[:-1]))
    assert seven["selected"] == 0


def test_a_fact_in_the_unfinished_chunk_is_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _values(_by_hand(monkeypatch, [(8 * S, 8 * S + 2)]))
    assert found["right"] == 0
    assert all(math.isnan(found[name]) for name in ("z", "rank", "selected", "weight"))
    assert found["tail"] == pytest.approx((4 - np.mean(SCORES)) / np.std(SCORES))
    begun = _values(_by_hand(monkeypatch, [(8 * S - 1, 8 * S + 2)]))
    assert (begun["right"], begun["rank"]) == (1, 8)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [2.0, 1.0, 1.0, 1.0], [5.0]])
def test_others_that_do_not_deviate_are_no_measure(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    found = _values(_by_hand(monkeypatch, [(0, S)], scores))
    assert all(math.isnan(found[name]) for name in ("z", "bar", "tail"))
    assert (found["rank"], found["selected"]) == (2 if scores == [1.0, 2.0] else 1, 1)


def test_what_a_normal_distribution_takes() -> None:
    assert needed(8, 8) is needed(5, 8) is None
    assert needed(16, 8) == 0
    assert needed(524_288, 8) == pytest.approx(4.17, abs=0.01)
    draws = np.random.default_rng(0).standard_normal((2000, 256))
    eighth = np.sort(draws, axis=1)[:, -8].mean()
    assert needed(256, 8) == pytest.approx(eighth, abs=0.05)


def _naive(model: HsaModel, ids: Tensor, position: int, facts: list[tuple[int, int]]) -> list[list[dict[str, float]]]:
    """The definitions of one token, a layer and head each, on one forward without a cache."""
    c, out = model.config, []

    def look(layer: HsaLayer, inputs: Any) -> None:
        x, memory, first, chunks = inputs
        with torch.no_grad():
            x = layer.norm(x)
            indices, scores = (y[0, position].numpy() for y in layer.select(x, memory, first, chunks, c.top_k))
            q_r = layer.retrieval_queries(x)[0, position].double().numpy()
        landmark = memory.landmark[0].double().numpy()
        visible = range(position // c.chunk_size)
        right = {i for i in visible for a, b in facts if a < (i + 1) * c.chunk_size and b > i * c.chunk_size}
        heads = []
        for h in range(c.retrieval_heads):
            score = landmark[:, h] @ q_r[h] / math.sqrt(c.retrieval_dim)
            others = np.array([score[i] for i in visible if i not in right])
            best = max(score[i] for i in right)
            slots = np.exp(scores[h] - scores[h].max()) * (indices[h] >= 0)
            mine = [slots[k] for k, i in enumerate(indices[h]) if i in right]
            heads.append(
                {
                    "z": (best - others.mean()) / others.std(),
                    "rank": 1.0 + sum(score[i] > best for i in visible),
                    "selected": float(bool(mine)),
                    "weight": sum(mine) / slots.sum(),
                }
            )
        out.append(heads)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, HsaLayer)]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize(
    ("patch_from", "change"),
    [
        (1 << 17, {}),
        (1, {}),
        (1, {"retrieval_heads": 1, "hsa_kv_heads": 1}),
        (1, {"architecture": "mamba-hsa", "ssm_head_dim": 16, "ssm_state": 8}),
    ],
)
def test_margins_are_those_of_the_whole_text(patch_from: int, change: dict[str, Any]) -> None:
    model = lively(HsaModel(dataclasses.replace(WIDE, **change)))
    plan = Plan(("mk", "vt"), (700,), n=3, segment=128, patch_from=patch_from)
    samples = Samples(Bytes(), TEXT, 0, patch_from, shared=2)
    found = list(ask_all(model, samples, plan))
    assert {(one.task, one.index) for one in found} == {(task, i) for task in ("mk", "vt") for i in range(3)}
    wins = 0
    for one in found:
        context = samples.draw(TASKS[one.task], 700, one.index)
        ids = torch.cat((context[:, :][0], torch.from_numpy(context.answer)))
        positions = [700 - 1 + j for j, token in enumerate(context.answer) if token != ord(" ")]
        with torch.no_grad():
            likeliest = model(ids[None])[0].argmax(-1)
        assert one.right.tolist() == [bool(likeliest[t] == ids[t + 1]) for t in positions]
        facts = [context.changed[i] for i in context.needed]
        assert len(facts) == (3 if one.task == "vt" else 1)
        for i, position in enumerate(positions):
            for margin, heads in zip(one.layers, _naive(model, ids, position, facts), strict=True):
                assert margin.position[i] == position
                for h, want in enumerate(heads):
                    got = {name: getattr(margin, name)[i, h].item() for name in want}
                    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
                    wins += got["selected"] == 1
    assert wins > 0


def _margin(right: list[int], z: list[float], selected: list[float]) -> Margin:
    n, nan = len(right), torch.nan
    column = torch.tensor(z, dtype=torch.float64)[:, None]
    known = torch.tensor(right)[:, None] > 0
    return Margin(
        position=torch.arange(n), visible=torch.full((n,), 100), right=torch.tensor(right), z=column,
        bar=torch.full_like(column, 1.5), tail=column + 0.5, rank=torch.full_like(column, 7).where(known, nan),
        selected=torch.tensor(selected, dtype=torch.float64)[:, None], weight=column / 10, pearson=column / 20,
    )  # fmt: skip


def test_rows_are_means_over_tokens_and_the_best_of_layers(tmp_path: Path) -> None:
    nan = math.nan
    asked = [
        Asked("mk", 6400, 0, [_margin([1, 1], [1.0, 2.0], [0, 0]), _margin([1, 1], [3.0, 1.0], [1, 0])],
              torch.tensor([True, False])),
        Asked("mk", 6400, 1, [_margin([0, 1], [nan, 4.0], [nan, 1]), _margin([0, 1], [nan, 0.0], [nan, 0])],
              torch.tensor([False, True])),
        Asked("s-n", 6400, 0, [_margin([0], [nan], [nan])] * 2, torch.tensor([True])),
    ]  # fmt: skip
    rows = margin_report.rows(asked, 8, 4096, 5)
    assert [(row["task"], row["layer"]) for row in rows] == [
        (task, layer) for task in ("mk", "s-n") for layer in (0, 1, "any")
    ]
    first, second, best, *single = rows
    assert (first["n"], first["tokens"], first["unseen"], first["seed"], first["top_k"]) == (2, 4, 1, 5, 8)
    assert first["z"] == pytest.approx(7 / 3, abs=1e-3)
    assert first["z_p10"] == pytest.approx(1.2)
    assert (first["recall"], second["recall"]) == (pytest.approx(1 / 3, abs=1e-3),) * 2
    assert first["needed"] == pytest.approx(needed(100, 8), abs=1e-3)
    assert (best["z"], best["tail"], best["weight"]) == (3.0, 3.5, 0.3)  # of 3, 2 and 4
    assert best["recall"] == pytest.approx(2 / 3, abs=1e-3)
    assert (best["matched"], best["matched_selected"], best["matched_missed"]) == (0.5, 1.0, 0.0)
    assert all(row["z"] is row["z_p10"] is row["recall"] is row["rank"] is None for row in single)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert margin_report.table(rows).row_count == 6
    assert margin_report.plot(rows, tmp_path / "margins.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused() -> None:
    samples = Samples(Bytes(), TEXT, 0, 1 << 17)
    model = HsaModel(SMALL).eval()
    for task in ("fwe", "ppl"):
        with pytest.raises(ConfigError, match=f"{task} hides no facts"):
            next(ask_all(model, samples, Plan(("s-n", task))))
    swa = HsaModel(dataclasses.replace(SMALL, architecture="swa")).eval()
    with pytest.raises(ConfigError, match="measuring margins needs the architecture hsa or mamba-hsa; swa"):
        next(ask_all(swa, samples, Plan(("s-n",), (200,))))


def test_parts_are_joined() -> None:
    part = _margin([1], [2.0], [1])
    assert joined([part, part]).z.tolist() == [[2.0], [2.0]]


def _call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["margins", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_command(tmp_path: Path) -> None:
    model = save_checkpoint(lively(HsaModel(WIDE)), tmp_path / "model", {"recipe": {"data": str(LICENSE)}})
    output = _call(model, "--tasks", "s-n", "--lengths", "300,1K", "-n", 1, "--output", tmp_path / "out").output
    rows = [json.loads(line) for line in (tmp_path / "out" / "margins.jsonl").read_text().splitlines()]
    assert [(row["L"], row["layer"]) for row in rows] == [(L, layer) for L in (300, 1024) for layer in (0, 1, "any")]
    assert {(row["suite"], row["tokens"], row["n"]) for row in rows} == {("margins", 7, 1)}
    assert "1K" in output
    assert (tmp_path / "out" / "margins.png").read_bytes().startswith(b"\x89PNG")
    assert "hides no facts" in _call(model, "--tasks", "fwe", code=1).output
    assert "do not fit into 20 tokens" in _call(model, "--lengths", 20, code=1).output
