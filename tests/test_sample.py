"""``hsa.Sample``: PyTorch's operator by enumeration, and the function body and the kernels against that."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulate import EMULATOR, adapted
from export_kit import naive_kernel, operator_model
from hsa_compile.export.choice import sample
from hsa_compile.export.library import build_library
from hsa_compile.ir import ChunkSelect

Array = np.ndarray[Any, Any]
Choose = Callable[[Array, Array, Array, Array], Array]
NATIVE, HOST = (Path(str(resources.files(f"hsa_compile.{name}"))) for name in ("export.native", "schedules.host"))


def by_torch(*inputs: Array) -> Array:
    return sample(*(torch.from_numpy(x) for x in inputs)).numpy()


def feeds(inputs: tuple[Array, ...]) -> dict[str, Array]:
    return dict(zip(("logits", "temperature", "top_p", "uniform"), inputs))


def emulated(directory: Path) -> Choose:
    """The CUDA kernel, on a CPU."""
    source = adapted((NATIVE / "sample.cu").read_text()).replace("(const void*)sample", "sample")
    preamble = '#include "cuda_on_cpu.h"\n#include "library.h"\n#include "sample.h"\n#define __device__\n'
    (directory / "sample.cc").write_text(preamble + source)
    folders = [f"-I{folder}" for folder in (EMULATOR, NATIVE, HOST)]
    command = ["g++", "-std=c++20", "-O1", "-march=native", "-w", "-shared", "-fPIC", *folders]
    subprocess.run([*command, str(directory / "sample.cc"), "-o", str(directory / "sample.so")], check=True)
    kernel = ctypes.CDLL(str(directory / "sample.so")).hsa_gpu_sample

    def run(*inputs: Array) -> Array:
        tensors = [np.ascontiguousarray(x) for x in inputs]
        token = np.full(tensors[0].shape[:2], -7, np.int64)
        pointers = (ctypes.c_void_p * 5)(*(x.ctypes.data for x in (*tensors, token)))
        assert kernel(pointers, (ctypes.c_int64 * 3)(*tensors[0].shape), None) == 0
        return token

    return run


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Choose]:
    directory = tmp_path_factory.mktemp("sample")
    library = build_library([naive_kernel(ChunkSelect(1, 1, 4, 4, 2), directory)], directory / "ops.so")
    model = operator_model("Sample")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    fused = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(model)
    return {
        "library": lambda *x: fused.run(None, feeds(x))[0],
        "function": lambda *x: plain.run(None, feeds(x))[0],
        "evaluator": lambda *x: evaluator.run(None, feeds(x))[0],
        "gpu": emulated(directory),
    }


WAYS = pytest.mark.parametrize("way", ["torch", "library", "function", "evaluator", "gpu"])


def chosen(ways: dict[str, Choose], way: str, *inputs: Any) -> Array:
    arrays = [np.asarray(x, np.float32) for x in inputs]
    return (by_torch if way == "torch" else ways[way])(*arrays)


@WAYS
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.5, 0.5), (1.0, 1e-6), (0.01, 0.8)])
def test_every_token_comes_as_often_as_it_should(
    ways: dict[str, Choose], way: str, temperature: float, top_p: float
) -> None:
    """Evenly spread uniform numbers give each token its share of them, but for one at either end of its range."""
    logits = np.random.default_rng(0).standard_normal(19).astype(np.float32) * 3
    logits[7] = logits[3]
    n = 40 if way == "gpu" else 1000
    rows = np.tile(logits, (n, 1, 1))
    uniform = (np.arange(n, dtype=np.float32) + 0.5) / n
    tokens = chosen(ways, way, rows, np.full(n, temperature), np.full(n, top_p), uniform)[:, 0]
    assert (np.diff(tokens) >= 0).all()
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    sorted_p = p[order] / p.sum()
    dropped = order[np.cumsum(sorted_p) - sorted_p >= np.float32(top_p)]
    p[dropped] = 0.0
    np.testing.assert_allclose(np.bincount(tokens, minlength=19), p / p.sum() * n, atol=1.01)
    assert not np.isin(tokens, dropped).any()


@WAYS
def test_rows_choose_each_in_their_way(ways: dict[str, Choose], way: str) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 2, 1100)).astype(np.float32)
    logits[0, :, [5, 9]] = 50.0  # equals: the first of them
    tokens = chosen(ways, way, logits, [0.0, 0.0, 0.3], [1.0, 0.1, 0.6], [0.9, 0.9, 0.37])
    want = by_torch(logits, *(np.array(x, np.float32) for x in ([0, 0, 0.3], [1, 0.1, 0.6], [0.9, 0.9, 0.37])))
    assert tokens[0].tolist() == [5, 5]
    assert tokens[1].tolist() == logits[1].argmax(-1).tolist()
    assert tokens.tolist() == want.tolist()


@WAYS
def test_ties_at_the_threshold_are_kept_from_the_first_on(ways: dict[str, Choose], way: str) -> None:
    n = 64
    logits = np.tile(np.array([0, 1, 1, 1, 1, 0], np.float32), (n, 1, 1))
    p = np.exp([0, 1, 1, 1, 1, 0])
    two_of_four = 1.5 * p[1] / p.sum()  # passed by the second
    tokens = chosen(ways, way, logits, np.ones(n), np.full(n, two_of_four), np.arange(n) / n)
    assert np.bincount(tokens[:, 0], minlength=6).tolist() == [0, n // 2, n // 2, 0, 0, 0]


@WAYS
def test_logits_that_are_no_numbers_choose_nothing(ways: dict[str, Choose], way: str) -> None:
    logits = np.zeros((2, 4, 9), np.float32)
    logits[:, 0, 3], logits[:, 1, 3] = np.nan, np.inf
    logits[:, 2] = -np.inf
    logits[:, 3, 3] = -np.inf  # one that is impossible is none of these
    tokens = chosen(ways, way, logits, [0.0, 1.0], [1.0, 0.5], [0.0, 0.99])
    assert tokens[:, :3].tolist() == [[-1] * 3] * 2
    assert (tokens[:, 3] >= 0).all()
    assert (tokens[:, 3] != 3).all()


@WAYS
def test_one_token_of_a_vocabulary_of_one(ways: dict[str, Choose], way: str) -> None:
    assert chosen(ways, way, np.zeros((1, 1, 1)), [0.5], [0.5], [0.999]).tolist() == [[0]]


@pytest.mark.parametrize(
    ("temperature", "top_p", "uniform"), [(-1, 1, 0), (1, 0, 0), (1, 1.5, 0), (1, 1, 1), (np.nan, 1, 0), (1, 1, -0.1)]
)
def test_the_library_refuses_what_is_out_of_range(
    ways: dict[str, Choose], temperature: float, top_p: float, uniform: float
) -> None:
    with pytest.raises(Exception, match="temperature must be finite"):
        chosen(ways, "library", np.zeros((1, 1, 5)), [temperature], [top_p], [uniform])
