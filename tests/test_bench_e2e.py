"""What the suite ``e2e`` stands on: the dense peer's graph, processes that fail alone, a table with gaps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hsa_compile.bench import e2e
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
    assert list(e2e._measured(setup, [1] * 64, [64], 5.0, lambda _: None)) == []
    assert "abacus is left out from here on" in caplog.text


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
    shown = e2e.table(rows)
    assert [list(column.cells) for column in shown.columns][1][1] == "–"
    assert shown.row_count == 2
    assert e2e.plot(rows, tmp_path / "e2e.png").stat().st_size > 10_000
