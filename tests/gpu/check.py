"""The operators' GPU backends on a GPU: numbers against float64, repeats to the bit, no waiting for the device.

    python tests/gpu/check.py [--backend compiled] [--only TEXT] [--part 0/4]
    python tests/gpu/check.py --build             the kernels alone, into the cache: needs TileLang and nvcc, no GPU

Parts may run side by side: compiling dominates. ``pytest -m gpu`` runs the checks too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsa_compile import dispatch, ops
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem

sys.path.insert(0, str(Path(__file__).parent))
from inputs import (
    SELECT_KINDS,
    Tensors,
    assert_as_good_as,
    assert_selected,
    attention_by_definition,
    attention_inputs,
    select_gradient_inputs,
    select_gradients,
    select_inputs,
)
from model_checks import CHECKS

Shape = tuple[int, int, int]  # B, L, C
RESULTS = {"forward": ("o",), "backward": ("d_q", "d_k", "d_v", "d_w")}
BF16, F16, F32 = "bfloat16", "float16", "float32"
EDGES: tuple[Shape, ...] = ((2, 333, 9), (1, 5, 0), (1, 1, 1), (3, 1000, 40), (1, 0, 3))
USUAL: tuple[Shape, ...] = ((2, 203, 7), (1, 1, 3), (1, 900, 60))
# (Hq, Hkv, D, S, K, off_by_one, dtype), shapes, skew. Group sizes, odd widths, small and large chunks, many slots.
ATTENTION: dict[str, tuple[tuple, tuple[Shape, ...], float]] = {
    "g16-k8": ((16, 1, 64, 64, 8, False, BF16), EDGES, 1.0),
    "g16-k16": ((16, 1, 64, 64, 16, False, BF16), ((1, 2000, 31), (2, 77, 40)), 6.0),
    "g16-d128": ((32, 2, 128, 64, 16, False, BF16), USUAL, 1.0),
    "g8": ((16, 2, 64, 64, 16, False, BF16), USUAL, 1.0),
    "g4": ((16, 4, 64, 64, 16, False, BF16), USUAL, 4.0),
    "g2": ((16, 8, 64, 64, 16, False, BF16), USUAL, 1.0),
    "g1": ((16, 16, 64, 64, 16, False, BF16), USUAL, 1.0),
    "g3-d96-s48": ((6, 2, 96, 48, 5, True, F16), USUAL, 1.0),
    "g12-d80-s32": ((24, 2, 80, 32, 8, True, BF16), USUAL, 3.0),
    "g24-s16-k64": ((24, 1, 64, 16, 64, False, F16), ((2, 150, 90), (1, 70, 3)), 1.0),
    "g5-d32-s80": ((10, 2, 32, 80, 4, False, BF16), ((2, 333, 9), (1, 100, 70001)), 1.0),
    "s256": ((16, 2, 64, 256, 4, True, BF16), USUAL, 1.0),
    "s128-d128": ((16, 1, 128, 128, 4, False, BF16), USUAL, 1.0),
    "g2-d256": ((4, 2, 256, 64, 8, False, BF16), USUAL, 1.0),
}
# Only the Triton programs compute these.
TRITON_ATTENTION: dict[str, tuple[tuple, tuple[Shape, ...], float]] = {
    "odd-sizes": ((12, 1, 64, 100, 8, True, BF16), ((1, 65, 4),), 1.0),
    "tiny": ((3, 3, 20, 1, 3, True, F16), ((3, 50, 40),), 1.0),
    "g16-f32": ((16, 1, 64, 64, 8, False, F32), EDGES, 1.0),
    "g4-f32": ((8, 4, 96, 32, 4, True, F32), USUAL, 4.0),
    "g1-f32": ((4, 4, 64, 64, 16, False, F32), USUAL, 1.0),
}
# Hkv, Hr, Dr, S, K, window, dtype
SELECT: dict[str, tuple] = {
    "dr64": (1, 1, 64, 64, 16, 0, BF16),
    "dr128": (1, 1, 128, 64, 16, 0, BF16),
    "dr1024": (1, 1, 1024, 64, 16, 0, BF16),
    "odd": (2, 2, 80, 32, 24, 96, F16),
    "shared": (3, 1, 96, 48, 63, 0, BF16),
}
TRITON_SELECT: dict[str, tuple] = {"f32": (2, 2, 64, 16, 16, 0, F32), "dr20-f32": (1, 1, 20, 64, 3, 0, F32)}
SELECT_SHAPES: tuple[tuple[Shape, str, bool], ...] = (
    *(((1, 4000, 62), kind, False) for kind in SELECT_KINDS),
    ((2, 555, 300), "ties", False),
    ((3, 333, 700), "random", True),
    ((3, 77, 515), "ties", True),
    ((1, 100, 0), "random", False),
    ((2, 1, 999), "random", True),
    ((2, 17, 3), "ties", True),
    ((3, 1, 20000), "random", True),
    ((1, 5, 20000), "ties", True),
)
DECODE_SHAPES: tuple[Shape, ...] = ((2, 1, 9), (3, 3, 40), (1, 2, 1), (70, 1, 300), (1, 1, 0))
# Decoding and short segments, which kernels picked by length serve.
FEW_SHAPES: tuple[tuple[Shape, str, bool], ...] = (
    *(((2, 1, 3000), kind, False) for kind in SELECT_KINDS),
    ((1, 1, 300_001), "random", False),
    ((64, 1, 999), "random", True),
    ((3, 1, 20000), "ties", True),
    ((2, 17, 3), "ties", True),
    ((1, 63, 5000), "random", False),
    ((2, 3, 0), "random", False),
    *(((1, 100, 9000), kind, False) for kind in SELECT_KINDS),
    ((2, 255, 1500), "random", True),
)
FEW_LENGTHS = (1, 64)  # of the buckets whose kernels differ
# For tools that follow every access of a kernel, and take a thousand times as long.
SMALL: tuple[Shape, ...] = ((2, 77, 5), (1, 3, 0))
SMALL_SELECT: tuple[tuple[Shape, str, bool], ...] = (((2, 77, 90), "ties", True), ((1, 3, 0), "random", False))
SMALL_GRADIENTS: tuple[tuple[Shape, float], ...] = (((2, 77, 30), 1.0), ((1, 3, 0), 1.0))
GRADIENT_SHAPES: tuple[tuple[Shape, float], ...] = (
    ((1, 1000, 37), 1.0), ((2, 777, 300), 4.0), ((1, 5000, 3), 1.0), ((3, 1, 50), 1.0), ((1, 40, 2000), 1.0),
    ((1, 64, 0), 1.0),
)  # fmt: skip


def _as_tuple(x: Any) -> Tensors:
    return (x,) if isinstance(x, Tensor) else x


def run_twice(function: Callable[..., Any], *inputs: Any) -> Tensors:
    """The results; a second call, which may not wait for the device (loading a kernel may), repeats them to the bit."""
    first = _as_tuple(function(*inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _as_tuple(function(*inputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "a repeat differs"
    return second


def _half(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == torch.float32 else dtype


def attend(problem: ChunkAttention, pass_name: str, inputs: Tensors) -> Tensors:
    """A pass on (grad_o, q, k, v, indices, weights)."""
    if pass_name == "forward":
        return (ops.chunk_attention(*inputs[1:], problem.chunk_size, problem.off_by_one),)
    return ops.chunk_attention_backward(*inputs, problem.chunk_size, problem.off_by_one)


def _of(pass_name: str, results: Tensors) -> Tensors:
    """A pass's part of (o, d_q, d_k, d_v, d_w)."""
    return results[:1] if pass_name == "forward" else results[1:]


