"""Whole models by length: prefill and decode of eager, compiled and ONNX Runtime, beside a dense peer of the size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table

from hsa_compile import dispatch
from hsa_compile.bench.dense import DenseModel
from hsa_compile.bench.record import common_keys, timed
from hsa_compile.export import Session
from hsa_compile.model.generate import prefill
from hsa_compile.model.model import HsaModel

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
RUNTIMES = ("eager", "compiled", "ort-cpu", "dense")


class Runtime(Protocol):
    """One way to run a model."""

    def prefill(self, ids: list[int]) -> None: ...
    def decode(self, token: int) -> None: ...


class TorchRuntime:
    """The sparse model in PyTorch, on one of the operators' paths."""

    def __init__(self, model: HsaModel, backend: dispatch.Backend) -> None:
        self.model, self.backend = model, backend

    def prefill(self, ids: list[int]) -> None:
        with dispatch.use_backend(self.backend):
            _, self.state = prefill(self.model, torch.tensor([ids]))

    def decode(self, token: int) -> None:
        with dispatch.use_backend(self.backend):
            _, self.state = self.model.step(torch.tensor([[token]]), self.state)


class OrtRuntime:
    """The exported bundle in ONNX Runtime."""

    def __init__(self, bundle: Path, longest: int) -> None:
        self.session = Session(bundle, threads=torch.get_num_threads(), reserve=longest + 64)

    def prefill(self, ids: list[int]) -> None:
        self.session.reset()
        self.session.prefill(ids)

    def decode(self, token: int) -> None:
        self.session.step([token])


class DenseRuntime:
    """The dense peer in PyTorch."""

    def __init__(self, model: HsaModel, longest: int) -> None:
        self.model = DenseModel(model.config, longest + 64)

    def prefill(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.step(torch.tensor([ids]))

    def decode(self, token: int) -> None:
        self.model.step(torch.tensor([[token]]))


def run(
    model: HsaModel,
    bundle: Path,
    lengths: Sequence[int] = LENGTHS,
    seconds: float = 60.0,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Prefill tokens/s and milliseconds a decoded token, by length.

    Args:
        bundle: the exported model.
        seconds: for all; a runtime goes on to the next length while its share of the time is likely to suffice.

    Returns:
        The suite's measurements. A length that there was no time for has no entry.
    """
    longest = max(lengths)
    makers: dict[str, Callable[[], Runtime]] = {
        "eager": lambda: TorchRuntime(model, "eager"),
        "compiled": lambda: TorchRuntime(model, "compiled"),
        "ort-cpu": lambda: OrtRuntime(bundle, longest),
        "dense": lambda: DenseRuntime(model, longest),
    }
    ids = torch.randint(0, 256, (longest,), generator=torch.Generator().manual_seed(seed)).tolist()
    common = {**common_keys("e2e", seed), "batch": 1}
    rows: list[dict[str, Any]] = []
    for name in RUNTIMES:
        runtime, left, growth, before = makers[name](), seconds / len(RUNTIMES), 2.0, 0.0
        for L in sorted(lengths):
            if before * growth > left:
                break
            progress(f"{name}, {L:,} tokens")
            measured, took = _measure(runtime, ids[:L])
            rows += [{**common, "runtime": name, "L": L, **row} for row in measured]
            left, growth, before = left - took, max(2.0, took / before if before else 2.0), took
    return rows


def _measure(runtime: Runtime, ids: list[int]) -> tuple[list[dict[str, Any]], float]:
    began = time.perf_counter()
    fill = timed(lambda: runtime.prefill(ids), seconds=0.3, least=1)
    decode = timed(lambda: runtime.decode(ids[-1]), seconds=0.3, least=5, most=32)
    rate = len(ids) / fill.median * 1e3
    spread = {"low": len(ids) / fill.most * 1e3, "high": len(ids) / fill.least * 1e3}
    rows = [
        {"metric": "prefill_tokens_per_s", "value": round(rate, 1), **{k: round(v, 1) for k, v in spread.items()}},
        {"metric": "decode_ms", "value": decode.median, "low": decode.least, "high": decode.most},
    ]
    return rows, time.perf_counter() - began


def _values(rows: Sequence[dict[str, Any]], metric: str) -> dict[tuple[str, int], float]:
    return {(row["runtime"], row["L"]): row["value"] for row in rows if row["metric"] == metric}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a length: prefill tokens/s and decode ms of every runtime."""
    out = Table(title="Speed: prefill in tokens/s, decode in ms a token", caption="– : no time left for it")
    out.add_column("tokens", justify="right")
    for runtime in RUNTIMES:
        out.add_column(runtime, justify="right")
    fills, decodes = _values(rows, "prefill_tokens_per_s"), _values(rows, "decode_ms")
    for L in sorted({row["L"] for row in rows}):
        cells = [f"{fills[r, L]:,.0f}  {decodes[r, L]:.2f} ms" if (r, L) in fills else "–" for r in RUNTIMES]
        out.add_row(f"{L:,}", *cells)
    return out


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Both metrics by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    metrics = (("prefill_tokens_per_s", "prefill, tokens/s"), ("decode_ms", "decode, ms a token"))
    for axis, (metric, title) in zip(figure.subplots(1, 2), metrics):
        values = _values(rows, metric)
        for runtime in RUNTIMES:
            points = sorted((L, value) for (name, L), value in values.items() if name == runtime)
            axis.plot(*zip(*points), marker="o", label=runtime)
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
