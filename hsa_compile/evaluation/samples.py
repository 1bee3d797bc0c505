"""The questions of an evaluation. Each is a function of seed, task, length and number, and of the text."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsa_compile.model.config import ConfigError
from hsa_compile.model.tasks.haystack import Circle, Codec, Context, frequent_words, hide, other_words
from hsa_compile.model.tasks.problem import Hay, Task

PPL_PARTS, PPL_TOKENS = 8, 1024


@dataclass(frozen=True)
class Samples:
    """Draws questions and the texts around them.

    Args:
        codec: the model's tokens.
        text: token ids of held-out prose. Its last part is kept for perplexity, the rest hides facts.
        seed: of everything.
        patch_from: from this length on questions share haystacks.
        shared: so many questions of each task have one haystack then.
    """

    codec: Codec
    text: NDArray[np.integer]
    seed: int
    patch_from: int
    shared: int = 64

    def __post_init__(self) -> None:
        if len(self.text) < 8 * PPL_PARTS:
            raise ConfigError(f"the held-out text has {len(self.text)} tokens; give a longer one")

    def haystack(self, hay: Hay, length: int, index: int = 0) -> Circle:
        """What the facts of question ``index`` are hidden in; ``frequent`` words come with their problem."""
        number = index // self.shared if length >= self.patch_from else index
        rng = random.Random(f"{self.seed} {hay} {length} {number}")
        if hay == "words":
            return other_words(self.codec, length, rng.getrandbits(32))
        prose = self.text[: len(self.text) - self._ppl_size * PPL_PARTS]
        return Circle(prose, length, rng.randrange(len(prose)))

    def draw(self, task: Task, length: int, index: int, hay: Circle | None = None) -> Context:
        """Question ``index``, in its haystack or in the one that is given because it is the same.

        Raises:
            ConfigError: it does not fit into the length.
        """
        rng = random.Random(f"{self.seed} {task.name} {length} {index}")
        problem = task.make(rng, 1, length)
        if task.hay == "frequent":
            hay = frequent_words(self.codec, problem, length, rng.getrandbits(32))
        elif hay is None:
            hay = self.haystack(task.hay, length, index)
        after = b"\n" if task.hay == "text" else b" "
        return hide(rng, self.codec, hay, problem, problem.asks[0], after)

    @property
    def _ppl_size(self) -> int:
        return min(PPL_TOKENS, len(self.text) // (2 * PPL_PARTS))

    def continuations(self) -> list[NDArray[np.int64]]:
        """Texts whose perplexity is measured after contexts of any length: the same ones after all."""
        size = self._ppl_size
        tail = self.text[len(self.text) - size * PPL_PARTS :].astype(np.int64)
        return [tail[i * size : (i + 1) * size] for i in range(PPL_PARTS)]
