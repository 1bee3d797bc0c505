"""The chunk memory and the layers that read it.

Shape letters: B batch, L tokens, C chunks, S tokens a chunk, K chunks selected a token, d model width, Hq query heads,
Hkv key/value heads, D head width, Hr retrieval heads, Dr retrieval width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig, SlotWeights
from hsa_compile.model.layers import Projections, SwiGlu, attend, rms_norm, rotate, rotations
from hsa_compile.ops import chunk_attention, chunk_select


class Memory(NamedTuple):
    """Encoded chunks, shared by every HSA layer: ``k``, ``v`` [B, C*S, Hkv, D] and ``landmark`` [B, C, Hr, Dr]."""

    k: Tensor
    v: Tensor
    landmark: Tensor


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional layer; positions count from the chunk's first token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = rms_norm(config.d_model)
        self.attention = Projections(config)
        self.mlp_norm = rms_norm(config.d_model)
        self.mlp = SwiGlu(config.d_model, config.mlp_dim)

    def forward(self, x_NXd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.attention.split(self.norm(x_NXd))
        x = x_NXd + self.attention.merge(attend(rotate(q, cos, sin), rotate(k, cos, sin), v))
        return x + self.mlp(self.mlp_norm(x))


class ChunkEncoder(nn.Module):
    """Encodes each chunk on its own: the output at a learned CLS vector after its last token gives the landmark, the
    outputs at its tokens give keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cls = nn.Parameter(torch.empty(config.d_model))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = rms_norm(config.d_model)
        self.to_landmark = nn.Linear(config.d_model, config.retrieval_heads * config.retrieval_dim, bias=False)
        self.to_kv = nn.Linear(config.d_model, 2 * config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.landmark_norm = rms_norm(config.retrieval_dim) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(config.hsa_head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x_BCSd: Tensor) -> Memory:
        """The memory of C complete chunks of hidden states; C may be 0."""
        c = self.config
        B, C, S, d = x_BCSd.shape
        x_NSd = x_BCSd.flatten(0, 1)
        x = torch.cat((x_NSd, self.cls.expand(x_NSd.shape[0], 1, d)), dim=1)
        cos, sin = rotations(S + 1, c.swa_head_dim, c.rope_base, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        landmark = self.to_landmark(x[:, S]).view(B, C, c.retrieval_heads, c.retrieval_dim)
        k, v = self.to_kv(x[:, :S]).view(B, C * S, 2 * c.hsa_kv_heads, c.hsa_head_dim).chunk(2, dim=2)
        return Memory(self.k_norm(k), v, self.landmark_norm(landmark))


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


class HsaLayer(nn.Module):
    """Retrieval, HSA attention to what was retrieved, and an MLP.

    With ``bypass`` the MLP reads ``x + HSA(x)`` but adds to ``x``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = rms_norm(config.d_model)
        self.to_retrieval = nn.Linear(config.d_model, config.retrieval_heads * config.retrieval_dim, bias=False)
        self.to_q = nn.Linear(config.d_model, config.hsa_heads * config.hsa_head_dim, bias=False)
        self.out = nn.Linear(config.hsa_heads * config.hsa_head_dim, config.d_model, bias=False)
        self.retrieval_norm = rms_norm(config.retrieval_dim) if config.qk_norm else nn.Identity()
        self.q_norm = rms_norm(config.hsa_head_dim) if config.qk_norm else nn.Identity()
        self.mlp_norm = rms_norm(config.d_model)
        self.mlp = SwiGlu(config.d_model, config.mlp_dim)

    def forward(self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        """[B, L, d]; ``position_B`` is that of the first token, ``chunks_B`` how many rows of the memory are filled."""
        retrieved = x_BLd + self.retrieve(self.norm(x_BLd), memory, position_B, chunks_B)
        return (x_BLd if self.config.bypass else retrieved) + self.mlp(self.mlp_norm(retrieved))

    @property
    def top_k(self) -> int:
        """K of the present mode, training or inference."""
        return self.config.train_top_k if self.training else self.config.top_k

    def select(
        self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Indices and scores, [B, L, Hkv, top_k] each, of the chunks that the normed stream selects."""
        c = self.config
        q_r = self.retrieval_norm(self.to_retrieval(x_BLd).unflatten(-1, (c.retrieval_heads, c.retrieval_dim)))
        leave = c.window if c.leave_window else 0
        return chunk_select(q_r, memory.landmark, position_B, chunks_B, c.hsa_kv_heads, c.chunk_size, top_k, leave)

    def retrieve(self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        """HSA of the normed stream, [B, L, d]."""
        c = self.config
        indices, scores = self.select(x_BLd, memory, position_B, chunks_B, self.top_k)
        weights = slot_weights(indices, scores, c.weights)
        q = self.q_norm(self.to_q(x_BLd).unflatten(-1, (c.hsa_heads, c.hsa_head_dim)))
        o = chunk_attention(q, memory.k, memory.v, indices, weights, c.chunk_size, c.off_by_one)
        return self.out(o.flatten(2))
