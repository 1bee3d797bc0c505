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

import onnxruntime as ort
import torch
from rich.table import Table

from hsa_compile.bench.record import common_keys
from hsa_compile.bench.runtimes import LONG, LONGEST_FULL, RUNTIMES, Setup
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
# Tokens to which a GPU's time goes: plain PyTorch gathers keys for every token, and a dense prompt takes time by its
# square, in a cache that is allocated for the longest.
LONGEST_ON_GPU = {"eager": 4096, "ort-dense": 65_536}


def run(
    bundle: Path,
    checkpoint: Path | None = None,
    lengths: Sequence[int] = LENGTHS["cpu"],
    seconds: float = 60.0,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """The suite's measurements. A length for which there was no time or memory has none.

    Args:
        bundle: the exported model.
        checkpoint: the same in PyTorch; without it PyTorch runs new weights, as fast but for what they select.
        lengths: tokens of context.
        seconds: for all; a runtime goes on to the next length while its share of what is left is likely to suffice.
        device: "cpu", or "cuda" for ONNX Runtime's CUDA provider and PyTorch on the GPU.
        keep: is given all measurements so far, after each.

    Raises:
        BundleError: it cannot be opened, is of another model than the checkpoint, or ONNX Runtime has no such provider.
        CheckpointError: the checkpoint cannot be read.
    """
    manifest = read_manifest(bundle, [])
    if checkpoint is not None and read_config(checkpoint)[0] != ModelConfig.from_dict(manifest.model):
        raise BundleError(f"{bundle} is not of the model in {checkpoint}; export that, or leave it out")
    if device == "cuda" and PROVIDERS["cuda"] not in ort.get_available_providers():
        raise BundleError("this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu, or measure on the CPU")
    common = {**common_keys("e2e", seed, device), "batch": 1}
    rows: list[dict[str, Any]] = []
    ends = time.perf_counter() + seconds
    for others, runtime in zip(reversed(range(len(RUNTIMES))), RUNTIMES):
        mine = _lengths(runtime, lengths, device)
        where = str(checkpoint) if checkpoint else None
        setup = Setup(runtime, str(bundle), where, device, mine[-1], torch.get_num_threads())
        name = f"ort-{device}" if runtime == "ort" else runtime
        share = (ends - time.perf_counter()) / (others + 1)
        for L, found in _measured(setup, seed, mine, share, partial(_say, progress, name)):
            rows += [{**common, "runtime": name, "L": L, **each} for each in found]
            keep(rows)
    return rows


def _lengths(runtime: str, lengths: Sequence[int], device: str) -> list[int]:
    """Those that a runtime is measured at, ascending; at the least the shortest."""
    longest = LONGEST_ON_GPU.get(runtime, max(lengths)) if device == "cuda" else max(lengths)
    most = max(longest, min(lengths))
    return sorted(length for length in lengths if length <= most)


def _say(progress: Callable[[str], None], runtime: str, length: int) -> None:
    log.info("%s, %d tokens", runtime, length)
    progress(f"{runtime}, {length:,} tokens")


def _measured(
    setup: Setup, seed: int, lengths: Sequence[int], left: float, say: Callable[[int], None]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Lengths and their rows of one runtime, in its process; ends where time or memory does, or at a fault, which is
    said."""
    ends, expected = time.perf_counter() + left, 0.0
    with Worker("hsa_compile.bench.runtimes") as worker:
        try:
            dtype = worker.ask({"setup": asdict(setup)}, OPENING_SECONDS)["dtype"]
            for i, L in enumerate(lengths):
                left = ends - time.perf_counter()
                if i and expected > left:
                    log.warning("%s: no time left for %d tokens", setup.runtime, L)
                    return
                say(L)
                rows = worker.ask({"length": L, "seed": seed}, OPENING_SECONDS + 4 * max(left, 0.0))["rows"]
                yield L, [{"dtype": dtype, **row} for row in rows]
                if i + 1 < len(lengths):
                    expected = _expected(rows, L, lengths[i + 1])
        except WorkerError as error:
            log.warning("%s is left out from here on: %s", setup.runtime, error)


def _expected(rows: Sequence[dict[str, Any]], before: int, length: int) -> float:
    """Seconds that prompts of a length take to read, by what a shorter one took."""
    found = {row["metric"]: row["value"] for row in rows}
    once = found["ttft_ms"] / 1e3
    if length <= LONGEST_FULL and "prefill_tokens_per_s" in found:
        once += before / found["prefill_tokens_per_s"]
    return once * length / before * (2 if length < LONG else 1)


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
        caption=f"– : no time or memory for it; over {LONGEST_FULL:,} tokens, prompts are read by short prefill alone",
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
            rate = "–" if fill is None else f"{fill:,.0f}/s"
            cells.append(
                "–" if first is None or decode is None or memory is None
                else f"{rate}  {first:,.0f} ms\n{decode:.2f} ms  {memory:.2f} GiB"
            )  # fmt: skip
        out.add_row(f"{L:,}", *cells)
    return out


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """The four metrics by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(2, 2).flat, METRICS.items()):
        for runtime, points in _values(rows, metric).items():
            axis.plot(list(points), list(points.values()), marker="o", label=runtime)
        axis.set(title=title, xlabel="tokens", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
