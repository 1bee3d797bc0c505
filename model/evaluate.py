"""Held-out loss."""

from __future__ import annotations

import random

import torch

from hsa_compile.model.data import stack, text_sample
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.shards import Tokens


@torch.no_grad()
def text_loss(model: HsaModel, text: bytes | Tokens, length: int, samples: int = 16, seed: int = 0) -> float:
    """Mean cross-entropy in nats a token on excerpts of ``length`` tokens."""
    rng = random.Random(f"{seed} text")
    was_training = model.training
    model.eval()
    excerpts = stack([text_sample(rng, text, length) for _ in range(samples)])
    ids, targets, weights = (x.to(model.embedding.weight.device) for x in excerpts)
    loss = float(sequence_loss(model(ids), targets, weights))
    model.train(was_training)
    return loss
