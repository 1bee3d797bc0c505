"""Runs of a session's graph on fixed addresses: all that goes in and out is bound, the state as both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from hsa_compile.export.memory import ONNX_TYPES, Buffer
from hsa_compile.export.runtime import Runtime
from hsa_compile.export.sampling import Choices, Floats
from hsa_compile.export.state import SessionState

Ids = np.ndarray[Any, np.dtype[np.int64]]


class StepError(RuntimeError):
    """A run failed; the session forgot its texts."""


class Step(NamedTuple):
    """What a run gave, until the next one.

    Attributes:
        token: int64 [B, w], those chosen, -1 where none could be; a view.
        logits: copies the logits, float32 [B, w, V], from where they are: nobody who wants the tokens alone needs them.
    """

    token: Ids
    logits: Callable[[], Floats]


class _Bound:
    """An ONNX Runtime binding of the state and of named buffers."""

    def __init__(self, runtime: Runtime, state: SessionState) -> None:
        self.runtime, self.state = runtime, state
        self.bound = runtime.session.io_binding()
        for name, buffer in state.buffers.items():
            self.put(f"past.{name}", buffer)
            self.get(f"present.{name}", buffer)

    def put(self, name: str, buffer: Buffer) -> None:
        """Binds an input."""
        place = self.runtime.device.name, 0, ONNX_TYPES[buffer.dtype], buffer.shape, buffer.pointer
        self.bound.bind_input(name, *place)

    def get(self, name: str, buffer: Buffer) -> None:
        """Binds an output."""
        place = self.runtime.device.name, 0, ONNX_TYPES[buffer.dtype], buffer.shape, buffer.pointer
        self.bound.bind_output(name, *place)

    def run(self, graph_id: int | None = None) -> None:
        """One run; ``graph_id`` names a CUDA graph to capture or replay.

        Raises:
            StepError: it failed, and the state with it.
        """
        options = None
        if self.runtime.graphs:
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(-1 if graph_id is None else graph_id))
        try:
            self.runtime.session.run_with_iobinding(self.bound, options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            self.state.reset()
            raise StepError(f"a step failed, and the session forgot its texts: {error}") from error


class Binding:
    """Runs of any length: buffers are kept from run to run and made larger where one needs it."""

    def __init__(self, runtime: Runtime, state: SessionState, vocab_size: int) -> None:
        self.runtime, self.state, self.vocab_size = runtime, state, vocab_size
        self._kept: dict[str, Buffer] = {}

    def run(self, ids: Ids, lengths: Ids, upper: int, logits_at: Ids, choices: Choices) -> Step:
        """Reads ids [B, L]; what comes after the tokens ``logits_at`` [B, w] among the last ``upper`` ones."""
        B, L = ids.shape
        self.state.make_room(lengths, self.runtime.least_chunks)
        n = max(self.runtime.least_chunks, self.state.completing(lengths))
        segment: dict[str, np.ndarray[Any, Any]] = {
            "input_ids": ids,
            "lengths": lengths,
            "rows": np.arange(B),
            "tokens": np.arange(L),
            "upper": np.arange(L - upper, L),
            "logits_at": logits_at,
            "completing": np.arange(B * n).reshape(B, n),
            **choices._asdict(),
        }
        bound = _Bound(self.runtime, self.state)
        for name, array in segment.items():
            buffer = self._buffer(name, array.shape, str(array.dtype), self.runtime.device.shared)
            buffer.host[...] = array  # type: ignore[index]
            bound.put(name, buffer)
        token = self._buffer("token", logits_at.shape, "int64", self.runtime.device.shared)
        logits = self._buffer("logits", (*logits_at.shape, self.vocab_size), "float32", self.runtime.device.zeros)
        bound.get("token", token)
        bound.get("logits", logits)
        bound.run()
        self.state.advance(lengths)
        assert token.host is not None
        return Step(token.host, lambda: self.runtime.device.read(logits))

    def _buffer(
        self, name: str, shape: tuple[int, ...], dtype: str, allocate: Callable[[tuple[int, ...], str], Buffer]
    ) -> Buffer:
        size = int(np.prod(shape))
        kept = self._kept.get(name)
        if kept is None or int(np.prod(kept.shape)) < size:
            kept = self._kept[name] = allocate((size,), dtype)
        return kept.view(*shape)


class Decoder:
    """Runs of one token a row, at addresses that stay: on a GPU a CUDA graph each for steps that complete a chunk in
    some row and steps that do not."""

    def __init__(self, runtime: Runtime, state: SessionState, vocab_size: int) -> None:
        self.runtime, self.state = runtime, state
        B, shared = state.batch, runtime.device.shared
        self.inputs = {
            "input_ids": shared((B, 1), "int64"),
            "lengths": shared((B,), "int64"),
            "rows": shared((B,), "int64"),
            "tokens": shared((1,), "int64"),
            "upper": shared((1,), "int64"),
            "logits_at": shared((B, 1), "int64"),
            **{name: shared((B,), "float32") for name in Choices._fields},
        }
        self.completing = [shared((B, n), "int64") for n in (0, 1)]
        self.completing[1].host[:, 0] = self._host("rows")[:] = np.arange(B)  # type: ignore[index]
        self._host("top_p")[:] = 1.0
        self.token, self.logits = shared((B, 1), "int64"), runtime.device.zeros((B, 1, vocab_size), "float32")
        self._bound: dict[int, tuple[_Bound, int | None]] = {}
        self._generation = -1

    def run(self, tokens: Any, lengths: Ids, choices: Choices) -> Step:
        """Reads the next token of each row, int64 [B]; rows whose length is 0 stay as they are.

        Raises:
            CapacityError: a row would pass the session's limit.
        """
        state, least = self.state, self.runtime.least_chunks
        state.make_room(lengths, least)
        n = max(least, state.completing(lengths))
        bound, graph_id = self._ready(n)
        self._host("input_ids")[:, 0] = tokens
        self._host("lengths")[:] = lengths
        for name, values in choices._asdict().items():
            self._host(name)[:] = values
        bound.run(graph_id)
        state.advance(lengths)
        assert self.token.host is not None
        return Step(self.token.host, lambda: self.runtime.device.read(self.logits))

    def find_least_chunks(self) -> None:
        """Tries a step without any chunk, which takes an operator on empty tensors from the provider."""
        bound = self._bind(0)
        self._host("lengths")[:] = 0
        try:
            bound.run()
        except StepError:
            self.runtime.least_chunks = 1

    def _ready(self, n: int) -> tuple[_Bound, int | None]:
        if self._generation != self.state.generation:
            self._bound, self._generation = {}, self.state.generation
        if n not in self._bound:
            bound = self._bind(n)
            graph_id = next(self.runtime.graph_ids) if self.runtime.graphs else None
            if graph_id is not None:
                # ONNX Runtime runs a graph several times until it is captured. Rows of length 0 do not notice.
                self._host("lengths")[:] = 0
                bound.run(graph_id)
            self._bound[n] = bound, graph_id
        return self._bound[n]

    def _bind(self, n: int) -> _Bound:
        bound = _Bound(self.runtime, self.state)
        for name, buffer in (*self.inputs.items(), ("completing", self.completing[n])):
            bound.put(name, buffer)
        bound.get("token", self.token)
        bound.get("logits", self.logits)
        return bound

    def _host(self, name: str) -> np.ndarray[Any, Any]:
        host = self.inputs[name].host
        assert host is not None
        return host
