"""How well a model selects: its scores beside the mass that full attention would give each chunk.

HSA equals full attention where the weight of chunk i is proportional to ``Z[t, i] = sum_j exp(q_t · k_j / sqrt(D))``
over its keys, so a good score follows ``log Z``. What is measured is measured a token and query head, over the chunks
that the token may select, and averaged: differences between tokens, which no selection depends on, do not count.

Tokens are sampled and the text is read in segments: memory holds what a prefill holds and a few blocks besides.

Shape letters: n tokens measured, L tokens of the text, C chunks visible to the last of them, S tokens a chunk, T = C*S,
K chunks selected, Hq query heads, Hkv key/value heads, D head width, Hr retrieval heads, Dr retrieval width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hsa_compile.model.config import WITH_OPERATORS, ModelConfig
from hsa_compile.model.encoder import Memory
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import SEGMENT, prefill

Found = TypeVar("Found")

QUERIES = 256
# Over two chunks every correlation is 1 or -1.
LEAST_CHUNKS = 3
# Elements of the largest temporaries, where one token needs no more; about ten of 8 bytes live at once.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Measured:
    """What was measured at n tokens of one HSA layer.

    Attributes:
        position: int64 [n], the tokens' places in the text.
        visible: int64 [n], chunks that each may select.
        pearson, spearman: fp64 [n, Hq], correlation of the selection score with log Z over the visible chunks; NaN with
            fewer than three of them, or where one of both is constant.
        recall: fp64 [n, Hq], share of the K chunks of largest Z that were selected; NaN where there are no more than K.
        mass: fp64 [n, Hq], share of full attention over the visible chunks that falls to the selected ones; NaN without
            any.
        entropy: fp64 [n, Hkv], of the selected chunks' weights, in nats; NaN where nothing was selected.
        empty: fp64 [n, Hkv], share of slots without a chunk.
    """

    position: Tensor
    visible: Tensor
    pearson: Tensor
    spearman: Tensor
    recall: Tensor
    mass: Tensor
    entropy: Tensor
    empty: Tensor


@torch.no_grad()
def diagnose(
    model: HsaModel, ids: Sequence[int] | Tensor, queries: int = QUERIES, seed: int = 0, segment: int = SEGMENT
) -> list[Measured]:
    """Measures the selections of a model, as it makes them at inference, at some tokens of a text.

    Args:
        ids: the text's tokens, [L].
        queries: how many tokens to measure at, drawn uniformly; all of a shorter text.
        seed: of the draw.
        segment: tokens a prefill segment.

    Returns:
        What was found in each HSA layer, one a group, from bottom to top.

    Raises:
        ConfigError: the architecture has no HSA layers.
        ValueError: the text is empty or no tokens are to be measured.
    """
    model.config.require("measuring selections", WITH_OPERATORS)
    text = torch.as_tensor(ids, dtype=torch.int64, device=model.embedding.weight.device)
    if text.dim() != 1 or not len(text) or queries < 1:
        raise ValueError(f"need a text [L >= 1] and queries >= 1, got {list(text.shape)} and {queries}")
    chosen = sorted(random.Random(seed).sample(range(len(text)), min(queries, len(text))))
    was_training = model.training
    model.eval()
    with watched(model, chosen, _measure) as parts:
        prefill(model, text[None], segment)
    model.train(was_training)
    return [joined(layer) for layer in parts]


@dataclass(frozen=True)
class Retrieval:
    """What the retrieval of an HSA layer does at n tokens.

    Attributes:
        position: int64 [n], the tokens' places in the text.
        visible: int64 [n], chunks that each may select.
        seen: bool [n, 1, C], the same as a mask.
        score: fp64 [n, Hr, C], ``q_r · landmark / sqrt(Dr)``; those of chunks that are not visible mean nothing.
        mass: fp64 [n, Hq, C], ``log Z``, likewise.
        indices: int64 [n, Hkv, K], the selected chunks; -1 in empty slots.
        weights: fp64 [n, Hkv, K], theirs.
    """

    position: Tensor
    visible: Tensor
    seen: Tensor
    score: Tensor
    mass: Tensor
    indices: Tensor
    weights: Tensor

    def head_score(self) -> Tensor:
        """``score`` of each query head, fp64 [n, Hq, C]."""
        return self.score.repeat_interleave(self.mass.shape[1] // self.score.shape[1], dim=1)


def joined(parts: Sequence[Found]) -> Found:
    """Measurements of some tokens after the other as one: dataclasses of tensors that have the tokens first."""
    kind = type(parts[0])
    names = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@contextmanager
def watched(
    model: HsaModel, chosen: Sequence[int], measure: Callable[[ModelConfig, Retrieval], Found]
) -> Iterator[list[list[Found]]]:
    """Measures every HSA layer at the chosen tokens of one text as they pass by; gives the parts, a list a layer."""

    def watch(layer: HsaLayer, found: list[Found]) -> RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, Memory, Tensor, Tensor]) -> None:
            x, memory, position, chunks = inputs
            first = int(position)
            here = [t for t in chosen if first <= t < first + x.shape[1]]
            step = max(1, BLOCK_ELEMENTS // (layer.config.hsa_heads * max(1, int(chunks))))
            for i in range(0, len(here), step):
                at = torch.tensor(here[i : i + step], device=x.device)
                found.append(measure(layer.config, retrieval(layer, x[0, at - first], memory, at, chunks)))

        return layer.register_forward_pre_hook(look)

    layers = [module for module in model.modules() if isinstance(module, HsaLayer)]
    parts: list[list[Found]] = [[] for _ in layers]
    hooks = [watch(layer, found) for layer, found in zip(layers, parts)]
    try:
        yield parts
    finally:
        for hook in hooks:
            hook.remove()


def retrieval(layer: HsaLayer, x_nd: Tensor, memory: Memory, at_n: Tensor, chunks: Tensor) -> Retrieval:
    """What the layer selects, and from what, at tokens ``at_n`` of the text, whose stream below it is ``x_nd``."""
    c = layer.config
    x = layer.norm(x_nd)[:, None]
    # Token by token, as in decoding: they are anywhere in the text.
    selected = [layer.select(x[i : i + 1], memory, at_n[i : i + 1], chunks, c.top_k) for i in range(len(at_n))]
    indices, scores = (torch.cat(parts)[:, 0] for parts in zip(*selected))  # [n, Hkv, K]
    visible = visible_chunks(c, at_n).clamp(max=int(chunks))
    C = int(visible.max())
    return Retrieval(
        position=at_n,
        visible=visible,
        seen=(torch.arange(C, device=x.device) < visible[:, None])[:, None],
        score=landmark_scores(layer.retrieval_queries(x)[:, 0], memory.landmark[0, :C]),
        mass=chunk_mass(layer.queries(x)[:, 0], memory.k[0, : C * c.chunk_size], c.chunk_size),
        indices=indices.long(),
        weights=layer.weigh(indices[:, None], scores[:, None])[:, 0].double(),
    )


def _measure(c: ModelConfig, found: Retrieval) -> Measured:
    chosen = found.indices.repeat_interleave(c.hsa_heads // c.hsa_kv_heads, dim=1)
    filled, score = found.indices >= 0, found.head_score()
    entropy = torch.special.entr(found.weights).sum(-1)
    return Measured(
        position=found.position,
        visible=found.visible,
        pearson=correlation(score, found.mass, found.seen),
        spearman=correlation(ranks(score, found.seen), ranks(found.mass, found.seen), found.seen),
        recall=recall_of_best(found.mass, chosen, found.visible, c.top_k),
        mass=mass_share(found.mass, chosen, found.seen),
        entropy=entropy.masked_fill(~filled.any(-1), torch.nan),
        empty=(~filled).double().mean(-1),
    )


def visible_chunks(config: ModelConfig, position: Tensor) -> Tensor:
    """How many chunks of the past tokens at these positions may select."""
    lag = config.problems()[0].visible_lag
    return (position - lag).clamp(min=0) // config.chunk_size


def chunk_mass(q_nHD: Tensor, k_THD: Tensor, chunk_size: int) -> Tensor:
    """``log Z``, fp64 [n, Hq, C]: log-sum-exp of ``q · k / sqrt(D)`` over the keys of each chunk, in fp32 products."""
    n, Hq, D = q_nHD.shape
    Hkv = k_THD.shape[1]
    q = q_nHD.float().unflatten(1, (Hkv, -1))
    block = max(1, BLOCK_ELEMENTS // (n * Hq * chunk_size)) * chunk_size
    parts = [q.new_zeros(n, Hq, 0, dtype=torch.float64)]
    for first in range(0, len(k_THD), block):
        s = torch.einsum("nhgd,thd->nhgt", q, k_THD[first : first + block].float()) / math.sqrt(D)
        parts.append(s.flatten(1, 2).unflatten(-1, (-1, chunk_size)).logsumexp(-1).double())
    return torch.cat(parts, dim=-1)


def landmark_scores(q_r_nHD: Tensor, landmark_CHD: Tensor) -> Tensor:
    """Scores ``q_r · landmark / sqrt(Dr)`` of all chunks, fp64 [n, Hr, C], in fp32 products."""
    n, Hr, Dr = q_r_nHD.shape
    block = max(1, BLOCK_ELEMENTS // (Hr * max(n, Dr)))
    parts = [torch.einsum("nhd,chd->nhc", q_r_nHD.float(), x.float()) for x in landmark_CHD.split(block)]
    return (torch.cat(parts, dim=-1) / math.sqrt(Dr)).double()


def ranks(x: Tensor, seen: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension among what is seen; equal values share the mean of theirs."""
    x = x.masked_fill(~seen, torch.inf).contiguous()
    order = x.sort(-1).values
    below, up_to = (torch.searchsorted(order, x, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2


def correlation(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """Pearson's coefficient of a and b [n, H, C] over what is seen [n, 1, C]: [n, H]; NaN where it has no meaning."""
    count = seen.sum(-1)

    def centred(x: Tensor) -> Tensor:
        x = x.masked_fill(~seen, 0.0)
        return (x - x.sum(-1, keepdim=True) / count.clamp(min=1)[..., None]).masked_fill(~seen, 0.0)

    a, b = centred(a), centred(b)
    norm = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return ((a * b).sum(-1) / norm).masked_fill((count < LEAST_CHUNKS) | (norm == 0), torch.nan)


def recall_of_best(mass_nHC: Tensor, chosen_nHK: Tensor, visible_n: Tensor, top_k: int) -> Tensor:
    """Share of the ``top_k`` chunks of largest mass among the chosen ones, [n, H]; NaN where no more are visible."""
    seen = torch.arange(mass_nHC.shape[-1], device=mass_nHC.device) < visible_n[:, None, None]
    best = mass_nHC.masked_fill(~seen, -torch.inf).topk(min(top_k, mass_nHC.shape[-1]), dim=-1).indices
    found = (best[..., None] == chosen_nHK[..., None, :]).any(-1).double().sum(-1) / top_k
    return found.masked_fill(visible_n[:, None] <= top_k, torch.nan)


def mass_share(mass_nHC: Tensor, chosen_nHK: Tensor, seen: Tensor) -> Tensor:
    """Share of all that is seen which the chosen chunks have, [n, H]; NaN where nothing is."""
    if not mass_nHC.shape[-1]:
        return mass_nHC.new_full(mass_nHC.shape[:2], torch.nan)
    share = mass_nHC.masked_fill(~seen, -torch.inf).softmax(-1)
    taken = share.gather(-1, chosen_nHK.clamp(min=0)).masked_fill(chosen_nHK < 0, 0.0)
    return taken.sum(-1).masked_fill(~seen.any(-1), torch.nan)
