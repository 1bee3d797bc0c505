"""One step of a model with static shapes, for rows that advance each by itself: what ONNX graphs are exported from.

It is composed of the model's own layers. What differs from ``HsaModel.step`` is what they are given: windows over rings
of W slots, a whole chunk of room for the unfinished one, and index tensors from outside, whose lengths are the only
dynamic shapes. So no shape depends on a value, nothing computes with shapes at all, and each state tensor is read by
one operator before anything is written in its place: a runtime may bind inputs and outputs to the same buffers. What
ONNX Runtime computes from tables in host memory (GatherND, Concat and Split of different sizes) is not used, as a CUDA
graph would read the tables where they no longer are.

Shape letters: B batch, L tokens of the segment, u its last tokens, on which the upper half runs, w tokens whose logits
are wanted, n chunks a row for the encoder, S tokens a chunk, W window, d model width, V vocabulary, m rows taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.export.choice import sample
from hsa_compile.export.window import rotary, sliding_window
from hsa_compile.model.cache import cache_write
from hsa_compile.model.encoder import Memory
from hsa_compile.model.model import HsaModel


class Segment(NamedTuple):
    """What a step is asked to do; int64 but for the last three, float32.

    Attributes:
        input_ids: [B, L].
        lengths: [B], how many of its L tokens each row takes, from the left, 0 … L.
        rows: [B], 0 … B - 1.
        tokens: [L], 0 … L - 1.
        upper: [u], L - u … L - 1, u >= 1: the tokens that the upper half runs on. Of a prompt that is read in segments,
            those before the last ``U * (W - 1) + 1`` tokens need not be among them (``model.prefill``).
        logits_at: [B, w], places among ``upper``.
        completing: [B, n], 0 … B * n - 1, for as many chunks a row as any row completes, or more. What a row writes
            beyond its own stays unseen and is overwritten when the chunk is complete; the memory must have room for it.
        temperature, top_p, uniform: [B], how a token is chosen (``choice.sample``).
    """

    input_ids: Tensor
    lengths: Tensor
    rows: Tensor
    tokens: Tensor
    upper: Tensor
    logits_at: Tensor
    completing: Tensor
    temperature: Tensor
    top_p: Tensor
    uniform: Tensor


class StaticStep(nn.Module):
    """The step as a module. Its outputs are logits float32 [B, w, V], the tokens chosen from them int64 [B, w], and the
    state in the order of the inputs."""

    def __init__(self, model: HsaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        rows: Tensor,
        tokens: Tensor,
        upper: Tensor,
        logits_at: Tensor,
        completing: Tensor,
        temperature: Tensor,
        top_p: Tensor,
        uniform: Tensor,
        position: Tensor,
        pending: Tensor,
        swa_k: list[Tensor],
        swa_v: list[Tensor],
        mem_k: Tensor,
        mem_v: Tensor,
        landmark: Tensor,
    ) -> Any:
        """See ``Segment`` and ``graph.state_specs`` for the arguments."""
        model, n = self.model, len(self.model.lower)
        after = position + lengths
        before = after - lengths  # the only reader of `position` is the sum above: it may be written in place
        cos, sin = self._rotations(before[:, None] + tokens)
        lower = Windows(swa_k[:n], swa_v[:n], before, lengths, cos, sin)
        x = model.lower_half(input_ids, lower)  # type: ignore[arg-type]
        memory = Memory(mem_k, mem_v, landmark)
        length = tokens[-1:] + 1
        memory, pending = self._remember(x, memory, pending, before, after, completing, rows, length)

        first = upper[:1]
        begin, count = before + first, (lengths - first).clamp(min=0)
        cos, sin = cos.index_select(1, upper), sin.index_select(1, upper)
        above = Windows(swa_k[n:], swa_v[n:], begin, count, cos, sin)
        chunks = after.div(self.S, rounding_mode="trunc")
        x = model.upper_half(x.index_select(1, upper), above, memory, begin, chunks)  # type: ignore[arg-type]
        wanted = (rows * (length - first))[:, None] + logits_at
        logits = model.head(model.norm(F.embedding(wanted, x.flatten(0, 1)))).float()
        token = sample(logits, temperature, top_p, uniform)
        rings = ([*lower.new_k, *above.new_k], [*lower.new_v, *above.new_v])
        return logits, token, after, pending, *rings, *memory

    @property
    def S(self) -> int:
        return self.model.config.chunk_size

    def _rotations(self, position_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, D/2] in the model's type, exact at any position: angles are float64 up to here."""
        c = self.model.config
        exponent = torch.arange(0, c.swa_head_dim, 2, dtype=torch.float32) / c.swa_head_dim
        frequency = (c.rope_base**-exponent).double()  # that of ``model.layers.rotations``, to the bit
        angle = position_BL.double()[..., None] * frequency
        dtype = self.model.embedding.weight.dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _remember(
        self,
        x_BLd: Tensor,
        memory: Memory,
        pending_BSd: Tensor,
        before: Tensor,
        after: Tensor,
        completing: Tensor,
        rows: Tensor,
        length: Tensor,
    ) -> tuple[Memory, Tensor]:
        """The memory with n more chunks of every row, and the unfinished chunk after the segment of ``length`` tokens.

        The tokens of a row from the start of its unfinished chunk on are numbered from 0; the first r of them are in
        ``pending``, the others in the segment.
        """
        S, place_S = self.S, torch.arange(self.S)
        done = before.div(S, rounding_mode="trunc")
        r_B1 = (before - done * S)[:, None]
        last_B1 = (after - before)[:, None] - 1  # of the row's tokens in the segment, -1 where it takes none
        # The only reader of `pending`, as it may be written in place.
        held = torch.where((place_S < r_B1)[..., None], pending_BSd, 0.0).flatten(0, 1)
        segment = x_BLd.flatten(0, 1)

        def take(token_Bm: Tensor) -> Tensor:
            """Tokens by number; where there is none yet, any other."""
            old, ahead = token_Bm < r_B1, token_Bm - r_B1
            place = torch.where(ahead < last_B1, ahead, last_B1).clamp(min=0)
            from_held = F.embedding(rows[:, None] * S + torch.where(old, token_Bm, 0), held)
            from_segment = F.embedding((rows * length)[:, None] + place, segment)
            return torch.where(old[..., None], from_held, from_segment)

        number_Bn = completing - completing[:, :1]
        chunks = take((number_Bn[..., None] * S + place_S).flatten(1)).view(1, -1, S, x_BLd.shape[-1])
        new: Memory = self.model.encoder(chunks)  # type: ignore[misc]
        written = []
        for cache, encoded, tokens in zip(memory, new, (S, S, 1)):
            heads = encoded.shape[2:]
            flat = encoded.reshape(-1, tokens * heads.numel())  # [B * n, ...], back into rows of the batch
            update = F.embedding(completing, flat).view(completing.shape[0], -1, *heads)
            written.append(cache_write(cache, update, done * tokens))
        completed_B1 = after.div(S, rounding_mode="trunc")[:, None] - done[:, None]
        return Memory(*written), take(completed_B1 * S + place_S)


