"""Selections to measure kernels on: synthetic ones with a known overlap between neighbouring tokens, and those that a
trained model makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hsa_compile.model.config import WITH_OPERATORS
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import prefill

SyntheticKind = Literal["local", "random"]
SelectionKind = SyntheticKind | Literal["captured"]
NEIGHBOURS = 16  # tokens that share a base selection in "local"
KEEP = 0.93  # and how much of it each keeps, about what trained models show


def synthetic_selection(
    B: int, L: int, Hkv: int, K: int, S: int, kind: SyntheticKind, seed: int = 0, device: str = "cpu",
    before: int = 0,
) -> Tensor:  # fmt: skip
    """Indices int32 [B, L, Hkv, K], newest first, distinct, over the visible chunks, -1 where there are too few.

    "random": every token draws its own. "local": 16 neighbours share a draw, of which each token keeps an entry with
    probability 0.93 and redraws it else. ``before``: tokens of memory that the segment follows.
    """
    g = torch.Generator(device).manual_seed(seed)
    C = (before + L) // S
    if C == 0:
        return torch.full((B, L, Hkv, K), -1, dtype=torch.int32, device=device)
    visible = (torch.arange(L, device=device) + before).div(S, rounding_mode="floor").view(1, L, 1, 1)
    draws = torch.rand(B, L, Hkv, K, generator=g, device=device)
    if kind == "local":
        shared = draws[:, ::NEIGHBOURS].repeat_interleave(NEIGHBOURS, 1)[:, :L]
        keep = torch.rand(B, L, Hkv, K, generator=g, device=device) < KEEP
        draws = torch.where(keep, shared, draws)
    # Sorted, then duplicates pushed to the next free chunk, and back below the visible bound.
    rank = torch.arange(K, device=device)
    index = (draws * visible).long().sort(-1).values
    index = torch.minimum((index - rank).cummax(-1).values + rank, visible - K + rank)
    return torch.where(index >= 0, index, -1).flip(-1).to(torch.int32)


def union_ratio(indices: Tensor, tokens: int = 8) -> float:
    """|U|/K: distinct chunks among ``tokens`` neighbours, over the slots of one token; filled slots only."""
    tiles = indices[:, : indices.shape[1] // tokens * tokens].unflatten(1, (-1, tokens)).transpose(2, 3).flatten(3)
    ordered = tiles.sort(-1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    union = (fresh & (ordered >= 0)).sum()
    return float(union * tokens / (tiles >= 0).sum().clamp(min=1))


@dataclass(frozen=True)
class Captured:
    """What one HSA layer selected while it read a text: ``indices`` int32 and ``weights`` fp32, [1, L, Hkv, K]."""

    indices: Tensor
    weights: Tensor


class _Watch(TorchDispatchMode):
    """Notes what chunk attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Captured] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.hsa.chunk_attention.default:
            self.seen.append(Captured(args[3].detach().cpu(), args[4].detach().float().cpu()))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def captured_selections(model: HsaModel, ids: Tensor) -> list[Captured]:
    """The selections of each HSA layer, from bottom to top, as the model makes them at inference over a text.

    Args:
        ids: int64 [L], L >= 1.

    Raises:
        ConfigError: the architecture has no HSA layers.
    """
    model.config.require("capturing selections", WITH_OPERATORS)
    layers = sum(isinstance(module, HsaLayer) for module in model.modules())
    with _Watch() as watch:
        prefill(model.eval(), ids[None].to(model.embedding.weight.device))
    found = []
    for layer in range(layers):
        parts = watch.seen[layer::layers]
        found.append(Captured(*(torch.cat([getattr(p, name) for p in parts], 1) for name in ("indices", "weights"))))
    return found
