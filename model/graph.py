"""Decoding from CUDA graphs: a step takes what its kernels take, and none of Python's time.

A small model's step is some hundreds of kernels of a few microseconds each; launched one by one they wait for Python.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hsa_compile.model.config import WITH_MAMBA
from hsa_compile.model.model import HsaModel
from hsa_compile.model.state import State

_BOUNDED = ("hsa", "nsa", "swa", *WITH_MAMBA)


def capturable(model: HsaModel, state: State) -> bool:
    """Whether a step leaves every shape as it is: rows in lock-step, whole windows, no cache of all tokens."""
    c = model.config
    if state.ragged or c.architecture not in _BOUNDED:
        return False
    return c.architecture in WITH_MAMBA or state.swa_k[0].shape[1] == c.window - 1


class GraphDecoder:
    """Decodes a token a call, from one CUDA graph for each length of the unfinished chunk.

    A graph is captured when its length first comes, after a plain step, so the first S tokens are slower than without.
    On a CPU every step is a plain one.

    Args:
        state: to go on from; its memory is used further, the rest is copied.

    Raises:
        ValueError: steps of this model, or from this state, change shapes (``capturable``).
    """

    def __init__(self, model: HsaModel, state: State) -> None:
        if not capturable(model, state):
            raise ValueError("graphs need rows in lock-step whose windows are full; decode by HsaModel.step until then")
        self.model, self.config = model, model.config
        weight, B = model.embedding.weight, state.position.shape[0]
        self.position = int(state.position[0])
        self.ids = torch.zeros(B, 1, dtype=torch.int64, device=weight.device)
        self.logits = torch.zeros(B, 1, self.config.vocab_size, dtype=weight.dtype, device=weight.device)
        self.pending = weight.new_zeros(B, self.config.chunk_size, self.config.d_model, requires_grad=False)
        self.pending[:, : state.pending.shape[1]] = state.pending
        self.kept = replace(
            state, position=state.position.clone(), chunks=state.chunks.clone(), swa_k=[x.clone() for x in state.swa_k],
            swa_v=[x.clone() for x in state.swa_v],
        )  # fmt: skip
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def unfinished(self) -> int:
        """Tokens of the unfinished chunk."""
        return 0 if self.model.encoder is None else self.position % self.config.chunk_size

    @property
    def state(self) -> State:
        """The state after the last step; the next one changes it."""
        return replace(self.kept, pending=self.pending[:, : self.unfinished])

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Logits [B, 1, V] after the next token int64 [B, 1] of each text; the next step overwrites them."""
        self._make_room()
        self.ids.copy_(ids_B1)
        if (n := self.unfinished) in self.graphs:
            self.graphs[n].replay()
        else:
            self._advance()
            if self.ids.is_cuda:
                self.capture()
        self.position += 1
        return self.logits

    @torch.no_grad()
    def capture(self) -> torch.cuda.CUDAGraph:
        """The graph of a step from here, which is not taken; a plain step must have been."""
        graph = torch.cuda.CUDAGraph()
        others = next(iter(self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=None if others is None else others.pool()):
            self._advance()
        self.graphs[self.unfinished] = graph
        return graph

    def _make_room(self) -> None:
        """Room for the chunk that a step may complete. Graphs know the places of what is left behind: they go."""
        chunks = (self.position + 1) // self.config.chunk_size
        if self.model.encoder is not None and chunks > self.kept.capacity:
            self.kept = self.kept.with_room(chunks)
            self.graphs.clear()

    def _advance(self) -> None:
        """A step, whose results are put where its inputs were."""
        old = self.kept
        logits, position, chunks, pending, swa_k, swa_v, *_ = self.model.step_tensors(
            self.ids, *replace(old, pending=self.pending[:, : self.unfinished]).tensors(), offloaded=old.offloaded
        )
        places = (self.logits, old.position, old.chunks, self.pending[:, : pending.shape[1]], *old.swa_k, *old.swa_v)
        for place, result in zip(places, (logits, position, chunks, pending, *swa_k, *swa_v), strict=True):
            place.copy_(result)