def check_attention(
    problem: ChunkAttention, shapes: tuple[Shape, ...], skew: float, pass_name: str, apart: bool = False
) -> dict[str, float]:
    dtype, worst = getattr(torch, problem.dtype), {}
    for seed, (B, L, C) in enumerate(shapes):
        inputs = attention_inputs(problem, B, L, C, dtype, skew, seed)
        got = run_twice(attend, problem, pass_name, inputs)
        low = attention_by_definition(problem, inputs, torch.float32, _half(dtype), apart)
        exact = attention_by_definition(problem, inputs, torch.float64)
        ratios = assert_as_good_as(RESULTS[pass_name], got, _of(pass_name, low), _of(pass_name, exact))
        worst = {name: max(ratio, worst.get(name, 0.0)) for name, ratio in ratios.items()} or worst
    return worst


def check_select(problem: ChunkSelect, shapes: tuple[tuple[Shape, str, bool], ...] = SELECT_SHAPES) -> None:
    p, dtype = problem, getattr(torch, problem.dtype)
    for (B, L, C), kind, ragged in shapes:
        inputs = select_inputs(p, B, L, C, dtype, kind, ragged)
        got = run_twice(ops.chunk_select, *inputs, p.kv_heads, p.chunk_size, p.top_k, p.window)
        try:
            assert_selected(p, inputs, *got, torch.arange(L, device="cuda"), kind in ("ties", "zero"))
        except AssertionError as error:
            raise AssertionError(f"{kind} {B, L, C} ragged {ragged}: {error}") from None


