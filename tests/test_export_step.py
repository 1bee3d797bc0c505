"""The step with static shapes in PyTorch, and windows over rings in PyTorch and ONNX, against plain definitions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from export_kit import operator_model
from hsa_compile.export.graph import fix_shapes, state_specs
from hsa_compile.export.step import StaticStep, Windows
from hsa_compile.export.window import rotary, sliding_window
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import rotate
from hsa_compile.model.model import HsaModel
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

BASE = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=1, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=7, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=1,
    retrieval_dim=8, top_k=3, train_top_k=3,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "no encoder, window left": {"encoder": "none", "leave_window": True, "retrieval_heads": 2},
    "mean, stick-breaking": {"encoder": "mean", "weights": "stick-breaking", "bypass": False, "qk_norm": False},
    "rank decay, off by one": {"rank_decay": True, "off_by_one": True, "encoder_layers": 2, "tie_embeddings": False},
}
MODELS = {name: lively(HsaModel(dataclasses.replace(BASE, **change))) for name, change in VARIANTS.items()}
TEXT = 40


class Runner:
    """A step after the other, in PyTorch."""

    def __init__(self, model: HsaModel, B: int, capacity: int = TEXT) -> None:
        self.step, self.S = StaticStep(model), model.config.chunk_size
        sizes = {"batch": B, "capacity": capacity, "rows": capacity * self.S}
        state = {
            spec.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape])
            for spec in state_specs(model.config)
        }
        layers = range(len(model.swa_layers()))
        rings = [[state.pop(f"{kind}.{i}") for i in layers] for kind in ("swa_k", "swa_v")]
        position, pending, *memory = state.values()
        self.state: list[Any] = [position.long(), pending, *rings, *memory]

    def run(self, ids: Tensor, lengths: list[int], upper: int | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
        B, L = ids.shape
        at, taken = self.state[0], torch.tensor(lengths)
        n = int(((at + taken) // self.S - at // self.S).max()) + extra
        u = L if upper is None else upper
        places = torch.arange(u).expand(B, u)
        index = torch.arange(B * n).view(B, n)
        with torch.no_grad():
            greedy = torch.zeros(B), torch.ones(B), torch.zeros(B)
            logits, token, *self.state = self.step(
                ids,
                taken,
                torch.arange(B),
                torch.arange(L),
                torch.arange(L - u, L),
                places,
                index,
                *greedy,
                *self.state,
            )
        return logits, token


def ids_of(B: int, L: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_of_any_lengths_equal_one_forward_each(name: str, data: st.DataObject) -> None:
    model, texts = MODELS[name], ids_of(3, TEXT)
    steps = data.draw(st.lists(st.tuples(*[st.integers(0, 12)] * 3).filter(any), min_size=1, max_size=7))
    whole, runner, at = model(texts), Runner(model, 3), [0, 0, 0]
    for taken in steps:
        lengths = [min(n, TEXT - p) for n, p in zip(taken, at)]
        ids = torch.zeros(3, max(1, *lengths), dtype=torch.int64)
        for b, n in enumerate(lengths):
            ids[b, :n] = texts[b, at[b] : at[b] + n]
        logits, token = runner.run(ids, lengths, extra=data.draw(st.integers(0, 2)))
        assert torch.equal(token, logits.argmax(-1))
        for b, n in enumerate(lengths):
            torch.testing.assert_close(logits[b, :n], whole[b, at[b] : at[b] + n], rtol=1e-4, atol=1e-4)
        at = [p + n for p, n in zip(at, lengths)]
    assert runner.state[0].tolist() == at


def test_the_upper_half_may_pass_over_what_is_out_of_reach() -> None:
    model, texts = MODELS["base"], ids_of(2, TEXT)
    whole, reach = model(texts), 2 * 6 + 1
    runner = Runner(model, 2)
    runner.run(texts[:, :20], [20, 20], upper=1)
    logits, _ = runner.run(texts[:, 20:38], [18, 18], upper=reach)
    torch.testing.assert_close(logits[:, -1], whole[:, 37], rtol=1e-4, atol=1e-4)
    for t in (38, 39):  # and what comes next sees rings as after a full prefill
        logits, _ = runner.run(texts[:, t : t + 1], [1, 1])
        torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)


def test_positions_are_exact_where_floats_are_not() -> None:
    """Hidden states under windows at 2^25 + 1, which float32 cannot hold, equal those at 1."""
    model, ids = MODELS["base"], ids_of(1, 20)
    step, hidden = StaticStep(model), []
    for offset in (1, 2**25 + 1, 2**33 + 1):
        position = torch.tensor([offset])
        cos, sin = step._rotations(position[:, None] + torch.arange(20))
        windows = Windows([torch.zeros(1, 7, 2, 8)], [torch.zeros(1, 7, 2, 8)], position, torch.tensor([20]), cos, sin)
        hidden.append(model.lower_half(ids, windows)[:, 6:])  # type: ignore[arg-type]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(hidden[2], hidden[0], rtol=0, atol=2e-5)


# B, W, Hq, Hkv, D by place
WINDOWS = [(1, 1, 1, 1, 2), (2, 5, 4, 2, 6), (3, 4, 3, 1, 3), (2, 7, 2, 2, 8)]
POSITIONS = [0, 1, 3, 5, 11, 2**25 + 1, 2**33]


def window_inputs(
    B: int, W: int, Hq: int, Hkv: int, D: int, L: int, positions: list[int], seed: int
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    lengths = torch.randint(0, L + 1, (B,), generator=g)
    ring = (B, W, Hkv, D)
    q, k, v = normal(B, L, Hq, D), normal(B, L, Hkv, D), normal(B, L, Hkv, D)
    return q, k, v, normal(*ring), normal(*ring), torch.tensor(positions), lengths


def window_by_definition(*inputs: Tensor) -> list[np.ndarray]:
    q, k, v, ring_k, ring_v = (x.double().numpy() for x in inputs[:5])
    position, lengths = (x.tolist() for x in inputs[5:])
    o, (B, L, Hq, D), W, G = np.full(q.shape, np.nan), q.shape, ring_k.shape[1], q.shape[2] // k.shape[2]
    new_k, new_v = ring_k.copy(), ring_v.copy()
    for b, i, h in itertools.product(range(B), range(L), range(Hq)):
        if i >= lengths[b]:
            continue
        p, keys, values = position[b] + i, [], []
        for j in range(max(0, p - W + 1), p + 1):
            old, at = j < position[b], j - position[b]
            keys.append(ring_k[b, j % W, h // G] if old else k[b, at, h // G])
            values.append(ring_v[b, j % W, h // G] if old else v[b, at, h // G])
        s = np.array(keys) @ q[b, i, h] / np.sqrt(D)
        e = np.exp(s - s.max())
        o[b, i, h] = e / e.sum() @ np.array(values)
        new_k[b, p % W], new_v[b, p % W] = k[b, i], v[b, i]
    return [o, new_k, new_v]


def assert_window(got: list[np.ndarray], want: list[np.ndarray], atol: float) -> None:
    assert np.isfinite(got[0]).all()
    counts = np.isfinite(want[0])
    np.testing.assert_allclose(got[0][counts], want[0][counts], atol=atol, rtol=atol)
    for mine, theirs in zip(got[1:], want[1:]):
        np.testing.assert_allclose(mine, theirs, atol=atol, rtol=0)


def window_cases(W: int, B: int) -> list[tuple[int, list[int]]]:
    lengths = sorted({0, 1, W - 1, W, W + 1, 3 * W + 5})
    return [(L, [POSITIONS[(i + b * 3) % len(POSITIONS)] for b in range(B)]) for i, L in enumerate(lengths)]


@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_window_in_pytorch(shape: tuple[int, ...]) -> None:
    for seed, (L, positions) in enumerate(window_cases(shape[1], shape[0])):
        x = window_inputs(*shape, L, positions, seed)
        assert_window([y.numpy() for y in sliding_window(*x)], window_by_definition(*x), 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_window_as_a_function(shape: tuple[int, ...], dtype: str) -> None:
    """The body in ONNX Runtime, past and present in one place, and in the ONNX reference evaluator."""
    proto = operator_model("SlidingWindow", dtype)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(proto)
    kind = np.dtype(dtype)
    names = [i.name for i in proto.graph.input]
    for seed, (L, positions) in enumerate(window_cases(shape[1], shape[0])):
        x = window_inputs(*shape, L, positions, seed)
        x = (*(y.to(torch.from_numpy(np.zeros(0, kind)).dtype) for y in x[:5]), *x[5:])
        want = window_by_definition(*x)
        feeds = {name: y.numpy() for name, y in zip(names, x)}
        tolerance = 2e-6 if dtype == "float32" else 2e-3
        assert_window(evaluator.run(None, feeds), want, tolerance)
        bound, places = session.io_binding(), {name: np.ascontiguousarray(y) for name, y in feeds.items()}
        o = np.full(x[0].shape, np.nan, kind)
        for name, y in places.items():
            bound.bind_input(name, "cpu", 0, y.dtype, y.shape, y.ctypes.data)
        for name, y in (("o", o), ("present_k", places["past_k"]), ("present_v", places["past_v"])):
            bound.bind_output(name, "cpu", 0, y.dtype, y.shape, y.ctypes.data)
        session.run_with_iobinding(bound)
        assert_window([o, places["past_k"], places["past_v"]], want, tolerance)


def test_operators_for_tracing() -> None:
    x = window_inputs(2, 5, 4, 2, 6, 3, [0, 9], 0)
    torch.library.opcheck(torch.ops.hsa.sliding_window.default, x)
    angles = torch.randn(2, 3, 3)
    torch.library.opcheck(torch.ops.hsa.sample.default, (torch.randn(2, 3, 9), *torch.rand(3, 2)))
    torch.library.opcheck(torch.ops.hsa.rotary.default, (x[0], angles.cos(), angles.sin()))
    assert torch.equal(rotary(x[0], angles.cos(), angles.sin()), rotate(x[0], *(f[:, :, None] for f in _both(angles))))


def _both(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def test_window_refuses_what_does_not_fit() -> None:
    x = list(window_inputs(2, 5, 4, 2, 6, 3, [0, 9], 0))
    for place, wrong, message in (
        (1, x[1][:, :2], "k must be"),
        (4, x[4][:, :4], "past_v must be"),
        (5, x[5][:1], "position must be"),
        (6, x[6][:1], "lengths must be"),
        (0, x[0][:, :, :3], "multiple of Hkv=2"),
    ):
        with pytest.raises(ValueError, match=message):
            sliding_window(*x[:place], wrong, *x[place + 1 :])


def test_reshapes_are_made_constant_or_refused() -> None:
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT

    def graph(before: list[Any], after: list[Any]) -> onnx.GraphProto:
        nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Reshape", ["x", "s"], ["y"])]
        x, y = (helper.make_tensor_value_info(n, FLOAT, d) for n, d in (("x", before), ("y", after)))
        return helper.make_graph(nodes, "g", [x], [y])

    fixed = graph(["b", "l", 12], ["b", "l", 3, 4])
    fix_shapes(fixed)
    assert [n.op_type for n in fixed.node] == ["Reshape"]
    assert onnx.numpy_helper.to_array(fixed.initializer[0]).tolist() == [0, 0, 3, 4]
    with pytest.raises(ValueError, match="no constant shape"):
        fix_shapes(graph(["b*l", 12], ["b", "l", 12]))
