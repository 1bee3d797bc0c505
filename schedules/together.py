"""Several searches at once, for devices whose timing the host's load does not touch: GPUs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from hsa_compile.schedules.candidates import CandidateError, Job, ProcessLaboratory
from hsa_compile.schedules.choice import ScheduleError, Tile
from hsa_compile.schedules.tuner import BATCH, FINALS_SHARE, Outcome, Progress, Search


def search_together(
    searches: Sequence[Search], lab: ProcessLaboratory, seconds: float, progress: Progress = lambda share, line: None
) -> Iterator[Outcome | ScheduleError]:
    """Searches side by side, for about ``seconds`` in all: candidates are measured while others are built, so that
    neither compilers nor the device wait.

    Yields what each search found, in their order, or why it found nothing.

    Raises:
        JournalError: a trial can't be written down.
    """
    start = time.monotonic()
    searching = start + seconds * (1 - FINALS_SHARE)

    def tell() -> None:
        share = min(1.0, (time.monotonic() - start) / seconds)
        progress(share, f"{sum(len(search.trials) for search in searches)} candidates of {len(searches)} searches")

    _measure_while_building(searches, lab, searching, tell)
    for number, search in enumerate(searches, 1):
        tell()
        now, left = time.monotonic(), start + seconds - time.monotonic()
        try:
            if search.space.base not in search.scores:
                raise ScheduleError(f"no time was left for {search.job.problem} ({search.job.pass_name})")
            yield search.conclude(now + left / (len(searches) - number + 1), tell, start)
        except ScheduleError as error:
            yield error


def _measure_while_building(
    searches: Sequence[Search], lab: ProcessLaboratory, until: float, tell: Callable[[], None]
) -> None:
    """Searches take turns in proposing candidates; whatever is built first is measured first."""
    turns = deque(searches)
    building: dict[Future[tuple[Any, float]], tuple[Search, Tile]] = {}
    pool = ThreadPoolExecutor(lab.workers)
    try:
        while time.monotonic() < until:
            while turns and len(building) < BATCH * lab.workers:
                search = turns.popleft()
                if proposed := search.propose(1):
                    (tile,) = proposed
                    building[pool.submit(_build, lab, search.job, tile)] = (search, tile)
                    turns.append(search)
            if not building:
                return
            done, _ = wait(building, max(0.0, until - time.monotonic()), FIRST_COMPLETED)
            for future in done:
                search, tile = building.pop(future)
                search.settle(tile, *future.result())
                tell()
    finally:  # what is still being built is lost, and proposed again by the next run
        for future in building:
            future.cancel()
        lab.stop_building()
        pool.shutdown(wait=False, cancel_futures=True)


def _build(lab: ProcessLaboratory, job: Job, tile: Tile) -> tuple[Any, float]:
    """A candidate, or the CandidateError that it failed by, and the seconds that it took."""
    at = time.monotonic()
    try:
        return lab.build_one(job, tile), time.monotonic() - at
    except CandidateError as error:
        return error, time.monotonic() - at
