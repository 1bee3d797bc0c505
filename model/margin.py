"""How far the scores of the chunks that an answer needs lie above those of all others: the margin of a selection.

A chunk is selected where it is among the K best of C. If the others' scores were normal, that would take a score about
``needed`` of their standard deviations above their mean, which grows with C, so with the length of a text; the score of
the right chunk does not. They are not quite normal: ``bar`` is what the selection took.

Shape letters: n tokens measured, C chunks visible to the last of them, K chunks selected, Hr retrieval heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

from hsa_compile.model.config import WITH_OPERATORS, ModelConfig
from hsa_compile.model.diagnose import Retrieval, correlation, watched
from hsa_compile.model.model import HsaModel

# Over fewer others there is no deviation to measure by.
LEAST_OTHERS = 2


@dataclass(frozen=True)
class Margin:
    """What was measured at n tokens of one HSA layer.

    Right chunks hold a token of a fact that is needed; others are all other visible chunks. Scores are in standard
    deviations of the others' from their mean; NaN with fewer than two others, or where these are all alike.

    Attributes:
        position: int64 [n], the tokens' places in the text.
        visible: int64 [n], chunks that each may select.
        right: int64 [n], how many of them are right ones; where there are none, all below is NaN but ``bar``, ``tail``.
        z: fp64 [n, Hr], the best right chunk's score.
        bar: fp64 [n, Hr], the K-th largest score of the others, which a right chunk has to beat; NaN where no more than
            K - 1 are others.
        tail: fp64 [n, Hr], the largest score of the others.
        rank: fp64 [n, Hr], of the best right chunk among all that are visible, from 1.
        selected: fp64 [n, Hr], 1 where a right chunk was selected, else 0.
        weight: fp64 [n, Hr], what the right chunks got of the weights, together.
        pearson: fp64 [n, Hr], correlation of score and log Z over the visible chunks, as in ``Measured``; the mean of a
            retrieval head's query heads.
    """

    position: Tensor
    visible: Tensor
    right: Tensor
    z: Tensor
    bar: Tensor
    tail: Tensor
    rank: Tensor
    selected: Tensor
    weight: Tensor
    pearson: Tensor


def needed(visible: int, top_k: int) -> float | None:
    """Standard deviations above the mean that the best ``top_k`` of so many normal scores begin at: the quantile of
    1 - K / C. None where all are selected."""
    return NormalDist().inv_cdf(1 - top_k / visible) if visible > top_k else None


@contextmanager
def watched_margins(
    model: HsaModel, positions: Sequence[int], facts: Sequence[tuple[int, int]]
) -> Iterator[list[list[Margin]]]:
    """Measures every HSA layer at these tokens of one text as they pass by, in whatever steps it is read.

    Args:
        positions: places of tokens.
        facts: (first, end) of each fact that is needed there, tokens ``first`` … ``end - 1``.

    Returns:
        What is found, filled as tokens pass: a list a layer, from bottom to top, of parts in the tokens' order.

    Raises:
        ConfigError: the architecture has no HSA layers.
    """
    c = model.config
    c.require("measuring margins", WITH_OPERATORS)
    chunks = {i for first, end in facts for i in range(first // c.chunk_size, -(-end // c.chunk_size))}
    right = torch.tensor(sorted(chunks), dtype=torch.int64, device=model.embedding.weight.device)
    with watched(model, positions, partial(_margin, right)) as parts:
        yield parts


def _margin(right: Tensor, c: ModelConfig, found: Retrieval) -> Margin:
    """Of what a layer did, where these chunks, int64 [any], are right."""
    _, Hr, C = found.score.shape
    holds = torch.isin(torch.arange(C, device=right.device), right)
    ours, others = found.seen & holds, found.seen & ~holds  # [n, 1, C]
    place, spread, highest = _others(found.score, others, c.top_k)
    best = _highest(found.score, ours, 1)[..., 0]
    has = ours.any(-1)
    chosen, weights = found.indices[:, :Hr], found.weights[:, :Hr]  # with Hr = 1, all heads select alike
    taken = ((chosen[..., None] == right) & (chosen >= 0)[..., None]).any(-1)
    bar = highest[..., c.top_k - 1] if highest.shape[-1] == c.top_k else torch.full_like(place, torch.nan)
    return Margin(
        position=found.position,
        visible=found.visible,
        right=ours.sum(-1)[:, 0],
        z=(best - place) / spread,
        bar=(bar - place) / spread,
        tail=(highest[..., 0] - place) / spread,
        rank=_where((found.seen & (found.score > best[..., None])).sum(-1) + 1, has),
        selected=_where(taken.any(-1), has),
        weight=_where((weights * taken).sum(-1), has),
        pearson=correlation(found.head_score(), found.mass, found.seen).unflatten(1, (Hr, -1)).nanmean(-1),
    )


def _others(score: Tensor, others: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation [n, Hr] of the others' scores, NaN where they have no meaning, and the largest of
    them, [n, Hr, at most K and at least 1]."""
    count = others.sum(-1)
    mean = score.masked_fill(~others, 0.0).sum(-1) / count
    spread = (score - mean[..., None]).masked_fill(~others, 0.0).square().sum(-1).div(count).sqrt()
    return mean, spread.masked_fill((count < LEAST_OTHERS) | (spread == 0), torch.nan), _highest(score, others, top_k)


def _highest(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` highest scores among these, at most C but at least one place; NaN where there are fewer."""
    if not score.shape[-1]:
        return score.new_full((*score.shape[:-1], 1), torch.nan)
    found = score.masked_fill(~among, -torch.inf).topk(min(count, score.shape[-1]), dim=-1).values
    return found.masked_fill(found.isneginf(), torch.nan)


def _where(x: Tensor, has: Tensor) -> Tensor:
    return x.double().masked_fill(~has, torch.nan)
