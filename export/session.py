"""Runs a bundle: prefill in segments, cached decoding, generation. Needs numpy and ONNX Runtime, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from hsa_compile.export.bundle import GRAPH, LIBRARY, BundleError, Manifest, read_manifest
from hsa_compile.export.sampling import Floats, Sampler
from hsa_compile.export.state import SessionState

Ids = np.ndarray[Any, np.dtype[np.int64]]

# Tokens of a prefill segment. Function bodies gather the keys and values of every token, so they take fewer.
SEGMENT = 512
SEGMENT_BY_FUNCTIONS = 128

# The first with TensorScatter on the CPU, by which a step writes the chunk memory in place.
MINIMUM_RUNTIME = (1, 25)


class Session:
    """A bundle opened for inference on the CPU, and the text it has seen.

    Args:
        directory: the bundle.
        fused: run the operators by the bundle's compiled kernels; False runs them by the function bodies in the graph,
            in a plain ONNX Runtime.
        threads: of ONNX Runtime, which also drive the kernels; None leaves the choice to it.
        reserve: tokens to allocate the chunk memory for at first; it grows by doubling.

    Raises:
        BundleError: the bundle is missing, damaged or foreign, or its kernels are not for this CPU.
        ValueError: ``threads`` or ``reserve`` is out of range.
    """

    def __init__(
        self, directory: Path | str, fused: bool = True, threads: int | None = None, reserve: int = 4096
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if reserve < 0:
            raise ValueError(f"reserve must not be negative, got {reserve}")
        self.directory = Path(directory)
        self.fused = fused
        self.manifest = read_manifest(self.directory, [GRAPH, LIBRARY] if fused else [GRAPH])
        self.vocab_size = int(self.manifest.model["vocab_size"])
        self.chunk_size = int(self.manifest.model["chunk_size"])
        self.segment = SEGMENT if fused else SEGMENT_BY_FUNCTIONS
        self._reserve = reserve
        self._runtime = _runtime(self.directory, self.manifest, fused, threads)
        self.reset()

    def reset(self, batch: int = 1) -> None:
        """Forgets the text; the next one may be a batch of several that advance in lock-step."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        capacity = -(-self._reserve // self.chunk_size)
        self.state = SessionState(self.manifest.state, batch, self.chunk_size, capacity)

    @property
    def position(self) -> int:
        """Tokens seen since the last reset."""
        return self.state.position

    def step(self, ids: Sequence[int] | Sequence[Sequence[int]] | Ids) -> Floats:
        """Reads the next tokens in one run and returns the logits after each of them.

        Args:
            ids: [L] or [batch, L], L >= 1.

        Returns:
            float32 [batch, L, V].

        Raises:
            ValueError: there is no token, or one is not in 0 … V-1, or the batch is not that of the text.
        """
        checked = self._checked(ids)
        return self._run(checked, np.arange(checked.shape[1]))

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]] | Ids, segment: int | None = None) -> Floats:
        """Reads tokens in segments, so that memory beyond the state stays bounded.

        Args:
            ids: [L] or [batch, L], L >= 1.
            segment: tokens a run; None takes ``self.segment``.

        Returns:
            Logits after the last token, float32 [batch, V].

        Raises:
            ValueError: as ``step``, or the segment is not positive.
        """
        checked = self._checked(ids)
        length = self.segment if segment is None else segment
        if length < 1:
            raise ValueError(f"segment must be at least 1, got {length}")
        self.state.make_room(checked.shape[1])
        total = checked.shape[1]
        for start in range(0, total, length):
            part = checked[:, start : start + length]
            last = np.arange(part.shape[1])[-1 if start + length >= total else part.shape[1] :]
            logits = self._run(part, last)
        return logits[:, 0]

    def generate(
        self,
        prompt_ids: Sequence[int] | Ids,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """Continues the text with the prompt and then with new tokens, which it yields as they are made.

        The last token that is yielded has not been read: pass it with what follows to continue the same text.

        Args:
            prompt_ids: [L], L >= 1; it comes after what the session has seen, see ``reset``.
            max_new_tokens: at most this many.
            temperature: 0 is greedy.
            top_p: samples from the fewest tokens that hold this much of the probability.
            seed: of the sampling.
            stop_ids: tokens that end the text; they are not yielded.

        Raises:
            ValueError: a value is out of range, the prompt is empty, or the text is a batch of several.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        if self.state.batch != 1:
            raise ValueError("generate continues one text; use reset() first")
        return self._generate(
            self._checked(prompt_ids), max_new_tokens, Sampler(temperature, top_p, seed), set(stop_ids)
        )

    def _generate(self, prompt: Ids, count: int, sample: Sampler, stop: set[int]) -> Iterator[int]:
        logits = self.prefill(prompt)
        for left in reversed(range(count)):
            token = sample(logits[0])
            if token in stop:
                return
            yield token
            if left:
                logits = self._run(np.array([[token]]), np.zeros(1, np.int64))[:, 0]

    def _checked(self, ids: Any) -> Ids:
        array = np.asarray(ids)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[0] != self.state.batch:
            raise ValueError(f"ids must be [L] or [batch={self.state.batch}, L], got shape {list(array.shape)}")
        if array.shape[1] == 0:
            raise ValueError("there are no tokens; give at least one")
        if array.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, got {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids must lie in 0 … {self.vocab_size - 1}, found {low if low < 0 else high}")
        return array.astype(np.int64)

    def _run(self, ids: Ids, logits_at: Ids) -> Floats:
        """One run of the graph: logits [batch, len(logits_at), V]. The memory is bound as past and present both."""
        state = self.state
        state.make_room(ids.shape[1])
        binding = self._runtime.io_binding()
        inputs = {"input_ids": np.ascontiguousarray(ids), "logits_at": np.asarray(logits_at, np.int64)}
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        for name, value in state.small.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_output(f"present.{name}", "cpu")
        for name, value in state.memory.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._runtime.run_with_iobinding(binding)
        logits, *made = binding.get_outputs()
        state.advance(ids.shape[1], dict(zip(state.small, made)))
        result: Floats = logits.numpy()
        return result


def _runtime(directory: Path, manifest: Manifest, fused: bool, threads: int | None) -> ort.InferenceSession:
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < MINIMUM_RUNTIME:
        wanted = ".".join(map(str, MINIMUM_RUNTIME))
        raise BundleError(
            f"bundles need ONNX Runtime {wanted} or later, this is {ort.__version__}; pip install -U onnxruntime"
        )
    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        if fused:
            manifest.check_target()
            options.register_custom_ops_library(str(directory / LIBRARY))
        return ort.InferenceSession(str(directory / GRAPH), options, providers=["CPUExecutionProvider"])
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot open {directory}: {error}") from error
