"""How tokens are chosen: what rows ask the graph for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]


class GenerationError(RuntimeError):
    """A model's logits are no numbers, so that no token can be chosen; the message says what may be the cause."""


def checked_token(token: int) -> int:
    """A token that a graph chose.

    Raises:
        GenerationError: it could not choose one.
    """
    if token < 0:
        raise GenerationError(
            "the model's logits are NaN or infinite: its weights are damaged, or its values overflow the type it runs "
            "in; validate the bundle or export it again"
        )
    return token


class Sampler:
    """How a text's tokens are chosen, the same ones for the same seed.

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
        self._random = np.random.default_rng(seed)

    def draw(self) -> float:
        """The next random number, at least 0 and below 1."""
        return float(self._random.random(dtype=np.float32))


class Choices(NamedTuple):
    """What a step's ``hsa.Sample`` is given, float32 [B] each."""

    temperature: Floats
    top_p: Floats
    uniform: Floats

    @classmethod
    def of(cls, samplers: Sequence[Sampler | None]) -> Choices:
        """One of each row, which draws its next number; None, of rows that want no token, takes the likeliest."""
        given = [(s.temperature, s.top_p, s.draw()) if s is not None else (0.0, 1.0, 0.0) for s in samplers]
        return cls(*np.array(given, np.float32).reshape(-1, 3).T)
