"""How measurements are taken and kept: medians with spread, JSON Lines, one file a suite and device."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hsa_compile.schedules.device import cpu_name

_PACKAGES = ("hsa-compile", "torch", "numpy", "onnxruntime", "apache-tvm", "tilelang", "triton", "fla-core")


class MeasurementError(ValueError):
    """A file does not hold the measurements of one suite."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs."""

    median: float
    least: float
    most: float

    def fields(self) -> dict[str, float]:
        """The keys of the committed format."""
        return {"ms": self.median, "ms_min": self.least, "ms_max": self.most}


def timed(run: Callable[[], object], seconds: float = 0.5, least: int = 3, most: int = 100) -> Timing:
    """Runs once to warm up, then for about ``seconds``, at least ``least`` times."""
    run()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Timing(*(1e3 * f(times) for f in (statistics.median, min, max)))


def timed_gpu(run: Callable[[], object], milliseconds: float = 80.0) -> Timing:
    """Times enqueued work by the device's clock, from a cold L2, for about ``milliseconds`` after a warm-up."""
    from triton.testing import do_bench

    return Timing(*do_bench(run, warmup=20, rep=milliseconds, quantiles=[0.5, 0.0, 1.0]))


def timed_replay(run: Callable[[], object]) -> Timing:
    """As ``timed_gpu``, of a CUDA graph of the call: what a few microseconds of work take where nothing waits for
    Python. The graph warms nothing up: ``run`` must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed_gpu(graph.replay)


def _commit() -> str:
    """Of the repository around the current directory; ``$HSA_COMPILE_COMMIT`` says it where the package is a copy."""
    if given := os.environ.get("HSA_COMPILE_COMMIT"):
        return given
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def common_keys(suite: str, seed: int, device: str = "cpu") -> dict[str, Any]:
    """What every measurement carries: enough to repeat it."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "onnxruntime" in sys.modules:  # one module of several packages
        versions["onnxruntime"] = sys.modules["onnxruntime"].__version__
    return {
        "suite": suite,
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": " ".join(["hsa-compile", *sys.argv[1:]]),
        "versions": versions,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }


def write_suite(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Replaces a suite's file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return path


def read_suite(path: Path) -> list[dict[str, Any]]:
    """The measurements of one suite's file.

    Raises:
        MeasurementError: the file holds something else; the message says what.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MeasurementError(f"{path} holds no measurements: {error}") from error
    suites = {row.get("suite") if isinstance(row, dict) else None for row in rows}
    if len(suites) != 1 or None in suites:
        raise MeasurementError(f"{path} must hold the measurements of one suite, a JSON object a line")
    return rows


def matmul_tflops(size: int = 1024) -> float:
    """PyTorch's float32 matrix-product rate on this machine's threads: the ceiling that kernels are held against."""
    a = torch.randn(size, size)
    return 2 * size**3 / timed(lambda: a @ a).least / 1e9
