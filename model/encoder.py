"""The chunk memory and its encoder.

Shape letters: B batch, C chunks, S tokens a chunk, N = B*C, X = S + 1 positions with the CLS vector, d model width,
Hkv key/value heads, D head width, Hr retrieval heads, Dr retrieval width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import Projections, SwiGlu, attend, rms_norm, rotate, rotations


class Memory(NamedTuple):
    """Encoded chunks, shared by every HSA layer: ``k``, ``v`` [B, C*S, Hkv, D] and ``landmark`` [B, C, Hr, Dr]."""

    k: Tensor
    v: Tensor
    landmark: Tensor

    def chosen(self, indices_BLHK: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values to attend to where these chunks are selected, and the indices into them: all there are."""
        return self.k, self.v, indices_BLHK


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
        o = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x, normed = self.mlp_norm.after(x_NXd, self.attention.merge(o))
        return x + self.mlp(normed)


class ChunkEncoder(nn.Module):
    """Encodes each chunk on its own; ``config.encoder`` says what landmarks, keys and values are linear functions of.

    ``cls``: the output at a learned CLS vector after the chunk's last token gives the landmark, the outputs at its
    tokens give keys and values. ``mean``: no CLS; the mean of the outputs gives the landmark. ``none``: no layers; the
    mean of the hidden states gives the landmark, the normed hidden states give keys and values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.encoder == "cls":
            self.cls = nn.Parameter(torch.empty(config.d_model))
        layers = 0 if config.encoder == "none" else config.encoder_layers
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(layers))
        self.norm = rms_norm(config.d_model)
        self.to_landmark = nn.Linear(config.d_model, config.retrieval_heads * config.retrieval_dim, bias=False)
        self.to_kv = nn.Linear(config.d_model, 2 * config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.landmark_norm = rms_norm(config.retrieval_dim) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(config.hsa_head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x_BCSd: Tensor) -> Memory:
        """The memory of C complete chunks of hidden states; C may be 0."""
        c = self.config
        B, C, S, _ = x_BCSd.shape
        summary_Nd, x = self.encode(x_BCSd.flatten(0, 1))
        landmark = self.to_landmark(summary_Nd).view(B, C, c.retrieval_heads, c.retrieval_dim)
        k, v = self.to_kv(x[:, :S]).view(B, C * S, 2 * c.hsa_kv_heads, c.hsa_head_dim).chunk(2, dim=2)
        return Memory(self.k_norm(k), v, self.landmark_norm(landmark))

    def encode(self, x_NSd: Tensor) -> tuple[Tensor, Tensor]:
        """What the landmarks are made of, [N, d], and what keys and values are, the first S of [N, S or X, d]."""
        c = self.config
        S = x_NSd.shape[1]
        if c.encoder == "none":
            return x_NSd.mean(1), self.norm(x_NSd)
        x = self._with_cls(x_NSd) if c.encoder == "cls" else x_NSd
        cos, sin = rotations(x.shape[1], c.swa_head_dim, c.rope_base, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return (x[:, S] if c.encoder == "cls" else x.mean(1)), x

    def _with_cls(self, x_NSd: Tensor) -> Tensor:
        """[N, S + 1, d]: the CLS vector after the last token."""
        N, S, d = x_NSd.shape
        if not torch.compiler.is_exporting():
            return torch.cat((x_NSd, self.cls.expand(N, 1, d)), dim=1)
        # Exported, no shape is computed, N neither: any token makes room for the vector.
        place = torch.arange(S + 1)
        return torch.where(place[:, None] == S, self.cls, x_NSd.index_select(1, place % S))
