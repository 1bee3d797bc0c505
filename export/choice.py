"""Choosing tokens, as a PyTorch operator: what ``step`` ends with. ONNX graphs have ``hsa.Sample`` in its place.

Shape letters: B batch, w tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("hsa::sample", mutates_args=())
def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """A token from each row of logits, likeliest or at random.

    At random by ``softmax(logits / temperature)``, cut to the fewest likeliest tokens that hold ``top_p`` of it
    (nucleus sampling, arXiv 1904.09751): of these, in the order of their ids, the first at which the cumulated
    probability passes ``uniform`` times what all of them hold.

    Args:
        logits: float32 [B, w, V].
        temperature: float32 [B], at least 0; 0 takes the likeliest, the first of equals.
        top_p: float32 [B], above 0 and at most 1.
        uniform: float32 [B], random numbers, at least 0 and below 1.

    Returns:
        int64 [B, w]; -1 where a logit is NaN or the largest is infinite.
    """
    temperature_B11, top_p_B11, uniform_B11 = (x.double()[:, None, None] for x in (temperature, top_p, uniform))
    values, order = logits.double().sort(dim=-1, descending=True, stable=True)
    cold = temperature_B11 == 0
    p = ((values - values[..., :1]) / temperature_B11.masked_fill(cold, 1.0)).softmax(-1)
    kept = torch.where(p.cumsum(-1) - p < top_p_B11, p, 0.0)
    by_id = torch.empty_like(kept).scatter(-1, order, kept)
    drawn = (by_id.cumsum(-1) <= kept.sum(-1, keepdim=True) * uniform_B11).sum(-1)
    token = torch.where(cold[..., 0], order[..., 0], drawn)
    return torch.where(logits.isnan().any(-1) | logits.amax(-1).isinf(), -1, token)


@sample.register_fake
def _(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)
