"""Results of an evaluation: accuracies with 95 % intervals, as JSON, a table, a heat map by depth, and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hsa_compile.bench.record import common_keys
from hsa_compile.evaluation.plan import PERPLEXITY

Lines = Sequence[dict[str, Any]]
DEPTHS = 10
_COSTS = ("seconds", "selection_s", "attention_s", "patch_s", "full_seconds", "full_selection_s", "full_attention_s")


@dataclass(frozen=True)
class Accuracy:
    """Right answers among all of one kind, with a 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def rate(self) -> float:
        """Their part."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927)."""
        z, n, p = 1.96, self.total, self.rate
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def human(tokens: int) -> str:
    """4096 as 4K."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def rows(lines: Lines, variant: str, train_length: int | None, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The suite ``length``: an object a task and length, in the order of the journal's first lines.

    Args:
        variant: name of the model in the results.
        train_length: tokens that it was trained on.
    """
    common = {**common_keys("length", seed, device), "variant": variant, "train_length": train_length}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "sample":
            groups.setdefault((line["task"], line["L"]), []).append(line)
    found = []
    for (task, L), samples in groups.items():
        accuracy, forced = (Accuracy(sum(x[key] for x in samples), len(samples)) for key in ("correct", "forced"))
        low, high = accuracy.interval
        row = {"task": task, "L": L, "n": accuracy.total, "seeds": sorted({x["seed"] for x in samples})}
        row |= {"accuracy": round(accuracy.rate, 4), "ci_low": round(low, 4), "ci_high": round(high, 4)}
        row |= {"forced": round(forced.rate, 4), "matched": round(float(np.mean([x["matched"] for x in samples])), 4)}
        for key in _COSTS:
            if values := [x[key] for x in samples if key in x]:
                row[key] = round(float(np.median(values)), 4)
        for key in ("peak_gib", "full_peak_gib", "check_error"):
            if values := [x[key] for x in samples if key in x]:
                row[key] = max(values)
        if checked := [x["check_same"] for x in samples if "check_same" in x]:
            row |= {"checked": len(checked), "check_same": sum(checked)}
        found.append({**common, **row})
    for line in lines:
        if line["kind"] == "ppl":
            found.append({**common, "task": PERPLEXITY, "L": line["L"], "n": line["tokens"], **_perplexity(line)})
    return found


def _perplexity(line: dict[str, Any]) -> dict[str, Any]:
    """exp of the mean loss; the interval is over the texts, by the normal distribution."""
    nats = np.array(line["nats"])
    half = 1.96 * float(nats.std(ddof=1)) / math.sqrt(len(nats)) if len(nats) > 1 else 0.0
    middle = float(nats.mean())
    value, low, high = (round(math.exp(middle + x), 4) for x in (0.0, -half, half))
    return {"seeds": [line["seed"]], "value": value, "ci_low": low, "ci_high": high}


def table(found: Lines) -> Table:
    """Tasks by length: accuracy and interval in per cent; perplexity."""
    lengths = sorted({row["L"] for row in found})
    out = Table(title="Exact match by length, % (95 % interval)")
    out.add_column("task")
    for L in lengths:
        out.add_column(human(L), justify="right")
    for task in dict.fromkeys(row["task"] for row in found):
        cells = {row["L"]: _cell(row) for row in found if row["task"] == task}
        out.add_row(task, *(cells.get(L, "") for L in lengths))
    return out


def _cell(row: dict[str, Any]) -> str:
    if "value" in row:
        return f"{row['value']:.3g}"
    return f"{100 * row['accuracy']:.0f} ({100 * row['ci_low']:.0f}–{100 * row['ci_high']:.0f})"


def costs_table(found: Lines) -> Table | None:
    """Seconds and memory of reading one context, by length, where questions were asked."""
    out = Table(title="One context: seconds of a prefill, of selection and attention in it, and of a patched question")
    for name in ("tokens", "short prefill", "selection", "attention", "tokens/s", "patch", "full prefill", "peak GiB"):
        out.add_column(name, justify="right")
    costs = {row["L"]: row for row in found if "seconds" in row}
    for L, row in sorted(costs.items()):
        best = [x for x in found if x["L"] == L]
        full = [x["full_seconds"] for x in best if "full_seconds" in x]
        patch = [x["patch_s"] for x in best if "patch_s" in x]
        peak = [x["peak_gib"] for x in best if "peak_gib" in x]
        out.add_row(
            human(L), f"{row['seconds']:.3g}", f"{row['selection_s']:.3g}", f"{row['attention_s']:.3g}",
            f"{L / max(row['seconds'], 1e-9):,.0f}", f"{max(patch):.3g}" if patch else "",
            f"{max(full):.3g}" if full else "", f"{max(peak):.2f}" if peak else "",
        )  # fmt: skip
    return out if costs else None


