"""What is measured while training: work, its share of the machine's best, and what the selections look like."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsa_compile.model.checkpoint import CheckpointError, write_atomically, write_text
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.encoder import Memory
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel

COUNTED = ("hsa", "swa", "attention")


@functools.cache
def forward_flops(config: ModelConfig, length: int) -> int:
    """Floating-point operations of matrix products in the forward of one sample, a multiply-add counting as two.

    Attention counts what is visible: a window's keys, all tokens before, the chunks selected. Selection scores every
    visible chunk.

    Raises:
        ConfigError: the architecture is none of ``COUNTED``.
    """
    config.require("counting operations", COUNTED)
    c, d = config, config.d_model
    layer = d * (2 * c.swa_heads + 2 * c.swa_kv_heads) * c.swa_head_dim + 3 * d * c.mlp_dim
    window = length if c.architecture == "attention" else c.window
    keys = sum(min(t + 1, window) for t in range(length))
    attended = 2 * c.swa_heads * c.swa_head_dim * keys
    memory = _memory_products(c, length, layer) if c.has_memory else 0
    head = length * d * c.vocab_size
    return 2 * ((c.lower_layers + c.upper_layers) * (length * layer + attended) + memory + head)


def _memory_products(c: ModelConfig, length: int, layer: int) -> int:
    """Multiply-adds of the chunk encoder and of all retrievals with their HSA sub-layers."""
    select, attention = c.problems(training=True)
    d, C = c.d_model, length // c.chunk_size
    encoder_tokens = C * (c.chunk_size + 1)
    encoder = c.encoder_layers * encoder_tokens * (layer + 2 * c.swa_heads * c.swa_head_dim * (c.chunk_size + 1))
    retrieval = c.retrieval_heads * c.retrieval_dim
    projected = C * d * retrieval + C * c.chunk_size * d * 2 * c.hsa_kv_heads * c.hsa_head_dim
    visible = [min(C, max(0, (t - select.visible_lag) // c.chunk_size)) for t in range(length)]
    chosen = sum(min(chunks, attention.top_k) for chunks in visible)
    hsa = length * (d * retrieval + 2 * d * c.hsa_heads * c.hsa_head_dim + 3 * d * c.mlp_dim)
    hsa += retrieval * sum(visible) + 2 * c.hsa_heads * c.hsa_head_dim * c.chunk_size * chosen
    return encoder + projected + c.n_groups * hsa


def training_flops(config: ModelConfig, length: int) -> int:
    """Of one sample's forward and backward; the backward makes two products for each. Recomputing does not count."""
    return 3 * forward_flops(config, length)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large square products on this device: the best of a few, what nothing else here can exceed by much."""
    n, repeats = (1024, 3) if device.type == "cpu" else (8192, 20)
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Selections:
    """What the HSA layers selected.

    Attributes:
        slots, empty: all slots, and those without a chunk.
        rows, entropy: tokens (a kv head) that selected anything, and their weights' entropies added up, in nats.
    """

    slots: int = 0
    empty: int = 0
    rows: int = 0
    entropy: float = 0.0

    @property
    def empty_share(self) -> float:
        return self.empty / max(1, self.slots)

    @property
    def mean_entropy(self) -> float:
        """0 where each token has one chunk; at most log K."""
        return self.entropy / max(1, self.rows)


@contextmanager
def watch_selections(model: HsaModel) -> Iterator[Selections]:
    """Counts what is selected in the forwards of the block, by selecting once more: meant for a few of them."""
    seen = Selections()

    def look(layer: HsaLayer, inputs: tuple[Tensor, Memory, Tensor, Tensor]) -> None:
        x, memory, position, chunks = inputs
        with torch.no_grad():
            indices, scores = layer.select(layer.norm(x), memory, position, chunks, layer.top_k)
            weights = layer.weigh(indices, scores)
            filled = indices >= 0
            seen.slots += filled.numel()
            seen.empty += int((~filled).sum())
            seen.rows += int(filled.any(-1).sum())
            seen.entropy += float(torch.special.entr(weights).sum())

    # Before the forward: a sharded layer has its weights whole then, and no longer afterwards.
    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, HsaLayer)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class MetricsFile:
    """JSON Lines, one object a step; a continued run keeps what it had up to its step.

    Args:
        path: its directory is made.
        step: the step to go on after; 0 starts a new file.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.records = [record for record in _read(path) if record["step"] <= step] if step else []
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(path, lambda temporary: write_text(temporary, text))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            CheckpointError: it could not be written, for one because the disk is full.
        """
        self.records.append(record)
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"could not write {self._file.name}: {error.strerror}; make room, then resume"
            ) from None

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last one may have been cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
