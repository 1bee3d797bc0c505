"""Gradients of batches from CUDA graphs: an update of a small model is some thousand launches, which take longer than
their kernels do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Adds the gradients of ids, targets and weights [B, L], whose weights add up to the last, and returns the loss.
Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_WARM_UPS = 3  # what compiles, picks or allocates something does so by then


class GradientGraphs:
    """Computes gradients as ``compute`` does, from one CUDA graph for each shape of batches.

    A graph is captured when its shape first comes. It reads a batch from, and leaves gradients at, addresses that stay:
    nobody else may set gradients of the model to None. On a CPU there are no graphs, but the same addresses.

    Args:
        model: whose parameters get the gradients; those that a batch does not reach get none.
    """

    def __init__(self, model: nn.Module, compute: Compute) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._kept = [torch.zeros_like(p) for p in self._parameters]
        self._device = self._parameters[0].device
        self._compute = compute
        self._captured: dict[torch.Size, _Captured] = {}

    def __call__(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sets the gradients of a batch, int64 ids and targets and float32 weights [B, L], on any device.

        Returns:
            The loss, a scalar, until the next call.
        """
        one = self._captured.get(ids.shape)
        if one is None:
            one = self._captured[ids.shape] = self._prepare(ids, targets, weights)
        for place, value in zip(one.inputs, (ids, targets, weights, weights.sum())):
            place.copy_(value)
        self._point(one)
        if one.graph is None:
            self._run(one)
        else:
            one.graph.replay()
        assert one.loss is not None
        return one.loss

    def _prepare(self, ids: Tensor, targets: Tensor, weights: Tensor) -> _Captured:
        inputs = tuple(x.to(self._device, copy=True) for x in (ids, targets, weights, weights.sum()))
        if self._device.type != "cuda":
            return _Captured(inputs, self._reached(inputs))
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                reached = self._reached(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        one = _Captured(inputs, reached, graph)
        self._point(one)
        # They run one after the other, so they may have their memory from one pool.
        others = next((other.graph for other in self._captured.values() if other.graph is not None), None)
        with torch.cuda.graph(graph, pool=None if others is None else others.pool()):
            self._run(one)
        one.graph = graph
        return one

    def _reached(self, inputs: tuple[Tensor, ...]) -> list[bool]:
        """Which parameters get gradients of such a batch."""
        for parameter in self._parameters:
            parameter.grad = None
        self._compute(*inputs)
        return [parameter.grad is not None for parameter in self._parameters]

    def _point(self, one: _Captured) -> None:
        """Has gradients left at their addresses."""
        for parameter, kept, reached in zip(self._parameters, self._kept, one.reached):
            parameter.grad = kept if reached else None

    def _run(self, one: _Captured) -> None:
        torch._foreach_zero_([kept for kept, reached in zip(self._kept, one.reached) if reached])
        one.loss = self._compute(*one.inputs)


@dataclass
class _Captured:
    """What is at fixed addresses for a shape: the inputs of ``compute``, and the loss; which parameters it reaches."""

    inputs: tuple[Tensor, ...]
    reached: list[bool]
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None
