"""Choosing the next token from logits, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]


class GenerationError(RuntimeError):
    """A model's logits are no numbers, so that no token can be chosen; the message says what may be the cause."""


def checked_token(logits_V: Floats, token: int) -> int:
    """The likeliest token, where its logit is a number.

    Raises:
        GenerationError: it is NaN or infinite.
    """
    if not np.isfinite(logits_V[token]):
        raise GenerationError(
            f"the model's largest logit is {logits_V[token]}, where NaN and infinity are no scores: its weights are "
            "damaged, or its values overflow the type it runs in; validate the bundle or export it again"
        )
    return token


class Sampler:
    """Chooses tokens one after the other, the same ones for the same seed.

    Args:
        temperature: 0 takes the most likely token (the first of equals), more flattens the distribution.
        top_p: samples from the fewest tokens that hold this much of the probability.
        seed: of the random numbers.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        self.temperature = temperature
        self.top_p = top_p
        self.random = np.random.default_rng(seed)

    def __call__(self, logits_V: Floats) -> int:
        """A token from float32 logits [V].

        Raises:
            GenerationError: the largest logit is NaN or infinite.
        """
        best = checked_token(logits_V, int(logits_V.argmax()))  # NaN counts as largest
        if self.temperature == 0.0:
            return best
        order = np.argsort(-logits_V, kind="stable")
        scaled = (logits_V[order].astype(np.float64) - logits_V[order[0]]) / self.temperature
        p = np.exp(scaled)
        p /= p.sum()
        kept = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
        p = p[:kept] / p[:kept].sum()
        return int(order[self.random.choice(len(p), p=p)])
