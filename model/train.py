"""Training: one function from a ``TrainConfig`` to a checkpoint, metrics and a plot."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hsa_compile.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from hsa_compile.model.config import TRAINING_ONLY, ConfigError, ModelConfig
from hsa_compile.model.evaluate import text_loss
from hsa_compile.model.gradients import GradientGraphs
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.metrics import COUNTED, MetricsFile, matmul_rate, training_flops, watch_selections
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.optimizer import learning_rate, make_optimizer, selection_noise
from hsa_compile.model.parallel import World, join_world, shard, whole_model
from hsa_compile.model.plot import plot_losses
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.resume import STATES_NAME, load_state, read_state, save_state, states
from hsa_compile.model.stream import Batches, load_corpus

log = logging.getLogger("hsa_compile")

METRICS_NAME, PLOT_NAME, TOKENIZER_NAME = "metrics.jsonl", "loss.png", "tokenizer.json"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class TrainResult:
    """What training left: the model, where it lies, and how it went.

    Attributes:
        losses: training loss of every step, those before a continuation too.
        held_out: (step, nats a token) on text that was not trained on.
        seconds: of this call.
        tokens_per_second: of all steps, held-out losses and saving not counted.
        interrupted: stopped by a signal before the last step; the checkpoint is of what there was.
    """

    model: HsaModel
    checkpoint: Path
    losses: list[float]
    held_out: list[tuple[int, float]]
    seconds: float
    tokens_per_second: float
    interrupted: bool


def train(config: TrainConfig, resume: bool = False) -> TrainResult:
    """Trains a model and writes checkpoint, ``metrics.jsonl`` and ``loss.png`` to ``config.out``.

    The same config gives the same weights on the same machine, also when it was interrupted and resumed. On Ctrl-C and
    SIGTERM the step is finished and saved; a second signal stops at once. Under ``torchrun`` the processes train one
    model together, on the same batches as one would.

    Args:
        resume: go on from the newest training state in ``config.out``.

    Raises:
        DataError: the text cannot be used.
        ConfigError: model, data and recipe do not fit.
        CheckpointError: there is nothing to resume, it is of another recipe or damaged, or saving failed.
        TrainingError: the loss or its gradient is not a finite number any more; no state of that is saved.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    with join_world(config.device) as world:
        run = _Run(config, world, resume)
        started = time.perf_counter()
        with run.workers(), _stop_signals(world) as signals, _progress_bar(config.progress and world.main) as bar:
            task = bar.add_task("training", total=config.steps, completed=run.step, note="")
            while run.step < config.steps and not run.interrupted:
                run.update(stop=bool(signals))
                note = f"loss {run.losses[-1]:.3f}  {run.tokens_per_second:,.0f} tokens/s"
                bar.update(task, completed=run.step, note=note)
        return run.finish(started)


