"""What GPU kernels are measured against: public kernels and what one would compose from PyTorch.

Each takes ``(q [B,L,Hq,D], k, v [B,T,Hkv,D], indices int32 [B,L,Hkv,K], weights fp32 [B,L,Hkv,K], chunk_size)`` and
returns a differentiable [B, L, Hq, D]. ``None`` stands for a peer that is not installed or cannot do a shape.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Peer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _dense(backend: SDPBackend) -> Peer:
    """Dense causal attention to all tokens: another operator, of the same purpose."""

    def run(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def fla_selected(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int) -> Tensor:
    """The selected part of fla-core's NSA: one softmax over all selected tokens, one token a program, G >= 16."""
    from fla.ops.nsa.parallel import ParallelNSAFunction

    return ParallelNSAFunction.apply(q, k, v, indices, indices.shape[-1], chunk_size, q.shape[-1] ** -0.5, None)


def varlen_chunks(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int) -> Tensor:
    """Exactly this operator from ``torch.nn.attention.varlen``: a sequence a chunk, of the queries that chose it."""
    from torch.nn.attention.varlen import varlen_attn

    B, L, Hq, D = q.shape
    Hkv, K, C = k.shape[2], indices.shape[3], k.shape[1] // chunk_size
    G, rows, chunks = Hq // Hkv, B * L * Hkv, B * Hkv * C
    place = torch.arange(B, device=q.device).view(B, 1, 1, 1) * Hkv + torch.arange(Hkv, device=q.device).view(-1, 1)
    chunk = torch.where(indices >= 0, indices + place * C, chunks).flatten()
    order = chunk.argsort(stable=True)
    starts = torch.searchsorted(chunk[order], torch.arange(chunks + 1, device=q.device, dtype=chunk.dtype))
    row = order // K
    asking = q.reshape(rows, G, D)[row].reshape(-1, 1, D)
    keys, values = (x.unflatten(1, (C, chunk_size)).permute(0, 3, 1, 2, 4).reshape(-1, 1, D) for x in (k, v))
    cu_q, cu_k = (starts * G).int(), torch.arange(chunks + 1, device=q.device, dtype=torch.int32) * chunk_size
    found = varlen_attn(asking, keys, values, cu_q, cu_k, asking.shape[0], chunk_size)
    o = (found[0] if isinstance(found, tuple) else found).view(-1, G, D)
    filled = (chunk[order] < chunks).view(-1, 1, 1)
    o = torch.where(filled, o * weights.flatten()[order].view(-1, 1, 1), 0.0)
    return q.new_zeros(rows, G, D).index_add(0, row, o.to(q.dtype)).view(q.shape)


def available(groups: int) -> dict[str, Peer]:
    """The peers that this installation has, for GQA groups of that size."""
    found: dict[str, Peer] = {
        "sdpa-cudnn": _dense(SDPBackend.CUDNN_ATTENTION),
        "sdpa-fa2": _dense(SDPBackend.FLASH_ATTENTION),
    }
    if importlib.util.find_spec("fla") and groups >= 16 and not groups & (groups - 1):
        found["fla"] = fla_selected
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        found["varlen"] = varlen_chunks
    return found
