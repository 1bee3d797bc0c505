"""The rule that implementations are held to, and which of them are compared where."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hsa_compile import tolerances, validate
from hsa_compile.export.bundle import BundleError
from hsa_compile.export.runtime import PROVIDERS
from hsa_compile.tolerances import TABLE, Errors, Judge


def test_errors_are_those_of_all_that_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerances, "_BLOCK", 3)
    errors, want = Errors(), np.arange(8.0)
    errors.add(torch.tensor(want, dtype=torch.bfloat16), want)
    errors.add(want + 4 * (want == 7), want, scale=2)
    assert (errors.largest, errors.rms) == (2.0, 0.5)


@pytest.mark.parametrize("got", [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.ones(3)])
def test_what_is_no_number_or_of_another_shape_is_infinitely_wrong(got: Any) -> None:
    errors = Errors()
    errors.add(got, np.ones(2))
    assert (errors.largest, errors.rms) == (math.inf, math.inf)


def _off_by(largest: float, rms: float) -> Errors:
    return Errors(largest, rms**2, 1)


def test_both_errors_are_held_to_twice_eager_s_and_a_floor() -> None:
    judge, rule = Judge("operators", "float16"), TABLE["operators"]["float16"]
    assert judge.held("eager", "o", _off_by(1e-3, 1e-4), 1.0).passed
    largest, rms = 2e-3 + rule.largest, 2e-4 + rule.rms
    assert judge.held("triton", "o", _off_by(0.99 * largest, 0.99 * rms), 1.0).passed
    assert not judge.held("triton", "o", _off_by(1.01 * largest, 0.99 * rms), 1.0).passed
    assert not judge.held("triton", "o", _off_by(0.99 * largest, 1.01 * rms), 1.0).passed
    assert not judge.held("triton", "other", _off_by(0.99 * largest, 0.99 * rms), 1.0).passed


def test_eager_is_held_to_bounds_of_its_own() -> None:
    rule = TABLE["logits"]["bfloat16"]
    judge = Judge("logits", "bfloat16")
    assert judge.held("eager", "logits", _off_by(3 * rule.eager_largest, 3 * rule.eager_rms), 4.0).passed
    assert not judge.held("eager", "logits", _off_by(3 * rule.eager_largest, 5 * rule.eager_rms), 4.0).passed


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_taken_where_all_can_use_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"for-both": ("cpu:native", "cuda:sm_90a"), "for-cpus": ("cpu:native",)}
    monkeypatch.setattr(validate, "read_manifest", lambda path, _: SimpleNamespace(targets=targets[path.name]))
    monkeypatch.setattr(validate.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(validate.ort, "get_available_providers", lambda: [PROVIDERS["cuda"]] if gpu else [])
    assert validate.choose_device("auto", Path("for-both")) == ("cuda" if gpu else "cpu")
    assert validate.choose_device("auto", Path("for-cpus")) == "cpu"
    assert validate.choose_device("cpu", Path("for-both")) == "cpu"
    if gpu:
        assert validate.choose_device("cuda", Path("for-cpus")) == "cuda"
    else:
        with pytest.raises(BundleError, match="validate with --device cpu"):
            validate.choose_device("cuda", Path("for-both"))


def test_bfloat16_is_not_compared_in_onnx_runtime_on_a_cpu() -> None:
    legs, absent = validate.ort_legs(Path("/nowhere"), "bfloat16", "cpu")
    assert legs == []
    assert [one.leg for one in absent] == list(validate.ORT_LEGS)
