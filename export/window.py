"""Windows over rings of keys and values, as a PyTorch operator: what ``step`` is made of and what ONNX graphs hold.

It runs eagerly, for tests and for tracing; an exported graph has ``hsa.SlidingWindow`` in its place.

Shape letters: B batch, L tokens of the segment, W window, T = W + L, Hq query heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.library.custom_op("hsa::sliding_window", mutates_args=())
def sliding_window(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, position: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each token to the W tokens that end with it; those before the segment lie in a ring.

    Token i of row b has position ``p = position[b] + i`` and sees keys j with ``p - W < j <= p`` and ``j >= 0``. Key j
    before the segment is in slot j mod W of the ring. Scores are scaled by 1/sqrt(D); sums are in float32.

    Args:
        q: [B, L, Hq, D], rotated, Hq a multiple of Hkv.
        k, v: [B, L, Hkv, D], keys rotated.
        past_k, past_v: [B, W, Hkv, D].
        position: int64 [B], tokens of the row before the segment.
        lengths: int64 [B], 0 … L, how many of its tokens count; what the others give means nothing, but is finite.

    Returns:
        The output [B, L, Hq, D], and the rings after the first ``lengths[b]`` tokens of each row.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, k, v, past_k, past_v, position, lengths)
    W, L, Hkv = past_k.shape[1], q.shape[1], k.shape[2]
    joined_k, joined_v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
    own = position[:, None] + torch.arange(L, device=q.device)
    key_BT = torch.cat((_last_in_slots(position, W), own), dim=1)
    ahead = own[:, :, None] - key_BT[:, None]  # how far a key lies back, [B, L, T]
    mask = (ahead >= 0) & (ahead < W) & (key_BT[:, None] >= 0)
    queries = q.float().unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, L, D]
    keys, values = (x.float().transpose(1, 2)[:, :, None] for x in (joined_k, joined_v))
    scores = (queries @ keys.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
    o = (p @ values).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
    after = _last_in_slots(position + lengths, W)
    row = torch.where(after >= position[:, None], W + after - position[:, None], torch.arange(W, device=q.device))
    return o.contiguous(), _take(joined_k, row), _take(joined_v, row)


@sliding_window.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, position: Tensor, lengths: Tensor) -> object:
    return q.new_empty(q.shape), past_k.new_empty(past_k.shape), past_v.new_empty(past_v.shape)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, m, ...]: rows ``index[b]`` int64 [B, m] of each ``x[b]`` of [B, T, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _last_in_slots(position_B: Tensor, W: int) -> Tensor:
    """The last token before ``position`` in each slot of a ring, int64 [B, W]; negative where there is none."""
    slot = torch.arange(W, device=position_B.device)
    last = position_B[:, None] - 1
    return last - (last - slot) % W


def _check(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, position: Tensor, lengths: Tensor) -> None:
    B, L, Hq, D = q.shape
    Hkv, W = k.shape[2], past_k.shape[1]
    wanted = (("k", k, (B, L, Hkv, D)), ("v", v, (B, L, Hkv, D)), ("past_k", past_k, (B, W, Hkv, D)))
    for name, x, shape in (*wanted, ("past_v", past_v, (B, W, Hkv, D)), ("position", position, (B,))):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    if tuple(lengths.shape) != (B,) or Hq % Hkv:
        raise ValueError(f"lengths must be [B={B}] and Hq={Hq} a multiple of Hkv={Hkv}; got {list(lengths.shape)}")
