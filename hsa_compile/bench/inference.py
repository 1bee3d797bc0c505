"""Prefill and decode of a model by length of the context, with the chunk memory on the GPU and off it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.bench.record import Timing, timed, timed_gpu
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.graph import GraphDecoder
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import prefill, short_prefill
from hsa_compile.model.state import State

log = logging.getLogger("hsa_compile")

SEGMENT = 32_768  # tokens a prefill step: GPUs are busy with it, and what it makes is small beside a memory
_KINDS: dict[str, Callable[..., tuple[Tensor, State]]] = {"short": short_prefill, "full": prefill}


def inference_model(config: ModelConfig, device: torch.device) -> HsaModel:
    """New weights: speed does not depend on what was learnt, but for how much neighbouring selections overlap."""
    torch.manual_seed(0)
    with device:
        model = HsaModel(config).eval()
    return model.to(torch.bfloat16) if device.type == "cuda" else model


@dataclass
class OperatorClock:
    """Time spent in each operator, by events of the device."""

    device: torch.device
    spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            begin = self._now()
            result = function(*arguments)
            self.spans.setdefault(name, []).append((begin, self._now()))
            return result

        return timed_call

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, name: str) -> float:
        """Of all calls; the device must be done."""
        spans = self.spans.get(name, [])
        if self.device.type != "cuda":
            return 1e3 * sum(end - begin for begin, end in spans)
        return sum(begin.elapsed_time(end) for begin, end in spans)


@contextmanager
def operator_clock(device: torch.device) -> Iterator[OperatorClock]:
    """Times the operators within the block, whichever path computes them."""
    clock, before = OperatorClock(device), (dispatch.select, dispatch.attention)
    dispatch.select = clock.timing("selection", before[0])
    dispatch.attention = clock.timing("attention", before[1])
    try:
        yield clock
    finally:
        dispatch.select, dispatch.attention = before


def prefill_rows(
    model: HsaModel, lengths: Sequence[int], seconds: float, segment: int = SEGMENT
) -> Iterator[dict[str, Any]]:
    """Short and whole prefill by length, ascending; a kind ends where the memory does, or its time: the first's is half
    of all."""
    device = model.embedding.weight.device
    ends = time.perf_counter() + seconds
    for others, (kind, run) in zip(reversed(range(len(_KINDS))), _KINDS.items()):
        kind_ends = ends - (ends - time.perf_counter()) * others / len(_KINDS)
        last: tuple[int, dict[str, float]] | None = None
        for L in sorted(lengths):
            if last is not None and _expected(kind, L, *last) > kind_ends - time.perf_counter():
                log.warning("no time left for a %s prefill of %d tokens", kind, L)
                break
            try:
                found = _prefill(model, L, run, min(segment, L), device)
            except torch.OutOfMemoryError:
                log.warning("a context of %d tokens does not fit into the GPU's memory", L)
                break
            last = L, found
            keys = {"variant": model.config.architecture, "L": L, "batch": 1, "devices": 1, "prefill": kind}
            times = {name: round(found[name], 3) for name in ("selection_ms", "attention_ms")}
            yield {**keys, "metric": "prefill_tokens_per_s", "value": round(L / found["ttft_ms"] * 1e3, 1), **times}
            yield {**keys, "metric": "ttft_ms", "value": round(found["ttft_ms"], 3), **times}
            if "peak_gib" in found:
                yield {**keys, "metric": "peak_gib", "value": round(found["peak_gib"], 3)}


def _expected(kind: str, L: int, before: int, found: dict[str, float]) -> float:
    """Seconds of a prefill of L tokens by what one of ``before`` tokens took: linear, but for the selection of all."""
    growth, selection = L / before, found["selection_ms"] / 1e3
    rest = found["ttft_ms"] / 1e3 - selection
    return rest * growth + selection * growth ** (2 if kind == "full" else 1)


def _prefill(model: HsaModel, L: int, run: Callable[..., Any], segment: int, device: torch.device) -> dict[str, float]:
    cuda = device.type == "cuda"
    ids = torch.randint(0, model.config.vocab_size, (1, L), device=device)
    run(model, ids[:, : 2 * segment], segment)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    with operator_clock(device) as clock:
        started = time.perf_counter()
        run(model, ids, segment)
        if cuda:
            torch.cuda.synchronize()
        found = {"ttft_ms": 1e3 * (time.perf_counter() - started)}
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found | {f"{name}_ms": clock.milliseconds(name) for name in ("selection", "attention")}


def synthetic_state(model: HsaModel, context: int, offload: bool) -> State:
    """As after a text of ``context`` tokens, a multiple of S: a memory of random chunks, and full windows."""
    c = model.config
    state = model.start(1, context // c.chunk_size + 1, offload)
    for x in (state.mem_k, state.mem_v, state.landmark):
        x.normal_()
    ring = (1, c.window - 1, c.swa_kv_heads, c.swa_head_dim)
    rings = [[torch.randn(ring).to(x) for x in side] for side in (state.swa_k, state.swa_v)]
    counts = (torch.full_like(state.position, n) for n in (context, context // c.chunk_size))
    position, chunks = counts
    return replace(state, position=position, chunks=chunks, swa_k=rings[0], swa_v=rings[1])


def decode_rows(model: HsaModel, contexts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Milliseconds a token of one text by context, chunk memory on the device and on the host; on GPUs from a graph."""
    for context in sorted(contexts):
        for place in ("device", "host"):
            try:
                timing = _decode(model, context // model.config.chunk_size * model.config.chunk_size, place == "host")
            except (torch.OutOfMemoryError, RuntimeError) as failure:
                log.warning("decoding at %d tokens, memory on the %s: %.200s", context, place, failure)
                continue
            yield {
                "variant": model.config.architecture, "L": context, "batch": 1, "devices": 1, "memory": place,
                "metric": "decode_ms", "value": timing.median, "low": timing.least, "high": timing.most,
            }  # fmt: skip


def _decode(model: HsaModel, context: int, offload: bool) -> Timing:
    decoder = GraphDecoder(model, synthetic_state(model, context, offload))
    ids = torch.zeros(1, 1, dtype=torch.int64, device=decoder.ids.device)
    if not ids.is_cuda:
        return timed(lambda: decoder.step(ids), seconds=0.3, least=5, most=32)
    decoder.step(ids)
    return timed_gpu(decoder.graphs[0].replay)
