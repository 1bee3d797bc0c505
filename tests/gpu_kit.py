"""A laboratory without a GPU: it times candidates by the cost model, each off by a factor of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from hsa_compile.schedules.candidates import CandidateError, Job
from hsa_compile.schedules.choice import Tile, backend_of
from hsa_compile.schedules.gpu_costs import GpuMachine, estimate_ms
from hsa_compile.schedules.target import resolve_gpu

H100 = GpuMachine(132, 770e12, 3.0e12)


def milliseconds(job: Job, tile: Tile) -> float:
    """What a candidate takes on the made-up machine."""
    digest = hashlib.sha256(repr(tile).encode()).digest()
    level = resolve_gpu(job.target)
    expected = estimate_ms(job.problem, job.pass_name, tile, job.load, H100, level)  # type: ignore[arg-type]
    return expected * (0.8 + 0.4 * digest[0] / 255)


class FakeGpuLaboratory:
    """Args:
    bad: how candidates of which tile fail, by a function of the tile: "compile", "crash", "hang", "wrong" or "".
    """

    clock = "device"
    machine = H100
    rounds = (5, 9)

    def __init__(self, bad: Any = lambda tile: "", workers: int = 4) -> None:
        self.bad, self.workers = bad, workers
        self.built: list[Tile] = []
        self.stopped = 0
        self._lock = threading.Lock()

    def build_one(self, job: Job, tile: Tile) -> dict[str, Any]:
        with self._lock:
            self.built.append(tile)
        if self.bad(tile) == "compile":
            raise CandidateError("compile", "nvcc failed")
        return {"of": backend_of(tile)}

    def build(self, job: Job, tiles: list[Tile]) -> Iterator[tuple[Tile, Any]]:
        for tile in tiles:
            yield tile, self.build_one(job, tile)

    def check(self, job: Job, tile: Tile, built: Any) -> None:
        if kind := self.bad(tile):
            raise CandidateError(kind, f"a {kind}")

    def time(self, job: Job, tile: Tile, built: Any) -> list[float]:
        return [milliseconds(job, tile) * noise for noise in (1.0, 0.999, 1.001)]

    def resources(self, built: Any) -> dict[str, int]:
        return {"registers": 128, "spill_bytes": 0, "shared_bytes": 50_000}

    def rate(self) -> float | None:
        return 0.97 * H100.flops

    def stop_building(self) -> None:
        self.stopped += 1

    def __enter__(self) -> FakeGpuLaboratory:
        return self

    def __exit__(self, *_: object) -> None:
        pass
