"""The operators on a CPU: compiled kernels beside eager gather + einsum and dense causal attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from hsa_compile import dispatch, eager, ops
from hsa_compile.bench.record import Timing, common_keys, matmul_tflops, timed
from hsa_compile.bench.selections import Captured, SelectionKind, captured_selections, synthetic_selection, union_ratio
from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.ir.operators import Dtype
from hsa_compile.model.model import HsaModel
from hsa_compile.schedules import choose
from hsa_compile.schedules.space import searched

# Beyond this much work the slow peers would take minutes: eager's backward runs at 0.5 to 4 GFLOP/s.
EAGER_GFLOP, DENSE_GFLOP = 10.0, 400.0
CHECKED_TOKENS = 64  # compared with float64 before a timing counts
# On outputs of standard deviation about 1/2: rounding in float32, and half a unit in the last place of what is stored.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
TERA = 10.0  # TFLOP/s from which tables count in TFLOP/s: GPUs


@dataclass(frozen=True)
class Shape:
    """One line of the benchmark. ``captured`` are the selections to use where they are not synthetic."""

    L: int
    q_heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    chunk_size: int = 64
    selection: SelectionKind = "local"
    B: int = 1
    dtype: Dtype = "float32"
    captured: Captured | None = field(default=None, repr=False, compare=False)

    @property
    def problem(self) -> ChunkAttention:
        return ChunkAttention(self.q_heads, self.kv_heads, self.head_dim, self.chunk_size, self.top_k, dtype=self.dtype)

    def keys(self) -> dict[str, Any]:
        """In the committed format."""
        return {
            "B": self.B, "L": self.L, "Hq": self.q_heads, "Hkv": self.kv_heads, "D": self.head_dim,
            "S": self.chunk_size, "K": self.top_k, "dtype": self.dtype, "selection": self.selection,
        }  # fmt: skip


def default_shapes(lengths: Sequence[int] = (1024, 4096, 16384)) -> list[Shape]:
    """G = 16, 4 and 1 at D = 64, and D = 128; each on both selections. G = 16 in bfloat16, too."""
    heads = ((16, 1, 64), (16, 4, 64), (4, 4, 64), (16, 2, 128))
    shapes = [Shape(L, *h, 8, selection=kind) for L in lengths for h in heads for kind in ("local", "random")]
    return shapes + [Shape(L, *heads[0], 8, dtype="bfloat16") for L in lengths]


def captured_shapes(model: HsaModel, ids: Tensor, dtype: Dtype = "float32") -> list[Shape]:
    """A line for each HSA layer of a model: its sizes, and what it selects over a text [L].

    Raises:
        ConfigError: the architecture has no HSA layers.
    """
    found = captured_selections(model, ids)
    p = model.config.problems()[1]
    heads = (p.q_heads, p.kv_heads, p.head_dim, p.top_k, p.chunk_size)
    return [Shape(len(ids), *heads, "captured", dtype=dtype, captured=one) for one in found]


def selections_of(shape: Shape, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(indices, weights) [B, L, Hkv, K]; weights of synthetic selections are random and positive."""
    if shape.captured is not None:
        return shape.captured.indices.to(device), shape.captured.weights.to(device)
    sizes = (shape.B, shape.L, shape.kv_heads, shape.top_k, shape.chunk_size)
    assert shape.selection != "captured", "a captured selection comes with its indices"
    indices = synthetic_selection(*sizes, shape.selection, seed, device)
    weights = torch.rand(indices.shape, device=device).masked_fill(indices < 0, float("-inf"))
    return indices, weights.softmax(-1).nan_to_num()


