"""The measuring process of a GPU: ``python -m hsa_compile.gpu_measure`` answers requests of ``schedules/worker.py``.

It runs candidates on PyTorch's tensors, checks them against the reference in float64 and on the timed inputs against
float32, and times them by the device's clock from a cold L2. A CUDA error leaves a process unusable: this one then
ends, and the next request starts another. On a machine without a GPU it measures Triton's interpreter, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsa_compile.bench import verify
from hsa_compile.bench.selections import synthetic_selection
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem, problem_from_dict
from hsa_compile.native import CudaKernel
from hsa_compile.schedules import Artifact
from hsa_compile.schedules.costs import Workload
from hsa_compile.schedules.triton import TritonTile
from hsa_compile.schedules.worker import serve
from hsa_compile.schedules.workload import TOLERANCE, Case, error, expected

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED_SLOTS, CHECKED_TOKENS = 1500, 131  # of the small check: the reference takes 50 µs for a slot
CHECKED_CHUNKS = 40  # more than any tile loads ahead
FLUSHED = 256 << 20  # bytes that are written before each run, several times the L2
MATMUL = {"cuda": 8192, "cpu": 256}
POISONED = 70  # exit status
Results = tuple[Tensor, ...]
Candidate = Callable[[tuple[Tensor, ...]], Results]


def candidate(message: dict[str, Any], results: Callable[[], Results], load: Workload) -> Candidate:
    """A function from inputs to results, both in the order of ``schedules/host/kernel.h``.

    Args:
        results: makes tensors for a built kernel's results.
    """
    problem, pass_name = problem_from_dict(message["problem"]), message["pass"]
    if "tile" in message:
        return _triton_candidate(problem, pass_name, TritonTile(**message["tile"]))
    kernel = _kernel(message["library"], message["symbol"])

    def run(inputs: tuple[Tensor, ...]) -> Results:
        out = results()
        kernel((*inputs, *out), load.B, load.L, load.C)
        return out

    return run


@functools.lru_cache(256)
def _kernel(library: str, symbol: str) -> CudaKernel:
    # Of the artifact only the library and the symbol matter to who runs it.
    return CudaKernel(Artifact(Path(library).parent, None, "", "", symbol))  # type: ignore[arg-type]


def _triton_candidate(p: Problem, pass_name: str, tile: TritonTile) -> Candidate:
    from hsa_compile import triton_kernels as triton

    backward = pass_name == "backward"
    if isinstance(p, ChunkAttention):
        options: tuple[Any, ...] = (p.chunk_size, p.off_by_one, tile)
        function: Any = triton.attention_backward if backward else triton.attention
    else:
        options = (tile,) if backward else (p.kv_heads, p.chunk_size, p.top_k, p.visible_lag, tile)
        function = triton.select_backward if backward else triton.select

    def run(inputs: tuple[Tensor, ...]) -> Results:
        found = function(*inputs, *options)
        return found if isinstance(found, tuple) else (found,)

    return run


# Inputs


def tensor_of(x: NDArray, dtype: str, device: str = DEVICE) -> Tensor:
    """An array of ``schedules/workload.py``, in which bfloat16 is its bits, as a tensor."""
    if x.dtype == np.uint16 and dtype == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)


def array_of(x: Tensor) -> NDArray:
    """Inverse of ``tensor_of``."""
    if x.dtype == torch.bfloat16:
        return x.cpu().view(torch.int16).numpy().view(np.uint16)
    return x.cpu().numpy()


def check_load(problem: Problem, pass_name: str, length: int) -> Workload:
    """What is checked against the reference: as many tokens as its time allows, or as few as will be timed."""
    most = max(8, min(CHECKED_TOKENS, CHECKED_SLOTS // (2 * problem.kv_heads * problem.top_k)))
    chunks = 600 if isinstance(problem, ChunkSelect) and pass_name == "forward" else CHECKED_CHUNKS
    return Workload(2, min(length, most), chunks)


@functools.lru_cache(2)
def timing_inputs(problem: Problem, pass_name: str, load: Workload, seed: int) -> tuple[Tensor, ...]:
    """What candidates are timed on: the load's selections over the memory, of which the segment is the end."""
    torch.manual_seed(seed)
    B, L, C, S = load.B, load.L, load.C, problem.chunk_size
    dtype = getattr(torch, problem.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    before = max(0, C * S - L)
    indices = synthetic_selection(B, L, problem.kv_heads, problem.top_k, S, load.selection, seed, DEVICE, before)
    if isinstance(problem, ChunkAttention):
        q = normal(B, L, problem.q_heads, problem.head_dim)
        k, v = (normal(B, C * S, problem.kv_heads, problem.head_dim) for _ in range(2))
        weights = torch.rand(indices.shape, device=DEVICE).masked_fill(indices < 0, -torch.inf).softmax(-1).nan_to_num()
        grad = (torch.randn_like(q),) if pass_name == "backward" else ()
        return (*grad, q, k, v, indices, weights)
    q_r, landmark = (normal(B, n, problem.retrieval_heads, problem.retrieval_dim) for n in (L, C))
    if pass_name == "forward":
        position, chunks = (torch.full((B,), n, device=DEVICE) for n in (before, C))
        return q_r, landmark, position, chunks
    if problem.retrieval_heads == 1:  # kv heads that share a retrieval head share its selection
        indices = indices[:, :, :1].expand(indices.shape).contiguous()
    return torch.randn(indices.shape, device=DEVICE), q_r, landmark, indices


def results_for(problem: Problem, pass_name: str, inputs: tuple[Tensor, ...]) -> Results:
    """Tensors for a kernel's results, holding whatever was there."""
    if isinstance(problem, ChunkAttention):
        grads = (inputs[1], inputs[2], inputs[3], inputs[5]) if pass_name == "backward" else (inputs[0],)
        return tuple(map(torch.empty_like, grads))
    if pass_name == "backward":
        return torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    shape = (*inputs[0].shape[:2], problem.kv_heads, problem.top_k)
    return torch.empty(shape, dtype=torch.int32, device=DEVICE), torch.empty(shape, device=DEVICE)


# Requests


def prepare(message: dict[str, Any]) -> dict[str, Any]:
    """Compiles a Triton candidate into its cache on the disk; the device, where another may be timed, is left alone."""
    problem, pass_name = problem_from_dict(message["problem"]), message["pass"]
    load = check_load(problem, pass_name, message["load"][1])
    case, _ = expected(problem, pass_name, Workload(1, min(load.L, 2), 3), message["seed"])
    inputs = tuple(tensor_of(x, problem.dtype, "cpu") for x in case.inputs)
    with _launches(warmup=True):
        candidate(message, tuple, load)(inputs)
    return {}


@contextlib.contextmanager
def _launches(warmup: bool = False) -> Iterator[list[Any]]:
    """Collects the Triton kernels that are launched meanwhile, or with ``warmup`` only compiled."""
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def seen(self: Any, *arguments: Any, **options: Any) -> Any:
        found = run(self, *arguments, **{**options, **({"warmup": True} if warmup else {})})
        compiled.append(found)
        return found

    JITFunction.run = seen
    try:
        yield compiled
    finally:
        JITFunction.run = run


def check(message: dict[str, Any]) -> dict[str, Any]:
    """Runs a candidate on a small problem full of edge cases, and on the inputs it will be timed on. Answers with what
    is ``wrong``, "" if nothing is, and with the ``resources`` of Triton kernels."""
    problem, pass_name, load = problem_from_dict(message["problem"]), message["pass"], Workload(*message["load"])
    if "tile" not in message:
        return {"wrong": _wrong(message, problem, pass_name, load), "resources": {}}
    with _launches() as compiled:
        wrong = _wrong(message, problem, pass_name, load)
    return {"wrong": wrong, "resources": _largest(compiled)}


def _largest(kernels: list[Any]) -> dict[str, int]:
    """What the kernels take at most; nothing is known of interpreted ones."""
    taken = [kernel for kernel in kernels if getattr(kernel, "n_regs", None) is not None]
    if not taken:
        return {}
    return {
        "registers": max(kernel.n_regs for kernel in taken),
        "spill_bytes": max(4 * kernel.n_spills for kernel in taken),
        "shared_bytes": max(kernel.metadata.shared for kernel in taken),
    }


def _wrong(message: dict[str, Any], problem: Problem, pass_name: str, load: Workload) -> str:
    small = check_load(problem, pass_name, load.L)
    case, want = expected(problem, pass_name, small, message["seed"])
    inputs = tuple(tensor_of(x, problem.dtype) for x in case.inputs)
    run = candidate(message, lambda: _results_of(case), small)
    _poison_memory()
    first, second = run(inputs), run(inputs)
    if not all(torch.equal(a, b) for a, b in zip(first, second)) and all(x.isfinite().all() for x in first):
        return f"L = {small.L}: it does not repeat to the bit"
    found = error(problem, pass_name, case, [array_of(x) for x in first], want)
    if not found <= TOLERANCE[problem.dtype]:
        return f"L = {small.L}: off by {found:.2g}, more than {TOLERANCE[problem.dtype]:.2g}"
    inputs = timing_inputs(problem, pass_name, load, message["seed"])
    got = candidate(message, lambda: results_for(problem, pass_name, inputs), load)(inputs)
    found = _error_of_timed(problem, pass_name, inputs, got)
    return "" if found <= verify.TOLERANCE else f"L = {load.L}: off by {found:.2g}, more than {verify.TOLERANCE:.2g}"


def _results_of(case: Case) -> Results:
    return tuple(torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE) for dtype, shape in case.results)


