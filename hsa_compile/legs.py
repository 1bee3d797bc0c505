"""The ways in which a whole model is run to be compared: PyTorch on each path, ONNX Runtime by kernels or functions.

Shape letters: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.export import Session
from hsa_compile.model.generate import generate
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import prefill, short_prefill


class Leg(Protocol):
    """One way to run a model in its type."""

    @property
    def name(self) -> str: ...

    def logits(self, rows: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Any]:
        """Logits [L, V] of each row's tokens, which it reads in so many at a time."""

    def last(self, row: Tensor, segment: int, short: bool) -> Any:
        """Logits [V] after a prompt that is read in segments, by a short prefill if asked."""

    def generated(self, prompt: list[int], count: int) -> list[int]:
        """Greedy tokens."""


class TorchLeg:
    """PyTorch, on one of the operators' paths, where the model is."""

    def __init__(self, model: HsaModel, name: dispatch.Backend) -> None:
        self.model, self.name, self.device = model, name, model.embedding.weight.device

    def logits(self, rows: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Any]:
        state, made = self.model.start(len(rows)), Pieces(rows)
        with dispatch.use_backend(self.name):
            for lengths in parts:
                logits, state = self.model.step(made.next(lengths).to(self.device), state, lengths)
                made.take(logits.float().cpu().numpy(), lengths)
        return made.logits()

    def last(self, row: Tensor, segment: int, short: bool) -> Any:
        read = short_prefill if short else prefill
        with dispatch.use_backend(self.name), torch.no_grad():
            return read(self.model, row[None].to(self.device), segment)[0][0].float().cpu().numpy()

    def generated(self, prompt: list[int], count: int) -> list[int]:
        with dispatch.use_backend(self.name):
            return [int(token) for token in generate(self.model, prompt, count)]


class OrtLeg:
    """The bundle in ONNX Runtime, by its kernels or by the function bodies.

    Raises:
        BundleError, DeviceError: it does not open there.
    """

    def __init__(self, bundle: Path, name: str, provider: Literal["cpu", "cuda"] = "cpu") -> None:
        self.name = name
        fused = name == "ort-fused"
        self._opened = Session(bundle, 1, provider, fused, threads=torch.get_num_threads(), reserve=0)

    def logits(self, rows: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Any]:
        session, made = self._opened.fork(len(rows)), Pieces(rows)
        for lengths in parts:
            made.take(session.step(made.next(lengths).numpy(), lengths), lengths)
        return made.logits()

    def last(self, row: Tensor, segment: int, short: bool) -> Any:
        session = self._opened.fork()
        return (session.short_prefill if short else session.prefill)(row.numpy(), segment=segment)[0]

    def generated(self, prompt: list[int], count: int) -> list[int]:
        return list(self._opened.fork().generate(prompt, count))


class Pieces:
    """Cuts rows of text into segments, padded on the right, and puts their logits together."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows, self.at = rows, [0] * len(rows)
        self.parts: list[list[Any]] = [[] for _ in rows]

    def next(self, lengths: Sequence[int]) -> Tensor:
        ids = torch.zeros(len(self.rows), max(lengths), dtype=torch.int64)
        for b, n in enumerate(lengths):
            ids[b, :n] = self.rows[b][self.at[b] : self.at[b] + n]
        return ids

    def take(self, logits_BLV: Any, lengths: Sequence[int]) -> None:
        for b, n in enumerate(lengths):
            self.parts[b].append(logits_BLV[b, :n].copy())
            self.at[b] += n

    def logits(self) -> list[Any]:
        return [np.concatenate(part) for part in self.parts]


def cut(length: int, sizes: Sequence[int]) -> list[int]:
    """The text in parts of these sizes and a last one."""
    parts: list[int] = []
    for size in sizes:
        if 0 < size <= length - sum(parts):
            parts.append(size)
    rest = length - sum(parts)
    return [*parts, rest] if rest else parts
