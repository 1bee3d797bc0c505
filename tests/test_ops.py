"""The custom ops as PyTorch sees them: schema, fake tensors, autograd, torch.compile, and what they refuse."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from hsa_compile import dispatch, ops
from hsa_compile.ir import ChunkAttention, ChunkSelect
from kit import attention_inputs, select_inputs

pytestmark = pytest.mark.usefixtures("light")

ATTENTION = ChunkAttention(4, 2, 8, 4, 3)
SELECT = ChunkSelect(2, 2, 6, 4, 3)
SELECT_OPTIONS = (2, 4, 3)


def _attention() -> list[torch.Tensor]:
    inputs = attention_inputs(ATTENTION, 2, 13, 5)
    return [x.nan_to_num().requires_grad_(x.is_floating_point()) for x in inputs]


def _select() -> list[torch.Tensor]:
    inputs = select_inputs(SELECT, 2, 13, 5)
    return [x.nan_to_num().requires_grad_() if x.is_floating_point() else x for x in inputs]


def test_opcheck_attention() -> None:
    for off_by_one in (False, True):
        torch.library.opcheck(torch.ops.hsa.chunk_attention.default, (*_attention(), 4, off_by_one))
    inputs = [x.detach() for x in _attention()]
    torch.library.opcheck(torch.ops.hsa.chunk_attention_backward.default, (torch.randn(2, 13, 4, 8), *inputs, 4))


def test_opcheck_select() -> None:
    # opcheck's AOT test adds all outputs up in the first one's dtype, which an index can't hold: it is done below.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hsa.chunk_select.default, (*_select(), *SELECT_OPTIONS), test_utils=tests)
    q_r, landmark, position, chunks = (x.detach() for x in _select())
    indices, scores = ops.chunk_select(q_r, landmark, position, chunks, *SELECT_OPTIONS)
    torch.library.opcheck(torch.ops.hsa.chunk_select_backward.default, (scores, q_r, landmark, indices, 4))


def test_compiles_without_graph_breaks_and_with_the_same_gradients() -> None:
    def f(q_r: Any, landmark: Any, position: Any, chunks: Any, q: Any, k: Any, v: Any) -> torch.Tensor:
        indices, scores = ops.chunk_select(q_r, landmark, position, chunks, *SELECT_OPTIONS)
        weights = torch.where(indices >= 0, scores.sigmoid(), 0.0)
        return ops.chunk_attention(q, k, v, indices, weights, 4).square().sum()

    def gradients(function: Any) -> list[torch.Tensor]:
        leaves = [*_select(), *_attention()[:3]]
        function(*leaves).backward()
        return [x.grad for x in leaves if x.requires_grad]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for mine, theirs in zip(gradients(compiled), gradients(f)):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck() -> None:
    q, k, v, indices, weights = _attention()
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v, weights)]
    for off_by_one in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v, w, o=off_by_one: ops.chunk_attention(q, k, v, indices, w, 4, o), doubles
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_run_eagerly(dtype: torch.dtype) -> None:
    q, k, v, indices, weights = (x.detach() for x in _attention())
    got = ops.chunk_attention(q.to(dtype), k.to(dtype), v.to(dtype), indices, weights, 4)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), ops.chunk_attention(q, k, v, indices, weights, 4), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_narrows_tensors_and_leaves_weights_in_float32(compiled: bool) -> None:
    q, k, v, indices, weights = _attention()
    narrow = torch.nn.Linear(8, 8)

    def f() -> torch.Tensor:
        # A narrowed query beside wide keys and narrowed weights, as layers under autocast hand them over.
        return ops.chunk_attention(narrow(q), k, v, indices, weights.bfloat16(), 4)

    run = torch.compile(f, backend="aot_eager", fullgraph=True) if compiled else f
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = run()
        indices_too, scores = ops.chunk_select(_select()[0].bfloat16(), *_select()[1:], *SELECT_OPTIONS)
    assert o.dtype == torch.bfloat16
    assert (indices_too.dtype, scores.dtype) == (torch.int32, torch.float32)
    o.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (q, k, v, weights))  # type: ignore[union-attr]
    want = ops.chunk_attention(narrow(q), k, v, indices, weights, 4)
    torch.testing.assert_close(o.float(), want, atol=0.05, rtol=0.05)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    def f(q_r: Any, landmark: Any, position: Any, chunks: Any, q: Any, k: Any, v: Any) -> torch.Tensor:
        indices, scores = ops.chunk_select(q_r, landmark, position, chunks, *SELECT_OPTIONS)
        return ops.chunk_attention(q, k, v, indices, scores.sigmoid(), 4).square()

    def gradients(function: Any) -> list[torch.Tensor]:
        leaves = [*_select(), *_attention()[:3]]
        function(*leaves).sum().backward()
        return [x.grad for x in leaves if x.requires_grad]

    again = gradients(lambda *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=False))
    for mine, theirs in zip(again, gradients(f)):
        assert torch.equal(mine, theirs)


def _changed(inputs: list[torch.Tensor], place: int, change: Any) -> list[torch.Tensor]:
    out = [x.detach().clone() for x in inputs]
    out[place] = change(out[place])
    return out


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda q: q[0], "q must have 4 dimensions"),
        (0, lambda q: q[:, :, :3], "q_heads \\(3\\) must be a multiple of kv_heads \\(2\\)"),
        (0, lambda q: q.int(), "dtype must be one of float32"),
        (0, lambda q: q.half(), "q, k and v must have one dtype"),
        (1, lambda k: k[:, :-1], "v must have k's shape"),
        (1, lambda k: k[..., :4], "k must be \\[B=2, C\\*S, Hkv, D=8\\]"),
        (3, lambda i: i.long(), "indices must be int32, got torch.int64; use indices.to"),
        (3, lambda i: i[:, :5], "indices must be \\[B=2, L=13, Hkv=2, K=3\\]"),
        (4, lambda w: w.half(), "weights must be torch.float32"),
        (4, lambda w: w[..., :1], "weights must be"),
    ],
)
def test_wrong_attention_arguments_are_named(fake: bool, place: int, change: Any, message: str) -> None:
    inputs = _changed(_attention(), place, change)
    if fake:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode()
        inputs = [mode.from_tensor(x) for x in inputs]
    with pytest.raises(ValueError, match=message):
        ops.chunk_attention(*inputs, 4)


def test_sizes_and_ranges_are_checked() -> None:
    inputs = [x.detach() for x in _attention()]
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        ops.chunk_attention(*inputs, 0)
    with pytest.raises(ValueError, match="20 tokens, not a multiple of chunk_size 3"):
        ops.chunk_attention(*inputs, 3)
    for index in (5, -2, 2**31 - 1):
        inputs[3][0, 0, 0, 0] = index
        with pytest.raises(ValueError, match=f"indices must lie in -1 … 4, found .*{index}"):
            ops.chunk_attention(*inputs, 4)
    select = [x.detach() for x in _select()]
    with pytest.raises(ValueError, match="top_k must be a positive integer, got 0"):
        ops.chunk_select(*select, 2, 4, 0)
    with pytest.raises(ValueError, match="retrieval_heads must be 1 or kv_heads \\(3\\), got 2"):
        ops.chunk_select(*select, 3, 4, 3)
    with pytest.raises(ValueError, match="position must be int64"):
        ops.chunk_select(*select[:2], select[2].int(), select[3], *SELECT_OPTIONS)
    with pytest.raises(ValueError, match=r"chunks must lie in 0 … 5, found .* 6"):
        ops.chunk_select(*select[:3], torch.tensor([6, 1]), *SELECT_OPTIONS)
    with pytest.raises(ValueError, match="landmark must be"):
        ops.chunk_select(select[0], select[1][..., :2], *select[2:], *SELECT_OPTIONS)


def test_backend_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be one of"), dispatch.use_backend("gpu"):  # type: ignore[arg-type]
        pass
    monkeypatch.setattr(dispatch, "_backend", None)
    monkeypatch.setenv("HSA_COMPILE_BACKEND", "fast")
    with pytest.raises(ValueError, match="must be one of auto, compiled, triton, eager, reference, got 'fast'"):
        dispatch.current_backend()


WITHOUT_A_COMPILER = """
import logging, sys
logging.basicConfig(format="%(message)s")
import hsa_compile.schedules.builder as builder
builder.compiler_version = lambda: None
import torch
from hsa_compile import ops
for _ in range(3):
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 8, 1, 8)
    indices = torch.zeros(1, 4, 1, 1, dtype=torch.int32)
    ops.chunk_attention(q, k, k, indices, torch.ones(1, 4, 1, 1), 4)
print(sorted(m for m in sys.modules if m.split(".")[0] in ("tvm", "tilelang")))
"""


def test_without_a_compiler_there_is_one_line_and_a_result(tmp_path: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin", "HSA_COMPILE_CACHE": str(tmp_path)},
    )
    assert done.stderr.count("no compiled kernels, using the slower eager path") == 1
    assert "pip install 'hsa-compile[compile]'" in done.stderr
    assert done.stdout.strip() == "[]"


def test_asking_for_kernels_that_cannot_be_had_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v, indices, weights = (x.detach() for x in _attention())
    with (
        caplog.at_level(logging.WARNING),
        dispatch.use_backend("compiled"),
        pytest.raises(RuntimeError, match=r"float32 or float16 or bfloat16 on cpu.*, not torch.float64"),
    ):
        ops.chunk_attention(q.double(), k.double(), v.double(), indices, weights.double(), 4)
