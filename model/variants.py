"""The rows of a comparison: what the paper takes apart, and its baselines, at one number of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.model import HsaModel

# What each row changes in the model of the paper's choice.
ABLATIONS: dict[str, dict[str, Any]] = {
    "hsa": {},
    "no encoder": {"encoder": "none"},
    "encoder without CLS": {"encoder": "mean"},
    "no bypass": {"bypass": False},
    "stick-breaking": {"weights": "stick-breaking"},
    "rank decay": {"rank_decay": True},
    "selection noise": {"selection_noise": 0.7},
    "window left out": {"leave_window": True},
    "no QK norm": {"qk_norm": False},
    "off by one": {"off_by_one": True},
}
BASELINES: dict[str, dict[str, Any]] = {
    "SWA": {"architecture": "swa"},
    "full attention": {"architecture": "attention"},
    "NSA style": {"architecture": "nsa"},
    "Landmark attention": {"architecture": "landmark"},
    "Mamba-2": {"architecture": "mamba"},
    "Mamba-2 + HSA": {"architecture": "mamba-hsa"},
}


NO_SPARSITY = "no enforced sparsity"
VARIANTS = (*ABLATIONS, NO_SPARSITY, *BASELINES)


def variant(base: ModelConfig, name: str, length: int, multiple: int = 1) -> ModelConfig:
    """An ablation or baseline of ``base``, with as many parameters as ``base`` (``with_parameters``).

    Args:
        base: the paper's choice: an encoder with CLS, bypass, few chunks selected.
        name: of ``VARIANTS``.
        length: tokens of a training sample; the row without enforced sparsity trains with all its chunks selected.
        multiple: of what ``mlp_dim`` is to be.

    Raises:
        ConfigError: there is no such row, or it does not fit the sizes of ``base``; other rows may.
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    if name == NO_SPARSITY:
        change: dict[str, Any] = {"train_top_k": max(1, length // base.chunk_size)}
    else:
        change = (ABLATIONS | BASELINES)[name]
    try:
        return with_parameters(replace(base, **change), parameter_count(base), multiple)
    except ConfigError as error:
        raise ConfigError(f"variant {name!r} does not fit this model: {error}") from None


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, without making it."""
    with torch.device("meta"):
        return HsaModel(config).parameter_count()


def with_parameters(config: ModelConfig, wanted: int, multiple: int = 1) -> ModelConfig:
    """``config`` with the ``mlp_dim`` that brings its number of parameters nearest to ``wanted``.

    The number is linear in ``mlp_dim``; what is left is at most half of the parameters that one more unit brings.

    Args:
        multiple: of what ``mlp_dim`` is to be: GPUs multiply matrices of odd widths at a fraction of their rate.

    Raises:
        ConfigError: even without MLPs there are more parameters.
    """
    one, two = (parameter_count(replace(config, mlp_dim=n)) for n in (1, 2))
    mlp_dim = round(((wanted - one) / (two - one) + 1) / multiple) * multiple
    if mlp_dim < 1:
        raise ConfigError(f"{config.architecture} has at least {one:,} parameters of this width, more than {wanted:,}")
    return replace(config, mlp_dim=mlp_dim)