def _poison_memory() -> None:
    """What the allocator hands out next holds NaN, or wild indices, so that what is left unwritten shows."""
    for size in (1 << 22, 1 << 24, 1 << 26):
        torch.full((size // 4,), torch.nan, device=DEVICE)


def _error_of_timed(p: Problem, pass_name: str, inputs: tuple[Tensor, ...], got: Results) -> float:
    """Some tokens and chunks against float32, where there are enough to compare."""
    if isinstance(p, ChunkAttention):
        if pass_name == "forward":
            return verify.attention_error(p, inputs, got[0])
        return verify.gradients_error(p, inputs[0], inputs[1:], got)
    return verify.select_error(p, inputs, *got) if pass_name == "forward" else 0.0


def time_candidate(message: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of some runs after one that warms up, each from a cold L2."""
    problem, pass_name, load = problem_from_dict(message["problem"]), message["pass"], Workload(*message["load"])
    inputs = timing_inputs(problem, pass_name, load, message["seed"])
    run = candidate(message, lambda: results_for(problem, pass_name, inputs), load)
    return {"device": _timed(lambda: run(inputs), message["least"], message["round_seconds"])}


def _timed(run: Callable[[], object], least: int, seconds: float) -> list[float]:
    if DEVICE == "cpu":
        times: list[float] = []
        while len(times) < least or sum(times) < 1e3 * seconds:
            at = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - at))
        return times
    run()
    once = _by_events(run, 1)[0]
    return _by_events(run, max(least, min(100, round(1e3 * seconds / max(once, 1e-3)))))


def _by_events(run: Callable[[], object], count: int) -> list[float]:
    # Written between the runs, it also lets the host enqueue the next one meanwhile.
    flushed = _flushed()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for begin, end in events:
        flushed.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


@functools.cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)


def look(message: dict[str, Any]) -> dict[str, Any]:
    """The device, and the rates of a matrix product and of a copy now; ``message["copy"]`` false leaves the latter."""
    size = MATMUL[DEVICE]
    a = torch.randn(size, size, device=DEVICE).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    product = _timed(lambda: a @ a, 5, 0.05)
    answer: dict[str, Any] = {"flops": 2 * size**3 / float(np.median(product)) * 1e3}
    if message["copy"]:
        x = torch.empty(1 << (30 if DEVICE == "cuda" else 24), dtype=torch.uint8, device=DEVICE)
        y = torch.empty_like(x)
        answer["bandwidth"] = 2 * x.numel() / float(np.median(_timed(lambda: y.copy_(x), 3, 0.02))) * 1e3
        cuda = DEVICE == "cuda"
        answer["processors"] = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    return answer


def handle(message: dict[str, Any]) -> dict[str, Any]:
    """Answers a request; ends the process where the device can't be used any more."""
    actions = {"prepare": prepare, "check": check, "time": time_candidate, "look": look}
    try:
        with torch.no_grad():
            return actions[message["do"]](message)
    except Exception as failure:
        if DEVICE == "cuda" and (complaint := _poisoned()):
            print(f"{type(failure).__name__}: {failure}\n{complaint}", file=sys.stderr, flush=True)
            os._exit(POISONED)
        torch.cuda.empty_cache() if DEVICE == "cuda" else None
        raise


def _poisoned() -> str:
    """What the device says if it does not answer any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


if __name__ == "__main__":
    serve(handle)