def comparison(found: Lines, tasks: Sequence[str]) -> Table:
    """Variants by length: the mean of the tasks' exact match over all seeds, in per cent, and perplexity where known.

    Args:
        found: rows of the suite ``length`` of several models.
        tasks: what the mean is of; a cell where one of them lacks is left empty.
    """
    lengths = sorted({row["L"] for row in found})
    out = Table(title=f"Mean of {', '.join(tasks)}, exact match in % (runs)")
    out.add_column("variant")
    for L in lengths:
        out.add_column(human(L), justify="right")
    for variant in dict.fromkeys(row["variant"] for row in found):
        mine = [row for row in found if row["variant"] == variant]
        out.add_row(variant, *(_mean_cell([row for row in mine if row["L"] == L], tasks) for L in lengths))
    return out


def _mean_cell(found: Lines, tasks: Sequence[str]) -> str:
    rates = {task: [row["accuracy"] for row in found if row["task"] == task] for task in tasks}
    runs = min(map(len, rates.values()))
    if not runs:
        return ""
    mean = float(np.mean([float(np.mean(values)) for values in rates.values()]))
    return f"{100 * mean:.0f} ({runs})"


def plot(found: Lines, lines: Lines, directory: Path) -> list[Path]:
    """``accuracy.png``: exact match by length with intervals; ``depth.png``: by length and depth of the fact."""
    paths = []
    if asked := [row for row in found if "accuracy" in row]:
        paths += [_curves(asked, directory / "accuracy.png"), _heat_maps(lines, directory / "depth.png")]
    return paths


def _curves(asked: Lines, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for i, task in enumerate(dict.fromkeys(row["task"] for row in asked)):
        mine = sorted((row for row in asked if row["task"] == task), key=lambda row: row["L"])
        L, rate, low, high = (np.array([row[key] for row in mine]) for key in ("L", "accuracy", "ci_low", "ci_high"))
        line = axis.plot(L, rate, marker="o", label=task, linestyle=("-", "--", ":")[i // 8 % 3])
        axis.fill_between(L, low, high, alpha=0.12, color=line[0].get_color())
    lengths = sorted({row["L"] for row in asked})
    axis.set_xscale("log")
    axis.set_xticks(lengths, [human(L) for L in lengths], minor=False)
    axis.minorticks_off()
    if (trained := asked[0]["train_length"]) is not None:
        axis.axvline(trained, color="gray", linestyle=":", label=f"trained at {human(trained)}")
    axis.set(xlabel="tokens of context", ylabel="exact match", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    return path


def _heat_maps(lines: Lines, path: Path) -> Path:
    from matplotlib.figure import Figure

    samples = [line for line in lines if line["kind"] == "sample"]
    tasks, lengths = list(dict.fromkeys(x["task"] for x in samples)), sorted({x["L"] for x in samples})
    columns = min(4, len(tasks))
    across = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.5 + 3 * columns, 0.6 + 2.6 * across), layout="constrained")
    axes = list(figure.subplots(across, columns, squeeze=False).flat)
    for axis, task in zip(axes, tasks):
        right, total = np.zeros((DEPTHS, len(lengths))), np.zeros((DEPTHS, len(lengths)))
        for x in (x for x in samples if x["task"] == task):
            place = min(DEPTHS - 1, int(x["depth"] * DEPTHS)), lengths.index(x["L"])
            right[place] += x["correct"]
            total[place] += 1
        rate = np.divide(right, total, out=np.full_like(right, np.nan), where=total > 0)
        image = axis.imshow(rate, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set(title=task, xlabel="tokens", ylabel="depth, %")
        axis.set_xticks(range(len(lengths)), [human(L) for L in lengths], rotation=90, fontsize="small")
        axis.set_yticks(range(0, DEPTHS, 3), [f"{100 * i // DEPTHS}" for i in range(0, DEPTHS, 3)])
    for axis in axes[len(tasks) :]:
        axis.axis("off")
    figure.colorbar(image, ax=figure.axes, label="exact match", shrink=0.8)
    figure.savefig(path, dpi=110)
    return path
