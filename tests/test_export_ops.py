"""ChunkSelect and ChunkAttention in ONNX Runtime, by kernels and by function bodies, against the PyTorch operators."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hsa_compile.ops  # noqa: F401  (registers torch.ops.hsa)
from export_kit import FUSED, NaiveKernel, attention_inputs, naive_kernel, problem_session, select_inputs
from hsa_compile.dispatch import use_backend
from hsa_compile.export.library import LibraryError, build_library, kernel_table
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.schedules import BuildError, build

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
    with pytest.raises(LibraryError, match="float32 only"):
        kernel_table([naive_stand_in(ChunkSelect(1, 1, 8, 4, 2, dtype="float16"))])
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
    with pytest.raises(LibraryError, match="undefined reference"):
        build_library([naive_stand_in(SELECTS[0])], tmp_path / "lib.so")
    assert list(tmp_path.iterdir()) == []
