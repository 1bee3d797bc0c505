"""The operators on a GPU: compiled and Triton kernels beside public ones and dense attention, checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hsa_compile import dispatch, eager, ops
from hsa_compile.bench.kernels import Shape
from hsa_compile.bench.peers import Peer, available
from hsa_compile.bench.record import Timing, common_keys, timed_gpu
from hsa_compile.bench.selections import synthetic_selection, union_ratio
from hsa_compile.ir import ChunkSelect

OURS = {"ours": "compiled", "triton": "triton"}
CHECKED_TOKENS = 128
# Dense attention and what gathers all pairs take too long, or too much memory, beyond these.
DENSE_TOKENS, GATHERED_BYTES = 65_536, 16 << 30
SELECT_LENGTHS, SELECT_WIDTHS, SELECTED = (16_384, 131_072, 1_048_576), (64, 128, 1024), 16


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


def run(shapes: Sequence[Shape], seed: int = 0, progress: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Checks, then times all implementations of all shapes on the current GPU; returns the suite's measurements."""
    common = {**common_keys("kernels", seed, "cuda"), "ceiling_tflops": matmul_tflops(), "copy_tbs": copy_tbs()}
    rows = []
    for shape in shapes:
        progress(f"B {shape.B}, L {shape.L}, heads {shape.q_heads}/{shape.kv_heads}, {shape.selection}")
        rows += [{**common, **shape.keys(), **row} for row in _attention_rows(shape, seed, progress)]
        torch.cuda.empty_cache()
    for L in SELECT_LENGTHS:
        for Dr in SELECT_WIDTHS if L < 1 << 20 else SELECT_WIDTHS[:1]:
            progress(f"selection, L {L}, Dr {Dr}")
            rows += [{**common, **row} for row in _select_rows(L, Dr, seed, progress)]
    return rows


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
    indices = synthetic_selection(B, L, Hkv, shape.top_k, S, shape.selection, seed, "cuda")
    weights = torch.rand(indices.shape, device="cuda").masked_fill(indices < 0, float("-inf")).softmax(-1).nan_to_num()
    return q, k, v, indices, weights


def _errors(shape: Shape, inputs: tuple[Tensor, ...], o: Tensor) -> tuple[float, float]:
    """Largest error on some tokens against float32, and what is tolerated: twice that of a low-precision eager run."""
    q, k, v, indices, weights = inputs
    worst, low = 0.0, 0.0
    for at in (slice(0, 2 * CHECKED_TOKENS), slice(-CHECKED_TOKENS, None)):
        wide = (q[:, at].float(), k.float(), v.float())
        exact = eager.attention(*wide, indices[:, at], weights[:, at], shape.chunk_size, False)
        worst = max(worst, float((o[:, at].float() - exact).abs().max()))
        low = max(low, float((exact.to(q.dtype).float() - exact).abs().max()), 2**-9 * float(exact.abs().max()))
    return worst, 2 * low


def _attention_rows(shape: Shape, seed: int, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    inputs = _inputs(shape, seed)
    grad = torch.randn_like(inputs[0])
    work = {
        "forward": shape.problem.flops(shape.B, shape.L),
        "backward": shape.problem.backward_flops(shape.B, shape.L),
    }
    shared = {"op": "attention", "union_ratio": round(union_ratio(inputs[3]), 3)}

    def row(impl: str, pass_name: str, timing: Timing, **more: Any) -> dict[str, Any]:
        tflops = round(work[pass_name] / timing.median / 1e9, 2)
        return {**shared, "impl": impl, "pass": pass_name, **timing.fields(), "tflops": tflops, **more}

    for impl, backend in OURS.items():
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            try:
                o = ops.chunk_attention(*inputs, shape.chunk_size)
                error, tolerance = _errors(shape, inputs, o)
                if not error <= tolerance:
                    progress(f"{impl} is off by {error:.2g} (tolerance {tolerance:.2g}) on {shape}: not timed")
                    continue
                timing = timed_gpu(lambda: ops.chunk_attention(*inputs, shape.chunk_size))
                yield row(impl, "forward", timing, error=error, tolerance=tolerance)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                timing = timed_gpu(lambda: ops.chunk_attention_backward(grad, *inputs, shape.chunk_size))
                peak = (torch.cuda.max_memory_allocated() - before) >> 20
                yield row(impl, "backward", timing, peak_mib=peak)
            except (RuntimeError, ValueError) as failure:
                progress(f"{impl} fails on {shape}: {str(failure)[:200]}")
    for impl, peer in available(shape.problem.groups).items():
        if impl.startswith("sdpa") and shape.L > DENSE_TOKENS:
            continue
        if impl == "varlen" and inputs[3].numel() * shape.problem.groups * shape.head_dim * 8 > GATHERED_BYTES:
            continue
        try:
            for pass_name, timing in _time_peer(peer, inputs, shape.chunk_size):
                yield row(impl, pass_name, timing)
        except (RuntimeError, AssertionError, torch.OutOfMemoryError) as failure:
            progress(f"{impl} fails on {shape}: {str(failure)[:200]}")


def _time_peer(peer: Peer, inputs: tuple[Tensor, ...], chunk_size: int) -> Iterator[tuple[str, Timing]]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    weights = inputs[4].detach().requires_grad_()
    with torch.no_grad():
        yield "forward", timed_gpu(lambda: peer(q, k, v, inputs[3], weights, chunk_size))
    o = peer(q, k, v, inputs[3], weights, chunk_size)
    wanted = [x for x in (q, k, v, weights) if x is not weights or peer.__name__ == "varlen_chunks"]
    grad = torch.randn_like(o)
    yield "backward", timed_gpu(lambda: torch.autograd.grad(o, wanted, grad, retain_graph=True))


def _select_rows(L: int, Dr: int, seed: int, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(seed)
    problem = ChunkSelect(1, 1, Dr, 64, SELECTED, dtype="bfloat16")
    C = L // problem.chunk_size
    q_r, landmark = (torch.randn(1, n, 1, Dr, device="cuda", dtype=torch.bfloat16) for n in (L, C))
    position, chunks = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.full((1,), C, device="cuda")
    keys = {
        "op": "select", "pass": "forward", "B": 1, "L": L, "Hr": 1, "Dr": Dr, "S": 64, "K": SELECTED,
        "dtype": "bfloat16",
    }  # fmt: skip
    inputs = (q_r, landmark, position, chunks, 1, problem.chunk_size, problem.top_k)
    for impl, backend in OURS.items():
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            try:
                timing = timed_gpu(lambda: ops.chunk_select(*inputs))
            except (RuntimeError, ValueError) as failure:
                progress(f"{impl} selection fails at L {L}, Dr {Dr}: {str(failure)[:200]}")
                continue
        tflops = problem.flops(1, L, C) / 2 / timing.median / 1e9  # causal: half of the scores
        yield {**keys, "impl": impl, **timing.fields(), "tflops": round(tflops, 2)}
    if SELECT_LENGTHS[1] >= L:
        hidden = (torch.arange(C, device="cuda") + 1) * 64 > torch.arange(L, device="cuda").unsqueeze(-1)

        def naive() -> object:
            return (q_r[0, :, 0] @ landmark[0, :, 0].T).float().masked_fill_(hidden, float("-inf")).topk(SELECTED)

        timing = timed_gpu(naive)
        tflops = problem.flops(1, L, C) / 2 / timing.median / 1e9
        yield {**keys, "impl": "topk", **timing.fields(), "tflops": round(tflops, 2)}
