"""The operator library in ONNX Runtime's CUDA provider: against float64, in place, in CUDA graphs, past 2^31 elements.

    python tests/gpu/check_ort.py --build DIRECTORY   the library: needs TileLang, TVM, nvcc and g++, no GPU
    python tests/gpu/check_ort.py DIRECTORY [--only TEXT]

The second needs a GPU, PyTorch, onnx and onnxruntime-gpu; of this project, ``ir`` and the tests. It prints the times of
a few calls last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch  # first: it brings the CUDA libraries that ONNX Runtime looks for

# isort: split
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from torch import Tensor

from hsa_compile.ir import AnyProblem, ChunkAttention, ChunkSelect, SlidingWindow

sys.path.insert(0, str(Path(__file__).parent))
from inputs import assert_as_good_as, assert_selected, attention_by_definition, attention_inputs, select_inputs
from passes import CASES, Pass

LIBRARY = "libhsa_ops.so"
DTYPES = ("bfloat16", "float16", "float32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the checks themselves can be tried on a CPU
ATTENTION, SELECT = ChunkAttention(16, 1, 64, 64, 8), ChunkSelect(1, 1, 128, 64, 8)
WINDOW = SlidingWindow(16, 2, 64, 512)
COMPILED: tuple[AnyProblem, ...] = (ATTENTION, SELECT, WINDOW)
# Warps of many tokens, a window of no whole blocks.
CHECKED: tuple[AnyProblem, ...] = (*COMPILED, SlidingWindow(3, 3, 64, 200))
# Of these the library has no compiled kernel: its plain ones serve.
PLAIN: tuple[AnyProblem, ...] = (
    ChunkAttention(6, 2, 20, 12, 3, off_by_one=True),
    replace(ATTENTION, logit_scale=0.3),
    ChunkSelect(3, 1, 20, 16, 5, window=48),
    SlidingWindow(6, 2, 20, 70),
)
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
NAMES = {
    "chunk_select": ("ChunkSelect", ("q_r", "landmark", "position", "chunks"), ("indices", "scores")),
    "chunk_attention": ("ChunkAttention", ("q", "k", "v", "indices", "weights"), ("o",)),
    "sliding_window": (
        "SlidingWindow",
        ("q", "k", "v", "past_k", "past_v", "position", "lengths"),
        ("o", "present_k", "present_v"),
    ),
}
Tensors = tuple[Tensor, ...]


def attributes(p: AnyProblem) -> dict[str, Any]:
    """Of the problem's node."""
    if isinstance(p, ChunkSelect):
        return {"kv_num_heads": p.kv_heads, "chunk_size": p.chunk_size, "top_k": p.top_k, "window": p.window}
    if isinstance(p, ChunkAttention):
        scale = {"scale": p.logit_scale} if p.logit_scale else {}
        return {"chunk_size": p.chunk_size, "off_by_one": int(p.off_by_one), **scale}
    return {}


