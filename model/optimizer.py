"""The optimizer, and what changes over the steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hsa_compile.model.recipe import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from ``lr`` down to ``min_lr``; ``step`` counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def selection_noise(config: TrainConfig, step: int) -> float:
    """Noise on the selection: none up to ``noise_from`` of the steps, all of it from ``noise_full`` of them on."""
    done, start, full = step / config.steps, config.noise_from, config.noise_full
    part = 1.0 if done >= full else max(0.0, done - start) / max(full - start, 1e-9)
    return part * config.model.selection_noise


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices other than the embedding decay."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 and not name.startswith("embedding") else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
