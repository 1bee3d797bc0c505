"""Rows of a batch that are not alike: at different positions, or several documents in one.

Shape letters: B batch, L tokens of the segment, R tokens carried from before it, T = R + L; the rest of a shape is
whatever a token has.

**Ragged rows.** What is carried ends where the segment begins, so it is padded on the left; the segment is padded on
the right. A row's real tokens are then contiguous, differences of positions are what they are in the row alone, and
causality hides the padding on the right from every real token. Only the padding on the left has to be masked.

**Packed documents.** ``starts`` [B, L] gives each token the place in its row where its document starts. Windows and
scans are masked by it; chunks are counted from there, and a memory is read document by document, so that the operators
see plain sequences. A packed document has the numbers that it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of which each has its own position and takes its own number of tokens.

    Args:
        before: tokens that each row has seen.
        lengths: tokens of the segment that are real, at the row's left.
    """

    before: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def after(self) -> tuple[int, ...]:
        """Tokens that each row has seen after the segment."""
        return tuple(p + n for p, n in zip(self.before, self.lengths))

    def carried(self, carried: int, device: torch.device) -> Tensor:
        """How many of the ``carried`` tokens are real, int64 [B]."""
        return torch.tensor(self.before, device=device).clamp(max=carried)

    def padding(self, length: int, device: torch.device) -> Tensor:
        """True where the segment of that many tokens is padding, [B, L]."""
        return torch.arange(length, device=device) >= torch.tensor(self.lengths, device=device)[:, None]

    def last(self, x_BT: Tensor, carried: int, most: int | None) -> Tensor:
        """The last real tokens of carried and segment, at most ``most``, padded on the left to the longest row."""
        size = max(self.after) if most is None else min(max(self.after), most)
        return take(x_BT, [carried + n - size for n in self.lengths], size)


def take(x_BT: Tensor, first: Sequence[int], size: int) -> Tensor:
    """[B, size, ...]: tokens ``first[b]`` … of each row. Places outside the row give some token of it."""
    rows = torch.arange(x_BT.shape[0], device=x_BT.device)[:, None]
    places = torch.tensor(first, device=x_BT.device)[:, None] + torch.arange(size, device=x_BT.device)
    return x_BT[rows, places.clamp(0, max(0, x_BT.shape[1] - 1))] if x_BT.shape[1] else x_BT


def documents(starts_BL: Tensor) -> list[tuple[int, int, int]]:
    """(row, first token, end) of every document, in order.

    Raises:
        ValueError: ``starts_BL`` does not name, for each token, the first token of its document.
    """
    if starts_BL.dim() != 2 or starts_BL.dtype != torch.int64:
        raise ValueError(f"document starts must be int64 [B, L], got {starts_BL.dtype} {list(starts_BL.shape)}")
    place = torch.arange(starts_BL.shape[1], device=starts_BL.device)
    before = torch.nn.functional.pad(starts_BL[:, :-1], (1, 0), value=-1)
    if not ((starts_BL == place) | (starts_BL == before)).all() or (starts_BL[:, :1] != 0).any():
        raise ValueError("document starts must be the place of each document's first token, at all of its tokens")
    return list(_spans(starts_BL))


def _spans(starts_BL: Tensor) -> Iterator[tuple[int, int, int]]:
    for row, starts in enumerate(starts_BL.tolist()):
        firsts = sorted(set(starts))
        for first, end in zip(firsts, [*firsts[1:], len(starts)]):
            yield row, first, end


def starts_of(lengths: Sequence[Sequence[int]]) -> Tensor:
    """Document starts int64 [B, L] of rows packed from documents of these lengths; all rows have L tokens.

    Raises:
        ValueError: a document is empty or the rows differ in length.
    """
    if len({sum(row) for row in lengths}) != 1 or any(n < 1 for row in lengths for n in row):
        raise ValueError("documents must have at least one token, and all rows the same number of tokens")
    rows = []
    for row in lengths:
        n = torch.tensor(row)
        rows.append((n.cumsum(0) - n).repeat_interleave(n))
    return torch.stack(rows)
