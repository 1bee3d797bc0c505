"""The language model: lower sliding-window layers, one chunk memory at mid-depth, upper groups that read it.

Shape letters: B batch, L tokens of the segment, V vocabulary, d model width, S tokens a chunk, n chunks that the
segment completes, R tokens of a ring, r tokens of the unfinished chunk; the rest in ``layers`` and ``hsa``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsa_compile.model.cache import write_rows
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.hsa import ChunkEncoder, HsaLayer, Memory
from hsa_compile.model.layers import SlidingWindow, SwaLayer, rms_norm
from hsa_compile.model.state import State


class UpperGroup(nn.Module):
    """One retrieval with its HSA sub-layer, then sliding-window layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hsa = HsaLayer(config)
        self.layers = nn.ModuleList(SwaLayer(config) for _ in range(config.upper_layers // config.n_groups))


class HsaModel(nn.Module):
    """Byte- or token-level language model with hierarchical sparse attention.

    Attributes:
        recompute: keep no activations inside layers for the backward of ``forward``, make them again there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.lower = nn.ModuleList(SwaLayer(config) for _ in range(config.lower_layers))
        self.encoder = ChunkEncoder(config)
        self.groups = nn.ModuleList(UpperGroup(config) for _ in range(config.n_groups))
        self.norm = rms_norm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialize()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self) -> None:
        """Normal weights that keep the scale of what they multiply; those that add to the residual stream are scaled
        down by the number of additions."""
        c = self.config
        additions = 2 * (c.lower_layers + c.upper_layers) + 2 * c.n_groups
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 or name.endswith("cls"):
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=(parameter.shape[-1] * (additions if adds else 1)) ** -0.5)

    def swa_layers(self) -> list[SwaLayer]:
        """All sliding-window layers from bottom to top: the order of ``State.swa_k``."""
        upper = [layer for group in self.groups for layer in group.layers]  # type: ignore[union-attr]
        return [*self.lower, *upper]

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of whole texts from their first token, without a cache; for training and as the reference.

        Args:
            ids_BL: int64 [B, L], L >= 1.
        """
        B, L = ids_BL.shape
        S, C = self.config.chunk_size, L // self.config.chunk_size
        window = SlidingWindow(self.config, 0, L, ids_BL.device)
        x = self.embedding(ids_BL)
        for layer in self.lower:
            x, _, _ = self._run(layer, x, window)
        memory = self._run(self.encoder, x[:, : C * S].unflatten(1, (C, S)))
        position = ids_BL.new_zeros(B, dtype=torch.int64)
        for group in self.groups:
            x = self._run(group.hsa, x, memory, position, position + C)  # type: ignore[arg-type]
            for layer in group.layers:  # type: ignore[union-attr]
                x, _, _ = self._run(layer, x, window)
        return self.head(self.norm(x))

    def _run(self, layer: nn.Module, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def start(self, batch: int = 1, capacity: int = 16) -> State:
        """The state before the first token of ``batch`` texts, with room for ``capacity`` chunks (it grows)."""
        weight = self.embedding.weight
        return State.empty(self.config, batch, max(1, capacity), weight.dtype, weight.device)

    @torch.no_grad()
    def step(self, ids_BL: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits [B, L, V] of the next L tokens and the state after them; the same numbers as one ``forward``.

        The memory of ``state`` is reused: continue from the state that is returned.

        Args:
            ids_BL: int64 [B, L], L >= 1; a segment of a prompt or one decoded token.
            state: of the same B texts.

        Raises:
            ValueError: the segment is empty or its batch is not the state's.
        """
        if ids_BL.dim() != 2 or ids_BL.shape[1] < 1 or ids_BL.shape[0] != state.position.shape[0]:
            raise ValueError(
                f"ids must be [B={state.position.shape[0]}, L >= 1] like the state, got {list(ids_BL.shape)}"
            )
        completed = (state.pending.shape[1] + ids_BL.shape[1]) // self.config.chunk_size
        if completed:  # the look at `chunks` waits for the device, so only where something is written
            state = state.with_room(int(state.chunks[0]) + completed)
        result = self.step_tensors(ids_BL, *state.tensors())
        return result[0], State(*result[1:])

    def step_tensors(
        self,
        ids_BL: Tensor,
        position_B: Tensor,
        chunks_B: Tensor,
        pending_Brd: Tensor,
        swa_k: list[Tensor],
        swa_v: list[Tensor],
        mem_k: Tensor,
        mem_v: Tensor,
        landmark: Tensor,
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        """``step`` on bare tensors, for export: what is computed depends on shapes and never on values.

        Shapes are those of ``State``; the memory must have room for the ``(r + L) // S`` chunks that the segment
        completes. Every text of the batch has the same ``position`` and ``chunks``.

        Args:
            logits_at: int64 [wanted], the tokens of the segment after which logits are given; None gives all L.

        Returns:
            Logits [B, L or wanted, V] and the state after the segment, in the order of the arguments.
        """
        window = SlidingWindow(self.config, swa_k[0].shape[1], ids_BL.shape[1], ids_BL.device)
        rings = _Rings(swa_k, swa_v, self.config.window - 1)
        x = self.embedding(ids_BL)
        for layer in self.lower:
            x = rings.run(layer, x, window)  # type: ignore[arg-type]
        pending, new = self._complete_chunks(pending_Brd, x)
        S = self.config.chunk_size
        mem_k = write_rows(mem_k, new.k, chunks_B * S)
        mem_v = write_rows(mem_v, new.v, chunks_B * S)
        landmark = write_rows(landmark, new.landmark, chunks_B)
        chunks = chunks_B + new.landmark.shape[1]
        memory = Memory(mem_k, mem_v, landmark)
        for group in self.groups:
            x = group.hsa(x, memory, position_B, chunks)  # type: ignore[operator]
            for layer in group.layers:  # type: ignore[union-attr]
                x = rings.run(layer, x, window)
        x = self.norm(x)
        logits = self.head(x if logits_at is None else x.index_select(1, logits_at))
        position = position_B + ids_BL.shape[1]
        return logits, position, chunks, pending, rings.new_k, rings.new_v, mem_k, mem_v, landmark

    def _complete_chunks(self, pending_Brd: Tensor, x_BLd: Tensor) -> tuple[Tensor, Memory]:
        """What stays unfinished, and the encoded chunks that the segment completes (possibly none)."""
        S = self.config.chunk_size
        joined = torch.cat((pending_Brd, x_BLd), dim=1)
        n = joined.shape[1] // S
        return joined[:, n * S :].contiguous(), self.encoder(joined[:, : n * S].unflatten(1, (n, S)))


class _Rings:
    """Runs sliding-window layers one after the other, each with its ring, and keeps the last tokens of each."""

    def __init__(self, swa_k: list[Tensor], swa_v: list[Tensor], size: int) -> None:
        self.old = iter(zip(swa_k, swa_v, strict=True))
        self.size = size
        self.new_k: list[Tensor] = []
        self.new_v: list[Tensor] = []

    def run(self, layer: SwaLayer, x_BLd: Tensor, window: SlidingWindow) -> Tensor:
        x, k, v = layer(x_BLd, window, *next(self.old))
        first = torch.sym_max(k.shape[1] - self.size, 0)
        self.new_k.append(k[:, first:].contiguous())
        self.new_v.append(v[:, first:].contiguous())
        return x


def sequence_loss(
    logits_BLV: Tensor, targets_BL: Tensor, weights_BL: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats, weighted a token where weights are given.

    Args:
        total: what the weights of the whole batch add up to, where this is a part of it; the parts' losses add up.
    """
    loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="none")
    if weights_BL is None:
        return loss.mean()
    weights = weights_BL.flatten()
    return (loss * weights).sum() / (weights.sum() if total is None else total)
