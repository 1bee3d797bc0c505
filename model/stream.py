"""The batches of a recipe, one after the other: where the stream is, is the state of one random generator."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hsa_compile.model.config import ConfigError
from hsa_compile.model.data import Sample, load_text, retrieval_sample, split_text, stack, text_sample
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.shards import INDEX_NAME, Tokenizer, Tokens, open_shards


@dataclass(frozen=True)
class Corpus:
    """What is trained on.

    Attributes:
        text, held_out: bytes, or other tokens.
        digest: tells one corpus from another.
    """

    text: bytes | Tokens
    held_out: bytes | Tokens
    digest: str


def load_corpus(config: TrainConfig) -> Corpus:
    """The data that a recipe names.

    Raises:
        DataError: it cannot be used.
        ConfigError: it does not fit the model or the recipe.
    """
    vocab_size = config.model.vocab_size
    if config.data is not None and (Path(config.data) / INDEX_NAME).is_file():
        if config.tokenizer is not None:
            raise ConfigError(f"{config.data} holds tokens already: leave out the tokenizer")
        tokens, digest = open_shards(config.data, vocab_size)
    else:
        text = load_text(config.data)
        digest = hashlib.sha256(text).hexdigest()
        if config.tokenizer is None:
            if vocab_size < 256:
                raise ConfigError(f"training is on bytes: vocab_size must be at least 256, got {vocab_size}")
            return Corpus(*split_text(text), digest)
        tokenizer = Tokenizer(config.tokenizer)
        if (known := tokenizer.vocab_size) > vocab_size:
            raise ConfigError(f"{config.tokenizer} has {known} tokens: raise the model's vocab_size of {vocab_size}")
        ids = tokenizer.encode(text)
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        tokens = Tokens([ids], vocab_size, config.tokenizer)
    if config.text_share != 1:
        raise ConfigError("hidden pairs are written in bytes: on other tokens set text_share to 1")
    return Corpus(*tokens.split(), digest)


class Batches:
    """Draws batches; the same recipe and corpus give the same ones, whatever number of processes trains."""

    def __init__(self, config: TrainConfig, text: bytes | Tokens) -> None:
        self.config, self.text = config, text
        self.rng = random.Random(config.seed)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and loss weights [B, L] of the next batch; ``step`` says whether samples are short."""
        c = self.config
        length = min(c.short_length, c.length) if step < c.short_part * c.steps else c.length
        batch, pairs = c.batch * c.length // length, max(1, c.pairs * length // c.length)
        plain = round(batch * c.text_share)
        samples: list[Sample] = [text_sample(self.rng, self.text, length) for _ in range(plain)]
        if isinstance(self.text, bytes):
            for _ in range(batch - plain):
                samples.append(retrieval_sample(self.rng, self.text, length, pairs, c.fill, c.answer_weight))
        return stack(samples)

    def state(self) -> list[Any]:
        """Where the stream is, as JSON data."""
        version, words, gauss = self.rng.getstate()
        return [version, list(words), gauss]

    def restore(self, state: list[Any]) -> None:
        """Goes on where ``state`` was taken."""
        version, words, gauss = state
        self.rng.setstate((version, tuple(words), gauss))
