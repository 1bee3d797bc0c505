"""What a model carries from one segment of a text to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsa_compile.model.config import WITH_MAMBA, ModelConfig
from hsa_compile.model.encoder import Memory
from hsa_compile.model.host import HostMemory, host_zeros, put_rows
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
        offloaded: ``mem_k`` and ``mem_v`` lie in the host's memory (``model/host.py``).
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
    offloaded: bool = False

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        offload: bool = False,
    ) -> State:
        """The state before the first token, with room for ``capacity`` chunks, in the host's memory if ``offload``."""
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
        rows = (batch, capacity * c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim)
        mem_k, mem_v = (_zeros(rows, dtype, device, offload) for _ in range(2))
        return cls(
            position=count(),
            chunks=count(),
            pending=zeros(0, c.d_model),
            swa_k=[first for first, _ in carried],
            swa_v=[second for _, second in carried],
            mem_k=mem_k,
            mem_v=mem_v,
            landmark=zeros(capacity, *c.landmark_shape),
            offloaded=offload,
        )

    @property
    def memory(self) -> Memory:
        """What the upper layers read."""
        return (HostMemory if self.offloaded else Memory)(self.mem_k, self.mem_v, self.landmark)

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

        def pick_memory(x: Tensor) -> Tensor:
            if not self.offloaded:
                return pick(x)
            picked = _zeros((len(rows), *x.shape[1:]), x.dtype, x.device, True)
            for i, row in enumerate(rows.tolist()):
                put_rows(picked[i : i + 1], 0, x[row : row + 1])
            return picked

        return State(
            pick(self.position), pick(self.chunks), pick(self.pending),
            [pick(x) for x in self.swa_k], [pick(x) for x in self.swa_v],
            pick_memory(self.mem_k), pick_memory(self.mem_v), pick(self.landmark), self.ragged, self.offloaded,
        )  # fmt: skip

    def __deepcopy__(self, _: object) -> State:
        return self.rows(torch.arange(self.position.shape[0]))

    def with_room(self, chunks: int) -> State:
        """This state with room for at least that many chunks: itself, or a copy with twice the memory or more."""
        if chunks <= self.capacity:
            return self
        capacity = max(chunks, 2 * self.capacity)
        S = self.mem_k.shape[1] // self.capacity if self.capacity else 0
        return replace(
            self,
            mem_k=_grown(self.mem_k, capacity * S, self.offloaded),
            mem_v=_grown(self.mem_v, capacity * S, self.offloaded),
            landmark=_grown(self.landmark, capacity),
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, offload: bool) -> Tensor:
    return host_zeros(shape, dtype, device) if offload else torch.zeros(shape, dtype=dtype, device=device)


def _grown(x: Tensor, rows: int, offload: bool = False) -> Tensor:
    grown = _zeros((x.shape[0], rows, *x.shape[2:]), x.dtype, x.device, offload)
    put_rows(grown, 0, x)
    return grown
