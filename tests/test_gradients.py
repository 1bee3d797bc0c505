"""Training from graphs, as far as a CPU goes: the same addresses every time, and the same numbers as without."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hsa_compile.model.config import ConfigError
from hsa_compile.model.gradients import GradientGraphs
from hsa_compile.model.train import train
from kit import small_recipe

pytestmark = pytest.mark.usefixtures("light")


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "plain")
    plain = train(recipe)
    graphs = train(dataclasses.replace(recipe, out=str(tmp_path / "graphs"), graphs=True))
    assert graphs.losses == plain.losses
    for name, value in plain.model.state_dict().items():
        assert torch.equal(graphs.model.state_dict()[name], value), name


def test_processes_that_draw_batches_end_with_training(tmp_path: Path) -> None:
    train(dataclasses.replace(small_recipe(tmp_path), graphs=True, workers=2))
    assert not multiprocessing.active_children()


class Branching(nn.Module):
    """Uses ``b`` for long batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = (nn.Parameter(torch.full((3,), x)) for x in (1.0, 2.0, 3.0))

    def backward(self, ids: Tensor, targets: Tensor, weights: Tensor, total: Tensor) -> Tensor:
        x = ids.float().sum() * self.a
        if ids.shape[1] > 2:
            x = x * self.b + targets.float().sum()
        loss = (x.sum() * weights).sum() / total
        loss.backward()
        return loss.detach()


def test_batches_of_several_shapes_take_turns() -> None:
    model, other = Branching(), Branching()
    graphs, addresses = GradientGraphs(model, model.backward), set()
    for seed, L in enumerate((2, 4, 4, 2, 4)):
        g = torch.Generator().manual_seed(seed)
        ids, targets = torch.randint(0, 9, (2, 2, L), generator=g)
        weights = torch.rand(2, L, generator=g)
        loss = graphs(ids, targets, weights)
        other.zero_grad(set_to_none=True)
        assert torch.equal(loss, other.backward(ids, targets, weights, weights.sum()))
        for mine, theirs in zip(model.parameters(), other.parameters()):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None and theirs.grad is not None:
                assert torch.equal(mine.grad, theirs.grad)
        assert model.a.grad is not None
        addresses.add(model.a.grad.data_ptr())
        assert (model.b.grad is None) == (L == 2)
        assert model.idle.grad is None
    assert len(addresses) == 1


def test_parts_of_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accumulate = 1"):
        dataclasses.replace(small_recipe(tmp_path), graphs=True, accumulate=2)