def run(
    shapes: Sequence[Shape],
    seed: int = 0,
    progress: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Checks, then times all implementations of all shapes; returns the suite's measurements.

    Args:
        progress: is told what comes next.
        keep: is given all measurements so far, now and then.
    """
    ceiling = matmul_tflops()
    common = {**common_keys("kernels", seed), "ceiling_tflops": round(ceiling, 4)}
    rows = []
    for shape in shapes:
        heads = f"heads {shape.q_heads}/{shape.kv_heads}, D {shape.head_dim}"
        progress(f"L {shape.L}, {heads}, {shape.selection}, {shape.dtype}")
        rows += [{**common, **shape.keys(), **row} for row in _attention_rows(shape, seed)]
        keep(rows)
    for L in sorted({shape.L for shape in shapes}):
        progress(f"selection, L {L}")
        rows += [{**common, **row} for row in _select_rows(L, seed)]
    return rows


def _inputs(shape: Shape, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    L, S = shape.L, shape.chunk_size
    dtype = getattr(torch, shape.dtype)
    q = torch.randn(1, L, shape.q_heads, shape.head_dim).to(dtype)
    k, v = torch.randn(2, 1, L // S * S, shape.kv_heads, shape.head_dim).to(dtype)
    return q, k, v, *selections_of(shape, seed)


def _error(shape: Shape, inputs: tuple[Tensor, ...], o: Tensor) -> float:
    """Largest error on the last tokens against float64."""
    q, k, v, indices, weights = inputs
    at = slice(-CHECKED_TOKENS, None)
    exact = eager.attention(
        q[:, at].double(), k.double(), v.double(), indices[:, at], weights[:, at].double(), shape.chunk_size, False
    )
    return float((o[:, at] - exact).abs().max())


def _attention_rows(shape: Shape, seed: int) -> Iterator[dict[str, Any]]:
    inputs = _inputs(shape, seed)
    q, S = inputs[0], shape.chunk_size
    grad, tolerance = torch.randn(q.shape).to(q.dtype), TOLERANCE[shape.dtype]
    flops = {"forward": shape.problem.flops(1, shape.L), "backward": shape.problem.backward_flops(1, shape.L)}
    shared = {"op": "attention", "union_ratio": round(union_ratio(inputs[3]), 3), "tolerance": tolerance}

    def schedule(impl: str, pass_name: str) -> dict[str, str]:
        """The tile of the compiled kernels, in a few words."""
        if impl != "ours":
            return {}
        tile = choose(shape.problem, pass_name, length=shape.L).tile
        return {"schedule": searched(tile, shape.problem, pass_name, "cpu:native", shape.L)}

    def row(impl: str, pass_name: str, timing: Timing, **more: Any) -> dict[str, Any]:
        tflops = flops[pass_name] / timing.median / 1e9
        return {**shared, "impl": impl, "pass": pass_name, **timing.fields(), "tflops": round(tflops, 4), **more}

    for impl, backend in (("ours", "compiled"), ("eager", "eager")):
        if impl == "eager" and (shape.dtype != "float32" or flops["forward"] > EAGER_GFLOP * 1e9):
            continue
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            error = _error(shape, inputs, ops.chunk_attention(*inputs, S))
            if error > tolerance:
                raise AssertionError(f"{impl} is off by {error} on {shape}; a wrong kernel is not timed")
            timing = timed(lambda: ops.chunk_attention(*inputs, S))
            yield row(impl, "forward", timing, error=error, **schedule(impl, "forward"))
            timing = timed(lambda: ops.chunk_attention_backward(grad, *inputs, S))
            yield row(impl, "backward", timing, **schedule(impl, "backward"))
    if shape.dtype == "float32" and 2 * shape.L**2 * shape.q_heads * shape.head_dim < DENSE_GFLOP * 1e9:
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        k, v = (x if x.shape[2] == shape.L else F.pad(x, (0, 0, 0, shape.L - x.shape[2])) for x in (k, v))
        with torch.no_grad():
            dense = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        yield row("sdpa", "forward", dense)


def _select_rows(L: int, seed: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(seed)
    problem = ChunkSelect(1, 1, 64, 64, 16)
    C = L // problem.chunk_size
    inputs = (torch.randn(1, L, 1, 64), torch.randn(1, C, 1, 64), torch.tensor([0]), torch.tensor([C]))
    for impl, backend in (("ours", "compiled"), ("eager", "eager")):
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            timing = timed(lambda: ops.chunk_select(*inputs, 1, problem.chunk_size, problem.top_k))
        tflops = problem.flops(1, L, C) / 2 / timing.median / 1e9  # causal: half of the scores
        yield {
            "op": "select", "pass": "forward", "impl": impl, "B": 1, "L": L, "Hr": 1, "Dr": 64, "S": 64, "K": 16,
            "dtype": "float32", **timing.fields(), "tflops": round(tflops, 4),
        }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds and rates, a line for each shape, pass and implementation."""
    unit, scale, digits = ("TFLOP/s", 1.0, 0) if rows[0]["ceiling_tflops"] > TERA else ("GFLOP/s", 1e3, 1)
    ceiling = f"{scale * rows[0]['ceiling_tflops']:.0f} {unit}"
    out = Table(title="Kernels", caption=f"matmul in the same run: {ceiling}")
    for name in ("op", "B, L", "heads", "D", "K", "selection", "pass", "implementation"):
        out.add_column(name)
    for name in ("ms", unit, "of matmul"):
        out.add_column(name, justify="right")
    for row in rows:
        heads = f"{row['Hq']}/{row['Hkv']}" if "Hq" in row else str(row["Hr"])
        rate, share = f"{scale * row['tflops']:.{digits}f}", f"{row['tflops'] / row['ceiling_tflops']:.0%}"
        if "tbs" in row:  # decoding moves bytes
            rate, share = f"{row['tbs']:.2f} TB/s", f"{row['tbs'] / row['copy_tbs']:.0%} of copy"
        out.add_row(
            row["op"], f"{row['B']}, {row['L']}", heads, str(row.get("D", row.get("Dr"))), str(row["K"]),
            row.get("selection", ""), row["pass"], row["impl"], f"{row['ms']:.3g}", rate, share,
        )  # fmt: skip
    return out


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Attention's rates and times a token by length, forward and backward, ours beside the peers: one kv head of width
    64 and 8 slots, in the precision that most is measured in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    plain = {"op": "attention", "Hkv": 1, "D": 64, "K": 8, "dtype": rows[0]["dtype"]}
    for column, pass_name in enumerate(("forward", "backward")):
        picked = [r for r in rows if r.items() >= {**plain, "pass": pass_name}.items()]
        for impl, kind in sorted({(r["impl"], r["selection"]) for r in picked}):
            line = sorted(
                (r["L"], r["tflops"], 1e3 * r["ms"] / r["B"] / r["L"])
                for r in picked
                if (r["impl"], r["selection"]) == (impl, kind)
            )
            lengths, rates, times = zip(*line)
            style = {"local": "-", "random": "--"}.get(kind, ":")
            color = f"C{sorted({r['impl'] for r in picked}).index(impl)}"
            axes[0, column].plot(lengths, rates, style, color=color, marker="o", label=f"{impl}, {kind}")
            axes[1, column].plot(lengths, times, style, color=color, marker="o")
        axes[0, column].axhline(rows[0]["ceiling_tflops"], color="grey", linewidth=1, label="matmul")
        axes[0, column].set(title=f"chunk attention, {pass_name}", yscale="log")
        axes[1, column].set(xlabel="tokens", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("TFLOP/s")
    axes[1, 0].set_ylabel("µs a token")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
