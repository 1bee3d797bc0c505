"""The Triton path: its numbers in the interpreter, every kernel through the compiler, and when dispatch takes it."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hsa_compile
from hsa_compile import dispatch, ops
from hsa_compile.ir import ChunkAttention, ChunkSelect
from kit import attention_inputs, select_inputs
from triton_kit import SHARED_MEMORY, Launches, needs_triton, not_interpreted, passes_in_the_interpreter


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    passes_in_the_interpreter("triton_interpreter.py")


def _attention(dtype: torch.dtype) -> None:
    from hsa_compile import triton_kernels

    q, k, v, indices, weights = attention_inputs(ChunkAttention(8, 1, 64, 64, 4), 1, 32, 3)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    triton_kernels.attention(q, k, v, indices, weights, 64, False)
    triton_kernels.attention_backward(q, q, k, v, indices, weights, 64, False)


def _select(dtype: torch.dtype) -> None:
    from hsa_compile import triton_kernels

    problem = ChunkSelect(1, 1, 64, 64, 8)
    for L, C in ((1, 300), (2000, 30)):  # split over the landmarks, and not
        q_r, landmark, position, chunks = select_inputs(problem, 1, L, C)
        q_r, landmark = q_r.to(dtype), landmark.to(dtype)
        indices, scores = triton_kernels.select(q_r, landmark, position, chunks, 1, 64, 8, 0)
    triton_kernels.select_backward(scores, q_r, landmark, torch.zeros_like(indices))


@needs_triton
@not_interpreted
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("run", "dtype", "kernels"),
    [
        (_attention, torch.bfloat16, 5),
        (_attention, torch.float32, 5),
        (_select, torch.bfloat16, 5),
    ],
)
def test_every_kernel_compiles(
    run: Callable[[torch.dtype], None],
    dtype: torch.dtype,
    kernels: int,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = Launches(monkeypatch, capability)
    run(dtype)
    assert len(launches.compiled) == kernels
    for kernel in launches.compiled.values():
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
    products = [name for name, kernel in launches.compiled.items() if "tt.dot" in kernel.asm["ttir"]]
    for name in products:  # on the matrix units
        ptx = launches.compiled[name].asm["ptx"]
        assert "wgmma" in ptx or "mma.sync" in ptx, name


def _call() -> torch.Tensor:
    q, k, v, indices, weights = attention_inputs(ChunkAttention(4, 2, 8, 4, 3), 1, 6, 3)
    return ops.chunk_attention(q, k, v, indices, weights, 4)


@not_interpreted
def test_on_cpu_tensors_it_runs_only_in_the_interpreter() -> None:
    reason = "CUDA tensors" if importlib.util.find_spec("triton") else "hsa-compile\\[cuda\\]"
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        _call()


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Dispatch takes CPU tensors for a GPU's, and finds no kernels, whatever other tests have built."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(dispatch, "find", lambda *_: None)
    remembered = (dispatch._triton, dispatch._warn_once, dispatch._load, dispatch._resolve)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_gpu_without_triton_says_so_once_and_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hsa_compile.triton_kernels", None)
    monkeypatch.delattr(hsa_compile, "triton_kernels", raising=False)
    with caplog.at_level(logging.WARNING), dispatch.use_backend("auto"):
        first = _call()
        assert torch.equal(first, _call())
    (line,) = caplog.messages
    assert "slower eager path" in line
    assert "pip install 'hsa-compile[cuda]'" in line
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match="hsa-compile"):
        _call()


@needs_triton
@pytest.mark.usefixtures("_on_a_gpu")
def test_what_no_multiprocessor_can_hold_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hsa_compile import triton_kernels

    def refuse(*_: Any) -> None:
        raise triton_kernels.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(triton_kernels, "attention", refuse)
    monkeypatch.setattr(dispatch, "_device_lacks", lambda device: "")
    with caplog.at_level(logging.WARNING), dispatch.use_backend("auto"):
        _call()
    assert "out of resource" in caplog.text
    with dispatch.use_backend("triton"), pytest.raises(triton_kernels.OutOfResources):
        _call()