@contextmanager
def _stop_signals(world: World) -> Iterator[list[int]]:
    """The signals that asked to stop. A second Ctrl-C stops at once, but not under ``torchrun``, which sends its own
    after the terminal's."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard  # only the main thread may listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def listen(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if world.size == 1:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, listen)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), disable=not shown)


def _weights(checkpoint: str, model: ModelConfig) -> dict[str, Tensor]:
    """The weights to start from, in float32."""
    found = load_checkpoint(checkpoint)
    if replace(found.config, **{name: getattr(model, name) for name in TRAINING_ONLY}) != model:
        raise ConfigError(f"{checkpoint} is of another model: give the recipe its config, or another checkpoint")
    return found.float().state_dict()


class _Run:
    """What training carries from step to step."""

    def __init__(self, config: TrainConfig, world: World, resume: bool) -> None:
        self.config, self.world, self.out = config, world, Path(config.out)
        if config.batch < config.accumulate * world.size:
            raise ConfigError(
                f"batch ({config.batch}) must be at least accumulate × processes ({config.accumulate} × {world.size})"
            )
        if config.graphs and world.size > 1:
            raise ConfigError("graphs are of one process: train without them, or without torchrun")
        found = read_state(self.out) if resume else None
        self.corpus = load_corpus(config)
        self._check_start(None if found is None else found[1]["about"])
        torch.manual_seed(config.seed)
        self.model = HsaModel(config.model).to(world.device).train()
        if config.init is not None:
            self.model.load_state_dict(_weights(config.init, config.model))
        self.model.recompute = config.recompute
        self.noise = torch.zeros((), device=world.device)
        for layer in self.model.modules():
            if isinstance(layer, HsaLayer):
                layer.dense_escape, layer.noise = config.dense_escape, self.noise
        shard(self.model, world)
        self.optimizer = make_optimizer(self.model, config)
        self.graphs = GradientGraphs(self.model, self._backward) if config.graphs else None
        self.step, self.seconds, self.tokens, self.flops = 0, 0.0, 0, 0
        self.interrupted = False
        if found is not None:
            self._restore(*found)
        self.batches = Batches(config, self.corpus.text).stream(self.step)
        self.metrics = MetricsFile(self.out / METRICS_NAME, self.step) if world.main else None
        records = self.metrics.records if self.metrics else []
        self.losses: list[float] = [record["loss"] for record in records]
        self.held_out = [(record["step"], record["held_out_loss"]) for record in records if "held_out_loss" in record]
        self.peak_rate = 0.0

    def _check_start(self, about: dict[str, Any] | None) -> None:
        """A continuation is of the same recipe and data; a start is not over an unfinished run."""
        if about is None:
            if found := states(self.out):
                raise CheckpointError(
                    f"{self.out} holds an unfinished training, saved at {found[-1].name}: continue it with --resume, "
                    f"give another output, or remove {self.out / STATES_NAME}"
                )
            return
        if changed := self.config.differences(TrainConfig.from_dict(about["recipe"])):
            raise CheckpointError(
                f"the training in {self.out} has another recipe (field: given, saved): {'; '.join(changed)}; "
                "resume with the saved values, or train to another output"
            )
        if about["data"] != self.corpus.digest:
            raise CheckpointError(
                f"the training in {self.out} was on other data than {self.config.data or 'the book'} has now; give it "
                "the same text to resume, or train to another output"
            )

    def _restore(self, path: Path, about: dict[str, Any]) -> None:
        load_state(path, about, self.world, self.model, self.optimizer)
        self.step, saved = about["step"], about["about"]
        self.seconds, self.tokens, self.flops = saved["seconds"], saved["tokens"], saved["flops"]

    @contextmanager
    def workers(self) -> Iterator[None]:
        """Ends the processes that draw batches: they are deaf to signals, and the interpreter would wait for them."""
        try:
            yield
        finally:
            self.batches = iter(())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def update(self, stop: bool) -> None:
        """One step of the optimizer; held-out loss and training state where they are due.

        Args:
            stop: this is to be the last step.
        """
        c, started = self.config, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, self.step)
        self.noise.fill_(selection_noise(c, self.step))
        ids, targets, weights = next(self.batches)
        loss = self._gradients(ids, targets, weights)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        # One exchange a step: the loss, and whether any process was told to stop, so that all stop at one step.
        total, stops = self.world.sum([float(loss), float(stop)])
        self.losses.append(total)
        self.step += 1
        self.tokens += ids.numel()
        if c.model.architecture in COUNTED:
            self.flops += ids.shape[0] * training_flops(c.model, ids.shape[1])
        self.seconds += time.perf_counter() - started
        record: dict[str, Any] = {"step": self.step, "loss": total}
        record["grad_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not (math.isfinite(total) and math.isfinite(record["grad_norm"])):
            raise TrainingError(self._diverged(total, record["grad_norm"]))
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(self.seconds, 3)}
        if self.step % c.eval_every == 0 or self.step == c.steps:
            record |= self._evaluate()
        if self.metrics:
            self.metrics.write(record)
        self.interrupted = stops > 0 and self.step < c.steps
        if c.save_every and self.step < c.steps and (self.step % c.save_every == 0 or self.interrupted):
            self._save()

    def _diverged(self, loss: float, norm: float) -> str:
        line = (
            f"step {self.step} has the loss {loss} and a gradient of norm {norm}: lower lr or clip, or look at the data"
        )
        if found := states(self.out):
            line += f"; the state of {found[-1].name} is from before"
        return line

    def _gradients(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Adds up this process's gradients, part by part, and returns its share of the loss."""
        if self.graphs is not None:
            return self.graphs(ids, targets, weights)
        c, world, device = self.config, self.world, self.world.device
        total = weights.sum().to(device)
        parts = [x.tensor_split(c.accumulate * world.size) for x in (ids, targets, weights)]
        mine = range(world.rank * c.accumulate, (world.rank + 1) * c.accumulate)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for i in mine:
            x, y, w = (part[i].to(device) for part in parts)
            losses.append(self._backward(x, y, w, total))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(self, ids: Tensor, targets: Tensor, weights: Tensor, total: Tensor) -> Tensor:
        """Adds the gradients of a part of a batch, whose weights add up to ``total``, and returns its loss."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            loss = sequence_loss(self.model(ids), targets, weights, total)
        # Sharded gradients are averaged over the processes, each of which has a part of one sum.
        (loss * self.world.size if self.world.size > 1 else loss).backward()
        return loss.detach()

    def _evaluate(self) -> dict[str, float]:
        with watch_selections(self.model) as selections:
            loss = text_loss(self.model, self.corpus.held_out, self.config.length)
        self.held_out.append((self.step, loss))
        if not self.peak_rate:
            dtype = torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32
            self.peak_rate = sum(self.world.sum([matmul_rate(self.world.device, dtype)]))
        found = {"held_out_loss": loss, "tokens_per_second": round(self.tokens_per_second, 1)}
        if self.flops:
            rate = self.flops / max(self.seconds, 1e-9)
            found |= {"mfu": round(rate / self.peak_rate, 4), "peak_flops": self.peak_rate}
        if selections.slots:
            found["empty_slots"] = round(selections.empty_share, 4)
            found["selection_entropy"] = round(selections.mean_entropy, 4)
        return found

    def _save(self) -> None:
        about = {
            "recipe": self.config.to_dict(), "data": self.corpus.digest,
            "seconds": self.seconds, "tokens": self.tokens, "flops": self.flops,
        }  # fmt: skip
        save_state(self.out, self.step, self.world, self.model, self.optimizer, about, self.config.keep)

    def finish(self, started: float) -> TrainResult:
        """Writes checkpoint and plot of what there is; a finished run needs its training states no more."""
        model = whole_model(self.model, self.world).eval()
        model.recompute = False
        if self.metrics:
            self.metrics.close()
            recipe = {name: value for name, value in self.config.to_dict().items() if name != "model"}
            save_checkpoint(model, self.out, {"recipe": recipe, "steps": self.step, "interrupted": self.interrupted})
            if self.config.tokenizer is not None:
                shutil.copyfile(self.config.tokenizer, self.out / TOKENIZER_NAME)
            if self.losses:
                plot_losses(self.out / PLOT_NAME, self.losses, self.held_out)
            if not self.interrupted:
                shutil.rmtree(self.out / STATES_NAME, ignore_errors=True)
        seconds = time.perf_counter() - started
        return TrainResult(
            model, self.out, self.losses, self.held_out, seconds, self.tokens_per_second, self.interrupted
        )
