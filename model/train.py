"""Training: one function from a ``TrainConfig`` to a checkpoint, metrics and a plot."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hsa_compile.model.checkpoint import save_checkpoint
from hsa_compile.model.config import PRESETS, ConfigError, ModelConfig
from hsa_compile.model.data import Sample, load_text, retrieval_sample, split_text, stack, text_sample
from hsa_compile.model.evaluate import text_loss
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.plot import plot_losses

METRICS_NAME, PLOT_NAME = "metrics.jsonl", "loss.png"


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. The defaults are the demo's: minutes on two CPU cores for the ``tiny`` preset.

    Args:
        out: directory of the checkpoint, metrics and plot.
        model: the model's shape.
        data: a text file or a directory of them; by default a book.
        steps, batch, length: updates, samples an update, tokens a sample.
        short_part, short_length: the first part of the updates is on samples of this length, as many tokens an update.
            Finding a pair among few chunks comes much sooner, and carries over.
        lr, min_lr, warmup: peak and last learning rate of a cosine schedule, and steps up to the peak.
        weight_decay: of matrices; vectors and the embedding have none.
        clip: largest norm of the gradient.
        text_share: part of every batch that is plain text; the rest hides pairs and asks for them.
        pairs: at most, in a retrieval sample of ``length`` tokens; fewer in short ones.
        fill: part of a retrieval sample that is pairs and their repetitions.
        answer_weight: of an answer's byte in the loss; a byte of text has 1.
        eval_every: steps between held-out losses.
        seed: of weights and data.
        threads: CPU threads, 0 leaves PyTorch's.
        device: where to train.
        progress: show a progress bar.

    Raises:
        ConfigError: a value is out of range.
    """

    out: str = "runs/tiny"
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    data: str | None = None
    steps: int = 2000
    batch: int = 8
    length: int = 256
    short_part: float = 0.5
    short_length: int = 128
    lr: float = 4e-3
    min_lr: float = 2e-4
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    text_share: float = 0.125
    pairs: int = 16
    fill: float = 0.7
    answer_weight: float = 20.0
    eval_every: int = 100
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "short_length", "warmup", "pairs", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("short_part", "text_share", "fill"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in 0 … 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "answer_weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainResult:
    """What training left: the model, where it lies, and how it went.

    Attributes:
        losses: training loss of every step.
        held_out: (step, nats a byte) on text that was not trained on.
        interrupted: stopped by the user before the last step; the checkpoint is of what there was.
    """

    model: HsaModel
    checkpoint: Path
    losses: list[float]
    held_out: list[tuple[int, float]]
    seconds: float
    tokens_per_second: float
    interrupted: bool


def train(config: TrainConfig) -> TrainResult:
    """Trains a model and writes checkpoint, ``metrics.jsonl`` and ``loss.png`` to ``config.out``.

    The same config gives the same weights on the same machine. On ``KeyboardInterrupt`` what was reached is saved.

    Raises:
        DataError: the text cannot be used.
        ConfigError: model and data do not fit.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = _Run(config)
    started = time.perf_counter()
    try:
        with _progress_bar(config.progress) as bar:
            task = bar.add_task("training", total=config.steps, note="")
            while run.step < config.steps:
                run.update()
                note = f"loss {run.losses[-1]:.3f}  {run.tokens_per_second:,.0f} tokens/s"
                bar.update(task, advance=1, note=note)
    except KeyboardInterrupt:
        run.interrupted = True
    return run.finish(time.perf_counter() - started)


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), disable=not shown)


class _Run:
    """What training carries from step to step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.text, self.held_out_text = split_text(load_text(config.data))
        if config.model.vocab_size < 256:
            raise ConfigError(f"training is on bytes: vocab_size must be at least 256, got {config.model.vocab_size}")
        torch.manual_seed(config.seed)
        self.model = HsaModel(config.model).to(config.device).train()
        self.optimizer = _optimizer(self.model, config)
        self.rng = random.Random(config.seed)
        self.step, self.interrupted = 0, False
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self.seconds, self.tokens = 0.0, 0
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.metrics = (self.out / METRICS_NAME).open("w", encoding="utf-8")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def update(self) -> None:
        """One step of the optimizer, and the held-out loss where it is due."""
        c, started = self.config, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, self.step)
        ids, targets, weights = self._batch()
        loss = sequence_loss(self.model(ids), targets, weights)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.step += 1
        self.tokens += ids.numel()
        self.seconds += time.perf_counter() - started
        record: dict[str, Any] = {"step": self.step, "loss": self.losses[-1], "grad_norm": float(norm)}
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(self.seconds, 3)}
        if self.step % c.eval_every == 0 or self.step == c.steps:
            self.held_out.append((self.step, text_loss(self.model, self.held_out_text, c.length)))
            record["held_out_loss"] = self.held_out[-1][1]
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        length = min(c.short_length, c.length) if self.step < c.short_part * c.steps else c.length
        batch, pairs = c.batch * c.length // length, max(1, c.pairs * length // c.length)
        plain = round(batch * c.text_share)
        samples: list[Sample] = [text_sample(self.rng, self.text, length) for _ in range(plain)]
        for _ in range(batch - plain):
            samples.append(retrieval_sample(self.rng, self.text, length, pairs, c.fill, c.answer_weight))
        ids, targets, weights = (x.to(c.device) for x in stack(samples))
        return ids, targets, weights

    def finish(self, seconds: float) -> TrainResult:
        """Writes checkpoint and plot of what there is."""
        self.metrics.close()
        self.model.eval()
        recipe = {name: value for name, value in asdict(self.config).items() if name != "model"}
        save_checkpoint(self.model, self.out, {"recipe": recipe, "steps": self.step, "interrupted": self.interrupted})
        if self.losses:
            plot_losses(self.out / PLOT_NAME, self.losses, self.held_out)
        return TrainResult(
            self.model, self.out, self.losses, self.held_out, seconds, self.tokens_per_second, self.interrupted
        )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from ``lr`` down to ``min_lr``; ``step`` counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _optimizer(model: HsaModel, config: TrainConfig) -> torch.optim.AdamW:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 and not name.startswith("embedding") else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
