"""Held-out loss, and retrieval accuracy by length."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_compile.model.data import VALUE_DIGITS, load_text, question, split_text, stack, text_sample
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.shards import Tokens

# Tokens of one batch: bounds the memory of a prefill, whatever the length.
BATCH_TOKENS = 1 << 16
DISTRACTORS = 7


@dataclass(frozen=True)
class Accuracy:
    """Exact matches among questions of one length, with a 95 % Wilson interval."""

    length: int
    correct: int
    total: int

    @property
    def rate(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.96, self.total, self.rate
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half


def retrieval_accuracy(
    model: HsaModel,
    lengths: Sequence[int],
    n: int = 64,
    seed: int = 0,
    *,
    text: bytes | None = None,
    distractors: int = DISTRACTORS,
    progress: Callable[[Accuracy], None] | None = None,
) -> dict[int, Accuracy]:
    """How often the greedily generated value is exactly the one that the prompt hides, for each prompt length.

    Args:
        lengths: prompt lengths in tokens.
        n: questions a length.
        seed: draws the questions; the needle's position is uniform.
        text: what hides the needles; by default the held-out part of the default text.
        distractors: pairs with other keys beside the needle.
        progress: called after each length.

    Raises:
        DataError: a length is too short for the pairs.
        ValueError: ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    hay = split_text(load_text())[1] if text is None else text
    was_training = model.training
    model.eval()
    results = {}
    for length in lengths:
        rng = random.Random(f"{seed} {length}")
        questions = [question(rng, hay, length, distractors) for _ in range(n)]
        correct, batch = 0, max(1, BATCH_TOKENS // length)
        for first in range(0, n, batch):
            correct += _count_correct(model, questions[first : first + batch])
        results[length] = Accuracy(length, correct, n)
        if progress:
            progress(results[length])
    model.train(was_training)
    return results


def _count_correct(model: HsaModel, questions: list[tuple[bytes, bytes]]) -> int:
    device = model.embedding.weight.device
    prompts = torch.tensor([list(prompt) for prompt, _ in questions], device=device)
    answers = torch.tensor([list(value) for _, value in questions], device=device)
    got = torch.stack(list(generate(model, prompts, VALUE_DIGITS)), dim=1)
    return int((got == answers).all(-1).sum())


@torch.no_grad()
def text_loss(model: HsaModel, text: bytes | Tokens, length: int, samples: int = 16, seed: int = 0) -> float:
    """Mean cross-entropy in nats a token on excerpts of ``length`` tokens."""
    rng = random.Random(f"{seed} text")
    was_training = model.training
    model.eval()
    ids, targets, weights = (x.to(model.embedding.weight.device) for x in _excerpts(rng, text, length, samples))
    loss = float(sequence_loss(model(ids), targets, weights))
    model.train(was_training)
    return loss


def _excerpts(rng: random.Random, text: bytes | Tokens, length: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    return stack([text_sample(rng, text, length) for _ in range(samples)])
