"""The ways to run a model that the suite ``e2e`` compares, each in a process of its own:
``python -m hsa_compile.bench.runtimes`` answers requests of ``schedules/worker.py``.

A process of its own, so that what a runtime takes of memory is its own, and one that runs out of it ends alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.bench.dense import DenseModel
from hsa_compile.bench.dense_onnx import DenseSession
from hsa_compile.bench.record import Timing, timed
from hsa_compile.export.bundle import read_manifest
from hsa_compile.export.sampling import Sampler
from hsa_compile.export.session import Ids, Session
from hsa_compile.model.checkpoint import load_checkpoint
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.graph import GraphDecoder, capturable
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import SEGMENT, prefill, short_prefill
from hsa_compile.model.state import State
from hsa_compile.schedules.worker import serve

MORE_TOKENS = 256  # that are decoded after a context at most: there is room for them
TIMED_TOKENS = 127  # of them; as many as a chunk has go before on a GPU, where each captures a CUDA graph
GPU_SEGMENT = 32_768  # tokens a prefill step in PyTorch
# Prompts from here on are read once, after a part of them has warmed up what they take.
LONG, PART = 1 << 20, 1 << 17
# Tokens up to which a prompt is read through all layers, too: 32 M would take an H100 a minute.
LONGEST_FULL = 1 << 22
GREEDY = Sampler()


@dataclass(frozen=True)
class Setup:
    """What to run.

    Args:
        runtime: of ``RUNTIMES``.
        bundle: the exported model.
        checkpoint: the same in PyTorch; without it, new weights of the bundle's config.
        device: "cpu" or "cuda".
        longest: tokens of the longest context that it is asked for.
        threads: on a CPU.
    """

    runtime: str
    bundle: str
    checkpoint: str | None
    device: str
    longest: int
    threads: int

    def config(self) -> ModelConfig:
        """Of the bundle's model."""
        return ModelConfig.from_dict(read_manifest(Path(self.bundle), []).model)


class Runtime(Protocol):
    """One way to run a model, on one text. What it does is done when it returns."""

    dtype: str

    def prefill(self, ids: Ids) -> None:
        """Reads a prompt anew, all layers on all of its tokens."""
        ...

    def first_token(self, ids: Ids) -> None:
        """Reads a prompt anew by the fastest way to its next token."""
        ...

    def decode(self) -> None:
        """Reads one more token and chooses the next."""
        ...


class TorchRuntime:
    """The sparse model in PyTorch, on one of the operators' paths; on a GPU, compiled operators decode from CUDA
    graphs."""

    def __init__(self, setup: Setup) -> None:
        compiled: dispatch.Backend = "auto" if setup.device == "cuda" else "compiled"
        self.backend: dispatch.Backend = "eager" if setup.runtime == "eager" else compiled
        with torch.device(setup.device):
            torch.manual_seed(0)
            model = load_checkpoint(setup.checkpoint) if setup.checkpoint else HsaModel(setup.config())
        self.dtype = read_manifest(Path(setup.bundle), []).dtype
        self.model = model.eval().to(setup.device, getattr(torch, self.dtype))
        self.segment = GPU_SEGMENT if setup.device == "cuda" else SEGMENT
        self.state: Any = None
        self._decoder: GraphDecoder | None = None

    def prefill(self, ids: Ids) -> None:
        room = (len(ids) + MORE_TOKENS) // self.model.config.chunk_size + 1
        self._read(ids, lambda m, prompt: prefill(m, prompt, self.segment, state=m.start(1, room)))

    def first_token(self, ids: Ids) -> None:
        room = MORE_TOKENS // self.model.config.chunk_size + 1
        self._read(ids, lambda m, prompt: short_prefill(m, prompt, self.segment, room=room))

    def _read(self, ids: Ids, read: Callable[[HsaModel, Tensor], tuple[Tensor, State]]) -> None:
        """A memory with room for what is decoded: one that grows takes the graphs with it."""
        self._decoder = self.state = None
        at = self.model.embedding.weight.device
        with dispatch.use_backend(self.backend), torch.no_grad():
            logits, self.state = read(self.model, torch.from_numpy(ids)[None].to(at))
            self.token = logits.argmax(-1, keepdim=True)
            if self.backend != "eager" and at.type == "cuda" and capturable(self.model, self.state):
                self._decoder, self.state = GraphDecoder(self.model, self.state), None
        self.token.tolist()  # waits for the GPU

    def decode(self) -> None:
        with dispatch.use_backend(self.backend), torch.no_grad():
            if self._decoder is not None:
                logits = self._decoder.step(self.token)
            else:
                logits, self.state = self.model.step(self.token, self.state)
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        self.token.tolist()


