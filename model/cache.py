"""Writing new rows into a memory of fixed capacity, as an operator without side effects, for exported graphs."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("hsa::cache_write", mutates_args=())
def cache_write(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """A copy of ``cache`` [B, T, ...] with ``update`` [B, n, ...] in rows ``start[b]`` … ``start[b] + n - 1`` (ONNX
    ``TensorScatter``, axis 1).

    Raises:
        ValueError: the rows do not fit into the cache.
    """
    n = update.shape[1]
    if start.numel() and not 0 <= int(start.min()) <= int(start.max()) <= cache.shape[1] - n:
        raise ValueError(
            f"cannot write {n} rows at {start.tolist()} into {cache.shape[1]}; give the memory more capacity"
        )
    written = cache.clone()
    for row, first in enumerate(start.tolist()):
        written[row, first : first + n] = update[row]
    return written


@cache_write.register_fake
def _(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)
