"""What the suite ``e2e`` stands on: the dense peer's graph, processes that fail alone, a table with gaps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hsa_compile.bench import e2e, runtimes
from hsa_compile.bench.dense import DenseModel
from hsa_compile.bench.dense_onnx import DenseSession
from hsa_compile.bench.runtimes import Setup
from hsa_compile.model.config import ModelConfig


@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "swa_kv_heads": 4}], ids=["grouped", "plain"])
def test_the_dense_graph_is_the_dense_model(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        **{"d_model": 32, "mlp_dim": 64, "swa_heads": 4, "swa_kv_heads": 2, "swa_head_dim": 16} | options
    )
    model = DenseModel(config, 64)
    session = DenseSession(model, threads=1)
    ids = torch.randint(0, 260, (1, 40))
    for segment in (512, 7, 1):
        model.reset()
        session.reset()
        np.testing.assert_allclose(session.prefill(ids[0].tolist(), segment), model.step(ids)[0], atol=2e-5)
        for token in (3, 250):
            np.testing.assert_allclose(session.prefill([token]), model.step(torch.tensor([[token]]))[0], atol=2e-5)
    with pytest.raises(ValueError, match="the cache holds 64 tokens"):
        session.prefill([1] * 30)


def test_a_runtime_that_fails_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup("abacus", "/nowhere", None, "cpu", 64, 1)
    assert list(e2e._measured(setup, 0, [64], 5.0, lambda _: None)) == []
    assert "abacus is left out from here on" in caplog.text


def test_a_gpu_s_time_goes_to_what_reads_long_texts() -> None:
    lengths = [1 << 25, 4096, 65_536, 1 << 20]
    assert e2e._lengths("ort", lengths, "cuda") == sorted(lengths)
    assert e2e._lengths("ort-dense", lengths, "cuda") == [4096, 65_536]
    assert e2e._lengths("eager", lengths, "cuda") == [4096]
    assert e2e._lengths("eager", [1 << 20], "cuda") == [1 << 20]
    assert e2e._lengths("eager", lengths, "cpu") == sorted(lengths)


def test_what_is_left_out_of_a_long_prompt_is_not_expected_to_take_time() -> None:
    rows = [{"metric": "prefill_tokens_per_s", "value": 1000.0}, {"metric": "ttft_ms", "value": 500.0}]
    assert e2e._expected(rows, 1000, 4000) == pytest.approx(2 * 4 * 1.5)
    assert e2e._expected(rows, 1000, runtimes.LONG) == pytest.approx(runtimes.LONG / 1000 * 1.5)
    assert e2e._expected(rows, 1000, 1 << 25) == pytest.approx((1 << 25) / 1000 * 0.5)


class Counter:
    """A runtime that counts the tokens it reads."""

    dtype = "float32"

    def __init__(self) -> None:
        self.full: list[int] = []
        self.short: list[int] = []
        self.decoded = 0

    def prefill(self, ids: Any) -> None:
        self.full.append(len(ids))

    def first_token(self, ids: Any) -> None:
        self.short.append(len(ids))

    def decode(self) -> None:
        self.decoded += 1


def test_long_prompts_are_read_once_and_longer_ones_short_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "LONG", 64)
    monkeypatch.setattr(runtimes, "PART", 8)
    monkeypatch.setattr(runtimes, "LONGEST_FULL", 128)
    memory, counter = runtimes.MemoryUse("cpu"), Counter()
    metrics = [row["metric"] for row in runtimes.measure(counter, np.zeros(64, np.int64), memory, 10)]
    assert metrics == list(e2e.METRICS)
    assert counter.full == counter.short == [8, 64]
    assert counter.decoded == 10 + 1 + runtimes.TIMED_TOKENS
    rows = runtimes.measure(counter, np.zeros(256, np.int64), memory, 0)
    assert [row["metric"] for row in rows] == list(e2e.METRICS)[1:]
    assert counter.full == [8, 64]


def test_memory_is_what_was_taken_at_most() -> None:
    code = "import numpy as np; from hsa_compile.bench.runtimes import MemoryUse; use = MemoryUse('cpu')\n"
    code += "np.ones(1 << 25); print(use.peak() >> 20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 250 <= int(done.stdout) < 400


def test_gaps_show_as_gaps(tmp_path: Path) -> None:
    rows = [
        {"runtime": name, "L": L, "metric": metric, "value": 1.5 * L}
        for name, lengths in (("eager", (64,)), ("ort-cpu", (64, 128)))
        for L in lengths
        for metric in e2e.METRICS
    ]
    rows += [{"runtime": "ort-cpu", "L": 256, "metric": metric, "value": 2.0} for metric in list(e2e.METRICS)[1:]]
    shown = e2e.table(rows)
    assert [list(column.cells) for column in shown.columns][1][1] == "–"
    assert list(shown.columns[2].cells)[2].startswith("–  2 ms")
    assert shown.row_count == 3
    assert e2e.plot(rows, tmp_path / "e2e.png").stat().st_size > 10_000
