"""The batches of a recipe. Each is a function of the seed and its step, so any process can draw it, and ahead."""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hsa_compile.model.config import ConfigError
from hsa_compile.model.data import Sample, load_text, split_text, stack, text_sample
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.shards import INDEX_NAME, Tokenizer, Tokens, open_shards
from hsa_compile.model.tasks.haystack import codec
from hsa_compile.model.tasks.pairs import KEYS
from hsa_compile.model.tasks.problem import WORDS
from hsa_compile.model.tasks.registry import find_tasks
from hsa_compile.model.tasks.weave import Weaver

Batch = tuple[Tensor, Tensor, Tensor]


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
    if config.text_share != 1 and config.tokenizer is None:
        raise ConfigError("questions are written with the tokenizer: train on text and name it, or set text_share to 1")
    return Corpus(*tokens.split(), digest)


class Batches(Dataset[Batch]):
    """The batches of a recipe by step; the same recipe and corpus give the same ones, whatever number of processes
    trains."""

    def __init__(self, config: TrainConfig, text: bytes | Tokens) -> None:
        self.config, self.text = config, text
        tasks = tuple((task, config.tasks[task.name]) for task in find_tasks(list(config.tasks)))
        self.most_pairs = len(KEYS if isinstance(text, bytes) else WORDS)
        self.weaver = Weaver(
            codec(config.tokenizer), text, tasks, config.fill, config.answer_weight,
            config.straddle, config.model.chunk_size,
        )  # fmt: skip

    def __getitem__(self, step: int) -> Batch:
        """Inputs, targets and loss weights [B, L] at this step, of the length that is due."""
        c, length, rng = self.config, length_at(self.config, step), random.Random(f"{self.config.seed} {step}")
        batch, pairs = c.batch * c.length // length, max(1, min(self.most_pairs, c.pairs * length // c.length))
        plain = round(batch * c.text_share)
        samples: list[Sample] = [text_sample(rng, self.text, length) for _ in range(plain)]
        samples += [self.weaver.draw(rng, length, pairs) for _ in range(batch - plain)]
        return stack(samples)

    def stream(self, start: int) -> Iterator[Batch]:
        """The batches from step ``start`` on, drawn ahead by ``config.workers`` processes."""
        steps = range(start, self.config.steps)
        if not self.config.workers:
            return (self[step] for step in steps)
        loader = DataLoader(
            self, batch_size=None, sampler=steps, num_workers=self.config.workers, prefetch_factor=4,
            multiprocessing_context="fork", worker_init_fn=_leave_signals,
        )  # fmt: skip
        return iter(loader)


def _leave_signals(worker: int) -> None:
    """Whom to stop is told to all processes of a group; the trainer ends its workers itself, after its last step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def length_at(config: TrainConfig, step: int) -> int:
    """Tokens a sample at a step: over the first ``short_part`` of the steps they double from ``short_length`` on, each
    length for as many steps."""
    lengths = [min(config.short_length, config.length)]
    while 2 * lengths[-1] < config.length:
        lengths.append(2 * lengths[-1])
    short = config.short_part * config.steps
    return lengths[int(step * len(lengths) / short)] if step < short else config.length
