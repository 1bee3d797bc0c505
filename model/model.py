"""The language model: lower sliding-window layers, one chunk memory at mid-depth, upper groups that read it.

Shape letters: B batch, L tokens of the segment, V vocabulary, d model width, S tokens a chunk, n chunks that the
segment completes, R tokens of a ring, r tokens of the unfinished chunk; the rest in ``layers``, ``encoder``, ``hsa``.

The baselines share this skeleton: ``config.architecture`` chooses the layers, what they see (their span), and what
reads the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsa_compile.model import fused
from hsa_compile.model.baselines import FullAttention, MeanPooledMemory, NsaLayer
from hsa_compile.model.config import WITH_MAMBA, ConfigError, ModelConfig
from hsa_compile.model.encoder import ChunkEncoder, Memory
from hsa_compile.model.flash import FlashWindow, fits
from hsa_compile.model.host import HostMemory, put_rows
from hsa_compile.model.hsa import HsaLayer
from hsa_compile.model.landmark import LandmarkAttention
from hsa_compile.model.layers import SlidingWindow, Span, SwaLayer, rms_norm
from hsa_compile.model.mamba import MambaLayer, MambaSpan
from hsa_compile.model.packed import PackedMemory
from hsa_compile.model.rows import Ragged, take
from hsa_compile.model.state import State


def _layer(config: ModelConfig) -> nn.Module:
    return MambaLayer(config) if config.architecture in WITH_MAMBA else SwaLayer(config)


class UpperGroup(nn.Module):
    """One retrieval with its HSA sub-layer, where there is a memory, then sliding-window (or Mamba-2) layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hsa: HsaLayer | NsaLayer | None = None
        if config.has_memory:
            self.hsa = NsaLayer(config) if config.architecture == "nsa" else HsaLayer(config)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.upper_layers // config.n_groups))


