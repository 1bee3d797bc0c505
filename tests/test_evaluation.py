"""The evaluation by length: samples, patched and whole contexts, the journal, the report, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hsa_compile.cli import app
from hsa_compile.cli.evaluation import tokens
from hsa_compile.evaluation import report
from hsa_compile.evaluation.answers import answer, losses
from hsa_compile.evaluation.journal import EvaluationError, Journal
from hsa_compile.evaluation.plan import Plan
from hsa_compile.evaluation.run import Evaluation
from hsa_compile.evaluation.samples import Samples
from hsa_compile.evaluation.setup import prepare
from hsa_compile.model.checkpoint import save_checkpoint
from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import patched, prefill
from hsa_compile.model.tasks.haystack import Bytes
from hsa_compile.model.tasks.registry import TASKS
from kit import LICENSE, SMALL, lively

pytestmark = pytest.mark.usefixtures("light")

TEXT = np.frombuffer(LICENSE.read_bytes(), np.uint8)
MODEL = lively(HsaModel(SMALL))
PLAN = Plan(("s-n", "vt", "fwe", "cwe", "ppl"), (700, 1500), n=3, segment=256, batch_tokens=1500)


def _evaluate(
    path: Path, plan: Plan = PLAN, model: HsaModel = MODEL, patch_from: int = 1 << 17
) -> list[dict[str, Any]]:
    samples = Samples(Bytes(), TEXT, plan.seed, patch_from, shared=2)
    journal = Journal(path, {"of": "test"})
    assert Evaluation(model, samples, dataclasses.replace(plan, patch_from=patch_from), journal).run()
    journal.close()
    return journal.lines


def _answers(lines: list[dict[str, Any]]) -> dict[Any, Any]:
    keys = ("depth", "correct", "forced", "matched", "answer", "got")
    return {(x["task"], x["L"], x["index"]): [x[key] for key in keys] for x in lines if x["kind"] == "sample"}


def test_all_is_asked_once_and_the_same_from_a_seed(tmp_path: Path) -> None:
    lines = _evaluate(tmp_path / "a.jsonl")
    answers = _answers(lines)
    assert set(answers) == {(t, L, i) for t in ("s-n", "vt", "fwe", "cwe") for L in (700, 1500) for i in range(3)}
    assert len([x for x in lines if x["kind"] == "sample"]) == 24
    assert [x["L"] for x in lines if x["kind"] == "ppl"] == [700, 1500]
    assert _answers(_evaluate(tmp_path / "b.jsonl")) == answers
    other = _answers(_evaluate(tmp_path / "c.jsonl", dataclasses.replace(PLAN, seed=1)))
    assert all(other[key] != answers[key] for key in answers if key[0] != "cwe")


@pytest.mark.parametrize("change", [{}, {"window": 40}, {"chunk_size": 64, "window": 3}, {"architecture": "swa"}])
def test_patched_haystacks_give_what_whole_contexts_give(tmp_path: Path, change: dict[str, Any]) -> None:
    model = lively(HsaModel(dataclasses.replace(SMALL, **change)))
    plan = Plan(("s-n", "vt", "qa3", "cwe", "mk"), (1600,), n=3, segment=300, check=3)
    lines = _evaluate(tmp_path / "p.jsonl", plan, model, patch_from=1)
    assert [x["hay"] for x in lines if x["kind"] == "prefill"] == ["text", "text", "words", "words"]
    checked = [x for x in lines if x["kind"] == "sample"]
    assert len(checked) == 15
    assert max(x["check_error"] for x in checked) < 1e-4
    assert all(x["check_same"] and x["check_ok"] for x in checked)


def test_patching_several_places_is_taken_back_to_the_bit() -> None:
    ids = torch.randint(0, 256, (2, 333), generator=torch.Generator().manual_seed(0))
    now = ids.clone()
    ranges = [(3, 9), (100, 130), (131, 132), (250, 333)]
    for start, end in ranges:
        now[:, start:end] = (now[:, start:end] + 5) % 256
    before, state = prefill(MODEL, ids, 64)
    want, full = prefill(MODEL, now, 64)
    kept = [x.clone() for x in state.memory]
    for segment in (16, 50, 512):
        with patched(MODEL, now, state, ranges, segment) as (got, patched_state):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            n = 333 // 8
            torch.testing.assert_close(patched_state.landmark[:, :n], full.landmark[:, :n], atol=1e-4, rtol=0)
            torch.testing.assert_close(patched_state.pending, full.pending, atol=1e-4, rtol=0)
            step = ids[:, :1]
            torch.testing.assert_close(
                MODEL.step(step, patched_state)[0], MODEL.step(step, full)[0], atol=1e-4, rtol=0
            )  # fmt: skip
        filled = [x[:, : n * size] for x, size in zip(state.memory, (8, 8, 1))]
        assert all(torch.equal(a, b[:, : a.shape[1]]) for a, b in zip(filled, kept))
    assert before.shape == want.shape


class _Script(HsaModel):
    """Continues every text with the same tokens."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(SMALL)
        self.script = script

    def step(self, ids: torch.Tensor, state: Any, lengths: Any = None, last: bool = False) -> Any:
        first, at = state, ids.shape[1]
        logits = torch.nn.functional.one_hot(torch.tensor(self.script[first + 1 : first + 1 + at]), 260).float()
        return logits[None].expand(ids.shape[0], -1, -1), first + at


