"""Synthetic selections with a known overlap between neighbouring tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SelectionKind = Literal["local", "random"]
NEIGHBOURS = 16  # tokens that share a base selection in "local"
KEEP = 0.93  # and how much of it each keeps, about what trained models show


def synthetic_selection(
    B: int, L: int, Hkv: int, K: int, S: int, kind: SelectionKind, seed: int = 0, device: str = "cpu",
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
