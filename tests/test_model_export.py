"""The operator by which an exported step writes its memory."""

from __future__ import annotations

import pytest
import torch

import hsa_compile.model.cache  # noqa: F401  (registers torch.ops.hsa.cache_write)


def test_cache_write_is_functional_and_checked() -> None:
    cache, update = torch.zeros(2, 5, 3), torch.ones(2, 2, 3)
    written = torch.ops.hsa.cache_write(cache, update, torch.tensor([1, 3]))
    assert (cache == 0).all()
    assert written[..., 0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="capacity"):
        torch.ops.hsa.cache_write(cache, update, torch.tensor([1, 4]))
    torch.library.opcheck(torch.ops.hsa.cache_write.default, (cache, update, torch.tensor([1, 3])))
