"""ChunkSelect and ChunkAttention in ONNX Runtime, by kernels and by function bodies, against the PyTorch operators."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import hsa_compile.ops  # noqa: F401  (registers torch.ops.hsa)
from export_kit import FUSED, NaiveKernel, attention_inputs, naive_kernel, problem_session, select_inputs
from hsa_compile.dispatch import use_backend
from hsa_compile.export.library import LibraryError, build_library, kernel_table
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem, SlidingWindow, reference
from hsa_compile.schedules import BuildError, build
from hsa_compile.schedules.target import machine_features

Arrays = dict[str, np.ndarray[Any, Any]]

# kv_heads, retrieval_heads, retrieval_dim, chunk_size, top_k, window
SELECTS = [
    ChunkSelect(1, 1, 8, 4, 2),
    ChunkSelect(2, 2, 3, 4, 3),
    ChunkSelect(3, 1, 5, 2, 4),
    ChunkSelect(2, 2, 7, 4, 16),
    ChunkSelect(2, 1, 4, 4, 1, window=12),
    ChunkSelect(1, 1, 1, 1, 5, window=4),
]
# q_heads, kv_heads, head_dim, chunk_size, top_k, off_by_one
ATTENTIONS = [
    ChunkAttention(1, 1, 8, 4, 2),
    ChunkAttention(4, 2, 16, 8, 3),
    ChunkAttention(6, 2, 5, 3, 1, off_by_one=True),
    ChunkAttention(3, 3, 7, 4, 12),
    ChunkAttention(8, 1, 4, 1, 5, off_by_one=True),
]
SHAPES = list(itertools.product((1, 2), (1, 7), (0, 1, 3, 9)))  # B, L, C
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("naive")
    problems: list[Problem] = [*SELECTS, *ATTENTIONS]
    kernels = [naive_kernel(problem, directory) for problem in problems]
    return build_library(kernels, directory / "libhsa_ops.so")


def eager_select(problem: ChunkSelect, x: Arrays) -> list[np.ndarray[Any, Any]]:
    tensors = [torch.from_numpy(value) for value in x.values()]
    with use_backend("eager"):
        out = torch.ops.hsa.chunk_select(*tensors, problem.kv_heads, problem.chunk_size, problem.top_k, problem.window)
    return [t.numpy() for t in out]


def eager_attention(problem: ChunkAttention, x: Arrays) -> np.ndarray[Any, Any]:
    tensors = [torch.from_numpy(value) for value in x.values()]
    with use_backend("eager"):
        o = torch.ops.hsa.chunk_attention(*tensors, problem.chunk_size, problem.off_by_one)
    result: np.ndarray[Any, Any] = o.numpy()
    return result


@FUSED
@pytest.mark.parametrize("problem", SELECTS, ids=str)
def test_select_is_exact(problem: ChunkSelect, fused: bool, library: Path) -> None:
    session = problem_session(problem, library if fused else None)
    for seed, (B, L, C) in enumerate(SHAPES):
        x = select_inputs(problem, B, L, C, seed)
        indices, scores = session.run(None, x)
        expected_indices, expected_scores = eager_select(problem, x)
        np.testing.assert_array_equal(indices, expected_indices)
        np.testing.assert_allclose(scores, expected_scores, atol=TOLERANCE, rtol=0)


@FUSED
@pytest.mark.parametrize("problem", ATTENTIONS, ids=str)
def test_attention_agrees(problem: ChunkAttention, fused: bool, library: Path) -> None:
    session = problem_session(problem, library if fused else None)
    for seed, (B, L, C) in enumerate(SHAPES):
        x = attention_inputs(problem, B, L, C, seed)
        (o,) = session.run(None, x)
        np.testing.assert_allclose(o, eager_attention(problem, x), atol=TOLERANCE * problem.top_k, rtol=1e-5)


@pytest.mark.needs_compiler
def test_compiled_kernels_agree(tmp_path: Path) -> None:
    select, attention = SELECTS[2], ATTENTIONS[2]
    library = build_library([build(select), build(attention)], tmp_path / "libhsa_ops.so")
    for seed, (B, L, C) in enumerate([*SHAPES, (2, 150, 40)]):
        x = select_inputs(select, B, L, C, seed)
        for got, expected in zip(problem_session(select, library).run(None, x), eager_select(select, x)):
            np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
        x = attention_inputs(attention, B, L, C, seed)
        (o,) = problem_session(attention, library).run(None, x)
        np.testing.assert_allclose(o, eager_attention(attention, x), atol=TOLERANCE * attention.top_k, rtol=1e-5)


@FUSED
@pytest.mark.parametrize("problem", [SELECTS[1], ATTENTIONS[1]], ids=["select", "attention"])
def test_empty_segment(problem: Problem, fused: bool, library: Path) -> None:
    make: Any = select_inputs if isinstance(problem, ChunkSelect) else attention_inputs
    outputs = problem_session(problem, library if fused else None).run(None, make(problem, 2, 0, 3, 0))
    assert all(o.shape[:2] == (2, 0) for o in outputs)


def test_large_logits_stay_finite(library: Path) -> None:
    problem = ATTENTIONS[2]
    x = attention_inputs(problem, 1, 4, 3, 0)
    x["q"] *= 1000
    for path in (library, None):
        (o,) = problem_session(problem, path).run(None, x)
        np.testing.assert_allclose(o, eager_attention(problem, x), atol=1e-5, rtol=1e-4)


def test_unaligned_inputs(library: Path) -> None:
    problem = ATTENTIONS[1]
    x = attention_inputs(problem, 2, 3, 4, 0)
    moved = {name: np.zeros(value.size + 1, value.dtype)[1:].reshape(value.shape) for name, value in x.items()}
    for name, value in x.items():
        moved[name][...] = value
    (o,) = problem_session(problem, library).run(None, moved)
    np.testing.assert_allclose(o, eager_attention(problem, x), atol=1e-5)


def _with(problem: Problem, **changed: Any) -> Arrays:
    make: Any = select_inputs if isinstance(problem, ChunkSelect) else attention_inputs
    x: Arrays = make(problem, 2, 3, 4, 0)
    return x | {name: change(x[name]) for name, change in changed.items()}


@pytest.mark.parametrize(
    ("problem", "changed", "message"),
    [
        (SELECTS[1], {"chunks": lambda c: c * 0 + 5}, "chunks must lie in 0 … 4, got 5"),
        (SELECTS[1], {"chunks": lambda c: c * 0 - 1}, "chunks must lie in 0 … 4, got -1"),
        (SELECTS[1], {"chunks": lambda c: c[:1]}, r"chunks must be \[B\] = \[2\], got \[1\]"),
        (SELECTS[1], {"position": lambda p: p * 0 - 1}, "position must not be negative"),
        (SELECTS[1], {"landmark": lambda x: x[:, :, :1]}, r"landmark must be \[B, C, Hr, Dr\]"),
        (
            SELECTS[1],
            {"landmark": lambda x: x[..., :2], "q_r": lambda x: x[..., :2]},
            "no kernel for kv_heads=2 .*retrieval_dim=2",
        ),
        (ATTENTIONS[1], {"indices": lambda i: i * 0 + 4}, "indices must lie in -1 .empty. … 3, found 4"),
        (ATTENTIONS[1], {"indices": lambda i: i * 0 - 2}, "indices must lie in"),
        (
            ATTENTIONS[1],
            {"k": lambda k: k[:, :-1], "v": lambda v: v[:, :-1]},
            "31 tokens, not a multiple of chunk_size 8",
        ),
        (ATTENTIONS[1], {"v": lambda v: v[:, :-8]}, "v must be k's shape"),
        (ATTENTIONS[1], {"weights": lambda w: w[..., :2]}, "weights must be"),
        (ATTENTIONS[1], {"indices": lambda i: i[:, :2]}, "indices must be"),
        (
            ATTENTIONS[1],
            {"q": lambda q: q[:, :, :3]},
            "no kernel for q_heads=3 .*this library has: .*q_heads=4 kv_heads=2",
        ),
    ],
)
def test_bad_inputs_are_refused(problem: Problem, changed: dict[str, Any], message: str, library: Path) -> None:
    session = problem_session(problem, library)
    with pytest.raises(Exception, match=message):
        session.run(None, _with(problem, **changed))
    session.run(None, _with(problem))  # and the session lives on


def test_other_dtypes_have_no_kernel(library: Path) -> None:
    x = _with(ATTENTIONS[1], q=lambda q: q.astype(np.float16))
    with pytest.raises(Exception, match="float16"):
        problem_session(ATTENTIONS[1], library).run(None, x)


def naive_stand_in(problem: Problem) -> Any:
    return NaiveKernel(problem, [], "unused")


def test_table_needs_distinct_kernels() -> None:
    with pytest.raises(LibraryError, match="two kernels"):
        kernel_table([naive_stand_in(SELECTS[0])] * 2)
    with pytest.raises(LibraryError, match="no kernels"):
        kernel_table([])


@pytest.mark.parametrize(
    ("foreign", "message"), [({"abi": "99"}, "interface 99, not"), ({"stage": "backward"}, "backward pass")]
)
def test_foreign_kernels_are_refused(foreign: dict[str, str], message: str, tmp_path: Path) -> None:
    library = build_library([naive_kernel(SELECTS[0], tmp_path, **foreign)], tmp_path / "lib.so")
    with pytest.raises(Exception, match=f"chunk_size=4 top_k=2.*{message}"):
        problem_session(SELECTS[0], library)


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="apt install g"):
        build_library([naive_stand_in(SELECTS[0])], tmp_path / "lib.so")
    assert list(tmp_path.iterdir()) == []


def test_failed_link_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "out").mkdir()
    kernel = naive_kernel(SELECTS[0], tmp_path / "kernel")
    with pytest.raises(LibraryError, match="undefined reference"):
        build_library([dataclasses.replace(kernel, symbol="another")], tmp_path / "out" / "lib.so")
    with pytest.raises(LibraryError, match="no objects"):
        build_library([naive_stand_in(SELECTS[0])], tmp_path / "out" / "lib.so")
    assert list((tmp_path / "out").iterdir()) == []


WINDOW = SlidingWindow(4, 2, 16, 8)


def window_inputs(problem: SlidingWindow, L: int, position: list[int], lengths: list[int], dtype: Any) -> Arrays:
    rng, B = np.random.default_rng(L), len(position)

    def normal(length: int, heads: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((B, length, heads, problem.head_dim), np.float32).astype(dtype)

    W, Hkv = problem.window, problem.kv_heads
    x = {"q": normal(L, problem.q_heads), "k": normal(L, Hkv), "v": normal(L, Hkv)}
    x |= {"past_k": normal(W, Hkv), "past_v": normal(W, Hkv)}
    return x | {"position": np.array(position), "lengths": np.array(lengths)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of two levels and two types."""
    problems: list[Any] = [WINDOW, SELECTS[1], ATTENTIONS[1]]
    problems += [dataclasses.replace(problem, dtype="float16") for problem in problems]
    kernels = [build(problem) for problem in [*problems, dataclasses.replace(ATTENTIONS[1], logit_scale=0.5)]]
    kernels += [build(WINDOW, target="cpu:x86-64-v2")]
    return build_library(kernels, tmp_path_factory.mktemp("compiled") / "libhsa_ops.so")


