"""A model's training, prefill and decode: the suite ``model``. Under ``torchrun`` training alone, on all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from hsa_compile.bench import gpu_kernels, inference, training
from hsa_compile.bench.record import common_keys, matmul_tflops
from hsa_compile.model.config import ConfigError, preset
from hsa_compile.model.parallel import World, join_world

Part = Literal["train", "decode", "prefill"]
PARTS: tuple[Part, ...] = ("train", "decode", "prefill")
Keep = Callable[[list[dict[str, Any]]], object]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        preset: of the model.
        device: ``cuda`` or ``cpu``.
        parts: in this order.
        train_lengths: tokens a sample.
        train_tokens: a step and process.
        train_variants: of ``training.VARIANTS``.
        prefill_lengths, decode_lengths: tokens of context.
        segment: tokens a prefill step.
        seconds: for all; what does not fit is left out, and said.
        seed: noted in the results.

    Raises:
        ConfigError: a name is unknown or a number is not positive.
    """

    preset: str = "240m"
    device: str = "cuda"
    parts: tuple[Part, ...] = PARTS
    train_lengths: tuple[int, ...] = (4096, 32_768)
    train_tokens: int = 32_768
    train_variants: tuple[str, ...] = ("hsa", "swa", "full")
    prefill_lengths: tuple[int, ...] = (1 << 16, 1 << 20, 1 << 22, 1 << 25)
    decode_lengths: tuple[int, ...] = (1 << 12, 1 << 20, 1 << 25)
    segment: int = inference.SEGMENT
    seconds: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        preset(self.preset)
        for name, known in (("parts", PARTS), ("train_variants", tuple(training.VARIANTS))):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ConfigError(f"{name} must be of {', '.join(known)}, got {unknown[0]!r}")
        numbers = (*self.train_lengths, self.train_tokens, *self.prefill_lengths, *self.decode_lengths, self.segment)
        if min(numbers) < 1:
            raise ConfigError(f"lengths must be at least 1, got {min(numbers)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device; measure on --device cpu, with a small preset")


def run(
    plan: Plan, progress: Callable[[str], None] = print, keep: Keep = lambda rows: None
) -> tuple[list[dict[str, Any]], bool]:
    """The suite's measurements, and whether this is the process that writes them.

    Args:
        progress: is told what comes next.
        keep: is given all measurements so far, after each.
    """
    rows: list[dict[str, Any]] = []
    with join_world(plan.device) as world:
        ceiling = gpu_kernels.matmul_tflops() if plan.device == "cuda" else matmul_tflops()
        common = {**common_keys("model", plan.seed, plan.device), "preset": plan.preset}
        common["ceiling_tflops"] = round(ceiling, 4)
        for row in _measurements(plan, world, ceiling, progress):
            rows.append({**common, **row})
            if world.main:
                keep(rows)
        return rows, world.main


def _measurements(
    plan: Plan, world: World, ceiling: float, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    config, ends = preset(plan.preset), time.perf_counter() + plan.seconds
    for part in plan.parts if world.size == 1 else ("train",):
        if part == "train":
            yield from _train(plan, world, ceiling, ends, progress)
            continue
        progress(part)
        model = inference.inference_model(config, world.device)
        if part == "decode":
            yield from inference.decode_rows(model, plan.decode_lengths)
        else:
            yield from inference.prefill_rows(model, plan.prefill_lengths, ends - time.perf_counter(), plan.segment)
        del model


def _train(
    plan: Plan, world: World, ceiling: float, ends: float, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for length in plan.train_lengths:
        left = min(world.sum([ends - time.perf_counter()])[0] / world.size, plan.seconds / 2)
        if left <= 0:
            training.log.warning("no time left for training at %d tokens", length)
            return
        progress(f"training, {length:,} tokens a sample")
        share = left / len(plan.train_lengths) / len(plan.train_variants) / 2
        yield from training.rows(
            preset(plan.preset), plan.train_variants, length, plan.train_tokens, world, ceiling, seconds=share
        )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a measurement."""
    out = Table(title="The model by length")
    for name in ("metric", "variant", "tokens", "batch", "devices", "value", "selection", "attention"):
        out.add_column(name, justify="left" if name in ("metric", "variant") else "right")
    for row in rows:
        kind = " ".join(filter(None, (row.get("prefill"), row["variant"], row.get("memory"))))
        parts = [f"{row[key]:,.2f} ms" if key in row else "" for key in ("selection_ms", "attention_ms")]
        value = f"{row['value']:,.0f}" if row["value"] >= 1000 else f"{row['value']:.3g}"
        out.add_row(row["metric"], kind, f"{row['L']:,}", f"{row['batch']}", f"{row['devices']}", value, *parts)
    return out


def _lines(rows: Sequence[dict[str, Any]], metric: str, key: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["metric"] == metric:
            lines.setdefault(row[key], []).append((row["L"], row["value"]))
    return {name: sorted(points) for name, points in lines.items()}


def _tokens(count: float, _: object = None) -> str:
    """``32K``, ``1M``: a number of tokens, as axes name it."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _bars(axis: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """A group of bars a length, with their values."""
    lengths = sorted({L for points in lines.values() for L, _ in points})
    width = 0.8 / max(1, len(lines))
    for i, (name, points) in enumerate(lines.items()):
        places = [lengths.index(L) + (i - (len(lines) - 1) / 2) * width for L, _ in points]
        bars = axis.bar(places, [rate / 1000 for _, rate in points], width, label=name)
        axis.bar_label(bars, fmt="%.3g", fontsize="small")
    axis.set_xticks(range(len(lengths)), [_tokens(L) for L in lengths])


def _curves(axis: Any, lines: dict[str, list[tuple[int, float]]], scale: float) -> None:
    for name, points in lines.items():
        axis.plot([L for L, _ in points], [value / scale for _, value in points], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(_tokens)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Training and prefill rates and decode latency by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    train, prefill, decode = figure.subplots(1, 3)
    _bars(train, _lines(rows, "train_tokens_per_s", "variant"))
    _curves(prefill, _lines(rows, "prefill_tokens_per_s", "prefill"), 1000)
    _curves(decode, _lines(rows, "decode_ms", "memory"), 1)
    train.set(title="training, thousand tokens/s", xlabel="tokens a sample")
    prefill.set(title="prefill, thousand tokens/s", xlabel="tokens of context")
    decode.set(title="decode, ms a token, by place of the memory", xlabel="tokens of context")
    for axis in (train, prefill, decode):
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])  # room for a legend
        axis.grid(alpha=0.3, axis="y")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper right", ncols=3)
    if rows:
        figure.suptitle(f"{rows[0]['preset']} on {rows[0]['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
