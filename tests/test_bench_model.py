"""The suite ``model`` on sizes that take a moment: its rows, its files, and two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hsa_compile import dispatch
from hsa_compile.bench import inference, model, training
from hsa_compile.bench.record import write_suite
from hsa_compile.cli import app
from hsa_compile.model.config import ConfigError, preset
from hsa_compile.model.parallel import World
from hsa_compile.model.prefill import prefill
from hsa_compile.model.variants import parameter_count, variant

PLAN: dict[str, Any] = {
    "preset": "tiny", "device": "cpu", "train_lengths": (64,), "train_tokens": 128, "prefill_lengths": (64, 200),
    "decode_lengths": (256, 1024), "segment": 64, "seconds": 20.0,
}  # fmt: skip


@pytest.mark.usefixtures("light")
def test_every_part_is_measured_and_kept(tmp_path: Path) -> None:
    path, kept = tmp_path / "model.jsonl", []

    def keep(rows: list[dict[str, Any]]) -> None:
        kept.append(len(rows))
        write_suite(path, rows)

    rows, main = model.run(model.Plan(**PLAN), lambda _: None, keep)
    assert main
    assert kept == list(range(1, len(rows) + 1)), "written as it goes"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert all({"suite", "preset", "metric", "variant", "L", "batch", "devices", "value"} <= set(row) for row in rows)
    assert all(row["value"] > 0 for row in rows)
    found = {(row["metric"], row["variant"], row["L"], row.get("prefill", row.get("memory"))) for row in rows}
    assert {("train_tokens_per_s", name, 64, None) for name in ("hsa", "swa", "full")} <= found
    assert {("prefill_tokens_per_s", "hsa", 200, kind) for kind in ("short", "full")} <= found
    assert {("decode_ms", "hsa", 1024, place) for place in ("device", "host")} <= found
    assert all(0 < row["value"] < 1 for row in rows if row["metric"] == "mfu")
    assert model.table(rows).row_count == len(rows)
    assert model.plot(rows, tmp_path / "model.png").stat().st_size > 10_000


def test_baselines_have_as_many_parameters() -> None:
    base = preset("240m")
    assert variant(base, "hsa", 64, training.WIDTH) == base
    for name in training.VARIANTS.values():
        config = variant(base, name, 64, training.WIDTH)
        assert parameter_count(config) == pytest.approx(parameter_count(base), rel=0.01)
        assert config.mlp_dim % training.WIDTH == 0


@pytest.mark.usefixtures("light")
def test_what_does_not_fit_is_tried_at_half(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, real = [], training._measure

    def small(base: Any, name: str, length: int, batch: int, *others: Any) -> Any:
        tried.append((name, batch))
        if name == "swa" and batch > 1:
            raise torch.OutOfMemoryError
        return real(base, name, length, batch, *others)

    monkeypatch.setattr(training, "_measure", small)
    alone = World(torch.device("cpu"))
    rows = list(training.rows(preset("tiny"), ("hsa", "swa"), 32, 64, alone, 0.1, steps=3, seconds=0.1))
    assert tried == [("hsa", 2), ("swa", 2), ("hsa", 1), ("swa", 1)]
    assert {(row["variant"], row["batch"]) for row in rows} == {("hsa", 2), ("hsa", 1), ("swa", 1)}


@pytest.mark.usefixtures("light")
def test_a_kind_of_prefill_ends_with_its_time(caplog: pytest.LogCaptureFixture) -> None:
    tiny = inference.inference_model(preset("tiny"), torch.device("cpu"))
    rows = list(inference.prefill_rows(tiny, (64, 1 << 40), 5.0, 64))
    assert {row["L"] for row in rows} == {64}
    assert "no time left for a full prefill" in caplog.text


def test_what_a_longer_prefill_will_take() -> None:
    """Selecting for all tokens grows with the square of their number, everything else with their number."""
    found = {"ttft_ms": 1000.0, "selection_ms": 100.0}
    assert inference._expected("short", 64, 16, found) == pytest.approx(4.0)
    assert inference._expected("full", 64, 16, found) == pytest.approx(4 * 0.9 + 16 * 0.1)


@pytest.mark.usefixtures("light")
def test_operators_are_timed_within_the_block_alone() -> None:
    tiny = inference.inference_model(preset("tiny"), torch.device("cpu"))
    before = dispatch.select, dispatch.attention
    ids = torch.zeros(1, 128, dtype=torch.int64)
    with inference.operator_clock(torch.device("cpu")) as clock:
        prefill(tiny, ids, 64)
    assert (dispatch.select, dispatch.attention) == before
    assert len(clock.spans["selection"]) == len(clock.spans["attention"]) == 2
    assert clock.milliseconds("selection") > 0
    prefill(tiny, ids, 64)
    assert len(clock.spans["selection"]) == 2


@pytest.mark.usefixtures("light")
def test_a_synthetic_state_is_one_that_decoding_goes_on_from() -> None:
    tiny = inference.inference_model(preset("tiny"), torch.device("cpu"))
    state = inference.synthetic_state(tiny, 1024, offload=True)
    assert (state.position.tolist(), state.chunks.tolist(), state.offloaded) == ([1024], [64], True)
    logits, after = tiny.step(torch.zeros(1, 20, dtype=torch.int64), state)
    assert logits.isfinite().all()
    assert after.chunks.tolist() == [65]


def test_plans_that_cannot_be_measured_are_refused() -> None:
    for change, message in (
        ({"preset": "huge"}, "unknown preset"),
        ({"parts": ("train", "sing")}, "parts must be of train, decode, prefill"),
        ({"train_variants": ("rwkv",)}, "train_variants must be of"),
        ({"decode_lengths": (0,)}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.Plan(**PLAN | change)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            model.Plan()


def test_a_picture_is_drawn_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.jsonl").write_bytes(Path("benchmarks/results/h100/model.jsonl").read_bytes())
    assert CliRunner().invoke(app, ["bench", "plot", str(tmp_path / "model.jsonl")]).exit_code == 0
    assert (tmp_path / "model.png").stat().st_size > 10_000
    for text, message in (
        ("", "of one suite"),
        ('{"a": 1}\n', "of one suite"),
        ("PK\n", "holds no measurements"),
        ('{"suite": "parity"}\n', "has no picture"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        done = CliRunner().invoke(app, ["bench", "plot", str(tmp_path / "bad.jsonl")])
        assert done.exit_code != 0
        assert message in " ".join(done.output.split()), done.output


def test_two_processes_train_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "hsa_compile.cli", "bench", "model", "--preset", "tiny", "--device", "cpu"]
    command += ["--train-length", "64", "--train-tokens", "64", "--seconds", "3", "--output", str(tmp_path)]
    environment = os.environ | {"HSA_COMPILE_BACKEND": "eager", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "model.jsonl").read_text().splitlines()]
    rates = [row for row in rows if row["metric"] == "train_tokens_per_s"]
    assert {row["variant"] for row in rates} == {"hsa", "swa", "full"}
    assert all(row["devices"] == row["batch"] == 2 for row in rates)