@pytest.mark.needs_compiler
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_windows_agree_with_the_reference(dtype: str, in_place: bool, compiled: Path) -> None:
    session = problem_session(dataclasses.replace(WINDOW, dtype=dtype), compiled)
    for L, position in itertools.product((0, 1, 7, 40), ([0, 5], [2**25 + 1, 2**33])):
        x = window_inputs(WINDOW, L, position, [L, L // 2], dtype)
        want = reference.sliding_window(WINDOW, *x.values())
        binding = session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in x.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        outputs = {"o": ort.OrtValue.ortvalue_from_numpy(np.full_like(x["q"], np.nan))}
        for name in ("k", "v"):
            past = values[f"past_{name}"]
            outputs[f"present_{name}"] = past if in_place else ort.OrtValue.ortvalue_from_numpy(past.numpy() * 0)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)
        o, *present = (outputs[name].numpy() for name in ("o", "present_k", "present_v"))
        for b, length in enumerate(x["lengths"]):
            atol = TOLERANCE if dtype == "float32" else 2e-3
            np.testing.assert_allclose(o[b, :length], want[0][b, :length], atol=atol, rtol=0)
        for got, expected in zip(present, want[1:]):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.needs_compiler
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": lambda x: x + 9}, "lengths must lie in 0 … 3, got"),
        ({"position": lambda x: x * 0 - 1}, "SlidingWindow: position must not be negative"),
        ({"past_v": lambda x: x[:, :5]}, "past_v must be past_k's shape"),
        ({"past_k": lambda x: x[:, :, :1]}, r"past_k must be \[B, W, Hkv, D\]"),
        ({"v": lambda x: x[:, :2]}, "v must be k's shape"),
        ({"lengths": lambda x: x[:1]}, r"lengths must be \[B\] = \[2\], got \[1\]"),
        (
            {"past_k": lambda x: x[:, :5], "past_v": lambda x: x[:, :5]},
            "no kernel for q_heads=4 kv_heads=2 head_dim=16 window=5 float32 .*this library has: .*window=8 float32",
        ),
    ],
)
def test_bad_windows_are_refused(changed: dict[str, Any], message: str, compiled: Path) -> None:
    session, x = problem_session(WINDOW, compiled), window_inputs(WINDOW, 3, [0, 5], [3, 1], "float32")
    with pytest.raises(Exception, match=message):
        session.run(None, x | {name: change(x[name]) for name, change in changed.items()})
    session.run(None, x)


