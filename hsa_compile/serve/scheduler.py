"""The one thread that runs the model: admits prompts, reads them in turns, decodes all rows in one step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hsa_compile.export.sampling import Sampler, checked_token
from hsa_compile.model.tokenizer import StreamDecoder
from hsa_compile.serve.engine import Engine
from hsa_compile.serve.metrics import Metrics
from hsa_compile.serve.stops import StopText

log = logging.getLogger("hsa_compile.serve")

Reason = Literal["stop", "length", "cancelled", "time", "error", "closing"]


class BusyError(RuntimeError):
    """No request is taken: the queue is full, or the server is going down."""


@dataclass(frozen=True)
class Event:
    """More of a text, and with the last event why it ended; ``error`` says what went wrong, if something did."""

    text: str = ""
    reason: Reason | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """One completion: what to do, and how far it is.

    Args:
        prompt_ids: at least one token.
        max_tokens: at most so many new ones, at least 1.
        sampler: how they are chosen.
        decoder: makes text of them.
        stops: where the text ends.
        end_ids: tokens that end it.
        deadline: by ``time.monotonic``.
        emit: is called with each event, from the scheduler's thread; must not block.

    Attributes:
        made: tokens so far.
        token: the last of them.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    sampler: Sampler
    decoder: StreamDecoder
    stops: StopText
    end_ids: frozenset[int]
    deadline: float
    emit: Callable[[Event], None] = lambda _: None
    made: int = 0
    token: int = -1
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)


class Scheduler:
    """Runs jobs on an engine until it is closed; usable as a context.

    Prompts are read a segment at a time, in turns, and between two segments all rows that have read theirs decode a
    token: neither a long prompt nor a long answer keeps others waiting.

    Args:
        engine: belongs to the scheduler's thread from ``__enter__`` on.
        queue: jobs that may wait for a row.
        metrics: told what happens.
    """

    def __init__(self, engine: Engine, queue: int, metrics: Metrics) -> None:
        self._engine, self._queue, self._metrics = engine, queue, metrics
        self._waiting: deque[Job] = deque()
        self._reading: deque[tuple[int, Job]] = deque()
        self._decoding: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def __enter__(self) -> Scheduler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what still runs, after the step that it is in."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are being run."""
        return self._thread.is_alive() and not self._closing

    @property
    def capacity(self) -> int:
        """Jobs that can run or wait."""
        return self._engine.rows + self._queue

    @property
    def rows_in_use(self) -> int:
        """Jobs that run."""
        return len(self._reading) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a row."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues a job; every job that is taken gets exactly one event with a reason, the last.

        Raises:
            BusyError: too many wait already, or the scheduler does not run.
        """
        with self._changed:
            if not self.alive:
                raise BusyError("the server is going down")
            if len(self._waiting) >= self._queue + max(0, self._engine.rows - self.rows_in_use):
                raise BusyError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job before its next step, wherever it is; nothing happens to one that has ended."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except Exception:
            log.exception("the scheduler stops")
        finally:
            self._closing = True
            for row, job in self._in_rows():
                self._leave(row)
                self._end(job, "closing", "the server is going down")
            with self._changed:
                left = list(self._waiting)
                self._waiting.clear()
            for job in left:
                self._end(job, "closing", "the server is going down")

    def _wait(self) -> bool:
        """Waits for something to do; False to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self.rows_in_use)
            return not self._closing

    def _turn(self) -> None:
        self._drop()
        self._admit()
        if self._reading:
            self._read()
        if self._decoding:
            self._decode()

    def _in_rows(self) -> Iterator[tuple[int, Job]]:
        yield from list(self._reading)
        yield from list(self._decoding.items())

    def _drop(self) -> None:
        """Ends jobs that nobody waits for any more, or that took too long."""
        now = time.monotonic()
        for row, job in self._in_rows():
            if job.cancelled or now > job.deadline:
                self._leave(row)
                self._give_up(job)
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled or now > job.deadline]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._give_up(job)

    def _give_up(self, job: Job) -> None:
        if job.cancelled:
            self._end(job, "cancelled")
        else:
            seconds = job.deadline - job.since
            self._end(job, "time", f"not done within {seconds:.0f} s; ask for fewer tokens, or try again later")

    def _admit(self) -> None:
        while self.rows_in_use < self._engine.rows:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                self._reading.append((self._engine.admit(job.prompt_ids, job.sampler), job))
            except Exception as error:
                self._fail(job, error)

    def _read(self) -> None:
        row, job = self._reading[0]
        try:
            token = self._engine.read(row)
        except Exception as error:
            self._leave(row)
            self._fail(job, error)
            return
        self._reading.popleft()
        if token is None:
            self._reading.append((row, job))
            return
        self._metrics.prompt_tokens.inc(len(job.prompt_ids))
        self._decoding[row] = job
        self._take(row, job, token)
        self._metrics.first_token_seconds.observe(time.monotonic() - job.since)

    def _decode(self) -> None:
        jobs = dict(self._decoding)
        started = time.monotonic()
        try:
            tokens = self._engine.decode({row: job.token for row, job in jobs.items()})
        except Exception as error:
            for row, job in jobs.items():
                self._leave(row)
                self._fail(job, error)
            return
        self._metrics.step_seconds.observe(time.monotonic() - started)
        for row, job in jobs.items():
            self._take(row, job, tokens[row])

    def _take(self, row: int, job: Job, token: int) -> None:
        """Passes the text of the row's next token on."""
        try:
            job.token = checked_token(token)
            ended = job.token in job.end_ids
            text = "" if ended else job.stops.push(job.decoder.push([job.token]))
        except Exception as error:
            self._leave(row)
            self._fail(job, error)
            return
        job.made += 1
        self._metrics.new_tokens.inc()
        if not (ended or job.stops.stopped or job.made == job.max_tokens):
            if text:
                job.emit(Event(text))
            return
        self._leave(row)
        if not job.stops.stopped:
            text += job.stops.push(job.decoder.finish())
            text += job.stops.finish()
        self._end(job, "stop" if ended or job.stops.stopped else "length", text=text)

    def _leave(self, row: int) -> None:
        """Frees the row of a job that ends."""
        self._decoding.pop(row, None)
        self._reading = deque((other, job) for other, job in self._reading if other != row)
        self._engine.release(row)

    def _fail(self, job: Job, error: Exception) -> None:
        log.error("a request failed: %s: %s", type(error).__name__, error)
        self._end(job, "error", f"{type(error).__name__}: {error}")

    def _end(self, job: Job, reason: Reason, error: str | None = None, text: str = "") -> None:
        self._metrics.finished.labels(reason).inc()
        job.emit(Event(text, reason, error))
