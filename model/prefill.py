"""Reading prompts: in segments, with the upper half on the last tokens alone, and again after a few tokens changed.

The chunk memory depends on the lower half only, and each upper sliding-window layer sees W - 1 tokens back. So the last
logits, and all that later tokens need, come from the memory and the lower half's last ``U * (W - 1) + 1`` outputs, U
the upper layers. Likewise a changed token reaches the lower half's outputs within ``lower_layers * (W - 1)`` tokens
after it, and only the chunks there are encoded again. Both are exact.

Shape letters: B batch, L tokens, V vocabulary, d model width, S tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.encoder import Memory
from hsa_compile.model.host import put_rows
from hsa_compile.model.model import HsaModel, Rings
from hsa_compile.model.state import State

SEGMENT = 512
WINDOWED = ("hsa", "nsa", "swa")


class Ids(Protocol):
    """Token ids [B, L] that are asked for a segment at a time: a tensor, or what makes them as they are needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L)."""

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        """int64 [B, l]; the first slice is always ``:``."""


def prefill(
    model: HsaModel,
    ids_BL: Ids,
    segment: int = SEGMENT,
    lengths: Sequence[int] | None = None,
    state: State | None = None,
    offload: bool = False,
) -> tuple[Tensor, State]:
    """Runs prompts through the model in segments.

    Args:
        ids_BL: int64 [B, L]; shorter prompts are padded on the right with any token.
        segment: tokens a step.
        lengths: tokens of each prompt, 1 … L; by default all have L.
        state: what the prompts go on from, by default nothing; its memory is reused.
        offload: keep the chunk memory in the host's (``HsaModel.start``), where there is no state yet.

    Returns:
        Logits [B, V] after each prompt's last token, and the state.

    Raises:
        ValueError: a prompt is empty, or the segment length is not positive.
    """
    _check(ids_BL, segment)
    B, L = ids_BL.shape
    if lengths is not None and (len(lengths) != B or not all(1 <= n <= L for n in lengths)):
        raise ValueError(f"prompts must have 1 to {L} tokens each, got lengths {list(lengths)} for {B} rows")
    ragged = lengths is not None and min(lengths) < L
    if state is None:
        state = model.start(B, L // model.config.chunk_size + 1, offload)
    last = torch.empty(0)
    for first in range(0, L, segment):
        part = _part(model, ids_BL, first, first + segment)
        if not ragged or lengths is None:
            logits, state = model.step(part, state, last=True)
            last = logits[:, -1]
            continue
        taken = [min(max(n - first, 0), part.shape[1]) for n in lengths]
        logits, state = model.step(part, state, taken)
        ends = [b for b, n in enumerate(lengths) if first < n <= first + segment]
        last = last if first else logits.new_empty(B, logits.shape[-1])
        last[ends] = logits[ends, [lengths[b] - first - 1 for b in ends]]
    return last, state


def upper_reach(config: ModelConfig) -> int:
    """Tokens at the end of a text whose upper half the last logits depend on: ``U * (W - 1) + 1``."""
    return config.upper_layers * (config.window - 1) + 1


def lower_reach(config: ModelConfig) -> int:
    """Tokens after a token whose hidden states below the memory it reaches: ``lower_layers * (W - 1)``."""
    return config.lower_layers * (config.window - 1)


@torch.no_grad()
def short_prefill(
    model: HsaModel, ids_BL: Ids, segment: int = SEGMENT, offload: bool = False, room: int = 1
) -> tuple[Tensor, State]:
    """``prefill`` with the upper half, and so the selection, on the last ``upper_reach`` tokens alone.

    Args:
        offload: keep the chunk memory in the host's.
        room: chunks that the memory has room for after the prompt's, before it grows into a copy.

    Returns:
        Logits [B, V] after the last token, and the state; the same numbers as those of ``prefill``.

    Raises:
        ValueError: a prompt is empty, or the segment length is not positive.
        ConfigError: the architecture's layers reach back without bound.
    """
    _check(ids_BL, segment)
    _check_windows(model, "a short prefill")
    B, L = ids_BL.shape
    state = model.start(B, L // model.config.chunk_size + room, offload)
    lower, tail = _LowerHalf(model, ids_BL, segment), state.pending
    for x in lower:
        tail = torch.cat((tail, x), dim=1)[:, -upper_reach(model.config) :]
        if model.encoder is not None:
            _, chunks, pending = model.remember(x, state.memory, state.chunks, state.pending)
            state = replace(state, chunks=chunks, pending=pending)
    return _finish(model, tail, lower, replace(state, position=state.position + L))


@torch.no_grad()
def patch(
    model: HsaModel, ids_BL: Ids, state: State, changed: Sequence[tuple[int, int]], segment: int = SEGMENT
) -> tuple[Tensor, State]:
    """Logits and state of a text of which some tokens were replaced since ``state`` was made.

    Its cost is that of the changed tokens and of the reaches of both halves, whatever the length of the text.

    Args:
        ids_BL: int64 [B, L], the whole text as it is now; L is the position of ``state``.
        state: after the text as it was; its memory is changed in place.
        changed: (start, end) of each replaced range, tokens ``start`` … ``end - 1``.
        segment: tokens at once, of all ranges together.

    Returns:
        Logits [B, V] after the last token, and the state; the same numbers as those of ``prefill``.

    Raises:
        ValueError: a range is empty or outside the text, or the text is not as long as what the state has seen.
        ConfigError: the architecture's layers reach back without bound.
    """
    _check(ids_BL, segment)
    _check_windows(model, "patching")
    c, L = model.config, ids_BL.shape[1]
    if state.ragged or state.position.tolist() != [L] * ids_BL.shape[0]:
        raise ValueError(f"the state has seen {state.position.tolist()} tokens, the text has {list(ids_BL.shape)}")
    for start, end in changed:
        if not 0 <= start < end <= L:
            raise ValueError(f"tokens {start} … {end} are not a range of a text of {L}")
    if model.encoder is not None:
        _encode_again(model, ids_BL, state, _reached(c, changed, L), segment)
    needed = max(upper_reach(c), L % c.chunk_size)
    tail, lower = _hidden(model, ids_BL, max(0, L - needed), segment)
    if model.encoder is not None:
        state = replace(state, pending=tail[:, tail.shape[1] - L % c.chunk_size :].contiguous())
    return _finish(model, tail[:, -upper_reach(c) :], lower, state)


@contextmanager
def patched(
    model: HsaModel, ids_BL: Ids, state: State, changed: Sequence[tuple[int, int]], segment: int = SEGMENT
) -> Iterator[tuple[Tensor, State]]:
    """``patch`` within the block; after it the memory of ``state`` is again what it was, to the bit.

    Decoding in the block writes only after the text's chunks, which ``state`` does not count.
    """
    c = model.config
    tokens = (c.chunk_size, c.chunk_size, 1)
    spans = _reached(c, changed, ids_BL.shape[1]) if model.encoder is not None else []
    kept = [[x[:, first * n : last * n].clone() for x, n in zip(state.memory, tokens)] for first, last in spans]
    try:
        yield patch(model, ids_BL, state, changed, segment)
    finally:
        for (first, _), rows in zip(spans, kept):
            for x, n, row in zip(state.memory, tokens, rows):
                put_rows(x, first * n, row)


def _reached(config: ModelConfig, changed: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The chunks, first … last - 1, that depend on these tokens; spans that touch are one."""
    S, spans = config.chunk_size, list[tuple[int, int]]()
    for start, end in sorted(changed):
        first, last = start // S, min(-(-(end + lower_reach(config)) // S), length // S)
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        elif first < last:
            spans.append((first, last))
    return spans


