"""Decoding in place, as CUDA graphs do it; here every step is a plain one (tests/gpu captures)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.generate import generate
from hsa_compile.model.graph import GraphDecoder, capturable
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import prefill
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=2, upper_layers=2, n_groups=2, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=5, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=2,
    retrieval_dim=8, top_k=3, train_top_k=3, ssm_state=6, ssm_head_dim=16,
)  # fmt: skip


def model_of(architecture: Any) -> HsaModel:
    return lively(HsaModel(dataclasses.replace(SMALL, architecture=architecture)))


def ids_of(B: int, L: int) -> Tensor:
    return torch.randint(0, 50, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["hsa", "nsa", "swa", "mamba", "mamba-hsa"])
def test_steps_in_place_are_those_of_the_model(name: str, offload: bool) -> None:
    model, ids = model_of(name), ids_of(2, 40)
    _, state = prefill(model, ids[:, :7], offload=offload)
    decoder, before = GraphDecoder(model, state), state.swa_k[0].clone()
    for i in range(7, 40):  # the memory grows several times
        want, state = model.step(ids[:, i : i + 1], state)
        assert torch.equal(decoder.step(ids[:, i : i + 1]), want)
    assert not torch.equal(before, decoder.kept.swa_k[0])
    mine = decoder.state
    assert mine.position.tolist() == [40, 40]
    assert torch.equal(mine.pending, state.pending)
    assert torch.equal(model.step(ids[:, :3], mine)[0], model.step(ids[:, :3], state)[0])


def test_generation_passes_over_to_graphs() -> None:
    model = model_of("hsa")
    plain, graphs = (torch.stack(list(generate(model, [[1, 2]], 20, graphs=x))) for x in (False, True))
    assert torch.equal(plain, graphs)


def test_what_changes_shape_is_refused() -> None:
    model = model_of("hsa")
    for state in (prefill(model, ids_of(1, 3))[1], prefill(model, ids_of(2, 9), lengths=[9, 6])[1]):
        assert not capturable(model, state)
        with pytest.raises(ValueError, match="windows are full"):
            GraphDecoder(model, state)
    full = model_of("attention")
    assert not capturable(full, prefill(full, ids_of(1, 9))[1])
