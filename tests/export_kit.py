"""Naive C kernels with the interface of compiled ones, and one-operator ONNX models, for the tests of ``export``."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from filelock import FileLock
from onnx import TensorProto, helper

from hsa_compile.export import functions, schema
from hsa_compile.export.package import export_bundle
from hsa_compile.ir import AnyProblem, ChunkAttention, ChunkSelect, Problem
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel
from hsa_compile.schedules import resolve
from kit import lively

# Every part of a model, small.
CONFIG = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=1, upper_layers=1, n_groups=1, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=7, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=1,
    retrieval_dim=8, top_k=3, train_top_k=3, off_by_one=True, leave_window=True,
)  # fmt: skip

# By the operator library, or by the function bodies in the graph.
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "functions"])

_COMMON = r"""
#include <math.h>
#include "kernel.h"
#define RUN_ARGUMENTS \
  int32_t stage, void *const *t, const int64_t *dims, void *scratch, void *work, int64_t begin, int64_t end
static int64_t units(int32_t stage, const int64_t* dims) { return dims[0] * dims[1]; }
static int64_t no_bytes(const int64_t* dims) { return 0; }
static int64_t work_bytes(const int64_t* dims) { return WORK_BYTES; }
"""

_SELECT = r"""
static void run(RUN_ARGUMENTS) {
  const float *q = t[0], *landmark = t[1];
  const int64_t *position = t[2], *chunks = t[3], L = dims[1], C = dims[2];
  int32_t* indices = t[4];
  float *scores = t[5], *s = work;
  for (int64_t u = begin; u < end; ++u)
    for (int64_t g = 0; g < HKV; ++g) {
      const int64_t b = u / L, h = HR == 1 ? 0 : g, limit = position[b] + u % L - LAG;
      int32_t* index = indices + (u * HKV + g) * K;
      float* score = scores + (u * HKV + g) * K;
      int64_t n = 0;
      for (; n < chunks[b] && (n + 1) * S <= limit; ++n) {
        s[n] = 0;
        for (int64_t d = 0; d < DR; ++d) s[n] += q[(u * HR + h) * DR + d] * landmark[((b * C + n) * HR + h) * DR + d];
        s[n] /= sqrtf(DR);
      }
      int64_t k = 0;
      for (int64_t c = n - 1; c >= 0; --c) { /* in, if fewer than K beat it; the newer of equals beats */
        int64_t better = 0;
        for (int64_t i = 0; i < n; ++i) better += s[i] > s[c] || (s[i] == s[c] && i > c);
        if (better < K) index[k] = (int32_t)c, score[k++] = s[c];
      }
      for (; k < K; ++k) index[k] = -1, score[k] = 0;
    }
}
"""

_ATTENTION = r"""
static void run(RUN_ARGUMENTS) {
  const float *q = t[0], *k = t[1], *v = t[2], *weights = t[4];
  const int32_t* indices = t[3];
  const int64_t L = dims[1], C = dims[2];
  float *o = t[5], *p = work;
  for (int64_t u = begin; u < end; ++u)
    for (int64_t h = 0; h < HQ; ++h) {
      const int64_t g = h / (HQ / HKV), at = (u * HQ + h) * D;
      for (int64_t d = 0; d < D; ++d) o[at + d] = 0;
      for (int64_t slot = 0; slot < K; ++slot) {
        const int64_t c = indices[(u * HKV + g) * K + slot], first = (u / L * C + c) * S;
        if (c < 0) continue;
        float peak = OFF ? 0 : -INFINITY, sum = 0;
        for (int64_t j = 0; j < S; ++j) {
          p[j] = 0;
          for (int64_t d = 0; d < D; ++d) p[j] += q[at + d] * k[((first + j) * HKV + g) * D + d];
          p[j] /= sqrtf(D);
          if (p[j] > peak) peak = p[j];
        }
        for (int64_t j = 0; j < S; ++j) sum += p[j] = expf(p[j] - peak);
        if (OFF) sum += expf(-peak);
        for (int64_t j = 0; j < S; ++j)
          for (int64_t d = 0; d < D; ++d)
            o[at + d] += weights[(u * HKV + g) * K + slot] * p[j] / sum * v[((first + j) * HKV + g) * D + d];
      }
    }
}
"""

_KERNEL = r"""
const hsa_kernel SYMBOL = {ABI, "", PASS, 6, 1, units, no_bytes, work_bytes, run};
"""


@dataclass(frozen=True)
class NaiveKernel:
    """What ``export.build_library`` takes: a problem, object files and a symbol."""

    problem: Problem
    objects: list[Path]
    symbol: str
    target: str = resolve("cpu:native").name


def naive_kernel(p: Problem, directory: Path, abi: str = "HSA_KERNEL_ABI", stage: str = "forward") -> NaiveKernel:
    """Compiles the naive C kernel of a problem into ``directory``."""
    symbol = f"hsa_kernel_{p.digest}"
    if isinstance(p, ChunkSelect):
        sizes = {"HKV": p.kv_heads, "HR": p.retrieval_heads, "DR": p.retrieval_dim, "LAG": p.visible_lag}
        body, work = _SELECT, "(dims[2] * 4)"
    else:
        sizes = {"HQ": p.q_heads, "HKV": p.kv_heads, "D": p.head_dim, "OFF": int(p.off_by_one)}
        body, work = _ATTENTION, "(S * 4)"
    sizes |= {"S": p.chunk_size, "K": p.top_k}
    defines = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    source, built = directory / f"{symbol}.c", directory / f"{symbol}.o"
    interface = f'#define ABI {abi}\n#define PASS "{stage}"\n'
    source.write_text(
        f"{interface}#define SYMBOL {symbol}\n#define WORK_BYTES {work}\n{defines}{_COMMON}{body}{_KERNEL}"
    )
    include = resources.files("hsa_compile.schedules.host")
    subprocess.run(["cc", "-O2", "-fPIC", f"-I{include}", "-c", str(source), "-o", str(built)], check=True)
    return NaiveKernel(p, [built], symbol)


def shared_bundle(factory: pytest.TempPathFactory) -> Path:
    """A bundle of ``CONFIG`` with naive kernels, made once for all test processes, as exporting takes long."""
    shared = factory.getbasetemp()
    directory = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "bundle"
    directory.mkdir(exist_ok=True)
    with FileLock(directory / "lock"):
        if not (directory / "tiny").exists():
            kernels = [naive_kernel(problem, directory) for problem in CONFIG.problems()]
            export_bundle(lively(HsaModel(CONFIG)), directory / "tiny", kernels, external_data_above=0)
    return directory / "tiny"


_T, _FLOAT, _INT32, _INT64 = 0, int(TensorProto.FLOAT), int(TensorProto.INT32), int(TensorProto.INT64)
_ELEMENTS = {"float32": _FLOAT, "float16": int(TensorProto.FLOAT16), "bfloat16": int(TensorProto.BFLOAT16)}
_INPUTS = {
    "ChunkSelect": [("q_r", _T, 4), ("landmark", _T, 4), ("position", _INT64, 1), ("chunks", _INT64, 1)],
    "ChunkAttention": [("q", _T, 4), ("k", _T, 4), ("v", _T, 4), ("indices", _INT32, 4), ("weights", _FLOAT, 4)],
    "SlidingWindow": [
        *((name, _T, 4) for name in ("q", "k", "v", "past_k", "past_v")),
        ("position", _INT64, 1),
        ("lengths", _INT64, 1),
    ],
    "Sample": [("logits", _FLOAT, 3), *((name, _FLOAT, 1) for name in ("temperature", "top_p", "uniform"))],
}
_OUTPUTS = {
    "ChunkSelect": [("indices", _INT32, 4), ("scores", _FLOAT, 4)],
    "ChunkAttention": [("o", _T, 4)],
    "SlidingWindow": [("o", _T, 4), ("present_k", _T, 4), ("present_v", _T, 4)],
    "Sample": [("token", _INT64, 2)],
}


def operator_model(op: str, dtype: str = "float32", **attributes: Any) -> onnx.ModelProto:
    """A model of one operator with all dimensions dynamic, its function attached."""
    schema.register()
    node = helper.make_node(op, [n for n, *_ in _INPUTS[op]], [n for n, *_ in _OUTPUTS[op]], domain="hsa", **attributes)

    def values(names: list[tuple[str, int, int]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, kind or _ELEMENTS[dtype], [f"{n}_{i}" for i in range(rank)])
            for n, kind, rank in names
        ]

    graph = helper.make_graph([node], op, values(_INPUTS[op]), values(_OUTPUTS[op]))
    opsets = [helper.make_opsetid("", functions.STANDARD_OPSET), helper.make_opsetid(schema.DOMAIN, schema.OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    functions.attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@cache
def _operator_bytes(op: str, dtype: str, attributes: tuple[tuple[str, float], ...]) -> bytes:
    return operator_model(op, dtype, **dict(attributes)).SerializeToString()


def problem_session(problem: AnyProblem, library: Path | None = None) -> ort.InferenceSession:
    """An ONNX Runtime session of the problem's operator, by its kernels or (without a library) by its function."""
    names: tuple[str, ...] = ()
    if isinstance(problem, ChunkSelect):
        names, op = ("chunk_size", "top_k", "window"), "ChunkSelect"
    elif isinstance(problem, ChunkAttention):
        names, op = ("chunk_size", "off_by_one"), "ChunkAttention"
    else:
        op = "SlidingWindow"
    attributes: tuple[tuple[str, float], ...] = tuple((name, int(getattr(problem, name))) for name in names)
    if isinstance(problem, ChunkSelect):
        attributes += (("kv_num_heads", problem.kv_heads),)
    if isinstance(problem, ChunkAttention) and problem.logit_scale:
        attributes += (("scale", problem.logit_scale),)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        _operator_bytes(op, problem.dtype, attributes), options, providers=["CPUExecutionProvider"]
    )


