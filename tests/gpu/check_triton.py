"""The Triton path on a GPU: numbers against float64, repeats to the bit, no waiting for the device, and times.

    python tests/gpu/check_triton.py check [PART/PARTS]    numbers; parts may run side by side (compiling dominates)
    python tests/gpu/check_triton.py time [FILE]           milliseconds, as JSON lines

``pytest -m gpu`` runs the numbers too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hsa_compile import eager
from hsa_compile.bench.selections import synthetic_selection
from hsa_compile.ir import ChunkAttention, ChunkSelect

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit import attention_inputs, select_inputs

# Root mean square of the error over that of the reference. Half precisions round the softmax and its gradient before
# they are multiplied, as every fused attention does.
MOST_ERROR = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

ATTENTION = [  # (Hq, Hkv, D, S, K, off_by_one), (B, L, C)
    ((16, 1, 64, 64, 8, False), (2, 333, 9)),
    ((32, 2, 128, 64, 16, True), (1, 200, 20)),
    ((4, 4, 64, 64, 16, False), (2, 133, 7)),
    ((8, 4, 96, 32, 4, False), (1, 301, 11)),
    ((6, 2, 80, 48, 5, True), (2, 77, 5)),
    ((4, 1, 128, 16, 64, False), (1, 150, 90)),
    ((24, 3, 32, 64, 3, False), (1, 99, 6)),
    ((12, 1, 64, 100, 8, True), (1, 65, 4)),
    ((24, 1, 64, 256, 4, False), (1, 130, 3)),
    ((3, 3, 20, 1, 3, True), (3, 50, 40)),
]
SELECT = [  # (Hkv, Hr, Dr, S, K, window), (B, L, C)
    ((2, 2, 64, 16, 16, 0), (2, 4000, 250)),
    ((4, 1, 128, 16, 8, 64), (1, 3000, 300)),
    ((1, 1, 1024, 8, 5, 0), (1, 700, 400)),
    ((2, 2, 96, 64, 64, 0), (2, 1, 5000)),
    ((1, 1, 20, 64, 3, 0), (3, 7, 40)),
]
DTYPES = {
    "bfloat16": (len(ATTENTION), len(SELECT)), "float32": (len(ATTENTION), len(SELECT)), "float16": (3, 1),
}  # fmt: skip
SHAPES = [(8, 4096, 16, 1, 64, 8), (1, 65536, 16, 1, 64, 16), (1, 32768, 32, 2, 128, 16)]
GROUPS = [(1, 32768, 16, 16, 64, 16), (1, 32768, 16, 8, 64, 16), (1, 32768, 16, 4, 64, 16), (1, 32768, 16, 2, 64, 16)]


def _error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert bool(got.isfinite().all()), "poison, or garbage"
    if not want.numel():
        return 0.0
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-9))


def _without_waiting(function: Callable[..., object], *inputs: object) -> object:
    """The second call: compiling, which the first one did, may wait for the device."""
    first = function(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = function(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (first, second))):  # type: ignore[attr-defined]
        assert torch.equal(a, b), "a repeat differs"
    return second


def check_attention(case: tuple, shape: tuple, dtype: torch.dtype) -> dict[str, float]:
    from hsa_compile import triton_kernels

    problem = ChunkAttention(*case)
    S, off = problem.chunk_size, problem.off_by_one
    q, k, v, indices, weights = (x.cuda() for x in attention_inputs(problem, *shape, skew=3.0))
    indices[:, :20] = torch.where(torch.rand_like(weights[:, :20]) < 0.5, indices[:, :20], -1)
    indices[:, 5] = -1  # a row without any chunk
    weights[indices < 0] = torch.nan
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, torch.randn_like(q)))
    wide = [x.double() for x in (grad, q, k, v)]
    want = (
        eager.attention(*wide[1:], indices, weights.double(), S, off),
        *eager.attention_backward(*wide, indices, weights.double(), S, off),
    )
    got = (
        _without_waiting(triton_kernels.attention, q, k, v, indices, weights, S, off),
        *_without_waiting(triton_kernels.attention_backward, grad, q, k, v, indices, weights, S, off),  # type: ignore[misc]
    )
    errors = {name: _error(a, b) for name, a, b in zip(("o", "d_q", "d_k", "d_v", "d_w"), got, want)}
    assert max(errors.values()) < MOST_ERROR[dtype], errors
    return errors


def check_isolation(dtype: torch.dtype) -> None:
    """NaN in one token and in one chunk reach those alone that have to do with them."""
    from hsa_compile import triton_kernels

    problem = ChunkAttention(16, 1, 64, 64, 4)
    q, k, v, indices, weights = (x.cuda().nan_to_num() for x in attention_inputs(problem, 1, 64, 8))
    grad = torch.randn_like(q)
    q[:, 3] = torch.nan
    k[:, 128:192] = torch.nan
    v[:, 128:192] = torch.nan
    inputs = [x.to(dtype) for x in (grad, q, k, v)]
    options = (indices, weights, 64, False)
    o = triton_kernels.attention(*inputs[1:], *options)
    d_q = triton_kernels.attention_backward(*inputs, *options)[0]
    clean = ~((indices == 2) & (weights != 0)).any(-1)[0, :, 0]
    clean[3] = False
    assert bool(o[0, clean].isfinite().all())
    assert bool(d_q[0, clean].isfinite().all())
    assert bool(o[0, ~clean].isnan().any())


def check_select(case: tuple, shape: tuple, dtype: torch.dtype) -> dict[str, float]:
    from hsa_compile import triton_kernels

    problem = ChunkSelect(*case)
    options = (problem.kv_heads, problem.chunk_size, problem.top_k, problem.visible_lag)
    inputs = [x.cuda() for x in select_inputs(problem, *shape, ties=True)]
    q_r, landmark = (x.to(dtype) for x in inputs[:2])
    indices, scores = _without_waiting(triton_kernels.select, q_r, landmark, *inputs[2:], *options)  # type: ignore[misc]
    want, want_scores = eager.select(q_r, landmark, *inputs[2:], *options)
    assert torch.equal(indices, want), "exact scores, other chunks"
    errors = {"scores": _error(scores, want_scores.double())}
    landmark, grad = landmark.nan_to_num(), torch.randn_like(scores)
    got = _without_waiting(triton_kernels.select_backward, grad, q_r, landmark, indices)
    double = eager.select_backward(grad, q_r.float(), landmark.float(), indices)
    errors |= {name: _error(a, b.double()) for name, a, b in zip(("d_q", "d_landmark"), got, double)}  # type: ignore[call-overload]
    assert max(errors.values()) < MOST_ERROR[dtype], errors
    return errors


def check_streams() -> None:
    """Launches go to the caller's stream: what it waits for there is waited for."""
    from hsa_compile import triton_kernels

    problem = ChunkAttention(16, 1, 64, 64, 4)
    q, k, v, indices, weights = (x.cuda() for x in attention_inputs(problem, 1, 256, 8))
    want = triton_kernels.attention(q, k, v, indices, weights, 64, False)
    late, stream = torch.zeros_like(q), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        got = triton_kernels.attention(late, k, v, indices, weights, 64, False)
    stream.synchronize()
    assert torch.equal(got, want)


