"""A bundle by length of the context: prefill, first token, decode and memory, in ONNX Runtime and in PyTorch, beside a
dense model of the same size in ONNX Runtime. The suite ``e2e``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from rich.table import Table

from hsa_compile.bench.record import common_keys
from hsa_compile.bench.runtimes import RUNTIMES, Setup
from hsa_compile.export.bundle import BundleError, read_manifest
from hsa_compile.export.runtime import PROVIDERS
from hsa_compile.model.checkpoint import read_config
from hsa_compile.model.config import ModelConfig
from hsa_compile.schedules.worker import Worker, WorkerError

log = logging.getLogger("hsa_compile")

LENGTHS = {"cpu": (4096, 8192, 16_384, 32_768), "cuda": tuple(4096 << 2 * i for i in range(5))}  # by default
METRICS = {
    "prefill_tokens_per_s": "prefill, tokens/s",
    "ttft_ms": "time to first token, ms",
    "decode_ms": "decode, ms a token",
    "peak_gib": "memory, GiB",
}
OPENING_SECONDS = 300.0


def run(
    bundle: Path,
    checkpoint: Path | None = None,
    lengths: Sequence[int] = LENGTHS["cpu"],
    seconds: float = 60.0,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The suite's measurements. A length for which there was no time or memory has none.

    Args:
        bundle: the exported model.
        checkpoint: the same in PyTorch; without it PyTorch runs new weights, as fast but for what they select.
        lengths: tokens of context.
        seconds: for all; a runtime goes on to the next length while its share of the time is likely to suffice.
        device: "cpu", or "cuda" for ONNX Runtime's CUDA provider and PyTorch on the GPU.

    Raises:
        BundleError: it cannot be opened, is of another model than the checkpoint, or ONNX Runtime has no such provider.
        CheckpointError: the checkpoint cannot be read.
    """
    manifest = read_manifest(bundle, [])
    if checkpoint is not None and read_config(checkpoint)[0] != ModelConfig.from_dict(manifest.model):
        raise BundleError(f"{bundle} is not of the model in {checkpoint}; export that, or leave it out")
    if device == "cuda" and PROVIDERS["cuda"] not in ort.get_available_providers():
        raise BundleError("this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu, or measure on the CPU")
    ids = np.random.default_rng(seed).integers(0, manifest.model["vocab_size"], max(lengths)).tolist()
    common = {**common_keys("e2e", seed, device), "batch": 1}
    rows: list[dict[str, Any]] = []
    for runtime in RUNTIMES:
        where = str(checkpoint) if checkpoint else None
        setup = Setup(runtime, str(bundle), where, device, max(lengths), torch.get_num_threads())
        name = f"ort-{device}" if runtime == "ort" else runtime
        say = partial(_say, progress, name)
        for L, found in _measured(setup, ids, sorted(lengths), seconds / len(RUNTIMES), say):
            rows += [{**common, "runtime": name, "L": L, **each} for each in found]
    return rows


def _say(progress: Callable[[str], None], runtime: str, length: int) -> None:
    progress(f"{runtime}, {length:,} tokens")


def _measured(
    setup: Setup, ids: list[int], lengths: Sequence[int], left: float, say: Callable[[int], None]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Lengths and their rows of one runtime, in its process; ends where time or memory does, or at a fault, which is
    said."""
    growth, before = 2.0, 0.0
    with Worker("hsa_compile.bench.runtimes") as worker:
        try:
            dtype = worker.ask({"setup": asdict(setup)}, OPENING_SECONDS)["dtype"]
            for L in lengths:
                if before * growth > left:
                    return
                say(L)
                began = time.perf_counter()
                rows = worker.ask({"ids": ids[:L]}, OPENING_SECONDS + 4 * max(left, 0.0))["rows"]
                took = time.perf_counter() - began
                left, growth, before = left - took, max(2.0, took / before if before else 2.0), took
                yield L, [{"dtype": dtype, **row} for row in rows]
        except WorkerError as error:
            log.warning("%s is left out from here on: %s", setup.runtime, error)


def _values(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[int, float]]:
    """Values by runtime and length."""
    values: dict[str, dict[int, float]] = {row["runtime"]: {} for row in rows}
    for row in rows:
        if row["metric"] == metric:
            values[row["runtime"]][row["L"]] = row["value"]
    return values


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a length, a column a runtime."""
    out = Table(
        title="Prefill in tokens/s, time to first token, decode in ms a token, memory",
        caption="– : no time or memory left for it",
    )
    values = {metric: _values(rows, metric) for metric in METRICS}
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    out.add_column("tokens", justify="right")
    for runtime in runtimes:
        out.add_column(runtime, justify="right")
    for L in sorted({row["L"] for row in rows}):
        cells = []
        for runtime in runtimes:
            fill, first, decode, memory = (values[metric][runtime].get(L) for metric in METRICS)
            cells.append(
                "–" if fill is None or first is None or decode is None or memory is None
                else f"{fill:,.0f}/s  {first:,.0f} ms\n{decode:.2f} ms  {memory:.2f} GiB"
            )  # fmt: skip
        out.add_row(f"{L:,}", *cells)
    return out


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """The four metrics by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(2, 2).flat, METRICS.items()):
        for runtime, points in _values(rows, metric).items():
            axis.plot(*zip(*sorted(points.items())), marker="o", label=runtime)
        axis.set(title=title, xlabel="tokens", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