class HsaModel(nn.Module):
    """Byte- or token-level language model with hierarchical sparse attention, or one of its baselines.

    Attributes:
        recompute: keep no activations inside layers for the backward of ``forward``, make them again there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.architecture == "landmark":
            self.landmark_token = nn.Parameter(torch.empty(config.d_model))
        self.lower = nn.ModuleList(_layer(config) for _ in range(config.lower_layers))
        self.encoder: ChunkEncoder | MeanPooledMemory | None = None
        if config.has_memory:
            self.encoder = MeanPooledMemory(config) if config.architecture == "nsa" else ChunkEncoder(config)
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
            if parameter.dim() > 1 or name.endswith(("cls", "landmark_token")):
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=(parameter.shape[-1] * (additions if adds else 1)) ** -0.5)

    def swa_layers(self) -> list[nn.Module]:
        """All layers but the HSA sub-layers, from bottom to top: the order of ``State.swa_k``."""
        upper = [layer for group in self.groups for layer in group.layers]  # type: ignore[union-attr]
        return [*self.lower, *upper]

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def span(
        self, carried: int, length: int, ragged: Ragged | None = None, starts_BL: Tensor | None = None
    ) -> Span | MambaSpan:
        """What the layers of one call share, for ``length`` tokens after ``carried`` ones whose keys are kept."""
        c, device = self.config, self.embedding.weight.device
        if c.architecture in WITH_MAMBA:
            return MambaSpan(ragged, starts_BL)
        if c.architecture == "landmark":
            if ragged is not None or starts_BL is not None:
                raise ConfigError("landmark attention takes whole rows of one length: no ragged batch, no packed rows")
            return LandmarkAttention(c, carried, length, device, self.training)
        if c.architecture == "attention":
            return FullAttention(c, carried, length, device, ragged, starts_BL)
        if ragged is None and starts_BL is None and fits(c, device, self._computed_in(device)):
            return FlashWindow(c, carried, length, device)
        return SlidingWindow(c, carried, length, device, ragged, starts_BL)

    def _computed_in(self, device: torch.device) -> torch.dtype:
        """The dtype of queries and keys: the weights', or that of autocast."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.embedding.weight.dtype

    def check_ids(self, ids_BL: Tensor) -> None:
        """Refuses what are no tokens of this model. On a GPU values are not looked at: that would stop the stream.

        Raises:
            ValueError: the shape is not [B, L >= 1], or an id is outside the vocabulary.
        """
        if ids_BL.dim() != 2 or ids_BL.shape[1] < 1:
            raise ValueError(f"ids must be [B, L >= 1], got {list(ids_BL.shape)}; give at least one token")
        if ids_BL.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be int64, got {ids_BL.dtype}")
        if ids_BL.device.type == "cpu" and ids_BL.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in ids_BL.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"ids must lie in 0 … {self.config.vocab_size - 1}, found {low} … {high}")

    def embed(self, ids_BL: Tensor, span: Span | MambaSpan) -> Tensor:
        x = self.embedding(ids_BL)
        return span.insert(x, self.landmark_token) if isinstance(span, LandmarkAttention) else x

    def logits(self, x_BLd: Tensor, span: Span | MambaSpan, at: Tensor | None = None) -> Tensor:
        """[B, L, V], or [B, wanted, V] at the tokens ``at``."""
        x = self.norm(x_BLd)
        if isinstance(span, LandmarkAttention):
            x = span.remove(x)
        return self.head(x if at is None else x.index_select(1, at))

    def forward(self, ids_BL: Tensor, starts_BL: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of whole texts from their first token, without a cache; for training and as the reference.

        Args:
            ids_BL: int64 [B, L], L >= 1.
            starts_BL: int64 [B, L], where rows are packed documents: the place in the row where each token's document
                starts (``rows.starts_of``). Every document gets the logits that it has alone.

        Raises:
            ValueError: the document starts are not that, or the ids are no tokens (``check_ids``).
            ConfigError: the architecture takes no packed documents.
        """
        self.check_ids(ids_BL)
        B, L = ids_BL.shape
        S, C = self.config.chunk_size, L // self.config.chunk_size
        span = self.span(0, L, None, starts_BL)
        x = self.embed(ids_BL, span)
        for layer in self.lower:
            x, _, _ = self._run(layer, x, span)
        memory: Memory | PackedMemory | None = None
        if self.encoder is not None and starts_BL is not None:
            memory = PackedMemory(self.encoder, x, S, starts_BL)
        elif self.encoder is not None:
            memory = self._run(self.encoder, x[:, : C * S].unflatten(1, (C, S)))
        position = ids_BL.new_zeros(B, dtype=torch.int64)
        for group in self.groups:
            if isinstance(memory, PackedMemory):
                x = memory.read(group.hsa, x)  # type: ignore[arg-type]
            elif memory is not None:
                x = self._run(group.hsa, x, memory, position, position + C)  # type: ignore[arg-type]
            for layer in group.layers:  # type: ignore[union-attr]
                x, _, _ = self._run(layer, x, span)
        return self.logits(x, span)

    def _run(self, layer: nn.Module, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def start(self, batch: int = 1, capacity: int = 16, offload: bool = False) -> State:
        """The state before the first token of ``batch`` texts, with room for ``capacity`` chunks (it grows).

        Args:
            offload: keep the chunks' keys and values in the host's memory, their landmarks on the device.
        """
        weight = self.embedding.weight
        return State.empty(self.config, batch, max(1, capacity), weight.dtype, weight.device, offload)

    @torch.no_grad()
    def step(
        self, ids_BL: Tensor, state: State, lengths: Sequence[int] | None = None, last: bool = False
    ) -> tuple[Tensor, State]:
        """Logits [B, L, V] of the next L tokens and the state after them; the same numbers as one ``forward``.

        The memory of ``state`` is reused: continue from the state that is returned.

        Args:
            ids_BL: int64 [B, L], L >= 1; a segment of a prompt or one decoded token.
            state: of the same B texts.
            lengths: how many of the L tokens each row takes, from the left, 0 … L; the logits of the others mean
                nothing. By default all.
            last: logits after the last token alone, [B, 1, V]: of long segments, those of all are gigabytes.

        Raises:
            ValueError: the ids are no tokens (``check_ids``), or their batch or the lengths are not the state's.
            ConfigError: the architecture demands rows of one length.
        """
        self.check_ids(ids_BL)
        B, L = state.position.shape[0], ids_BL.shape[-1]
        if ids_BL.shape[0] != B:
            raise ValueError(f"ids must be [B={B}, L >= 1] like the state, got {list(ids_BL.shape)}")
        ragged = None
        if lengths is not None or state.ragged:
            taken = tuple(int(n) for n in ([L] * B if lengths is None else lengths))
            if len(taken) != B or not all(0 <= n <= L for n in taken):
                raise ValueError(f"lengths must be {B} numbers from 0 to {L}, got {list(taken)}")
            ragged = Ragged(tuple(state.position.tolist()), taken)
        state = self._with_room(state, L, ragged)
        at = torch.tensor([L - 1], device=ids_BL.device) if last and L > 1 else None
        result = self.step_tensors(ids_BL, *state.tensors(), logits_at=at, ragged=ragged, offloaded=state.offloaded)
        uneven = ragged is not None and len(set(ragged.after)) > 1
        return result[0], State(*result[1:], ragged=uneven, offloaded=state.offloaded)

    def _with_room(self, state: State, length: int, ragged: Ragged | None) -> State:
        if self.encoder is None:
            return state
        if ragged is not None:
            return state.with_room(max(ragged.after) // self.config.chunk_size)
        completed = (state.pending.shape[1] + length) // self.config.chunk_size
        if completed:  # the look at `chunks` waits for the device, so only where something is written
            return state.with_room(int(state.chunks[0]) + completed)
        return state

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
        ragged: Ragged | None = None,
        offloaded: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        """``step`` on bare tensors: what is computed depends on shapes and, without ``ragged``, never on values.

        Shapes are those of ``State``; the memory must have room for the ``(r + L) // S`` chunks that the segment
        completes. Without ``ragged``, every text of the batch has the same ``position`` and ``chunks``.

        Args:
            logits_at: int64 [wanted], the tokens of the segment after which logits are given; None gives all L.
            ragged: where rows are not alike.
            offloaded: keys and values of the memory lie in the host's.

        Returns:
            Logits [B, L or wanted, V] and the state after the segment, in the order of the arguments.
        """
        rings = Rings(swa_k, swa_v, self.span(swa_k[0].shape[1], ids_BL.shape[1], ragged))
        x = self.lower_half(ids_BL, rings)
        memory: Memory = (HostMemory if offloaded else Memory)(mem_k, mem_v, landmark)
        chunks, pending = chunks_B, pending_Brd
        if self.encoder is not None:
            memory, chunks, pending = self.remember(x, memory, chunks_B, pending_Brd, ragged)
        x = self.upper_half(x, rings, memory, position_B, chunks)
        logits = self.logits(x, rings.span, logits_at)
        taken = ids_BL.shape[1] if ragged is None else position_B.new_tensor(ragged.lengths)
        return logits, position_B + taken, chunks, pending, rings.new_k, rings.new_v, *memory

    def lower_half(self, ids_BL: Tensor, rings: Rings) -> Tensor:
        """Hidden states [B, L, d] below the memory."""
        x = self.embed(ids_BL, rings.span)
        for layer in self.lower:
            x = rings.run(layer, x)
        return x

    def upper_half(self, x_BLd: Tensor, rings: Rings, memory: Memory, position_B: Tensor, chunks_B: Tensor) -> Tensor:
        """Hidden states [B, L, d] before the last norm, from those below the memory, of tokens from ``position_B``."""
        x = x_BLd
        for group in self.groups:
            if group.hsa is not None:
                x = group.hsa(x, memory, position_B, chunks_B)  # type: ignore[operator]
            for layer in group.layers:  # type: ignore[union-attr]
                x = rings.run(layer, x)
        return x

    def remember(
        self, x_BLd: Tensor, memory: Memory, chunks_B: Tensor, pending_Brd: Tensor, ragged: Ragged | None = None
    ) -> tuple[Memory, Tensor, Tensor]:
        """Memory and chunks with what the segment completes (possibly nothing), and what stays unfinished."""
        S = self.config.chunk_size
        joined = torch.cat((pending_Brd, x_BLd), dim=1)
        if ragged is not None:
            return self._remember_ragged(joined, memory, chunks_B, pending_Brd.shape[1], ragged)
        n = joined.shape[1] // S
        pending = joined[:, n * S :].contiguous()
        if not n:
            return memory, chunks_B, pending
        new: Memory = self.encoder(joined[:, : n * S].unflatten(1, (n, S)))  # type: ignore[misc]
        for x, y, tokens in zip(memory, new, (S, S, 1)):
            put_rows(x, chunks_B[:1] * tokens, y)  # all rows are at the same chunk
        return memory, chunks_B + n, pending

    def _remember_ragged(
        self, joined: Tensor, memory: Memory, chunks_B: Tensor, carried: int, ragged: Ragged
    ) -> tuple[Memory, Tensor, Tensor]:
        """Each row's chunks begin where its own unfinished one does; rows that complete fewer encode for nothing."""
        S = self.config.chunk_size
        done = [p // S for p in ragged.before]
        completed = [p // S - n for p, n in zip(ragged.after, done)]
        begin = [carried - p % S for p in ragged.before]
        if most := max(completed):
            new: Memory = self.encoder(take(joined, begin, most * S).unflatten(1, (most, S)))  # type: ignore[misc]
            for b, (first, n) in enumerate(zip(done, completed)):
                for x, y, tokens in zip(memory, new, (S, S, 1)):
                    put_rows(x[b : b + 1], first * tokens, y[b : b + 1, : n * tokens])
        size = max(p % S for p in ragged.after)
        end = [first + n * S + p % S for first, n, p in zip(begin, completed, ragged.after)]
        pending = take(joined, [place - size for place in end], size)
        return memory, chunks_B + chunks_B.new_tensor(completed), pending


class Rings:
    """Runs layers one after the other, each with what it carries, and keeps what it needs next.

    Args:
        swa_k, swa_v: what each of the layers carries, as in ``State``.
        span: of the segment that they are run on.
    """

    def __init__(self, swa_k: Sequence[Tensor], swa_v: Sequence[Tensor], span: Span | MambaSpan) -> None:
        self.old = iter(zip(swa_k, swa_v, strict=True))
        self.span = span
        self.new_k: list[Tensor] = []
        self.new_v: list[Tensor] = []

    def run(self, layer: nn.Module, x_BLd: Tensor) -> Tensor:
        x, k, v = layer(x_BLd, self.span, *next(self.old))
        k, v = self.span.kept(k, v)
        self.new_k.append(k)
        self.new_v.append(v)
        return x


def sequence_loss(
    logits_BLV: Tensor, targets_BL: Tensor, weights_BL: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats, weighted a token where weights are given.

    Args:
        total: what the weights of the whole batch add up to, where this is a part of it; the parts' losses add up.
    """
    logits, targets = logits_BLV.flatten(0, 1), targets_BL.flatten()
    if fused.serves(logits):
        loss = fused.cross_entropy(logits, targets)
    else:
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
    if weights_BL is None:
        return loss.mean()
    weights = weights_BL.flatten()
    return (loss * weights).sum() / (weights.sum() if total is None else total)