@pytest.mark.needs_compiler
def test_half_precision_kernels_agree(compiled: Path) -> None:
    select, attention = (dataclasses.replace(p, dtype="float16") for p in (SELECTS[1], ATTENTIONS[1]))
    for seed, (B, L, C) in enumerate([*SHAPES, (2, 150, 40)]):
        x = select_inputs(select, B, L, C, seed)
        half = {name: value.astype(np.float16) if value.dtype == np.float32 else value for name, value in x.items()}
        for got, expected in zip(problem_session(select, compiled).run(None, half), eager_select(select, x)):
            np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
        x = attention_inputs(attention, B, L, C, seed)
        half = {name: value.astype(np.float16) if name in "qkv" else value for name, value in x.items()}
        x |= {name: half[name].astype(np.float32) for name in "qkv"}
        (o,) = problem_session(attention, compiled).run(None, half)
        np.testing.assert_allclose(o, eager_attention(attention, x), atol=3e-3, rtol=2e-3)


@pytest.mark.needs_compiler
def test_another_factor_of_the_logits_has_its_kernel(compiled: Path) -> None:
    scaled = dataclasses.replace(ATTENTIONS[1], logit_scale=0.5)
    x = attention_inputs(scaled, 2, 3, 4, 0)
    for path in (compiled, None):
        (o,) = problem_session(scaled, path).run(None, x)
        np.testing.assert_allclose(o, reference.attention(scaled, *x.values()), atol=1e-5)
    with pytest.raises(Exception, match=r"no kernel for .*scale=0.75"):
        problem_session(dataclasses.replace(scaled, logit_scale=0.75), compiled).run(None, x)


def test_kernels_of_other_cpus_are_not_run(tmp_path: Path) -> None:
    kernel = dataclasses.replace(naive_kernel(SELECTS[1], tmp_path), target="cpu:x86-64-v4")
    table = kernel_table([kernel, dataclasses.replace(kernel, target="cpu:x86-64-v2")])
    assert table.index('"cpu:x86-64-v4", 0, 4, 0, 0') < table.index('"cpu:x86-64-v2", 0, 2, 0, 0')
    library = build_library([kernel], tmp_path / "lib.so")
    if "avx512f" in machine_features():
        pytest.skip("this machine runs the highest level")
    with pytest.raises(Exception, match="this CPU runs none of cpu:x86-64-v4"):
        problem_session(SELECTS[1], library).run(None, _with(SELECTS[1]))