class OrtRuntime:
    """The bundle in ONNX Runtime."""

    def __init__(self, setup: Setup) -> None:
        provider: Any = setup.device
        self._opened = Session(setup.bundle, provider=provider, threads=setup.threads, reserve=0)
        self.dtype = self._opened.manifest.dtype
        self._session, self._reserve = self._opened, 0

    def prefill(self, ids: Ids) -> None:
        self._start(ids)
        self.token = int(self._session.prefill(ids).argmax())

    def first_token(self, ids: Ids) -> None:
        self._start(ids)
        self.token = int(self._session.short_prefill(ids).argmax())

    def _start(self, ids: Ids) -> None:
        """A memory of just the size: one that doubled would not fit beside what it grew from."""
        if (reserve := len(ids) + MORE_TOKENS) > self._reserve:
            self._session = self._opened
            self._session, self._reserve = self._opened.fork(reserve=reserve), reserve
        self._session.reset()

    def decode(self) -> None:
        one = np.ones(1, np.int64)
        self.token = int(self._session.next(one * self.token, one, [GREEDY])[0])


class DenseRuntime:
    """A dense model of the same size in ONNX Runtime."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(0)
        model = DenseModel(setup.config(), setup.longest + MORE_TOKENS)
        self.session = DenseSession(model, setup.device, setup.threads)
        self.dtype = self.session.dtype

    def prefill(self, ids: Ids) -> None:
        self.session.reset()
        self.token = int(self.session.prefill(ids).argmax())

    def first_token(self, ids: Ids) -> None:
        self.prefill(ids)

    def decode(self) -> None:
        if self.session.position == self.session.capacity:
            self.session.position -= 1  # no runtime is that fast; the cost is that of the longest context
        self.token = int(self.session.prefill([self.token]).argmax())


# Those that end early come first: the others get what they leave of the time.
RUNTIMES: dict[str, Callable[[Setup], Runtime]] = {
    "eager": TorchRuntime, "ort-dense": DenseRuntime, "compiled": TorchRuntime, "ort": OrtRuntime,
}  # fmt: skip


class MemoryUse:
    """Bytes that this process has taken since this was made: at most so far on a CPU, for weights, state and all that
    a step needs; on a GPU what its allocators hold, which they do not give back."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._before = self._now()

    def peak(self) -> int:
        return self._now() - self._before

    def _now(self) -> int:
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) << 10


def measure(runtime: Runtime, ids: Ids, memory: MemoryUse, graphs: int) -> list[dict[str, Any]]:
    """The rows of one context: rates, latencies in ms, memory in GiB.

    Args:
        graphs: tokens to decode first, where each captures a CUDA graph.
    """
    rows: list[dict[str, Any]] = []
    if len(ids) <= LONGEST_FULL:
        fill = _timed_reading(runtime.prefill, ids)
        rate = {"value": fill.median, "low": fill.most, "high": fill.least}
        rates = {key: round(len(ids) / ms * 1e3, 1) for key, ms in rate.items()}
        rows.append({"metric": "prefill_tokens_per_s", **rates})
    first = _timed_reading(runtime.first_token, ids)
    for _ in range(graphs):
        runtime.decode()
    decode = timed(runtime.decode, seconds=0.3, least=5, most=TIMED_TOKENS)
    return [
        *rows,
        {"metric": "ttft_ms", "value": first.median, "low": first.least, "high": first.most},
        {"metric": "decode_ms", "value": decode.median, "low": decode.least, "high": decode.most},
        {"metric": "peak_gib", "value": round(memory.peak() / (1 << 30), 4)},
    ]


def _timed_reading(read: Callable[[Ids], None], ids: Ids) -> Timing:
    if len(ids) < LONG:
        return timed(lambda: read(ids), seconds=0.3, least=1)
    read(ids[:PART])
    started = time.perf_counter()
    read(ids)
    took = 1e3 * (time.perf_counter() - started)
    return Timing(took, took, took)


_open: dict[str, Any] = {}


def _handle(message: dict[str, Any]) -> dict[str, Any]:
    if "setup" in message:
        setup = _open["setup"] = Setup(**message["setup"])
        torch.set_num_threads(setup.threads)
        _open["memory"] = MemoryUse(setup.device)
        _open["runtime"] = RUNTIMES[setup.runtime](setup)
        return {"dtype": _open["runtime"].dtype}
    setup = _open["setup"]
    ids = np.random.default_rng(message["seed"]).integers(0, setup.config().vocab_size, message["length"])
    graphs = setup.config().chunk_size if setup.device == "cuda" else 0
    return {"rows": measure(_open["runtime"], ids, _open["memory"], graphs)}


if __name__ == "__main__":
    serve(_handle)
