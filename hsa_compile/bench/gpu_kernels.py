"""The operators on a GPU: compiled and Triton kernels beside public ones and dense attention, checked, then timed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hsa_compile import dispatch, ops
from hsa_compile.bench import verify
from hsa_compile.bench.kernels import Shape, selections_of
from hsa_compile.bench.peers import Peer, available
from hsa_compile.bench.record import Timing, common_keys, timed_gpu, timed_replay
from hsa_compile.bench.selections import union_ratio
from hsa_compile.ir import ChunkSelect, Problem
from hsa_compile.schedules import choose, gpu_target
from hsa_compile.schedules.choice import Backend
from hsa_compile.schedules.space import searched

log = logging.getLogger("hsa_compile")

OURS = {"ours": "compiled", "triton": "triton"}
# Dense attention and what gathers all pairs take too long, or too much memory, beyond these.
DENSE_TOKENS, GATHERED_BYTES = 65_536, 16 << 30
CHUNK, SELECTED = 64, 16
MANY_CHUNKS = 4096  # from which all scores of all tokens are too many
# B, L, C, Dr: whole contexts, a segment of a long one, and single tokens.
SELECT_SIZES = (
    *((1, L, L // CHUNK, Dr) for L in (16_384, 131_072) for Dr in (64, 128, 1024)),
    (1, 1_048_576, 16_384, 64), (1, 8192, 262_144, 64), (1, 1, 524_288, 64), (64, 1, 8192, 64),
)  # fmt: skip
DECODE_SIZES = ((1, 1 << 20), (1, 1 << 25), (8, 1 << 22), (64, 1 << 19))  # B, tokens of context


def default_shapes(lengths: Sequence[int] = ()) -> list[Shape]:
    """Training length, long contexts, wide heads, a million tokens, and groups of 8, 4, 2 and 1; all, or of some
    lengths."""
    main = ((8, 4096, 16, 1, 64, 8), (1, 32768, 16, 1, 64, 8), (1, 65536, 16, 1, 64, 16), (1, 32768, 32, 2, 128, 16))
    shapes = [
        Shape(L, Hq, Hkv, D, K, selection=kind, B=B, dtype="bfloat16")
        for B, L, Hq, Hkv, D, K in main
        for kind in ("local", "random")
    ]
    shapes.append(Shape(1_048_576, 16, 1, 64, 8, dtype="bfloat16"))
    shapes += [Shape(32768, 16, Hkv, 64, 16, dtype="bfloat16") for Hkv in (2, 4, 8, 16)]
    return [shape for shape in shapes if not lengths or shape.L in lengths]


def run(
    shapes: Sequence[Shape],
    seed: int = 0,
    progress: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Checks, then times all implementations of all shapes on the current GPU; returns the suite's measurements.

    Args:
        progress: is told what comes next.
        keep: is given all measurements so far, now and then.
    """
    common = {**common_keys("kernels", seed, "cuda"), "ceiling_tflops": matmul_tflops(), "copy_tbs": copy_tbs()}
    rows: list[dict[str, Any]] = []
    for name, part in _parts(shapes, seed):
        progress(name)
        rows += [{**common, **row} for row in part]
        torch.cuda.empty_cache()
        keep(rows)
    return rows


def _parts(shapes: Sequence[Shape], seed: int) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    for shape in shapes:
        name = f"B {shape.B}, L {shape.L}, heads {shape.q_heads}/{shape.kv_heads}, {shape.selection}"
        yield name, ({**shape.keys(), **row} for row in _attention_rows(shape, seed))
    for B, L, C, Dr in SELECT_SIZES:
        yield f"selection, B {B}, L {L}, C {C}, Dr {Dr}", _select_rows(B, L, C, Dr, seed)
    for B, context in DECODE_SIZES:
        yield f"decoding, B {B}, {context} tokens", _decode_rows(B, context, seed)