def test_answers_are_compared_token_by_token() -> None:
    model = _Script([5, 6, 7, 8, 9])
    first = torch.nn.functional.one_hot(torch.tensor([5, 5, 5]), 260).float()
    wanted = [[np.array(ids, np.int64)] for ids in ([5, 6, 7], [5, 9, 7], [5])]
    good, bad, short = answer(model, first, 0, wanted)  # type: ignore[arg-type]
    assert answer(model, first, 0, wanted, decode=False) == [good, bad, short]  # type: ignore[arg-type]
    assert (good.correct, good.forced, good.matched, good.got) == (True, True, 1.0, [5, 6, 7])
    assert (bad.correct, bad.forced, bad.got) == (False, False, [5, 6])
    assert bad.matched == pytest.approx(2 / 3)
    assert (short.correct, short.got) == (True, [5])
    wanted = [[np.array([1, 6], np.int64)]]
    (wrong,) = answer(model, first[:1], 0, wanted)  # type: ignore[arg-type]
    assert answer(model, first[:1], 0, wanted, decode=False) == [wrong]  # type: ignore[arg-type]
    assert (wrong.correct, wrong.forced, wrong.matched, wrong.got) == (False, False, 0.5, [5])


def _parts(*parts: list[int]) -> list[np.ndarray]:
    return [np.array(part, np.int64) for part in parts]


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("wanted", "correct", "forced", "matched"),
    [
        (_parts([5, 6], [7], [8, 9]), True, True, 1.0),
        (_parts([7], [8, 9], [5, 6]), True, False, 1.0),
        (_parts([5, 6], [8, 9], [4]), False, False, 2 / 3),  # one is missing, another token in its place
        (_parts([7], [6]), False, False, 0.5),  # what would come after as many tokens as there are does not count
        (_parts([1, 2], [3]), False, False, 0.0),
    ],
)  # fmt: skip
def test_parts_of_an_answer_are_right_in_any_order(
    wanted: Any, correct: bool, forced: bool, matched: float, decode: bool
) -> None:
    model = _Script([5, 6, 7, 8, 9])
    first = torch.nn.functional.one_hot(torch.tensor([5]), 260).float()
    (got,) = answer(model, first, 0, [wanted], decode)  # type: ignore[arg-type]
    assert (got.correct, got.forced) == (correct, forced)
    assert got.matched == pytest.approx(matched)
    assert got.got == [5, 6, 7, 8, 9][: sum(map(len, wanted))]


def test_a_part_that_comes_twice_counts_once() -> None:
    first = torch.nn.functional.one_hot(torch.tensor([5]), 260).float()
    (got,) = answer(_Script([5, 6, 5, 6]), first, 0, [_parts([5, 6], [7, 8])])  # type: ignore[arg-type]
    assert (got.correct, got.matched) == (False, 0.5)


