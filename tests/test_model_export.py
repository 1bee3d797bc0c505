"""The exported step: one graph for prefill and decode, with every length dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsa_compile.model.cache import write_rows
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel
from hsa_compile.model.state import StepTensors

pytestmark = pytest.mark.usefixtures("light")

TWO_GROUPS = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=1, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=7, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=1,
    retrieval_dim=8, top_k=3, train_top_k=3,
)  # fmt: skip


class Step(nn.Module):
    """``step_tensors`` as a module's forward."""

    def __init__(self, model: HsaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, position: Tensor, chunks: Tensor, pending: Tensor, swa_k: list[Tensor], swa_v: list[Tensor],
        mem_k: Tensor, mem_v: Tensor, landmark: Tensor,
    ) -> Any:  # fmt: skip
        return self.model.step_tensors(ids, position, chunks, pending, swa_k, swa_v, mem_k, mem_v, landmark)


def exported(model: HsaModel, args: tuple[Tensor, *StepTensors]) -> torch.export.ExportedProgram:
    batch, segment, unfinished, ring = (torch.export.Dim(name) for name in ("batch", "segment", "unfinished", "ring"))
    capacity = torch.export.Dim("capacity")
    rows = {0: batch, 1: model.config.chunk_size * capacity}
    rings = [{0: batch, 1: ring}] * len(model.swa_layers())
    shapes = (
        {0: batch, 1: segment}, {0: batch}, {0: batch}, {0: batch, 1: unfinished}, rings, rings, rows, rows,
        {0: batch, 1: capacity},
    )  # fmt: skip
    return torch.export.export(Step(model), args, dynamic_shapes=shapes)


def test_one_program_serves_every_length() -> None:
    torch.manual_seed(0)
    model = HsaModel(TWO_GROUPS).eval()
    ids = torch.randint(0, 50, (2, 61))
    _, state = model.step(ids[:, :6], model.start(batch=2, capacity=8))
    program = exported(model, (ids[:, 6:13].contiguous(), *state.tensors()))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"hsa.cache_write.default", "hsa.chunk_select.default", "hsa.chunk_attention.default"} <= targets
    assert not any("einsum" in target for target in targets)

    # Guards are checks of the example's sizes against 0 and 1 that only strides depend on.
    run = program.module(check_guards=False)
    for batch, sizes in ((2, [1, 1, 1, 1, 3, 20, 2, 32]), (1, [61]), (2, [2, 1, 58]), (1, [4, 4, 4, 49])):
        state_tensors: Any = model.start(batch=batch, capacity=20).tensors()
        parts, at = [], 0
        for size in sizes:
            logits, *state_tensors = run(ids[:batch, at : at + size], *state_tensors)
            parts.append(logits)
            at += size
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids[:batch]), rtol=1e-4, atol=1e-4)


def test_cache_write_is_functional_and_checked() -> None:
    cache, update = torch.zeros(2, 5, 3), torch.ones(2, 2, 3)
    written = torch.ops.hsa.cache_write(cache, update, torch.tensor([1, 3]))
    assert (cache == 0).all()
    assert written[..., 0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="capacity"):
        torch.ops.hsa.cache_write(cache, update, torch.tensor([1, 4]))
    torch.library.opcheck(torch.ops.hsa.cache_write.default, (cache, update, torch.tensor([1, 3])))


def test_write_rows_is_in_place_when_run() -> None:
    cache = torch.zeros(2, 5, 3)
    assert write_rows(cache, torch.ones(2, 2, 3), torch.tensor([2, 2])) is cache
    assert cache[0, :, 0].tolist() == [0, 0, 1, 1, 0]
    write_rows(cache, torch.ones(2, 0, 3), torch.tensor([5, 5]))
