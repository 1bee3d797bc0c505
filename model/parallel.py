"""Training in several processes: those that ``torchrun`` starts, with the model sharded by FSDP2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hsa_compile.model.model import HsaModel


@dataclass(frozen=True)
class World:
    """The processes that train together; alone, every method is local and costs nothing.

    Attributes:
        device: of this process.
        rank, size: this process, and how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, the same on each of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: str) -> list[str]:
        """The value of every process, in the order of ranks."""
        values: list[str] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], None], errors: tuple[type[Exception], ...]) -> str:
        """Runs ``function`` on the main process; what it failed with is told to all, "" where it did not.

        All processes wait for it. An error raised on one alone would leave the others waiting for ever.
        """
        problem = ""
        if self.main:
            try:
                function()
            except errors as error:
                problem = str(error) or type(error).__name__
        return self.gather(problem)[0]


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """The processes that ``torchrun`` started, by its environment variables; without them this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(torch.device(device))
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(torch.device(device), dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def shard(model: HsaModel, world: World) -> None:
    """Splits weights, gradients and optimizer state over the processes, gathered layer by layer as they are used."""
    if world.size == 1:
        return
    # Layers return views (a residual sum among others); nothing here writes into one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    upper = [module for group in model.groups for module in (group.hsa, *group.layers)]  # type: ignore[misc]
    for module in (*model.lower, model.encoder, *upper):
        if module is not None:  # models without a memory have neither encoder nor HSA layers
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_model(model: HsaModel, world: World) -> HsaModel:
    """The model with whole weights: itself, or a copy in host memory where it is sharded."""
    if world.size == 1:
        return model
    weights = {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()
        for name, x in model.state_dict().items()
    }
    whole = HsaModel(model.config)
    whole.load_state_dict(weights)
    return whole
