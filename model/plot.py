"""The loss plot of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hsa_compile.model.checkpoint import write_atomically


def plot_losses(path: Path, losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> None:
    """Writes a PNG of the training loss, its running mean, and the held-out loss, in nats a byte by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training")
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="training, running mean")
    if held_out:
        axes.plot(*zip(*held_out), "o-", color="tab:orange", label="held-out text")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _running_mean(values: Sequence[float], decay: float = 0.95) -> list[float]:
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means
