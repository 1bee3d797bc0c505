"""What HSA is compared with, in its own skeleton: full attention, and NSA-style reading of the chunk memory.

Shape letters: B batch, L tokens, R tokens carried from before, T = R + L, C chunks, S tokens a chunk, K chunks
selected, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.encoder import Memory
from hsa_compile.model.hsa import MemoryReader
from hsa_compile.model.layers import SwiGlu, attend, own_keys, rms_norm, rotate, rotations
from hsa_compile.model.rows import Ragged
from hsa_compile.ops import chunk_select

# Elements of the keys and values gathered at once; 2^24 floats are 64 MiB.
BLOCK_ELEMENTS = 1 << 24


class FullAttention:
    """Causal attention with RoPE to every token before; what is carried are the keys and values of them all.

    Arguments are those of ``SlidingWindow``.
    """

    def __init__(
        self,
        config: ModelConfig,
        carried: int,
        length: int,
        device: torch.device,
        ragged: Ragged | None = None,
        starts_BL: Tensor | None = None,
    ) -> None:
        self.R, self.L, self.ragged = carried, length, ragged
        self.cos, self.sin = rotations(carried + length, config.swa_head_dim, config.rope_base, device)
        plain = ragged is None and starts_BL is None
        # Kernels know causality by themselves, and then do half the work; a single token sees everything.
        self.causal = plain and not carried and length > 1
        self.mask: Tensor | None = None
        if not self.causal and not (plain and length == 1):
            i = torch.arange(carried, carried + length, device=device)[:, None]
            mask = i >= torch.arange(carried + length, device=device)
            self.mask = own_keys(mask, carried, ragged, starts_BL)

    def attend(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        q = rotate(q_BLHD, self.cos[self.R :], self.sin[self.R :])
        return attend(q, rotate(k_BTHD, self.cos, self.sin), v_BTHD, self.mask, self.causal)

    def kept(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """All of them."""
        if self.ragged is not None:
            return self.ragged.last(k_BTHD, self.R, None), self.ragged.last(v_BTHD, self.R, None)
        return k_BTHD, v_BTHD


class MeanPooledMemory(nn.Module):
    """Keys and values of the normed hidden states; a chunk's landmark is the mean of its keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = rms_norm(config.d_model)
        self.to_kv = nn.Linear(config.d_model, 2 * config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.k_norm = rms_norm(config.hsa_head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x_BCSd: Tensor) -> Memory:
        """The memory of C complete chunks of hidden states, ``landmark`` [B, C, Hkv, D]; C may be 0."""
        kv = self.to_kv(self.norm(x_BCSd)).unflatten(-1, (2 * self.config.hsa_kv_heads, self.config.hsa_head_dim))
        k, v = kv.chunk(2, dim=3)
        k = self.k_norm(k)
        return Memory(k.flatten(1, 2), v.flatten(1, 2), k.mean(2))


class NsaLayer(MemoryReader):
    """Selection by mean-pooled keys, and one softmax over all tokens of the selected chunks.

    This is the selected branch of Native Sparse Attention (arXiv 2502.11089) on the shared memory; its window is that
    of the sliding-window layers. A group's score of a chunk is that of its mean query with the chunk's mean key, which
    is the mean of its logits there. Queries and keys learn from the attention alone: no gradient passes the selection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = rms_norm(config.d_model)
        self.to_q = nn.Linear(config.d_model, config.hsa_heads * config.hsa_head_dim, bias=False)
        self.out = nn.Linear(config.hsa_heads * config.hsa_head_dim, config.d_model, bias=False)
        self.q_norm = rms_norm(config.hsa_head_dim) if config.qk_norm else nn.Identity()
        self.mlp_norm = rms_norm(config.d_model)
        self.mlp = SwiGlu(config.d_model, config.mlp_dim)

    def retrieve(self, x_BLd: Tensor, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        c = self.config
        q = self.q_norm(self.to_q(x_BLd).unflatten(-1, (c.hsa_heads, c.hsa_head_dim)))
        with torch.no_grad():
            q_r = q.unflatten(2, (c.hsa_kv_heads, -1)).mean(3)
            leave = c.window if c.leave_window else 0
            sizes = (c.hsa_kv_heads, c.chunk_size, self.top_k, leave)
            indices, _ = chunk_select(q_r, memory.landmark.detach(), position_B, chunks_B, *sizes)
        k, v, indices = memory.chosen(indices, c.chunk_size)
        return self.out(joint_attention(q, k, v, indices, c.chunk_size).flatten(2))


def joint_attention(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, indices_BLHK: Tensor, chunk_size: int) -> Tensor:
    """[B, L, Hq, D]: attention of every token to all tokens of its chunks under one softmax; zero without any chunk.

    Works in blocks of tokens, whose gathered keys and values are gathered again in the backward.
    """
    B, L, _, D = q_BLHD.shape
    if not k_BTHD.shape[1]:
        return torch.zeros_like(q_BLHD)
    block = max(1, BLOCK_ELEMENTS // (B * indices_BLHK[0, 0].numel() * chunk_size * D))
    parts = []
    for first in range(0, L, block):
        part = (q_BLHD[:, first : first + block], k_BTHD, v_BTHD, indices_BLHK[:, first : first + block], chunk_size)
        parts.append(checkpoint(_joint_block, *part, use_reentrant=False))
    return torch.cat(parts, dim=1)


def _joint_block(q_BlHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, indices_BlHK: Tensor, S: int) -> Tensor:
    B, _, Hkv, _ = indices_BlHK.shape
    row = torch.arange(B, device=q_BlHD.device).view(B, 1, 1, 1)
    head = torch.arange(Hkv, device=q_BlHD.device).view(1, 1, Hkv, 1)
    chosen = indices_BlHK.clamp(min=0).long()
    # [B, l, Hkv, K, S, D], then K and S as one axis.
    k, v = (x.unflatten(1, (-1, S)).transpose(2, 3)[row, chosen, head].flatten(3, 4) for x in (k_BTHD, v_BTHD))
    q = q_BlHD.unflatten(2, (Hkv, -1))
    s = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    filled = (indices_BlHK >= 0).repeat_interleave(S, dim=-1).unsqueeze(3)
    # A finite floor keeps tokens without any chunk free of NaN; the second mask empties them.
    p = s.masked_fill(~filled, torch.finfo(s.dtype).min).softmax(-1).masked_fill(~filled, 0.0)
    return (p.to(v.dtype) @ v).flatten(2, 3)
