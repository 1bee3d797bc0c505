"""Runs a bundle: prefill in segments, cached decoding, generation. Needs numpy and ONNX Runtime, nothing else.

Shape letters: B rows, which advance each by itself, L tokens of a segment, V vocabulary, W window, U upper layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsa_compile.export.binding import Binding, Decoder, Step
from hsa_compile.export.bundle import GRAPH, LIBRARY, read_manifest
from hsa_compile.export.runtime import Provider, Runtime, open_runtime
from hsa_compile.export.sampling import Choices, Floats, Sampler, checked_token
from hsa_compile.export.state import SessionState

Ids = np.ndarray[Any, np.dtype[np.int64]]
Tokens = Sequence[int] | Sequence[Sequence[int]] | Ids
Lengths = Sequence[int] | Ids | None
Samplers = Sequence[Sampler | None]


class Session:
    """A bundle opened for inference, and the texts that its rows have seen.

    Rows are independent: each call says how many tokens every row takes, which may be none.

    Args:
        directory: the bundle.
        batch: B, rows.
        provider: "cpu", "cuda", or "auto": a GPU where the bundle has kernels for GPUs and ONNX Runtime the provider.
            On "cuda" everything runs on the GPU, or the bundle does not open.
        fused: run the operators by the bundle's compiled kernels; False runs them by the function bodies in the graph,
            in a plain ONNX Runtime.
        threads: of ONNX Runtime, which also drive the kernels; None leaves the choice to it.
        reserve: tokens a row to allocate the chunk memory for at first; it grows by doubling.
        limit: tokens that a row may grow to; None for no limit but memory.
        host_memory: on a GPU, keep the chunks' keys and values in the host's memory.

    Raises:
        BundleError: the bundle is missing, damaged or foreign, its kernels are not for this machine, or ONNX Runtime
            cannot run it there.
        DeviceError: the GPU cannot be used.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        directory: Path | str,
        batch: int = 1,
        provider: Provider = "auto",
        fused: bool = True,
        threads: int | None = None,
        reserve: int = 4096,
        limit: int | None = None,
        host_memory: bool = False,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if reserve < 0:
            raise ValueError(f"reserve must not be negative, got {reserve}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        path = Path(directory)
        manifest = read_manifest(path, [GRAPH, LIBRARY] if fused else [GRAPH])
        self._start(open_runtime(path, manifest, provider, fused, threads, host_memory), batch, reserve, limit)
        if self.runtime.provider == "cuda":
            self._decoder.find_least_chunks()

    def _start(self, runtime: Runtime, batch: int, reserve: int, limit: int | None) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.runtime, self.manifest, self.fused = runtime, runtime.manifest, runtime.fused
        model = self.manifest.model
        self.vocab_size, self.chunk_size = int(model["vocab_size"]), int(model["chunk_size"])
        self.upper_reach = int(model["upper_layers"]) * (int(model["window"]) - 1) + 1
        self.segment = max(1, runtime.segment // batch)
        self._reserve, self._limit = reserve, limit
        capacity = -(-min(reserve, limit or reserve) // self.chunk_size)
        self.state = SessionState(self.manifest.state, batch, self.chunk_size, capacity, runtime.device, limit)
        self._decoder = Decoder(runtime, self.state, self.vocab_size)
        self._binding = Binding(runtime, self.state, self.vocab_size)

    def fork(self, batch: int = 1, reserve: int | None = None) -> Session:
        """A session of its own rows on the same opened graph: costs a state, no second copy of the weights.

        Sessions of one graph must not run at the same time on a GPU.

        Args:
            reserve: as of the class; None for what this session was opened with.
        """
        other = object.__new__(Session)
        other._start(self.runtime, batch, self._reserve if reserve is None else reserve, self._limit)
        return other

    @property
    def batch(self) -> int:
        """B."""
        return self.state.batch

    @property
    def positions(self) -> Ids:
        """Tokens that each row has seen, int64 [B]."""
        return self.state.positions.copy()

    @property
    def position(self) -> int:
        """Tokens that the row which has seen the most has seen."""
        return int(self.state.positions.max())

    def describe(self) -> str:
        """Which provider, kernels and schedule records are in use."""
        return self.runtime.describe()

    def reset(self, row: int | None = None) -> None:
        """Forgets the text of a row, or of all."""
        self._check_row(row or 0)
        self.state.reset(row)

    def copy_row(self, source: Session | SessionState, row: int, to: int) -> None:
        """Row ``to`` goes on from where row ``row`` of another session of this bundle is, or of this one.

        Raises:
            ValueError: there is no such row, or the source is of another model.
            CapacityError: the row is longer than this session's limit.
        """
        state = source.state if isinstance(source, Session) else source
        self._check_row(to)
        if not 0 <= row < state.batch:
            raise ValueError(f"the source has rows 0 … {state.batch - 1}, not {row}")
        if state.specs != self.state.specs:
            raise ValueError("the source is a state of another model")
        self.state.copy_row(state, row, to)

    def step(self, ids: Tokens, lengths: Lengths = None) -> Floats:
        """Reads the next tokens in one run and returns the logits after each of them.

        Args:
            ids: [L] or [B, L], L >= 1.
            lengths: how many of the L tokens each row takes, from the left, 0 … L; by default all.

        Returns:
            float32 [B, L, V]; those of tokens that a row does not take mean nothing.

        Raises:
            ValueError: there is no token, or one is not in 0 … V-1, or the shapes are not those of the session.
            CapacityError: a row would pass the session's limit; nothing has changed then.
        """
        checked, taken = self._checked(ids, lengths)
        L, choices = checked.shape[1], Choices.of([None] * self.batch)
        if L == 1:
            return self._decoder.run(checked[:, 0], taken, choices).logits()
        at = np.broadcast_to(np.arange(L), checked.shape)
        return self._binding.run(checked, taken, L, at, choices).logits()

    def next(self, tokens: Ids, lengths: Ids, samplers: Samplers) -> Ids:
        """Reads a token a row and chooses the ones after them, without a look at the logits.

        Args:
            tokens: int64 [B].
            lengths: int64 [B], 0 for rows that take none.
            samplers: one a row; None for rows that want no token.

        Returns:
            int64 [B], -1 where the logits are no numbers; what rows without a sampler get means nothing.

        Raises:
            ValueError, CapacityError: as ``step``.
        """
        checked, taken = self._checked(tokens[:, None], lengths)
        return self._decoder.run(checked[:, 0], taken, Choices.of(samplers)).token[:, 0]

    def prefill(self, ids: Tokens, *, lengths: Lengths = None, segment: int | None = None) -> Floats:
        """Reads tokens in segments, so that memory beyond the state stays bounded.

        Args:
            ids: [L] or [B, L], L >= 1; shorter prompts are padded on the right with any token.
            lengths: as in ``step``.
            segment: tokens a run; None takes ``self.segment``.

        Returns:
            Logits after the last token that each row takes, float32 [B, V]; 0 where it takes none.

        Raises:
            ValueError: as ``step``, or the segment is not positive.
            CapacityError: as ``step``.
        """
        return self._prefill(*self._checked(ids, lengths), segment, short=False)

    def short_prefill(self, ids: Tokens, *, lengths: Lengths = None, segment: int | None = None) -> Floats:
        """``prefill`` with the upper half, and so the selection, on the last ``U * (W - 1) + 1`` tokens alone: the same
        numbers for less work, which does not grow faster than the prompt."""
        return self._prefill(*self._checked(ids, lengths), segment, short=True)

    def segments(
        self, ids: Tokens, samplers: Samplers, *, lengths: Lengths = None, segment: int | None = None
    ) -> Iterator[Ids]:
        """``short_prefill`` that pauses after each segment, for who has other things to do between them.

        Yields:
            The tokens chosen after what each row takes, int64 [B], as ``next`` returns them; of rows that have not
            been read to their end they mean nothing.
        """
        return self._chosen(*self._checked(ids, lengths), segment, samplers)

    def generate(
        self,
        prompt_ids: Tokens,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """Continues one text, first with the prompt and then with new tokens, which it yields as they are made.

        The last token that is yielded has not been read: pass it with what follows to continue the same text.

        Args:
            prompt_ids: [L], L >= 1; it comes after what the session has seen, see ``reset``.
            max_new_tokens: at most this many.
            temperature: 0 is greedy.
            top_p: samples from the fewest tokens that hold this much of the probability.
            seed: of the sampling.
            stop_ids: tokens that end the text; they are not yielded.

        Raises:
            ValueError: a value is out of range, the prompt is empty, or the session has several rows.
            GenerationError: while iterating, where the model's logits are no numbers.
        """
        if self.batch != 1:
            raise ValueError("generate continues one text; use generate_batch for a session of several rows")
        options = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop_ids": stop_ids}
        texts = self._generate(*self._checked(prompt_ids, None), max_new_tokens, **options)  # type: ignore[arg-type]
        return (row[0] for row in texts)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[list[int]]:
        """``generate`` of a text a row, from prompts of any lengths. Rows sample each from its own generator, so that a
        text does not depend on its neighbours.

        Args:
            prompts: B of them, each of at least one token.

        Yields:
            The next token of every row, -1 once a row has ended; ends when all have.

        Raises:
            ValueError: as ``generate``.
        """
        if len(prompts) != self.batch or not all(len(prompt) for prompt in prompts):
            raise ValueError(f"prompts must be {self.batch}, one a row, of at least one token each")
        lengths = [len(prompt) for prompt in prompts]
        ids = np.zeros((len(prompts), max(lengths)), np.asarray(prompts[0]).dtype)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = prompt
        options = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop_ids": stop_ids}
        return self._generate(*self._checked(ids, lengths), max_new_tokens, **options)  # type: ignore[arg-type]

    def _generate(
        self,
        ids: Ids,
        lengths: Ids,
        count: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> Iterator[list[int]]:
        if count < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {count}")
        samplers = [Sampler(temperature, top_p, seed + b) for b in range(self.batch)]
        return self._stream(ids, lengths, count, samplers, set(stop_ids))

    def _stream(
        self, ids: Ids, lengths: Ids, count: int, samplers: list[Sampler], stop: set[int]
    ) -> Iterator[list[int]]:
        *_, chosen = self._chosen(ids, lengths, None, samplers)
        live = np.ones(self.batch, np.int64)
        for left in reversed(range(count)):
            tokens = [checked_token(token) if on else 0 for token, on in zip(chosen.tolist(), live)]
            live &= [token not in stop for token in tokens]
            if not live.any():
                return
            yield [token if on else -1 for token, on in zip(tokens, live)]
            if left:
                step = self._decoder.run(np.where(live, tokens, 0), live, Choices.of(samplers))
                chosen = step.token[:, 0]

    def _prefill(self, ids: Ids, lengths: Ids, segment: int | None, short: bool) -> Floats:
        logits = np.zeros((self.batch, self.vocab_size), np.float32)
        for ends, step in self._segments(ids, lengths, segment, short, [None] * self.batch):
            if ends.any():
                logits[ends] = step.logits()[ends, 0]
        return logits

    def _chosen(self, ids: Ids, lengths: Ids, segment: int | None, samplers: Samplers) -> Iterator[Ids]:
        token = np.zeros(self.batch, np.int64)
        for ends, step in self._segments(ids, lengths, segment, True, samplers):
            token[ends] = step.token[ends, 0]
            yield token

    def _segments(
        self, ids: Ids, lengths: Ids, segment: int | None, short: bool, samplers: Samplers
    ) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.bool_]], Step]]:
        """Which rows end in a segment, and what it gave."""
        size = self.segment if segment is None else segment
        if size < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        total = int(lengths.max())
        self.state.make_room(lengths, self.runtime.least_chunks)
        needed = min((int(n) for n in lengths if n), default=0) - self.upper_reach if short else 0
        for start in range(0, total, size):
            part = ids[:, start : min(start + size, total)]
            L = part.shape[1]
            taken = np.clip(lengths - start, 0, L)
            upper = int(np.clip(start + L - needed, 1, L))
            ends = (start < lengths) & (lengths <= start + L)
            last = np.where(ends, taken - 1 - (L - upper), 0)[:, None]
            ending = [sampler if end else None for sampler, end in zip(samplers, ends)]
            # Not by the decoder, even if it is one token: a CUDA graph costs more than it saves where nothing follows.
            yield ends, self._binding.run(part, taken, upper, last, Choices.of(ending))

    def _checked(self, ids: Any, lengths: Lengths) -> tuple[Ids, Ids]:
        array = np.asarray(ids)
        if array.ndim == 1:
            array = array[None]
        B = self.batch
        if array.ndim != 2 or array.shape[0] != B:
            raise ValueError(f"ids must be [L] or [batch={B}, L], got shape {list(array.shape)}")
        if array.shape[1] == 0:
            raise ValueError("there are no tokens; give at least one")
        if array.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, got {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids must lie in 0 … {self.vocab_size - 1}, found {low if low < 0 else high}")
        L = array.shape[1]
        taken = np.full(B, L) if lengths is None else np.asarray(lengths)
        if taken.shape != (B,) or taken.dtype.kind not in "iu" or taken.min() < 0 or taken.max() > L:
            raise ValueError(f"lengths must be {B} integers from 0 to {L}, got {taken.tolist()}")
        return array.astype(np.int64), taken.astype(np.int64)

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.batch:
            raise ValueError(f"there are rows 0 … {self.batch - 1}, not {row}")
