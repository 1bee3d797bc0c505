"""The plain CUDA kernels of the operator library, where a CPU emulates the GPU, against the reference."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from test_gpu_window import check as check_window

from emulate import EMULATOR, adapted
from hsa_compile.ir import AnyProblem, ChunkAttention, ChunkSelect, SlidingWindow, reference
from inputs import SELECT_KINDS, Tensors, assert_selected, attention_inputs, select_inputs

DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}
OPS = ("chunk_select", "chunk_attention", "sliding_window")
# Types and the square root that the emulator does not have under CUDA's names.
PREAMBLE = """#include "cuda_on_cpu.h"
#include "library.h"
#define __device__
#define cudaErrorInvalidValue 1
#define __half half_t
#define __nv_bfloat16 bfloat16_t
#define rsqrtf(x) (1.0f / sqrtf(x))
"""

Run = Callable[[AnyProblem], Callable[[Tensors, int, int, int], None]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``plain(problem)`` runs a problem's kernel on CPU tensors."""
    directory = tmp_path_factory.mktemp("plain")
    native = Path(str(resources.files("hsa_compile.export.native")))
    host = Path(str(resources.files("hsa_compile.schedules.host")))
    source = adapted((native / "plain.cu").read_text())
    # What asks the device, no emulator answers.
    source = source[: source.index("int32_t hsa_gpu_capability")]
    (directory / "plain.cc").write_text(PREAMBLE + re.sub(r"\(const void\*\)kernel", "kernel", source))
    folders = [f"-I{folder}" for folder in (EMULATOR, native, host)]
    compile = ["g++", "-std=c++20", "-O1", "-march=native", "-w", "-shared", "-fPIC", *folders]
    subprocess.run([*compile, str(directory / "plain.cc"), "-o", str(directory / "plain.so")], check=True)
    kernel = ctypes.CDLL(str(directory / "plain.so")).hsa_plain_run
    kernel.argtypes = [ctypes.c_int32] * 2 + [ctypes.c_void_p, ctypes.c_float] + [ctypes.c_void_p] * 3

    def of(p: AnyProblem) -> Callable[[Tensors, int, int, int], None]:
        def run(tensors: Tensors, B: int, L: int, C: int) -> None:
            fields: Any = [value for name, value in p.to_dict().items() if name not in ("op", "dtype", "logit_scale")]
            statics = (ctypes.c_int64 * 6)(*map(int, fields))
            pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
            dims, scale = (ctypes.c_int64 * 3)(B, L, C), getattr(p, "logit_scale", None) or 0.0
            which = OPS.index(p.op), DTYPES.index(p.dtype)
            assert kernel(*which, statics, scale, pointers, dims, None) == 0

        return run

    return of


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_windows(plain: Run, dtype: Any) -> None:
    p = SlidingWindow(4, 2, 6, 70, dtype)
    for in_place in (False, True):
        check_window(plain(p), p, in_place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_attention(plain: Run, dtype: Any) -> None:
    base = ChunkAttention(6, 2, 20, 12, 3, off_by_one=True, dtype=dtype)
    for p in (base, replace(base, off_by_one=False, logit_scale=0.3)):
        for seed, (B, L, C) in enumerate(((2, 13, 5), (1, 1, 3))):
            _, q, k, v, indices, weights = attention_inputs(p, B, L, C, getattr(torch, dtype), seed=seed)
            o = torch.full_like(q, torch.nan)
            plain(p)((q, k, v, indices, weights, o), B, L, C)
            kept = torch.where(indices < C, indices, -1)
            want = reference.attention(p, *(x.double().numpy() for x in (q, k, v)), kept.numpy(), weights.numpy())
            np.testing.assert_allclose(o.double(), want, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("kind", SELECT_KINDS)
def test_plain_selection(plain: Run, kind: str) -> None:
    for p in (ChunkSelect(3, 1, 20, 16, 5, window=48), ChunkSelect(2, 2, 8, 4, 200, dtype="float16")):
        B, L, C = 2, 11, 300
        inputs = select_inputs(p, B, L, C, getattr(torch, p.dtype), kind, ragged=True)
        slots = (B, L, p.kv_heads, p.top_k)
        indices, scores = torch.full(slots, -77, dtype=torch.int32), torch.full(slots, torch.nan)
        plain(p)((*inputs, indices, scores), B, L, C)
        assert_selected(p, inputs, indices, scores, torch.arange(L), kind in ("ties", "zero"))
