"""Random valid inputs of the operators, weights that show, and the one rule by which results are judged."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.stream import Batch, Batches

LICENSE = Path(__file__).parents[1] / "LICENSE"  # a short text, at hand

# Trains in milliseconds a step.
SMALL = ModelConfig(
    d_model=32, mlp_dim=64, lower_layers=1, upper_layers=1, swa_heads=2, swa_kv_heads=2, swa_head_dim=16, window=16,
    chunk_size=8, hsa_heads=2, hsa_head_dim=16, retrieval_dim=16, top_k=2, train_top_k=2,
)  # fmt: skip


def small_recipe(out: Path, **changes: Any) -> TrainConfig:
    """A recipe that learns something in 40 steps of ``SMALL``."""
    fields: dict[str, Any] = {
        "out": str(out), "data": str(LICENSE), "model": SMALL, "steps": 40, "batch": 4,
        "length": 96, "short_length": 48, "warmup": 5,
        "pairs": 2, "lr": 3e-3, "min_lr": 1e-4, "text_share": 0.25, "answer_weight": 10.0, "eval_every": 20,
        "progress": False,
    }  # fmt: skip
    return TrainConfig(**fields | changes)


def bpe_tokenizer(path: Path, size: int, special: list[str] | None = None) -> Path:
    """Byte-pair encoding of so many tokens, trained on the license, as a Hugging Face ``tokenizer.json``."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special or [], show_progress=False
    )
    bpe.train([str(LICENSE)], trainer)
    bpe.save(str(path))
    return path


@contextmanager
def interrupted(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """The signal comes while the batch of that step is drawn."""
    draw = Batches.__getitem__

    def drawing(batches: Batches, at: int) -> Batch:
        if at == step:
            os.kill(os.getpid(), number)
        return draw(batches, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__getitem__", drawing)
        yield


def attention_inputs(
    problem: ChunkAttention, B: int, L: int, C: int, seed: int = 0, skew: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, indices, weights) with about a fifth of the slots empty, duplicates and any order among the others.

    ``skew`` > 1 makes low chunks popular. Weights of empty slots are NaN, which no implementation may look at.
    """
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, L, problem.q_heads, problem.head_dim, generator=g)
    k, v = torch.randn(2, B, C * problem.chunk_size, problem.kv_heads, problem.head_dim, generator=g)
    slots = (B, L, problem.kv_heads, problem.top_k)
    indices = (torch.rand(slots, generator=g) ** skew * C).to(torch.int32)
    indices[torch.rand(slots, generator=g) < 0.2] = -1
    weights = torch.rand(slots, generator=g)
    weights[indices < 0] = torch.nan
    return q, k, v, indices, weights


def select_inputs(
    problem: ChunkSelect, B: int, L: int, C: int, seed: int = 0, ties: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q_r, landmark, position, chunks): segments that start anywhere, some landmark rows unfilled (NaN).

    With ``ties`` the scores are small integers, exact in any order of summation.
    """
    g = torch.Generator().manual_seed(seed)
    q_r = torch.randn(B, L, problem.retrieval_heads, problem.retrieval_dim, generator=g)
    landmark = torch.randn(B, C, problem.retrieval_heads, problem.retrieval_dim, generator=g)
    if ties:
        q_r, landmark = q_r.round(), landmark.round()
    position = torch.randint(0, C * problem.chunk_size, (B,), generator=g)
    chunks = torch.randint(C // 2, C + 1, (B,), generator=g)
    for b in range(B):
        landmark[b, chunks[b] :] = torch.nan
    return q_r, landmark, position, chunks


def wide(x: Tensor) -> np.ndarray:
    """A tensor for the reference: half precisions, which NumPy has not all of, as float32."""
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()


Module = TypeVar("Module", bound=nn.Module)


def lively(module: Module, seed: int = 0) -> Module:
    """The module in eval mode with weights large enough that every part shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
    return module.eval()


def assert_as_good_as(
    got: Tensor | np.ndarray, low: Tensor | np.ndarray, reference: Tensor | np.ndarray, floor: float = 2e-6
) -> None:
    """The error against the high-precision reference is at most twice that of the plain implementation in the same
    precision (``low``), plus a floor relative to the largest value; as a maximum and as a root mean square."""
    got, low, reference = (
        np.asarray(wide(x) if isinstance(x, Tensor) else x, dtype=np.float64) for x in (got, low, reference)
    )
    assert got.shape == reference.shape
    assert np.isfinite(got).all(), "poison or garbage in the result"
    if not got.size:
        return
    error, allowed = np.abs(got - reference), np.abs(low - reference)
    scale = max(1.0, float(np.abs(reference).max()))
    assert error.max() <= 2 * allowed.max() + floor * scale
    assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((allowed**2).mean()) + floor * scale / 4
