"""The measuring process: ``python -m hsa_compile.schedules.measure`` answers requests of ``schedules/worker.py``.

It loads candidates, checks them against the reference and times them, through ctypes, on NumPy's arrays and OpenMP's
threads. Whatever a candidate does to it costs that candidate.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsa_compile.ir import ChunkSelect, Problem, problem_from_dict
from hsa_compile.schedules.costs import Workload
from hsa_compile.schedules.worker import serve
from hsa_compile.schedules.workload import TOLERANCE, Case, error, expected, stored, timing_case

GUARD = 4096  # bytes around each result that a kernel must leave alone
POISON = 0xA5
CHECKED_SLOTS = 6000  # the reference takes 50 µs for each
MATMUL = 1024


def check_loads(problem: Problem, pass_name: str, tokens: int, few: int) -> list[Workload]:
    """What to check on: two rows; where the reference's time allows tokens of a second tile; and of a forward pass, as
    many as are split."""
    most = max(8, CHECKED_SLOTS // (2 * problem.kv_heads * problem.top_k))
    many = min(tokens + 3, most)
    # Half of the chunks are visible: more than a block of landmarks, or a part.
    chunks = 600 if isinstance(problem, ChunkSelect) and pass_name == "forward" else 7
    if pass_name == "backward" or few == 0:
        return [Workload(2, many, chunks)]
    return [Workload(2, min(few, most), chunks), Workload(2, max(few + 1, many), chunks)]


@functools.cache
def _openmp() -> int:
    """Address of GOMP_parallel, as PyTorch's own runtime has it; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL("libgomp.so.1").GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


@functools.lru_cache(256)
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.hsa_execute.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int32] + [ctypes.c_void_p] * 2
    return library


def _guarded(dtype: str, shape: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    """(all bytes, the result within them): poison everywhere, so that what is not written or written over shows."""
    kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    size = int(np.prod(shape)) * kind.itemsize
    memory = np.full(size + 2 * GUARD + 64, POISON, np.uint8)
    start = GUARD + -(memory.ctypes.data + GUARD) % 64
    result = memory[start : start + size].view(kind).reshape(shape)
    if kind.kind == "f":
        result[...] = np.nan
    return memory, result


class Call:
    """A candidate with its arguments."""

    def __init__(self, message: dict[str, Any], case: Case, load: Workload, threads: int) -> None:
        library = _library(message["library"])
        self.guarded = [_guarded(*result) for result in case.results]
        tensors = [*case.inputs, *(result for _, result in self.guarded)]
        parallel = library.hsa_parallel_openmp if _openmp() else library.hsa_parallel_serial
        self.arguments = (
            ctypes.addressof(ctypes.c_char.in_dll(library, message["symbol"])),
            (ctypes.c_void_p * len(tensors))(*(x.ctypes.data for x in tensors)),
            (ctypes.c_int64 * 3)(load.B, load.L, load.C),
            threads if _openmp() else 1,
            ctypes.cast(parallel, ctypes.c_void_p),
            _openmp(),
        )
        self._execute, self._tensors = library.hsa_execute, tensors

    def __call__(self) -> None:
        if self._execute(*self.arguments):
            raise MemoryError("no memory for the candidate's workspace")

    def overran(self) -> bool:
        """Whether bytes outside of the results were written."""
        for memory, result in self.guarded:
            start = result.ctypes.data - memory.ctypes.data
            if (memory[:start] != POISON).any() or (memory[start + result.nbytes :] != POISON).any():
                return True
        return False


def check(message: dict[str, Any]) -> dict[str, Any]:
    """Runs a candidate on small problems. Answers with what is ``wrong``, "" if nothing is."""
    problem, pass_name = problem_from_dict(message["problem"]), message["pass"]
    loads = check_loads(problem, pass_name, message["tokens"], message["few"])
    wrong = (_wrong(message, problem, pass_name, load) for load in loads)
    return {"wrong": next(filter(None, wrong), "")}


def _wrong(message: dict[str, Any], problem: Problem, pass_name: str, load: Workload) -> str:
    case, want = expected(problem, pass_name, load, message["seed"])
    call = Call(message, case, load, message["threads"])
    call()
    found = error(problem, pass_name, case, [result for _, result in call.guarded], want)
    if call.overran():
        return f"L = {load.L}: it writes outside of its results"
    if not found <= TOLERANCE[problem.dtype]:
        return f"L = {load.L}: off by {found:.2g}, more than {TOLERANCE[problem.dtype]:.2g}"
    return ""


@functools.lru_cache(1)
def _timing(problem: Problem, pass_name: str, load: Workload, seed: int) -> Case:
    return timing_case(problem, pass_name, load, seed)


def _timed(run: Any, threads: int, least: int, seconds: float) -> dict[str, Any]:
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) < least or sum(wall) < 1e3 * seconds:
        at, used = time.perf_counter(), time.process_time()
        run()
        wall.append(1e3 * (time.perf_counter() - at))
        cpu.append(1e3 * (time.process_time() - used) / threads)
    return {"wall": wall, "cpu": cpu}


def time_candidate(message: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of some runs after one that warms up: by the clock on the wall, and processor time a thread."""
    problem = problem_from_dict(message["problem"])
    load = Workload(*message["load"])
    call = Call(message, _timing(problem, message["pass"], load, message["seed"]), load, message["threads"])
    call()
    return _timed(call, call.arguments[3], message["least"], message["round_seconds"])


def time_matmul(message: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a float32 matrix product on one thread: a core's rate, and whether it is shared with others."""
    a = stored(np.random.default_rng(0).standard_normal((MATMUL, MATMUL), np.float32), "float32")
    np.matmul(a, a)
    return {**_timed(lambda: np.matmul(a, a), 1, 5, 0.2), "flops": 2 * MATMUL**3}


def handle(message: dict[str, Any]) -> dict[str, Any]:
    """Answers a request."""
    return {"check": check, "time": time_candidate, "matmul": time_matmul}[message["do"]](message)


def environment(threads: int) -> dict[str, str]:
    """What the process is to be started with. Threads do not spin after their work, so that processor time is work;
    OpenBLAS's would, so a matrix product takes one."""
    return {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    serve(handle)