class Windows:
    """Runs layers one after the other, each over its own ring, and keeps the rings after the segment.

    It is the span of the layers that it runs, too: their queries and keys come to ``attend``.

    Args:
        swa_k, swa_v: [B, W, Hkv, D] each, of the layers in order.
        position_B: of the segment's first token.
        lengths_B: tokens that count.
        cos, sin: [B, L, D/2].
    """

    def __init__(
        self, swa_k: list[Tensor], swa_v: list[Tensor], position_B: Tensor, lengths_B: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        self.rings = iter(zip(swa_k, swa_v, strict=True))
        self.position, self.lengths = position_B, lengths_B
        self.cos, self.sin = cos, sin
        self.new_k: list[Tensor] = []
        self.new_v: list[Tensor] = []

    @property
    def span(self) -> Windows:
        return self

    def run(self, layer: nn.Module, x_BLd: Tensor) -> Tensor:
        x, _, _ = layer(x_BLd, self)
        return x

    def attend(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k = rotary(q_BLHD, self.cos, self.sin), rotary(k_BLHD, self.cos, self.sin)
        o, ring_k, ring_v = sliding_window(q, k, v_BLHD, *next(self.rings), self.position, self.lengths)
        self.new_k.append(ring_k)
        self.new_v.append(ring_v)
        return o

    def kept(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer left."""
        return self.new_k[-1], self.new_v[-1]