def select_inputs(problem: ChunkSelect, B: int, L: int, C: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Small integers, so that there are exact ties and sums are exact; rows that are not filled hold NaN."""
    rng = np.random.default_rng(seed)
    Hr, Dr = problem.retrieval_heads, problem.retrieval_dim
    chunks = rng.integers(0, C + 1, B)
    landmark = rng.integers(-1, 2, (B, C, Hr, Dr)).astype(np.float32)
    landmark[np.arange(C) >= chunks[:, None]] = np.nan
    position = rng.integers(0, (C + 1) * problem.chunk_size + problem.visible_lag, B)
    q_r = rng.integers(-1, 2, (B, L, Hr, Dr)).astype(np.float32)
    return {"q_r": q_r, "landmark": landmark, "position": position, "chunks": chunks}


def attention_inputs(problem: ChunkAttention, B: int, L: int, C: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random values; indices in any order, with duplicates and empty slots, whose weights are not zero."""
    rng = np.random.default_rng(seed)
    Hq, Hkv, D, K = problem.q_heads, problem.kv_heads, problem.head_dim, problem.top_k

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape, dtype=np.float32)

    indices = rng.integers(-1, C, (B, L, Hkv, K)).astype(np.int32)
    memory = (B, C * problem.chunk_size, Hkv, D)
    return {
        "q": normal(B, L, Hq, D),
        "k": normal(*memory),
        "v": normal(*memory),
        "indices": indices,
        "weights": normal(B, L, Hkv, K),
    }
