"""Training speed and memory of a model, beside its baselines of as many parameters."""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.metrics import COUNTED, training_flops
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.optimizer import make_optimizer
from hsa_compile.model.parallel import World, shard
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.variants import variant

log = logging.getLogger("hsa_compile")

# Names in the results, and those of ``model/variants.py``.
VARIANTS = {"hsa": "hsa", "swa": "SWA", "full": "full attention", "mamba2": "Mamba-2"}
WIDTH = 64  # of what MLP widths are multiples: their parameters then differ by 1 % at most
WARM_UP = 3
# Dense attention is measured on its fastest kernels: cuDNN's, where a GPU has them.
_DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Trainer:
    """Steps of a model on random tokens: forward, backward, clipping and optimizer, bfloat16 autocast on GPUs."""

    def __init__(self, config: ModelConfig, length: int, batch: int, world: World) -> None:
        torch.manual_seed(world.rank)
        with world.device:
            self.model = HsaModel(config).train()
        shard(self.model, world)
        self.world, self.recipe = world, TrainConfig(model=config)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.ids = torch.randint(0, config.vocab_size, (batch, length + 1), device=world.device)

    def step(self) -> Tensor:
        device = self.world.device.type
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = sequence_loss(self.model(self.ids[:, :-1]), self.ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.detach()

    def timed_step(self) -> float:
        """Seconds of a step."""
        _wait(self.world.device)
        started = time.perf_counter()
        self.step()
        _wait(self.world.device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(
    base: ModelConfig,
    names: Sequence[str],
    length: int,
    tokens: int,
    world: World,
    ceiling_tflops: float,
    steps: int = 10,
    seconds: float = 10.0,
) -> Iterator[dict[str, Any]]:
    """tokens/s of all processes, MFU and peak memory of every variant on samples of ``length`` tokens.

    Args:
        names: of ``VARIANTS``.
        tokens: a step and process, whole samples; half as many for all, again and again, where one variant lacks the
            memory.
        ceiling_tflops: the matmul rate that MFU is a share of.
        steps, seconds: timed steps of a variant, fewer when the time is up, at least 3.
    """
    batch = max(1, tokens // length)
    while batch:
        try:
            for name in names:
                yield from _measure(base, name, length, batch, world, ceiling_tflops, steps, seconds)
            return
        except torch.OutOfMemoryError:
            log.warning("%s: %d samples of %d tokens do not fit into the GPU's memory", name, batch, length)
            batch //= 2


def _measure(
    base: ModelConfig, name: str, length: int, batch: int, world: World, ceiling: float, steps: int, seconds: float
) -> list[dict[str, Any]]:
    config, device = variant(base, VARIANTS[name], length, WIDTH), world.device
    if device.type == "cuda":
        gc.collect()  # what was measured before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(config, length, batch, world)
    dense = config.architecture == "attention"
    with sdpa_kernel(_DENSE, set_priority=True) if dense else contextlib.nullcontext():
        for _ in range(WARM_UP):
            trainer.step()
        times = [trainer.timed_step()]
        # The same number in every process: they wait for each other in each step.
        count = int(world.sum([max(3, min(steps, seconds / times[0]))])[0] / world.size)
        times += [trainer.timed_step() for _ in range(count - 1)]
    keys = {"variant": name, "L": length, "batch": batch * world.size, "devices": world.size}
    median, work = statistics.median(times), batch * length * world.size
    spread = {"low": round(work / max(times), 1), "high": round(work / min(times), 1)}
    found = [{**keys, "metric": "train_tokens_per_s", "value": round(work / median, 1), **spread}]
    if config.architecture in COUNTED:
        rate = batch * training_flops(config, length) / median
        found.append({**keys, "metric": "mfu", "value": round(rate / ceiling / 1e12, 4)})
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        found.append({**keys, "metric": "peak_gib", "value": round(peak, 2)})
    return found