def matmul_tflops(size: int = 8192) -> float:
    """bf16 matrix-product rate of this GPU: the ceiling that kernels are held against."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return round(2 * size**3 / timed_gpu(lambda: a @ b).median / 1e9, 1)


def copy_tbs(size: int = 1 << 30) -> float:
    """Terabytes a second of a device-to-device copy, read and written bytes counted."""
    a = torch.empty(size, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return round(2 * size / timed_gpu(lambda: b.copy_(a)).median / 1e9, 3)


def _inputs(shape: Shape, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    B, L, S, Hkv, D = shape.B, shape.L, shape.chunk_size, shape.kv_heads, shape.head_dim
    dtype = getattr(torch, shape.dtype)
    q = torch.randn(B, L, shape.q_heads, D, device="cuda", dtype=dtype)
    k, v = (torch.randn(B, L // S * S, Hkv, D, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v, *selections_of(shape, seed, "cuda")


def _attention_rows(shape: Shape, seed: int) -> Iterator[dict[str, Any]]:
    inputs = _inputs(shape, seed)
    work = {
        "forward": shape.problem.flops(shape.B, shape.L),
        "backward": shape.problem.backward_flops(shape.B, shape.L),
    }
    shared = {"op": "attention", "union_ratio": round(union_ratio(inputs[3]), 3)}

    def row(impl: str, pass_name: str, timing: Timing, more: dict[str, Any] | None = None) -> dict[str, Any]:
        tflops = round(work[pass_name] / timing.median / 1e9, 2)
        return {**shared, "impl": impl, "pass": pass_name, **timing.fields(), "tflops": tflops, **(more or {})}

    for impl, backend in OURS.items():
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            try:
                for pass_name, timing, more in _ours(shape, inputs):
                    more = {**more, "schedule": schedule(shape.problem, pass_name, shape.L, backend)}
                    yield row(impl, pass_name, timing, more)
            except (RuntimeError, ValueError, AssertionError) as failure:
                log.warning("%s fails on %s: %.300s", impl, shape, failure)
    for impl, peer in available(shape.problem.groups).items():
        if impl.startswith("sdpa") and shape.L > DENSE_TOKENS:
            continue
        if impl == "varlen" and inputs[3].numel() * shape.problem.groups * shape.head_dim * 8 > GATHERED_BYTES:
            continue
        try:
            for pass_name, timing in _time_peer(peer, inputs, shape.chunk_size):
                yield row(impl, pass_name, timing)
        except (RuntimeError, AssertionError, torch.OutOfMemoryError) as failure:
            log.warning("%s fails on %s: %.300s", impl, shape, failure)


def _ours(shape: Shape, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Timing, dict[str, Any]]]:
    """Checks and times the two passes of the backend in use."""
    grad, S = torch.randn_like(inputs[0]), shape.chunk_size

    def forward() -> Tensor:
        return ops.chunk_attention(*inputs, S)

    def backward() -> tuple[Tensor, ...]:
        return ops.chunk_attention_backward(grad, *inputs, S)

    errors = {"tolerance": verify.TOLERANCE}
    errors["error"] = _right(verify.attention_error(shape.problem, inputs, forward()))
    yield "forward", timed_gpu(forward), errors
    errors["error"] = _right(verify.gradients_error(shape.problem, grad, inputs, backward()))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward()
    peak = (torch.cuda.max_memory_allocated() - before) >> 20
    yield "backward", timed_gpu(backward), {**errors, "peak_mib": peak}


def schedule(problem: Problem, pass_name: str, length: int, backend: str) -> str:
    """The tile that a backend of ``OURS`` takes on the current GPU, in a few words."""
    target = gpu_target(torch.cuda.get_device_capability())
    assert target is not None, "measured on a GPU that has kernels"
    of: Backend = "triton" if backend == "triton" else "tilelang"
    return searched(choose(problem, pass_name, target.name, length, of).tile, problem, pass_name, target.name, length)


def _right(error: float) -> float:
    """Raises AssertionError if it is not: what is wrong is not timed."""
    assert error <= verify.TOLERANCE, f"off by {error:.2g} of the largest value ({verify.TOLERANCE:.2g} allowed)"
    return error


def _time_peer(peer: Peer, inputs: tuple[Tensor, ...], chunk_size: int) -> Iterator[tuple[str, Timing]]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    weights = inputs[4].detach().requires_grad_()
    with torch.no_grad():
        yield "forward", timed_gpu(lambda: peer(q, k, v, inputs[3], weights, chunk_size))
    o = peer(q, k, v, inputs[3], weights, chunk_size)
    wanted = [x for x in (q, k, v, weights) if x is not weights or peer.__name__ == "varlen_chunks"]
    grad = torch.randn_like(o)
    yield "backward", timed_gpu(lambda: torch.autograd.grad(o, wanted, grad, retain_graph=True))


def _select_rows(B: int, L: int, C: int, Dr: int, seed: int) -> Iterator[dict[str, Any]]:
    """Selection by the last L tokens of contexts of C chunks; of whole contexts also the naive way, by ``topk``."""
    torch.manual_seed(seed)
    problem = ChunkSelect(1, 1, Dr, CHUNK, SELECTED, dtype="bfloat16")
    q_r, landmark = (torch.randn(B, n, 1, Dr, device="cuda", dtype=torch.bfloat16) for n in (L, C))
    position, chunks = (torch.full((B,), n, device="cuda") for n in (C * CHUNK - L, C))
    inputs, options = (q_r, landmark, position, chunks), (1, CHUNK, SELECTED)
    whole = C * CHUNK == L
    work = problem.flops(B, L, C) / (2 if whole else 1)  # causal: half of the scores
    keys = {"op": "select", "B": B, "L": L, "C": C, "Hr": 1, "Dr": Dr, "S": CHUNK, "K": SELECTED, "dtype": "bfloat16"}

    def row(impl: str, timing: Timing, pass_name: str = "forward", **more: Any) -> dict[str, Any]:
        rate = {"tflops": round(work / timing.median / 1e9, 2)}
        return {**keys, "impl": impl, "pass": pass_name, **timing.fields(), **rate, **more}

    for impl, backend in OURS.items():
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            try:
                indices, scores = ops.chunk_select(*inputs, *options)
                error = _right(verify.select_error(problem, inputs, indices, scores))
                clock = timed_gpu if whole else timed_replay
                timing = clock(lambda: ops.chunk_select(*inputs, *options))
                chosen = schedule(problem, "forward", L, backend)
                yield row(impl, timing, error=error, tolerance=verify.TOLERANCE, schedule=chosen)
                if whole:
                    given = (scores, q_r, landmark, indices, CHUNK)
                    timing = timed_gpu(functools.partial(ops.chunk_select_backward, *given))
                    rate = round(4 * B * L * SELECTED * Dr / timing.median / 1e9, 2)
                    yield {**row(impl, timing, "backward"), "tflops": rate}
            except (RuntimeError, ValueError, AssertionError) as failure:
                log.warning("%s selection fails at L %d, C %d, Dr %d: %.300s", impl, L, C, Dr, failure)
    if whole and C < MANY_CHUNKS:
        hidden = (torch.arange(C, device="cuda") + 1) * CHUNK > torch.arange(L, device="cuda").unsqueeze(-1)

        def naive() -> object:
            return (q_r[0, :, 0] @ landmark[0, :, 0].T).float().masked_fill_(hidden, float("-inf")).topk(SELECTED)

        yield row("topk", timed_gpu(naive))


def _decode_rows(B: int, context: int, seed: int) -> Iterator[dict[str, Any]]:
    """One token a sequence: selection over all landmarks, then attention to the chunks, from a CUDA graph."""
    torch.manual_seed(seed)
    C, Hq, D, Dr, K = context // CHUNK, 16, 64, 64, 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, q_r, landmark = normal(B, 1, Hq, D), normal(B, 1, 1, Dr), normal(B, C, 1, Dr)
    k, v = normal(B, C * CHUNK, 1, D), normal(B, C * CHUNK, 1, D)
    position, chunks = (torch.full((B,), n, device="cuda") for n in (context, C))

    def step() -> Tensor:
        indices, scores = ops.chunk_select(q_r, landmark, position, chunks, 1, CHUNK, K)
        return ops.chunk_attention(q, k, v, indices, scores.softmax(-1), CHUNK)

    moved = 2 * B * (C * Dr + K * CHUNK * 2 * D)  # bytes: all landmarks, the chunks' keys and values
    work = 2 * B * (C * Dr + 2 * K * CHUNK * Hq * D)
    for impl, backend in OURS.items():
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            try:
                step()
                timing = timed_replay(step)
            except (RuntimeError, ValueError) as failure:
                log.warning("%s decoding fails at B %d, %d tokens: %.300s", impl, B, context, failure)
                continue
        yield {
            "op": "decode", "pass": "forward", "impl": impl, "B": B, "L": 1, "context": context, "Hq": Hq, "Hkv": 1,
            "D": D, "Hr": 1, "Dr": Dr, "S": CHUNK, "K": K, "dtype": "bfloat16", **timing.fields(),
            "tflops": round(work / timing.median / 1e9, 4), "tbs": round(moved / timing.median / 1e9, 3),
        }  # fmt: skip
