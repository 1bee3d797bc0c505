"""What a model carries from one segment of a text to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_compile.model.config import WITH_MAMBA, ModelConfig
from hsa_compile.model.mamba import empty_state

StepTensors = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class State:
    """State of B texts, in lock-step or each at its own position.

    Attributes:
        position: int64 [B], tokens seen.
        chunks: int64 [B], chunks in the memory.
        pending: [B, position mod S, d], hidden states of the unfinished chunk.
        swa_k, swa_v: a pair a layer. Sliding windows: [B, min(position, W - 1), Hkv, D], keys normed and not rotated.
            Full and landmark attention: the same of every token. Mamba-2: the convolution's last inputs and the state.
        mem_k, mem_v: [B, capacity * S, Hkv, D], of which ``chunks * S`` rows are filled.
        landmark: [B, capacity, Hr, Dr], of which ``chunks`` rows are filled.
        ragged: rows are at different positions; ``pending`` and rings are then padded on the left to the longest.
    """

    position: Tensor
    chunks: Tensor
    pending: Tensor
    swa_k: list[Tensor]
    swa_v: list[Tensor]
    mem_k: Tensor
    mem_v: Tensor
    landmark: Tensor
    ragged: bool = False

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> State:
        """The state before the first token, with room for ``capacity`` chunks."""
        c = config

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        def count() -> Tensor:
            return torch.zeros(batch, dtype=torch.int64, device=device)

        layers = range(c.lower_layers + c.upper_layers)
        if c.architecture in WITH_MAMBA:
            carried = [empty_state(c, batch, dtype, device) for _ in layers]
        else:
            carried = [
                (zeros(0, c.swa_kv_heads, c.swa_head_dim), zeros(0, c.swa_kv_heads, c.swa_head_dim)) for _ in layers
            ]
        if not c.has_memory:
            capacity = 0
        return cls(
            position=count(),
            chunks=count(),
            pending=zeros(0, c.d_model),
            swa_k=[first for first, _ in carried],
            swa_v=[second for _, second in carried],
            mem_k=zeros(capacity * c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim),
            mem_v=zeros(capacity * c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim),
            landmark=zeros(capacity, *c.landmark_shape),
        )

    @property
    def capacity(self) -> int:
        """Chunks that the memory has room for."""
        return self.landmark.shape[1]

    def tensors(self) -> StepTensors:
        """The tensors in the order of ``HsaModel.step_tensors``."""
        return (
            self.position, self.chunks, self.pending, self.swa_k, self.swa_v, self.mem_k, self.mem_v, self.landmark
        )  # fmt: skip

    def rows(self, rows: Tensor) -> State:
        """The state of these texts, int64 [n], in this order; a text may come several times. Nothing is shared."""

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        return State(
            pick(self.position), pick(self.chunks), pick(self.pending),
            [pick(x) for x in self.swa_k], [pick(x) for x in self.swa_v],
            pick(self.mem_k), pick(self.mem_v), pick(self.landmark), self.ragged,
        )  # fmt: skip

    def with_room(self, chunks: int) -> State:
        """This state with room for at least that many chunks: itself, or a copy with twice the memory or more."""
        if chunks <= self.capacity:
            return self
        capacity = max(chunks, 2 * self.capacity)
        S = self.mem_k.shape[1] // self.capacity if self.capacity else 0
        rows = capacity * S
        return State(
            self.position, self.chunks, self.pending, self.swa_k, self.swa_v,
            _grown(self.mem_k, rows), _grown(self.mem_v, rows), _grown(self.landmark, capacity), self.ragged,
        )  # fmt: skip


def _grown(x: Tensor, rows: int) -> Tensor:
    grown = x.new_zeros(x.shape[0], rows, *x.shape[2:])
    grown[:, : x.shape[1]] = x
    return grown