def check_select_backward(
    problem: ChunkSelect, shapes: tuple[tuple[Shape, float], ...] = GRADIENT_SHAPES
) -> dict[str, float]:
    dtype, worst = getattr(torch, problem.dtype), {}
    for (B, L, C), skew in shapes:
        inputs = select_gradient_inputs(problem, B, L, C, dtype, skew)
        got = run_twice(ops.chunk_select_backward, *inputs, problem.chunk_size)
        low = select_gradients(problem, inputs, torch.float32, _half(dtype))
        ratios = assert_as_good_as(("d_q_r", "d_landmark"), got, low, select_gradients(problem, inputs, torch.float64))
        worst = {name: max(ratio, worst.get(name, 0.0)) for name, ratio in ratios.items()} or worst
    return worst


def check_isolation(problem: ChunkAttention, pass_name: str) -> None:
    """NaN and infinity in query rows and chunks change nothing, to the bit, of what has nothing to do with them."""
    p, S, C, bad_tokens, bad_chunks = problem, problem.chunk_size, 40, [77, 301], [4, 5]
    inputs = attention_inputs(p, 1, 500, C, getattr(torch, p.dtype), seed=3)
    grad_o, q, k, v, indices, weights = (x.clone() for x in inputs)
    indices[0, 77, :, 0], indices[0, 301, :, 0] = 4, 6
    weights[0, [77, 301], :, 0] = 0.5
    clean = attend(p, pass_name, (grad_o, q, k, v, indices, weights))
    q[:, 77], grad_o[:, 301, :, 3] = math.nan, math.inf
    k[:, 4 * S + 1, :, 2], k[:, 5 * S + 7, :, 1] = math.nan, -math.inf
    dirty = attend(p, pass_name, (grad_o, q, k, v, indices, weights))
    slots = torch.isin(indices, torch.tensor(bad_chunks, device="cuda", dtype=torch.int32))  # [1, L, Hkv, K]
    tokens = slots.any(-1)
    tokens[:, bad_tokens] = True
    slots = slots.clone()
    slots[:, bad_tokens] = True
    chunks = torch.zeros(1, C, p.kv_heads, dtype=torch.bool, device="cuda")
    chunks[:, bad_chunks] = True
    for h in range(p.kv_heads):
        chosen = indices[0, bad_tokens, h].flatten()
        chunks[0, chosen[(chosen >= 0) & (chosen < C)].long(), h] = True
    rows = tokens.repeat_interleave(p.groups, 2)[..., None].expand_as(q)
    memory = chunks.repeat_interleave(S, 1)[..., None].expand_as(k)
    touchable = _of(pass_name, (rows, rows, memory, memory, slots))
    for name, a, b, touched in zip(RESULTS[pass_name], clean, dirty, touchable):
        assert torch.equal(a[~touched], b[~touched]), f"{name}: NaN reached what has nothing to do with it"
    assert bool(dirty[0][0, 77].isnan().all()), f"NaN in a query row must show in its {RESULTS[pass_name][0]}"