class _Own(HsaModel):
    """Continues as its own tokens say: after x comes x + 1, after 9 comes 1. Says which tokens it was given."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.given: list[list[list[int]]] = []

    def step(self, ids: torch.Tensor, state: Any, lengths: Any = None, last: bool = False) -> Any:
        self.given.append(ids.tolist())
        return torch.nn.functional.one_hot(ids % 9 + 1, 260).float(), state


@pytest.mark.parametrize("decode", [True, False])
def test_some_answers_of_a_batch_are_sets(decode: bool) -> None:
    model = _Own()
    first = torch.nn.functional.one_hot(torch.tensor([3, 8, 4, 7]), 260).float()
    wanted = [_parts([3, 4]), _parts([1, 2], [8, 9]), _parts([1, 5, 6]), _parts([9, 1, 2], [7, 8])]
    exact, permuted, wrong, whole = answer(model, first, None, wanted, decode)  # type: ignore[arg-type]
    assert (exact.correct, exact.forced, exact.got) == (True, True, [3, 4])
    assert (permuted.correct, permuted.forced, permuted.matched, permuted.got) == (True, False, 1.0, [8, 9, 1, 2])
    assert (wrong.correct, wrong.got) == (False, [4])
    assert wrong.matched == pytest.approx(1 / 3)
    assert (whole.correct, whole.got) == (True, [7, 8, 9, 1, 2])
    # One teacher-forced step, then the set's tokens one by one, of the model's own choice.
    assert [len(rows[0]) for rows in model.given] == [4, 1, 1, 1, 1]
    assert [rows[1] for rows in model.given[1:]] == [[8], [9], [1], [2]]


def test_sets_are_decoded_whatever_is_read_off(tmp_path: Path) -> None:
    plan = Plan(("mv", "s-n", "fwe"), (900,), n=3, segment=256, batch_tokens=1800)
    whole = _answers(_evaluate(tmp_path / "all.jsonl", plan))
    read = _answers(_evaluate(tmp_path / "read.jsonl", dataclasses.replace(plan, decoded=0)))
    assert read == whole
    sizes = {(task, len(got[4]) == len(got[5])) for (task, *_), got in whole.items()}
    assert {("mv", True), ("fwe", True)} <= sizes
    assert not {("mv", False), ("fwe", False)} & sizes
    path = tmp_path / "cut.jsonl"
    _evaluate(path, dataclasses.replace(plan, n=2, decoded=1))
    assert _answers(_evaluate(path, dataclasses.replace(plan, decoded=0))) == whole


def test_perplexity_after_a_context_is_that_of_the_joined_text() -> None:
    ids = torch.from_numpy(TEXT[:300].astype(np.int64))
    logits, state = prefill(MODEL, ids[None, :200], 64)
    want = torch.nn.functional.cross_entropy(MODEL(ids[None])[0, 199:299], ids[200:])
    assert losses(MODEL, logits, state, ids[200:].numpy()) == pytest.approx(float(want.detach()), rel=1e-4)


@pytest.mark.parametrize("architecture", ["mamba", "attention", "landmark", "mamba-hsa", "nsa"])
def test_baselines_are_evaluated_too(tmp_path: Path, architecture: Any) -> None:
    model = lively(HsaModel(dataclasses.replace(SMALL, architecture=architecture, ssm_head_dim=16)))
    lines = _evaluate(tmp_path / "j.jsonl", Plan(("s-n",), (200,), n=2), model, patch_from=100)
    assert len(_answers(lines)) == 2


def test_an_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = _answers(_evaluate(tmp_path / "whole.jsonl"))
    path, plan = tmp_path / "cut.jsonl", dataclasses.replace(PLAN, seconds=1e-9)
    journal = Journal(path, {"of": "test"})
    assert not Evaluation(MODEL, Samples(Bytes(), TEXT, 0, 1 << 17, 2), plan, journal).run()
    journal.close()
    _evaluate(path, dataclasses.replace(PLAN, lengths=(700,), n=2))
    with path.open("a") as file:
        file.write('{"kind": "sample", "ta')  # cut short by a crash
    done = path.read_text().count('"sample"') - 1
    lines = _evaluate(path)
    assert _answers(lines) == whole
    assert sum(x["kind"] == "sample" for x in lines) == 24 > done
    assert json.loads(path.read_text().splitlines()[0])["of"] == "test"
    with pytest.raises(EvaluationError, match="is of another evaluation \\(other: of\\); give another output"):
        Journal(path, {"of": "another"})
    head, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(head) | {"version": 1}) + "\n" + rest)
    with pytest.raises(EvaluationError, match="another version, which scored answers otherwise; give another output"):
        Journal(path, {"of": "test"})
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(EvaluationError, match="damaged at line 1"):
        Journal(path, {"of": "test"})


def test_haystacks_are_shared_from_a_length_on() -> None:
    samples = Samples(Bytes(), TEXT, 0, 1000, shared=2)
    offsets = [samples.haystack("text", 1000, i).offset for i in range(4)]
    assert offsets[0] == offsets[1] != offsets[2] == offsets[3]
    assert len({samples.haystack("text", 999, i).offset for i in range(4)}) == 4
    given = samples.draw(TASKS["mk"], 1000, 1, samples.haystack("text", 1000, 0))
    alone = samples.draw(TASKS["mk"], 1000, 1)
    assert np.array_equal(given.read(0, 1000), alone.read(0, 1000))


def test_accuracy_interval() -> None:
    assert report.Accuracy(90, 100).interval == pytest.approx((0.826, 0.945), abs=0.002)
    assert report.Accuracy(10, 10).interval[1] == pytest.approx(1.0)
    assert report.Accuracy(0, 10).interval == pytest.approx((0.0, 0.278), abs=0.002)


def test_report(tmp_path: Path) -> None:
    lines = [
        {"kind": "sample", "task": "s-n", "L": L, "seed": 0, "index": i, "depth": i / 10, "correct": i % 2 == 0,
         "forced": i > 2, "matched": 0.5, "seconds": 1.0, "selection_s": 0.25, "attention_s": 0.5, "peak_gib": 1.5 + i}
        for L in (4096, 1 << 20) for i in range(10)
    ]  # fmt: skip
    lines.append({"kind": "ppl", "L": 4096, "seed": 0, "nats": [1.0, 1.2], "tokens": 99})
    rows = report.rows(lines, "hsa", 4096, 0)
    counts = [(row["task"], row["L"], row["n"]) for row in rows]
    assert counts == [("s-n", 4096, 10), ("s-n", 1 << 20, 10), ("ppl", 4096, 99)]
    assert rows[0]["accuracy"] == 0.5
    assert rows[0]["forced"] == 0.7
    assert rows[0]["ci_low"] < 0.5 < rows[0]["ci_high"]
    assert (rows[0]["seconds"], rows[0]["selection_s"], rows[0]["peak_gib"]) == (1.0, 0.25, 10.5)
    assert rows[2]["value"] == pytest.approx(np.exp(1.1), abs=1e-3)
    assert (report.table(rows).row_count, report.costs_table(rows).row_count) == (2, 2)  # type: ignore[union-attr]
    for path in report.plot(rows, lines, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": ("x",)}, "unknown task"), ({"lengths": ()}, "at least one"), ({"n": 0}, "n must be at least 1"),
     ({"lengths": (4, 4)}, "different"), ({"seconds": -1.0}, "at least 0")],
)  # fmt: skip
def test_plans_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**change)


def test_what_is_evaluated_has_to_fit(tmp_path: Path) -> None:
    save_checkpoint(HsaModel(SMALL), tmp_path / "bytes")
    save_checkpoint(HsaModel(ModelConfig(vocab_size=600, d_model=32)), tmp_path / "words")
    with pytest.raises(ConfigError, match="no CUDA device"):
        prepare(tmp_path / "bytes", PLAN, LICENSE, device="cuda")
    with pytest.raises(ConfigError, match=r"give its tokenizer\.json"):
        prepare(tmp_path / "words", PLAN, LICENSE)
    with pytest.raises(ConfigError, match="dtype must be one of"):
        prepare(tmp_path / "bytes", PLAN, LICENSE, dtype="int8")


def test_lengths_of_the_command_line() -> None:
    assert [tokens(x) for x in ("4096", "4K", "32m")] == [4096, 4096, 1 << 25]


def test_command(tmp_path: Path) -> None:
    save_checkpoint(MODEL, tmp_path / "model", {"recipe": {"data": str(LICENSE), "length": 96}})
    command = ["eval", str(tmp_path / "model"), "--tasks", "s-n,ppl", "--lengths", "256,1K", "-n", "2"]
    command += ["--output", str(tmp_path / "out")]
    for _ in range(2):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in (tmp_path / "out" / "length.jsonl").read_text().splitlines()]
        assert [(row["task"], row["L"]) for row in rows] == [("s-n", 256), ("s-n", 1024), ("ppl", 256), ("ppl", 1024)]
        assert {row["train_length"] for row in rows} == {96}
    assert (tmp_path / "out" / "samples.jsonl").read_text().count("\n") == 7
    bad = CliRunner().invoke(app, [*command, "--seed", "1", "--tasks", "none"])
    assert bad.exit_code == 1
