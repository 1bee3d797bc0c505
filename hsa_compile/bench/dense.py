"""The peer that sparse models are measured against: a decoder of the same sizes whose layers attend to everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import SwaLayer, rms_norm, rotate, rotations


class DenseModel(nn.Module):
    """Full causal attention with RoPE and a preallocated key/value cache, one text.

    It has a layer for every layer of the sparse model, the chunk encoder's and the HSA sub-layers among them, so that
    parameters and depth are about equal.

    Args:
        capacity: tokens that the cache holds.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        super().__init__()
        self.config, self.capacity = config, capacity
        layers = config.lower_layers + config.upper_layers + config.n_groups + config.encoder_layers
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(SwaLayer(config) for _ in range(layers))
        self.norm = rms_norm(config.d_model)
        self.cos, self.sin = rotations(capacity, config.swa_head_dim, config.rope_base, torch.device("cpu"))
        self.reset()

    def reset(self) -> None:
        """Forgets the text."""
        shape = (len(self.layers), 2, 1, self.config.swa_kv_heads, self.capacity, self.config.swa_head_dim)
        self.position, self.cache = 0, torch.empty(shape)

    @torch.no_grad()
    def step(self, ids_1L: Tensor) -> Tensor:
        """Logits [1, V] after the next tokens: a whole prompt at once, then single ones."""
        at = slice(self.position, self.position + ids_1L.shape[1])
        causal = self.position == 0 and ids_1L.shape[1] > 1
        if self.position and ids_1L.shape[1] > 1:
            raise ValueError("after the prompt, tokens come one at a time")
        x = self.embedding(ids_1L)
        for layer, (keys, values) in zip(self.layers, self.cache):
            q, k, v = layer.attention.split(layer.norm(x))  # type: ignore[operator]
            q, k = (rotate(y, self.cos[at], self.sin[at]).transpose(1, 2) for y in (q, k))
            keys[:, :, at], values[:, :, at] = k, v.transpose(1, 2)
            seen = slice(0, at.stop)
            o = F.scaled_dot_product_attention(
                q, keys[:, :, seen], values[:, :, seen], is_causal=causal, enable_gqa=q.shape[1] != keys.shape[1]
            )
            x = x + layer.attention.merge(o.transpose(1, 2))  # type: ignore[operator, union-attr]
            x = x + layer.mlp(layer.mlp_norm(x))  # type: ignore[operator]
        self.position = at.stop
        return self.norm(x[:, -1]) @ self.embedding.weight.T
