"""Landmark attention (Mohtashami & Jaggi, arXiv 2305.16300): a landmark token after each chunk gates the chunk.

Shape letters: B batch, L tokens, M tokens with landmarks among them, R carried ones before them, T = R + M, H heads,
D head width, S tokens a chunk, N chunks with their landmarks, of S + 1 tokens each.

It is dense: time and memory are O(L*T). A baseline for training lengths, not for long contexts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import rotate, rotations


class LandmarkAttention:
    """Grouped softmax of every token over the chunks before it, and where landmarks stand among the tokens.

    A token's first softmax is over the tokens of its own chunk up to itself and the landmarks of all chunks before; a
    landmark's part goes to the tokens of its chunk by a softmax among them. At inference the ``top_k`` best landmarks
    of each token and head take part, the others none.

    Args:
        carried: tokens and landmarks before the segment, whose keys are all kept.
        length: tokens of the segment, without landmarks.
        training: let every landmark take part.
    """

    def __init__(
        self, config: ModelConfig, carried: int, length: int, device: torch.device, training: bool = False
    ) -> None:
        self.S, self.R = config.chunk_size, carried
        self.top_k = None if training else config.top_k
        seen = carried - carried // (self.S + 1)
        token = torch.arange(seen, seen + length, device=device)
        self.tokens = token + token // self.S - carried  # their places among the segment's M
        self.M = seen + length + (seen + length) // self.S - carried
        self.cos, self.sin = rotations(carried + self.M, config.swa_head_dim, config.rope_base, device)

    def insert(self, x_BLd: Tensor, landmark_d: Tensor) -> Tensor:
        """[B, M, d]: the segment with a landmark after each chunk that it completes."""
        x = landmark_d.to(x_BLd.dtype).expand(x_BLd.shape[0], self.M, -1)
        return x.index_copy(1, self.tokens, x_BLd)

    def remove(self, x_BMd: Tensor) -> Tensor:
        """[B, L, d] without the landmarks."""
        return x_BMd.index_select(1, self.tokens)

    def attend(self, q_BMHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        X, H = self.S + 1, q_BMHD.shape[2]
        q = rotate(q_BMHD, self.cos[self.R :], self.sin[self.R :]).transpose(1, 2)
        k = rotate(k_BTHD, self.cos, self.sin)
        k, v = (_in_chunks(x, X).repeat_interleave(H // x.shape[2], dim=1) for x in (k, v_BTHD))
        s_BHMNX = torch.einsum("bhmd,bhnxd->bhmnx", q, k).float() / math.sqrt(q.shape[-1])
        p = self._grouped_softmax(s_BHMNX).to(v.dtype)
        return torch.einsum("bhmnx,bhnxd->bmhd", p, v[..., : self.S, :])

    def _grouped_softmax(self, s_BHMNX: Tensor) -> Tensor:
        """Weights of the tokens, [B, H, M, N, S]."""
        S, N = self.S, s_BHMNX.shape[3]
        i = self.R + torch.arange(self.M, device=s_BHMNX.device)[:, None, None]
        chunk = torch.arange(N, device=s_BHMNX.device)[:, None]
        place = torch.arange(S + 1, device=s_BHMNX.device)
        own = (chunk == i // (S + 1)) & (place < S) & (chunk * (S + 1) + place <= i)
        gate = ((chunk < i // (S + 1)) & (place == S)).expand_as(s_BHMNX)
        if self.top_k is not None and self.top_k < N:
            landmarks = s_BHMNX[..., S].masked_fill(~gate[..., S], -torch.inf)
            best = torch.zeros_like(landmarks, dtype=torch.bool)
            best.scatter_(-1, landmarks.topk(self.top_k, dim=-1).indices, True)
            gate = gate & best.unsqueeze(-1)
        first = s_BHMNX.masked_fill(~(own | gate), -torch.inf).flatten(3)
        first = first.softmax(-1).unflatten(-1, (N, S + 1))
        return first[..., :S] + first[..., S:] * s_BHMNX[..., :S].softmax(-1)

    def kept(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """All of them."""
        return k_BTHD, v_BTHD


def _in_chunks(x_BTHD: Tensor, X: int) -> Tensor:
    """[B, H, N, X, D], padded at the end."""
    x = F.pad(x_BTHD, (0, 0, 0, 0, 0, -x_BTHD.shape[1] % X))
    return x.unflatten(1, (-1, X)).permute(0, 3, 1, 2, 4)
