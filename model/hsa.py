"""The layers that read the chunk memory.

Shape letters: B batch, L tokens, C chunks, S tokens a chunk, K chunks selected a token, d model width, Hq query heads,
Hkv key/value heads, D head width, Hr retrieval heads, Dr retrieval width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig, SlotWeights
from hsa_compile.model.encoder import Memory
from hsa_compile.model.layers import RmsNorm, SwiGlu, rms_norm
from hsa_compile.noise import noisy_chunk_select
from hsa_compile.ops import chunk_attention, chunk_select


def slot_weights(indices_BLHK: Tensor, scores_BLHK: Tensor, kind: SlotWeights) -> Tensor:
    """Weights [B, L, Hkv, K] of the selected chunks from their scores, 0 in empty slots (index -1).

    ``softmax`` is over the filled slots. ``stick-breaking`` goes from the newest chunk, which is the first slot, to the
    oldest: each takes ``sigmoid(score)`` of what the newer ones left.
    """
    filled = indices_BLHK >= 0
    if kind == "softmax":
        # A finite floor keeps rows without any chunk free of NaN; the last line empties them.
        weights = scores_BLHK.masked_fill(~filled, torch.finfo(scores_BLHK.dtype).min).softmax(-1)
    else:
        left = F.logsigmoid(-scores_BLHK).masked_fill(~filled, 0.0)
        weights = torch.exp(F.logsigmoid(scores_BLHK) + left.cumsum(-1) - left)
    return weights.masked_fill(~filled, 0.0)


def dense_chunk_attention(
    q_BLHqD: Tensor, k_BTHkvD: Tensor, v_BTHkvD: Tensor, indices: Tensor, weights: Tensor, S: int, off_by_one: bool
) -> Tensor:
    """``ops.chunk_attention`` by PyTorch's dense attention to every chunk, [B, L, Hq, D]: for memories of few chunks,
    of which tokens select all anyway. Takes the memory of C outputs; arguments as there."""
    (B, L, Hq, D), C, Hkv = q_BLHqD.shape, k_BTHkvD.shape[1] // S, k_BTHkvD.shape[2]
    q = q_BLHqD.transpose(1, 2).unsqueeze(1).expand(B, C, Hq, L, D).flatten(0, 1)
    k, v = (x.unflatten(1, (C, S)).transpose(2, 3).flatten(0, 1) for x in (k_BTHkvD, v_BTHkvD))
    if off_by_one:  # a key and a value of zeros: exp(0) = 1 more in the denominators
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).unflatten(0, (B, C))
    filled = (indices >= 0) & (indices < C)
    given = torch.where(filled, weights, 0.0)
    w_BLHC = given.new_zeros(B, L, Hkv, C).scatter_add(-1, torch.where(filled, indices, 0).long(), given)
    w = w_BLHC.permute(0, 3, 2, 1).repeat_interleave(Hq // Hkv, 2).unsqueeze(-1)
    return torch.where(w != 0, o * w, 0.0).sum(1).transpose(1, 2).to(q_BLHqD.dtype)


class MemoryReader(nn.Module):
    """A pre-norm sub-layer that reads the memory, and an MLP.

    With ``bypass`` the MLP reads ``x + read(x)`` but adds to ``x``.
    """

    config: ModelConfig
    norm: nn.Module
    mlp_norm: RmsNorm
    mlp: nn.Module

    def forward(self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        """[B, L, d]; ``position_B`` is that of the first token, ``chunks_B`` how many rows of the memory are filled."""
        o = self.retrieve(self.norm(x_BLd), memory, position_B, chunks_B)
        retrieved, normed = self.mlp_norm.after(x_BLd, o)
        return (x_BLd if self.config.bypass else retrieved) + self.mlp(normed)

    def retrieve(self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        """What the normed stream reads, [B, L, d]."""
        raise NotImplementedError

    @property
    def top_k(self) -> int:
        """K of the present mode, training or inference."""
        return self.config.train_top_k if self.training else self.config.top_k


class HsaLayer(MemoryReader):
    """Retrieval, HSA attention to what was retrieved, and an MLP.

    Attributes:
        dense_escape: attend densely where the memory has at most K chunks; the same up to rounding.
        noise: of the selection at present, ``config.selection_noise`` or on the way there; a scalar tensor may change
            between replays of a CUDA graph.
    """

    dense_escape = False
    noise: float | Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.noise = config.selection_noise
        self.norm = rms_norm(config.d_model)
        self.to_retrieval = nn.Linear(config.d_model, config.retrieval_heads * config.retrieval_dim, bias=False)
        self.to_q = nn.Linear(config.d_model, config.hsa_heads * config.hsa_head_dim, bias=False)
        self.out = nn.Linear(config.hsa_heads * config.hsa_head_dim, config.d_model, bias=False)
        self.retrieval_norm = rms_norm(config.retrieval_dim) if config.qk_norm else nn.Identity()
        self.q_norm = rms_norm(config.hsa_head_dim) if config.qk_norm else nn.Identity()
        self.mlp_norm = rms_norm(config.d_model)
        self.mlp = SwiGlu(config.d_model, config.mlp_dim)
        if config.rank_decay:
            self.rank_decay = nn.Parameter(torch.zeros(1))

    def retrieval_queries(self, x_BLd: Tensor) -> Tensor:
        """What the normed stream is scored against landmarks with, [B, L, Hr, Dr]."""
        c = self.config
        return self.retrieval_norm(self.to_retrieval(x_BLd).unflatten(-1, (c.retrieval_heads, c.retrieval_dim)))

    def queries(self, x_BLd: Tensor) -> Tensor:
        """What the normed stream attends inside chunks with, [B, L, Hq, D]."""
        return self.q_norm(self.to_q(x_BLd).unflatten(-1, (self.config.hsa_heads, self.config.hsa_head_dim)))

    def select(
        self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Indices and scores, [B, L, Hkv, top_k] each, of the chunks that the normed stream selects."""
        c = self.config
        q_r = self.retrieval_queries(x_BLd)
        leave = c.window if c.leave_window else 0
        sizes = (c.hsa_kv_heads, c.chunk_size, top_k, leave)
        if self.training and c.selection_noise:
            return noisy_chunk_select(q_r, memory.landmark, position_B, chunks_B, *sizes, noise=self.noise)
        return chunk_select(q_r, memory.landmark, position_B, chunks_B, *sizes)

    def weigh(self, indices_BLHK: Tensor, scores_BLHK: Tensor) -> Tensor:
        """Weights [B, L, Hkv, K] of what ``select`` gave."""
        if self.config.rank_decay:  # slots come newest first
            rank = torch.arange(scores_BLHK.shape[-1], device=scores_BLHK.device)
            scores_BLHK = scores_BLHK + self.rank_decay.float() * rank
        return slot_weights(indices_BLHK, scores_BLHK, self.config.weights)

    def retrieve(self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        """HSA of the normed stream, [B, L, d]."""
        c = self.config
        indices, scores = self.select(x_BLd, memory, position_B, chunks_B, self.top_k)
        weights = self.weigh(indices, scores)
        k, v, indices = memory.chosen(indices, c.chunk_size)
        few = self.dense_escape and 0 < k.shape[1] <= self.top_k * c.chunk_size
        attend = dense_chunk_attention if few else chunk_attention
        o = attend(self.queries(x_BLd), k, v, indices, weights, c.chunk_size, c.off_by_one)
        return self.out(o.flatten(2))