def _encode_again(model: HsaModel, ids_BL: Ids, state: State, spans: Sequence[tuple[int, int]], segment: int) -> None:
    """Writes these chunks anew. Spans go through the lower half side by side, as rows of one length, each from so many
    chunks before that the first one is exact."""
    S, B, chunks = model.config.chunk_size, ids_BL.shape[0], ids_BL.shape[1] // model.config.chunk_size
    before, most = -(-lower_reach(model.config) // S), max(1, segment // S)
    parts = [(i, min(i + most, last)) for first, last in spans for i in range(first, last, most)]
    if not parts:
        return
    size = min(max(last - first for first, last in parts) + before, chunks)
    rows = max(1, segment // (size * S))
    for group in (parts[i : i + rows] for i in range(0, len(parts), rows)):
        begins = [max(0, min(first - before, chunks - size)) for first, _ in group]
        ids = torch.cat([_part(model, ids_BL, begin * S, (begin + size) * S) for begin in begins])
        (hidden,) = _LowerHalf(model, ids, size * S)
        new: Memory = model.encoder(hidden.unflatten(1, (size, S)))  # type: ignore[misc]
        for i, ((first, last), begin) in enumerate(zip(group, begins)):
            for x, encoded, n in zip(state.memory, new, (S, S, 1)):
                put_rows(x, first * n, encoded[i * B : i * B + B, (first - begin) * n : (last - begin) * n])


def _check(ids_BL: Ids, segment: int) -> None:
    if len(ids_BL.shape) != 2 or ids_BL.shape[1] < 1:
        raise ValueError(f"ids must be [B, L >= 1], got {list(ids_BL.shape)}; give at least one token")
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")


def _part(model: HsaModel, ids_BL: Ids, first: int, end: int) -> Tensor:
    """Tokens ``first`` … ``end - 1`` on the model's device."""
    part = ids_BL[:, first:end]
    model.check_ids(part)
    return part.to(model.embedding.weight.device)


def _check_windows(model: HsaModel, what: str) -> None:
    if model.config.architecture not in WINDOWED:
        raise ConfigError(
            f"{what} needs layers that see a window, as {', '.join(WINDOWED)} have; {model.config.architecture} does "
            "not: use prefill"
        )


class _LowerHalf:
    """Hidden states [B, l, d] below the memory of one segment of a text after the other; ``k`` and ``v`` are the lower
    layers' rings after the last one."""

    def __init__(self, model: HsaModel, ids_BL: Ids, segment: int) -> None:
        self.model, self.ids, self.segment = model, ids_BL, segment
        empty, n = model.start(ids_BL.shape[0]), model.config.lower_layers
        self.k, self.v = empty.swa_k[:n], empty.swa_v[:n]

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, self.ids.shape[1], self.segment):
            part = _part(self.model, self.ids, first, first + self.segment)
            rings = Rings(self.k, self.v, self.model.span(self.k[0].shape[1], part.shape[1]))
            x = self.model.lower_half(part, rings)
            self.k, self.v = rings.new_k, rings.new_v
            yield x


def _hidden(model: HsaModel, ids_BL: Ids, first: int, segment: int) -> tuple[Tensor, _LowerHalf]:
    """Hidden states below the memory of tokens ``first`` … L - 1, and the lower half after them."""
    begin = max(0, first - lower_reach(model.config))
    lower = _LowerHalf(model, ids_BL[:, begin:], segment)
    return torch.cat(list(lower), dim=1)[:, first - begin :], lower


def _finish(model: HsaModel, tail_BLd: Tensor, lower: _LowerHalf, state: State) -> tuple[Tensor, State]:
    """The upper half on the last hidden states of a text, and its logits after the last."""
    n, L = model.config.lower_layers, tail_BLd.shape[1]
    empty = model.start(tail_BLd.shape[0])
    rings = Rings(empty.swa_k[n:], empty.swa_v[n:], model.span(0, L))
    x = model.upper_half(tail_BLd, rings, state.memory, state.position - L, state.chunks)
    logits = model.logits(x[:, -1:], rings.span)[:, 0]
    return logits, replace(state, swa_k=[*lower.k, *rings.new_k], swa_v=[*lower.v, *rings.new_v])
