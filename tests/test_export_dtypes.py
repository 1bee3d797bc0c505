"""Graphs in half precisions: as good as eager PyTorch in the same type, against the model in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hsa_compile.export.bundle import BundleError, Manifest
from hsa_compile.export.package import export_bundle
from hsa_compile.export.session import Session
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel
from kit import assert_as_good_as, lively

pytestmark = pytest.mark.usefixtures("light")

CONFIG = ModelConfig(
    vocab_size=40, d_model=16, mlp_dim=24, lower_layers=1, upper_layers=1, n_groups=1, swa_heads=2, swa_kv_heads=1,
    swa_head_dim=8, window=6, chunk_size=4, hsa_heads=2, hsa_kv_heads=1, hsa_head_dim=8, retrieval_heads=1,
    retrieval_dim=8, top_k=3, train_top_k=3,
)  # fmt: skip
# Few chunks, so that all are selected: where scores are near, half precisions may rightly choose otherwise.
IDS = np.random.default_rng(0).integers(0, 40, (2, 15))
SPLIT = (9, 1, 1, 1, 1, 2)


def expected(dtype: torch.dtype) -> tuple[HsaModel, Any, Any]:
    """The model in a type, its logits by eager PyTorch, and those of the same weights in float64."""
    model = lively(HsaModel(CONFIG)).to(dtype)
    exact = HsaModel(CONFIG).double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        ids = torch.from_numpy(IDS)
        return model, model(ids).float().numpy(), exact(ids).numpy()


def test_float16_runs_on_a_cpu(tmp_path: Path) -> None:
    model, low, exact = expected(torch.float16)
    bundle = export_bundle(model, tmp_path / "half")
    assert json.loads((bundle / "bundle.json").read_text())["dtype"] == "float16"
    session, ends = Session(bundle, batch=2, fused=False, reserve=0, threads=1), np.cumsum(SPLIT)
    assert session.state.buffers["mem_k"].host.dtype == np.float16
    got = [session.step(IDS[:, end - n : end]) for n, end in zip(SPLIT, ends)]
    assert all(logits.dtype == np.float32 for logits in got)
    assert_as_good_as(np.concatenate(got, axis=1), low, exact)


def test_bfloat16_runs_by_the_definition_of_onnx(tmp_path: Path) -> None:
    """No CPU provider multiplies bfloat16; the reference evaluator does."""
    model, low, exact = expected(torch.bfloat16)
    bundle = export_bundle(model, tmp_path / "brain")
    with pytest.raises(BundleError, match="no bfloat16 on a CPU"):
        Session(bundle, fused=False)
    manifest = Manifest.from_json((bundle / "bundle.json").read_text())
    evaluator, at = ReferenceEvaluator(str(bundle / "model.onnx")), 0
    sizes = {"batch": 2, "capacity": 4, "rows": 16}
    state = {
        spec.name: np.zeros(
            [sizes[d] if isinstance(d, str) else d for d in spec.shape],
            np.int64 if spec.dtype == "int64" else ml_dtypes.bfloat16,
        )
        for spec in manifest.state
    }
    got = []
    for L in SPLIT:
        n = (at + L) // 4 - at // 4
        segment = {
            "input_ids": IDS[:, at : at + L], "lengths": np.full(2, L), "rows": np.arange(2), "tokens": np.arange(L),
            "upper": np.arange(L), "logits_at": np.stack([np.arange(L)] * 2),
            "completing": np.arange(2 * n).reshape(2, n),
            "temperature": np.zeros(2, np.float32), "top_p": np.ones(2, np.float32),
            "uniform": np.zeros(2, np.float32),
        }  # fmt: skip
        results = evaluator.run(None, segment | {f"past.{name}": x for name, x in state.items()})
        made = dict(zip(evaluator.output_names, results))
        state = {name: made[f"present.{name}"] for name in state}
        got.append(np.asarray(made["logits"], np.float32))
        at += L
    assert_as_good_as(np.concatenate(got, axis=1), low, exact)