def check_streams(problem: ChunkAttention, pass_name: str) -> None:
    """Launches go to the caller's stream: what it waits for there is waited for."""
    grad_o, q, *rest = (x.nan_to_num() for x in attention_inputs(problem, 1, 256, 8, getattr(torch, problem.dtype)))
    want = attend(problem, pass_name, (grad_o, q, *rest))
    late, stream = torch.zeros_like(q), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        got = attend(problem, pass_name, (grad_o, late, *rest))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def check_strides(problem: ChunkAttention, pass_name: str) -> None:
    """Strided inputs are computed on as their contiguous copies are."""
    inputs = attention_inputs(problem, 2, 90, 8, getattr(torch, problem.dtype))
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    assert not strided[1].is_contiguous()
    a, b = (attend(problem, pass_name, x) for x in (inputs, strided))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def check_graph(problem: ChunkAttention, pass_name: str) -> None:
    """A CUDA graph computes on what its inputs hold when it is replayed."""
    shown, static = (attention_inputs(problem, 1, 300, 9, getattr(torch, problem.dtype), seed=s) for s in (0, 1))
    want = attend(problem, pass_name, shown)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(problem, pass_name, static)
    for a, b in zip(static, shown):
        a.copy_(b)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def check_far_offsets(problem: ChunkAttention, pass_name: str) -> None:
    """Queries, gradients and memory of more than 2^31 elements each; what lies past it is as if it were alone."""
    p, near, tokens = problem, 16, 96
    L, C = 2**31 // (p.q_heads * p.head_dim) + 2048, 2**31 // (p.chunk_size * p.head_dim * p.kv_heads) + 64
    small = attention_inputs(p, 1, tokens, near, getattr(torch, p.dtype), seed=7)
    rows, memory = near * p.chunk_size, (1, C * p.chunk_size, p.kv_heads, p.head_dim)

    def grown(x: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
        big = torch.full(shape, fill, dtype=x.dtype, device="cuda")
        big[:, -x.shape[1] :] = x
        return big

    far = torch.where((small[4] >= 0) & (small[4] < near), small[4] + (C - near), -1)
    slots = (1, L, p.kv_heads, p.top_k)
    big = (
        *(grown(x, (1, L, p.q_heads, p.head_dim), 1) for x in small[:2]),
        *(grown(x, memory, 1) for x in small[2:4]),
        grown(far, slots, -1),
        grown(small[5], slots, 0),
    )
    ends = (tokens, tokens, rows, rows, tokens)
    want, got = attend(p, pass_name, small), attend(p, pass_name, big)
    for name, a, b, n in zip(RESULTS[pass_name], got, want, _of(pass_name, ends)):
        # Tiles may begin elsewhere, which changes the order of sums.
        assert torch.allclose(a[:, -n:].float(), b.float(), atol=2e-2, rtol=2e-2), name
        assert not any(bool(part.any()) for part in a[:, :-n].split(1 << 18, 1)), f"{name}: not zero elsewhere"


def attention_problems(backend: str) -> dict[str, tuple[ChunkAttention, tuple[Shape, ...], float]]:
    cases = ATTENTION | (TRITON_ATTENTION if backend == "triton" else {})
    return {name: (ChunkAttention(*sizes), shapes, skew) for name, (sizes, shapes, skew) in cases.items()}


def select_problems(backend: str) -> dict[str, ChunkSelect]:
    cases = SELECT | (TRITON_SELECT if backend == "triton" else {})
    return {name: ChunkSelect(*sizes) for name, sizes in cases.items()}


def jobs(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """All checks of a backend, named."""
    attention, select = attention_problems(backend), select_problems(backend)
    for pass_name in RESULTS:
        for name, case in attention.items():
            yield f"attention {pass_name} {name}", lambda c=case, w=pass_name: check_attention(*c, w)
    for name, (problem, _, skew) in attention.items():
        case = problem, DECODE_SHAPES, skew
        yield f"attention forward few {name}", lambda c=case: check_attention(*c, "forward", apart=True)
    for name, problem in select.items():
        yield f"select {name}", lambda p=problem: check_select(p)
        yield f"select few {name}", lambda p=problem: check_select(p, FEW_SHAPES)
        yield f"select backward {name}", lambda p=problem: check_select_backward(p)
    plain = attention["g16-k8"][0]
    for pass_name in RESULTS:
        for name in ("g16-k8", "g4", "g1", "g3-d96-s48"):
            yield f"isolation {pass_name} {name}", lambda p=attention[name][0], w=pass_name: check_isolation(p, w)
        for check in (check_streams, check_strides, check_graph, check_far_offsets):
            title = check.__name__.removeprefix("check_").replace("_", " ")
            yield f"{title} {pass_name}", lambda f=check, w=pass_name: f(plain, w)
    for name, run in CHECKS.items():
        yield f"model {name}", run


def small_jobs(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every program once, on little."""
    for pass_name in RESULTS:
        for name, (problem, _, skew) in attention_problems(backend).items():
            yield (
                f"attention {pass_name} {name}",
                lambda p=problem, s=skew, w=pass_name: check_attention(p, SMALL, s, w),
            )
    for name, problem in select_problems(backend).items():
        yield f"select {name}", lambda p=problem: check_select(p, SMALL_SELECT)
        yield f"select backward {name}", lambda p=problem: check_select_backward(p, SMALL_GRADIENTS)


def _asked(only: str, name: str) -> bool:
    return all(word in name for word in only.split())


def check(backend: str, only: str = "", part: int = 0, parts: int = 1, small: bool = False) -> list[str]:
    """Runs every ``parts``-th check; what ``torch.empty`` gives holds NaN. Returns what failed."""
    failed = []
    torch.utils.deterministic.fill_uninitialized_memory = True
    with dispatch.use_backend(backend):  # type: ignore[arg-type]
        for name, job in [x for x in (small_jobs if small else jobs)(backend) if _asked(only, x[0])][part::parts]:
            # What fills memory; but then one kernel serves all lengths.
            torch.use_deterministic_algorithms("far offsets" not in name and " few " not in name, warn_only=True)
            try:
                print("ok", backend, name, job() or "", flush=True)
            except Exception as error:
                failed.append(name)
                print("FAILED", backend, name, type(error).__name__, str(error)[:600], flush=True)
            torch.cuda.empty_cache()
    torch.use_deterministic_algorithms(False)
    return failed


def build_all(target: str, only: str) -> list[str]:
    """Builds the kernels of all checks, two at a time; returns what failed."""
    from hsa_compile.schedules import build

    attention, select = attention_problems("compiled"), select_problems("compiled")
    problems: dict[str, Problem] = {f"attention {w} {n}": c[0] for w in RESULTS for n, c in attention.items()}
    problems |= {f"attention forward few {n}": c[0] for n, c in attention.items()}
    problems |= {f"select {n}": p for n, p in select.items()}
    problems |= {f"select few {n}": p for n, p in select.items()}
    problems |= {f"select backward {n}": replace(p, window=0) for n, p in select.items()}

    def one(name: str) -> str | None:
        try:
            for length in FEW_LENGTHS if " few " in name else (None,):
                build(problems[name], "backward" if "backward" in name else "forward", target, length=length)
        except Exception as error:
            print("FAILED", name, str(error)[-1500:], flush=True)
            return name
        print("built", name, flush=True)
        return None

    with ThreadPoolExecutor(2) as pool:
        return [name for name in pool.map(one, (n for n in problems if _asked(only, n))) if name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("compiled", "triton"), default="compiled")
    parser.add_argument("--only", default="", help="words, all of which are part of a check's name")
    parser.add_argument("--part", default="0/1", help="n/m: every m-th check, from the n-th")
    parser.add_argument("--small", action="store_true", help="every program once, on little: for compute-sanitizer")
    parser.add_argument("--build", action="store_true", help="build the kernels, check nothing")
    parser.add_argument("--target", default="cuda:sm_90a", help="what to build for")
    arguments = parser.parse_args()
    if arguments.build:
        return len(build_all(arguments.target, arguments.only))
    part, parts = map(int, arguments.part.split("/"))
    failed = check(arguments.backend, arguments.only, part, parts, arguments.small)
    print(f"{len(failed)} FAILED: {', '.join(failed)}" if failed else "ALL CHECKED", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