class Node(NamedTuple):
    """An operator's node, and the types and ranks of what it takes and gives, by name."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    ranks: dict[str, int]


def node_of(p: AnyProblem) -> Node:
    """The node of a problem."""
    op, inputs, outputs = NAMES[p.op]
    ints = {"position": torch.int64, "chunks": torch.int64, "lengths": torch.int64, "indices": torch.int32}
    dtypes = {n: ints.get(n, getattr(torch, p.dtype)) for n in (*inputs, *outputs)}
    dtypes |= {n: torch.float32 for n in ("scores", "weights") if n in dtypes}
    ranks = {n: 1 if n in ("position", "chunks", "lengths") else 4 for n in dtypes}
    return Node(op, inputs, outputs, attributes(p), dtypes, ranks)


def node_of_pass(p: Pass, inputs: Tensors, outputs: Tensors) -> Node:
    """The node of an operator between matrix products, for tensors like these."""
    tensors = dict(zip((*p.inputs, *p.outputs), (*inputs, *outputs)))
    dtypes, ranks = ({n: f(x) for n, x in tensors.items()} for f in (lambda x: x.dtype, lambda x: x.dim()))
    return Node(p.op, p.inputs, p.outputs, p.attributes, dtypes, ranks)


class Operator:
    """A session of one operator on a provider; nothing falls back to another."""

    library = Path(LIBRARY)

    def __init__(self, node: Node, graph: bool = False) -> None:
        self.inputs, self.outputs, self.dtypes, self.ranks = node.inputs, node.outputs, node.dtypes, node.ranks
        proto = helper.make_node(node.op, self.inputs, self.outputs, domain="hsa", **node.attributes)
        model = helper.make_model(
            helper.make_graph([proto], node.op, self._values(self.inputs), self._values(self.outputs)),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("hsa", 1)],
            ir_version=10,
        )
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(self.library))
        provider: Any = "CPUExecutionProvider"
        if DEVICE == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1" if graph else "0"})
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
        assert DEVICE == "cpu" or self.session.get_providers()[0] == "CUDAExecutionProvider"

    def _values(self, names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, ELEMENTS[self.dtypes[n]], [f"{n}_{i}" for i in range(self.ranks[n])])
            for n in names
        ]

    def bind(self, inputs: Tensors, outputs: Tensors) -> ort.IOBinding:
        binding = self.session.io_binding()
        for name, x in zip(self.inputs, inputs):
            assert x.is_contiguous()
            assert x.dtype == self.dtypes[name]
            binding.bind_input(name, DEVICE, 0, ELEMENTS[x.dtype], list(x.shape), x.data_ptr() or _somewhere())
        for name, x in zip(self.outputs, outputs):
            binding.bind_output(name, DEVICE, 0, ELEMENTS[x.dtype], list(x.shape), x.data_ptr() or _somewhere())
        return binding

    def __call__(self, inputs: Tensors, outputs: Tensors) -> Tensors:
        self.run(self.bind(inputs, outputs))
        return outputs

    def run(self, binding: ort.IOBinding) -> None:
        synchronize()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()


_PLACE = torch.zeros(64, device=DEVICE)


def _somewhere() -> int:
    """An address for tensors without elements."""
    return _PLACE.data_ptr()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------- inputs, definitions


def empty_outputs(p: AnyProblem, inputs: Tensors) -> Tensors:
    """Poisoned."""
    B, L = inputs[0].shape[:2]
    if isinstance(p, ChunkSelect):
        slots = (B, L, p.kv_heads, p.top_k)
        indices = torch.full(slots, -77, dtype=torch.int32, device=DEVICE)
        return indices, torch.full(slots, torch.nan, device=DEVICE)
    o = torch.full_like(inputs[0], torch.nan)
    return (o, *(torch.full_like(x, torch.nan) for x in inputs[3:5])) if isinstance(p, SlidingWindow) else (o,)


def window_inputs(p: SlidingWindow, L: int, position: tuple[int, ...], lengths: tuple[int, ...]) -> Tensors:
    """NaN where nobody may look: slots that no key has, keys and values of tokens that do not count."""
    B, g, dtype = len(position), torch.Generator(DEVICE).manual_seed(L + position[0]), getattr(torch, p.dtype)

    def normal(length: int, heads: int) -> Tensor:
        return torch.randn(B, length, heads, p.head_dim, generator=g, device=DEVICE).to(dtype)

    q, k, v = normal(L, p.q_heads), normal(L, p.kv_heads), normal(L, p.kv_heads)
    past_k, past_v = normal(p.window, p.kv_heads), normal(p.window, p.kv_heads)
    for b in range(B):
        past_k[b, position[b] :], past_v[b, position[b] :] = torch.nan, torch.nan
        k[b, lengths[b] :], v[b, lengths[b] :] = torch.nan, torch.nan
    return q, k, v, past_k, past_v, *(torch.tensor(x, device=DEVICE) for x in (position, lengths))


def window_by_definition(p: SlidingWindow, inputs: Tensors, wide: torch.dtype, low: torch.dtype | None) -> Tensors:
    """(o, present_k, present_v); ``low`` rounds probabilities and outputs, as any attention in half precision does."""
    q, k, v, past_k, past_v, position, lengths = inputs
    B, W, G = q.shape[0], p.window, p.groups
    o, rings = torch.zeros(q.shape, dtype=wide, device=DEVICE), (past_k.clone(), past_v.clone())

    def rounded(x: Tensor) -> Tensor:
        return x.to(low).to(wide) if low else x

    for b in range(B):
        start, count = int(position[b]), int(lengths[b])
        carried = torch.arange(max(0, start - W), start, device=DEVICE)
        keys, values = (torch.cat((r[b, carried % W], x[b, :count])).to(wide) for r, x in ((past_k, k), (past_v, v)))
        number = torch.arange(max(0, start - W), start + count, device=DEVICE)
        for t in range(0, count, 1024):
            own = torch.arange(start + t, start + min(t + 1024, count), device=DEVICE)
            seen = (number <= own[:, None]) & (number > own[:, None] - W)
            for h in range(p.q_heads):
                s = q[b, t : t + len(own), h].to(wide) @ keys[:, h // G].T * p.scale
                e = (s - s.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)).exp() * seen
                o[b, t : t + len(own), h] = rounded(rounded(e / e.sum(-1, keepdim=True)) @ values[:, h // G])
        last = torch.arange(max(0, count - W), count, device=DEVICE)
        for ring, x in zip(rings, (k, v)):
            ring[b, (start + last) % W] = x[b, last]
    return o, *rings


def random_inputs(p: AnyProblem, B: int, L: int, C: int, seed: int = 0) -> Tensors:
    dtype = getattr(torch, p.dtype)
    if isinstance(p, ChunkSelect):
        return select_inputs(p, B, L, C, dtype, "random", True)
    if isinstance(p, ChunkAttention):
        _, *inputs = attention_inputs(p, B, L, C, dtype, seed=seed)
        if DEVICE == "cpu":  # which refuses indices out of range
            inputs[3] = torch.where(inputs[3] >= C, -1, inputs[3])
        return tuple(inputs)
    return window_inputs(p, L, tuple(range(C * 64, C * 64 + B)), (L,) * B)


def judge(p: AnyProblem, inputs: Tensors, got: Tensors) -> object:
    """Raises AssertionError where results are wrong; returns the ratio of errors."""
    half = None if p.dtype == "float32" else getattr(torch, p.dtype)
    if isinstance(p, ChunkSelect):
        return assert_selected(p, inputs, *got, torch.arange(inputs[0].shape[1], device=DEVICE), False)
    if isinstance(p, ChunkAttention):
        exact, low = (
            attention_by_definition(p, (inputs[0], *inputs), wide, rounded, apart=True)[:1]
            for wide, rounded in ((torch.float64, None), (torch.float32, half))
        )
        return assert_as_good_as(("o",), got, low, exact)
    exact = window_by_definition(p, inputs, torch.float64, None)
    low = window_by_definition(p, inputs, torch.float32, half)
    for name, a, b in zip(("present_k", "present_v"), got[1:], exact[1:]):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{name}: other keys than expected"
    assert bool(got[0].isfinite().all()), "o must be finite, also where tokens do not count"
    counted = torch.arange(got[0].shape[1], device=DEVICE) < inputs[6][:, None]
    return assert_as_good_as(("o",), *((x[0][counted],) for x in (got, low, exact)))


# ---------------------------------------------------------------------------------------------------------- the checks

SHAPES = ((2, 1, 9), (3, 3, 40), (1, 70, 1), (2, 333, 30), (1, 1000, 60), (2, 40, 0), (1, 0, 3))  # B, L, C
# L, positions, tokens that count: below, at and above the window, far away, ragged, rows that rest.
WINDOWS: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    (1, (0, 1, 511, 2**25 + 1, 2**33), (1, 1, 1, 1, 0)),
    (3, (600, 0), (2, 3)),
    (17, (5, 2**33 - 7), (17, 9)),
    (511, (0, 100), (511, 500)),
    (512, (512, 3), (512, 0)),
    (513, (2**25 + 1,), (513,)),
    (1700, (0, 4000), (1700, 1601)),
    (0, (9,), (0,)),
)


def check_shapes(p: AnyProblem) -> object:
    operator, worst = Operator(node_of(p)), None
    if isinstance(p, SlidingWindow):
        cases = [window_inputs(p, *case) for case in WINDOWS]
    else:
        cases = [random_inputs(p, *shape, seed=i) for i, shape in enumerate(SHAPES)]
    for inputs in cases:
        got = operator(inputs, empty_outputs(p, inputs))
        again = operator(inputs, empty_outputs(p, inputs))
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, again)), "a repeat differs"
        worst = judge(p, inputs, got) or worst
    return worst


def check_in_place(p: SlidingWindow) -> None:
    """The ring may be written where it was read."""
    operator = Operator(node_of(p))
    for case in WINDOWS:
        inputs = window_inputs(p, *case)
        rings = tuple(x.clone() for x in inputs[3:5])
        o = torch.full_like(inputs[0], torch.nan)
        operator((*inputs[:3], *rings, *inputs[5:]), (o, *rings))
        judge(p, inputs, (o, *rings))


def check_graph(p: AnyProblem, L: int) -> None:
    """A replay computes on what inputs hold then, one token's ring written in place. ONNX Runtime runs a graph several
    times before it captures it, and of more tokens the later ones need what a run overwrites."""
    operator = Operator(node_of(p), graph=True)
    static, *shown = (random_inputs(p, 2, L, 40 + 2 * i if isinstance(p, SlidingWindow) else 40, i) for i in range(4))
    outputs = empty_outputs(p, static)
    if isinstance(p, SlidingWindow) and L == 1:
        outputs = (outputs[0], *static[3:5])
    binding = operator.bind(static, outputs)
    shown = [tuple(x.clone() for x in static), *shown, tuple(x.flip(0).contiguous() for x in static)]
    for inputs in shown:
        for to, x in zip(static, inputs):
            to.copy_(x)
        operator.run(binding)
        judge(p, inputs, outputs)


def check_far_offsets(p: SlidingWindow) -> None:
    """Queries of more than 2^31 elements: the last tokens are those of a short segment at their position."""
    L, tail = 2**31 // (p.q_heads * p.head_dim) + 1000, 300
    inputs = window_inputs(p, L, (5,), (L,))
    o, *rings = Operator(node_of(p))(inputs, empty_outputs(p, inputs))
    keys = torch.arange(L - tail - p.window, L - tail, device=DEVICE)
    past = tuple(torch.empty_like(x) for x in inputs[3:5])
    for to, x in zip(past, inputs[1:3]):
        to[0, (5 + keys) % p.window] = x[0, keys]
    counts = torch.tensor([5 + L - tail], device=DEVICE), torch.tensor([tail], device=DEVICE)
    short = (*(x[:, L - tail :].contiguous() for x in inputs[:3]), *past, *counts)
    judge(p, short, (o[:, L - tail :].contiguous(), *rings))


def check_pass(p: Pass, dtype: str, seed: int) -> None:
    """Also at addresses that vectors cannot be loaded from, and repeated to the bit."""
    inputs = p.make(getattr(torch, dtype), seed)
    moved = tuple(torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x) for x in inputs)
    operator = Operator(node_of_pass(p, inputs, p.empty(inputs)))
    got = operator(inputs, p.empty(inputs))
    p.check(inputs, got)
    assert all(torch.equal(a, b) for a, b in zip(got, operator(inputs, p.empty(inputs)))), "a repeat differs"
    p.check(moved, operator(moved, p.empty(moved)))


def jobs() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in DTYPES:
        for kind, problems in (("compiled" if dtype != "float32" else "plain", CHECKED), ("odd", PLAIN)):
            for number, base in enumerate(problems):
                p = replace(base, dtype=dtype)  # type: ignore[arg-type]
                name = f"{dtype} {p.op} {kind} {number}"
                yield name, lambda p=p: check_shapes(p)
                if isinstance(p, SlidingWindow):
                    yield f"{name} in place", lambda p=p: check_in_place(p)
                if DEVICE == "cuda" and problems is CHECKED:
                    for L in (1, 200):
                        yield f"{name} graph L={L}", lambda p=p, L=L: check_graph(p, L)
        for seed, case in enumerate((*CASES, *(LARGE if DEVICE == "cuda" else ()))):
            yield f"{dtype} {case.op} {case.shape}", lambda p=case, d=dtype, s=seed: check_pass(p, d, s)
    if DEVICE == "cuda":
        far = replace(WINDOW, dtype="bfloat16")
        yield "bfloat16 sliding_window far offsets", lambda: check_far_offsets(far)


# --------------------------------------------------------------------------------------------------------------- times

TIMED: tuple[tuple[AnyProblem, int, int, int], ...] = (  # B, L, C
    *((p, B, 1, 16384) for p in COMPILED for B in (1, 32)),
    *((p, 1, 32768, 512) for p in COMPILED),
)


# Of the preset 240m: the residual stream, heads by themselves, queries and keys, gates, tokens by number.
PASSES = tuple(
    case
    for L in (1, 65536)
    for case in (
        Pass("AddNorm", (1, L, 1024)),
        Pass("RmsNorm", (1, L, 16, 64)),
        Pass("RotaryHeads", (1, L, 64), (16, 2)),
        Pass("SwiGlu", (1, L, 2304)),
        Pass("TakeRows", (L, 1024), taken=(1, L)),
    )
)
LARGE = PASSES[5:]


def milliseconds(p: AnyProblem, B: int, L: int, C: int, graph: bool) -> float:
    """Wall time of a run, with what ONNX Runtime adds: the median of five series."""
    inputs = random_inputs(p, B, L, C)
    outputs = empty_outputs(p, inputs)
    if isinstance(p, SlidingWindow):
        outputs = (outputs[0], *inputs[3:5])
    operator = Operator(node_of(p), graph)
    return median_milliseconds(operator, operator.bind(inputs, outputs), 50 if L == 1 else 10)


def median_milliseconds(operator: Operator, binding: ort.IOBinding, runs: int) -> float:
    series = []
    for _ in range(3):
        operator.run(binding)
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(runs):
            operator.session.run_with_iobinding(binding)
        synchronize()
        series.append((time.perf_counter() - start) / runs * 1e3)
    return statistics.median(series)


def times() -> None:
    for base, B, L, C in TIMED:
        for dtype in ("bfloat16", *(["float32"] if L == 1 else [])):
            p = replace(base, dtype=dtype)  # type: ignore[arg-type]
            ms = {graph: milliseconds(p, B, L, C, graph) for graph in (False, True)}
            print(f"{p.op} {dtype} B={B} L={L} C={C}: {ms[False]:.4f} ms, from a graph {ms[True]:.4f} ms", flush=True)
            torch.cuda.empty_cache()
    for case in PASSES:
        inputs = case.make(torch.bfloat16)
        outputs, ms = case.empty(inputs), {}
        for graph in (False, True):
            operator = Operator(node_of_pass(case, inputs, outputs), graph)
            ms[graph] = median_milliseconds(operator, operator.bind(inputs, outputs), 50)
        rate = case.bytes(inputs) / ms[True] / 1e9
        print(f"{case.op} bfloat16 {case.shape}: {ms[False]:.4f} ms, from a graph {ms[True]:.4f}, {rate:.2f} TB/s")
        torch.cuda.empty_cache()


def build(directory: Path) -> None:
    from hsa_compile.export.library import build_library
    from hsa_compile.kernels import deployed

    halves = [replace(p, dtype=dtype) for p in CHECKED for dtype in DTYPES[:2]]  # type: ignore[arg-type]
    kernels = [*deployed(halves, ["cuda:sm_90a"]), *deployed(CHECKED, ["cpu:x86-64-v3"])]
    build_library(kernels, directory / LIBRARY)
    print(f"{directory / LIBRARY}: {len(kernels)} kernels", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--build", action="store_true", help="build the library there, check nothing")
    parser.add_argument("--only", default="", help="words, all of which are part of a check's name")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.directory)
        return 0
    Operator.library, failed = arguments.directory / LIBRARY, []
    for name, job in jobs():
        if not all(word in name for word in arguments.only.split()):
            continue
        try:
            print("ok", name, job() or "", flush=True)
        except Exception as error:
            failed.append(name)
            print("FAILED", name, type(error).__name__, str(error)[:600], flush=True)
    print(f"{len(failed)} FAILED: {', '.join(failed)}" if failed else "ALL CHECKED", flush=True)
    if DEVICE == "cuda" and not arguments.only:
        times()
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