def check_far_offsets() -> None:
    """Queries and memory of more than 2^31 elements each; the last tokens and chunks lie past it."""
    from hsa_compile import triton_kernels

    L, H, D, S, tail = 1 << 20, 40, 64, 64, 64
    C = L // S
    q = torch.randn(1, L, H, D, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn_like(q), torch.randn_like(q)
    assert q.numel() > 2**31
    indices = torch.randint(C - 50, C, (1, L, H, 1), dtype=torch.int32, device="cuda")
    weights = torch.rand(1, L, H, 1, device="cuda")
    o = triton_kernels.attention(q, k, v, indices, weights, S, False)[:, -tail:]
    near = (q[:, -tail:], k[:, -50 * S :], v[:, -50 * S :], indices[:, -tail:] - (C - 50), weights[:, -tail:])
    assert _error(o, eager.attention(*(x.double() if x.is_floating_point() else x for x in near), S, False)) < 1e-2


def jobs() -> Iterator[tuple[str, Callable[[], object]]]:
    """All checks, named."""
    for name, (attentions, selects) in DTYPES.items():
        dtype = getattr(torch, name)
        for case, shape in ATTENTION[:attentions]:
            if name == "float32" and case[3] > 128:
                continue  # no multiprocessor holds such a chunk in the backward: dispatch runs it eagerly
            yield f"attention {case} {shape} {name}", lambda a=case, b=shape, c=dtype: check_attention(a, b, c)
        for case, shape in SELECT[:selects]:
            yield f"select {case} {shape} {name}", lambda a=case, b=shape, c=dtype: check_select(a, b, c)
        yield f"isolation {name}", lambda c=dtype: check_isolation(c)
    yield "streams", check_streams
    yield "far offsets", check_far_offsets


def check(part: int = 0, parts: int = 1) -> list[str]:
    """Runs every ``parts``-th check; what ``torch.empty`` gives holds NaN. Returns what failed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failed = []
    for name, job in list(jobs())[part::parts]:
        torch.use_deterministic_algorithms(name != "far offsets", warn_only=True)
        try:
            errors = job() or {}
            print("ok", name, {k: f"{e:.1e}" for k, e in errors.items()}, flush=True)  # type: ignore[attr-defined]
        except Exception as error:
            failed.append(name)
            print("FAILED", name, type(error).__name__, str(error)[:400], flush=True)
    torch.use_deterministic_algorithms(False)
    return failed


def _median(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return round(float(do_bench(function, warmup=10, rep=60, return_mode="median")), 4)


def time_attention(B: int, L: int, Hq: int, Hkv: int, D: int, K: int, kind: str, dtype: torch.dtype) -> dict:
    from hsa_compile import triton_kernels

    problem = ChunkAttention(Hq, Hkv, D, 64, K)
    q, grad = torch.randn(2, B, L, Hq, D, device="cuda", dtype=dtype)
    k, v = torch.randn(2, B, L, Hkv, D, device="cuda", dtype=dtype)
    indices = synthetic_selection(B, L, Hkv, K, 64, kind).cuda()  # type: ignore[arg-type]
    weights = torch.rand(indices.shape, device="cuda")
    rest = (q, k, v, indices, weights, 64, False)
    forward = _median(lambda: triton_kernels.attention(*rest))
    backward = _median(lambda: triton_kernels.attention_backward(grad, *rest))
    return {
        "shape": (B, L, Hq, Hkv, D, K), "selection": kind, "dtype": str(dtype)[6:],
        "forward_ms": forward, "forward_tflops": round(problem.flops(B, L) / forward / 1e9, 1),
        "backward_ms": backward, "backward_tflops": round(problem.backward_flops(B, L) / backward / 1e9, 1),
    }  # fmt: skip


def time_select(B: int, L: int, C: int, Dr: int, K: int) -> dict:
    from hsa_compile import triton_kernels

    q_r = torch.randn(B, L, 1, Dr, device="cuda", dtype=torch.bfloat16)
    landmark = torch.randn(B, C, 1, Dr, device="cuda", dtype=torch.bfloat16)
    position = torch.full((B,), C * 64 - L, device="cuda")
    chunks = torch.full((B,), C, device="cuda")
    indices, scores = triton_kernels.select(q_r, landmark, position, chunks, 1, 64, K, 0)
    forward = _median(lambda: triton_kernels.select(q_r, landmark, position, chunks, 1, 64, K, 0))
    backward = _median(lambda: triton_kernels.select_backward(scores, q_r, landmark, indices))
    return {"select": (B, L, C, Dr, K), "forward_ms": forward, "backward_ms": backward}


def timings(only: int | None = None) -> Iterator[dict]:
    """The timed shapes; ``only`` the n-th, to compile side by side."""
    half, full = torch.bfloat16, torch.float32
    todo: list[Callable[[], dict]] = [
        lambda s=s, kind=kind: time_attention(*s, kind, half) for s in SHAPES for kind in ("local", "random")
    ]
    todo += [lambda s=s: time_attention(*s, "local", half) for s in GROUPS]
    todo += [
        lambda: time_attention(*SHAPES[0], "local", full),
        lambda: time_attention(1, 1 << 20, *SHAPES[0][2:], "local", half),
    ]
    todo += [lambda D=D: time_select(1, 131072, 2048, D, 16) for D in (64, 128, 1024)]
    todo += [lambda: time_select(1, 1 << 20, 1 << 14, 64, 16), lambda: time_select(1, 1, 1 << 19, 128, 8)]
    for i, job in enumerate(todo):
        if only is None or i == only:
            yield job()


def main() -> int:
    mode = sys.argv[1] if len(sys.argv) > 1 else "check"
    if mode == "check":
        part, parts = (int(x) for x in sys.argv[2].split("/")) if len(sys.argv) > 2 else (0, 1)
        return len(check(part, parts))
    if mode == "warm":
        list(timings(int(sys.argv[2])))
        return 0
    with open(sys.argv[2] if len(sys.argv) > 2 else "/dev/null", "w") as out:
        for line in timings():
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
