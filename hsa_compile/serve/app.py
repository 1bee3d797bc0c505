"""The HTTP side: routes, limits, errors and streaming, on Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hsa_compile.export.sampling import Sampler
from hsa_compile.model.tokenizer import Tokenizer
from hsa_compile.serve.api import Answer, ApiError, CompletionRequest, parse_request, usage
from hsa_compile.serve.engine import Engine
from hsa_compile.serve.metrics import Metrics
from hsa_compile.serve.scheduler import BusyError, Event, Job, Scheduler
from hsa_compile.serve.stops import StopText

log = logging.getLogger("hsa_compile.serve")

DEFAULT_TOKENS = 16  # OpenAI's
GRACE = 10.0  # seconds past its time in which a client may still read an answer
_STATUS: dict[str, int] = {"error": 500, "time": 504, "closing": 503, "cancelled": 499}


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them, may take.

    Args:
        context: tokens of prompt and answer together.
        max_tokens: new tokens a request.
        queue: requests that wait for a row; more are told to come later.
        body_bytes: of a request.
        body_seconds: in which it must have arrived.
        seconds: from the request to the end of its answer.

    Raises:
        ValueError: a value is out of range.
    """

    context: int = 65_536
    max_tokens: int = 4096
    queue: int = 64
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("max_tokens", 1), ("queue", 0), ("body_bytes", 64)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (self.body_seconds > 0 and self.seconds > 0):
            raise ValueError("body_seconds and seconds must be above 0")


class Service:
    """One model behind HTTP; ``app`` is the ASGI application.

    Args:
        engine: runs the model; used by one thread, from the application's start to its end.
        tokenizer: of the model.
        vocab_size: token ids of prompts lie below.
        name: of the model, told to clients.
        limits: of requests.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, vocab_size: int, name: str, limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.scheduler = Scheduler(engine, self.limits.queue, self.metrics)
        self._tokenizer, self._vocab_size, self._name, self._since = tokenizer, vocab_size, name, int(time.time())
        self.metrics.gauge("hsa_rows", "Texts that can run at a time", lambda: engine.rows)
        self.metrics.gauge("hsa_rows_in_use", "Texts that run", lambda: self.scheduler.rows_in_use)
        self.metrics.gauge("hsa_requests_waiting", "Requests that wait for a row", lambda: self.scheduler.waiting)
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics_text),
        ]
        handlers: dict[Any, Callable[[Request, Any], Response]] = {
            ApiError: _refuse, HTTPException: _http_error, ClientDisconnect: _nobody, Exception: _bug,
        }  # fmt: skip
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app.add_middleware(_Counting, metrics=self.metrics, paths={route.path for route in routes})

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        with self.scheduler:
            yield

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._since, "owned_by": "hsa-compile"}

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self._name):
            raise ApiError(404, f"there is no model {name!r} here; this server has {self._name!r}", "model")

    async def _health(self, _: Request) -> Response:
        alive = self.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)

    async def _metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _completions(self, request: Request) -> Response:
        wanted = parse_request(await _body(request, self.limits))
        self._check_name(wanted.model)
        ids, text = await asyncio.to_thread(self._prompt, wanted)
        answer, prefix = Answer(self._name), text if wanted.echo else ""
        job = self._job(wanted, ids)
        running = _Running(job, self.scheduler) if job.max_tokens else _Finished(job)
        if wanted.stream:
            with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return _Streamed(_pieces(running, answer, prefix, with_usage), running, self.limits.seconds + GRACE)
        return await _collected(running, answer, prefix, request)

    def _prompt(self, wanted: CompletionRequest) -> tuple[list[int], str]:
        """Checked token ids of the prompt, and its text where that is wanted."""
        given = wanted.prompt
        ids = self._tokenizer.encode(given) if isinstance(given, str) else given
        if not ids:
            raise ApiError(400, "prompt: it is empty; give at least one token", "prompt")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            bad = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise ApiError(
                400, f"prompt: token id {bad} is outside the vocabulary 0 … {self._vocab_size - 1}", "prompt"
            )
        most = self.limits.max_tokens
        new = DEFAULT_TOKENS if wanted.max_tokens is None else wanted.max_tokens
        if new > most:
            raise ApiError(400, f"max_tokens: at most {most} here, got {new}", "max_tokens")
        if len(ids) + new > self.limits.context:
            raise ApiError(
                400, f"prompt: {len(ids)} tokens and {new} new ones are more than the {self.limits.context} that a "
                "text may have here", "prompt",
            )  # fmt: skip
        text = given if isinstance(given, str) else self._tokenizer.decode(ids) if wanted.echo else ""
        return ids, text

    def _job(self, wanted: CompletionRequest, ids: list[int]) -> Job:
        temperature = 1.0 if wanted.temperature is None else wanted.temperature
        top_p = 1.0 if wanted.top_p is None else wanted.top_p
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        return Job(
            prompt_ids=ids, max_tokens=DEFAULT_TOKENS if wanted.max_tokens is None else wanted.max_tokens,
            sampler=Sampler(temperature, top_p, seed), decoder=self._tokenizer.stream(), stops=StopText(wanted.stops),
            end_ids=self._tokenizer.end_ids, deadline=time.monotonic() + self.limits.seconds,
        )  # fmt: skip


class _Finished:
    """Of a request for no new tokens: the event that ends it."""

    def __init__(self, job: Job) -> None:
        self.job = job

    async def events(self) -> AsyncIterator[Event]:
        yield Event(reason="length")

    def cancel(self) -> None:
        """Nothing runs."""


class _Running(_Finished):
    """A job that the scheduler runs, with its events in the event loop; ``cancel`` frees its row, if it has one."""

    def __init__(self, job: Job, scheduler: Scheduler) -> None:
        super().__init__(job)
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        job.emit = self._emit
        try:
            scheduler.submit(job)
        except BusyError as error:
            raise ApiError(429 if scheduler.alive else 503, str(error), retry=1) from None

    def _emit(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """All events to the last.

        Raises:
            ApiError: the text did not come to its end.
        """
        reason = None
        while reason is None:
            event = await self._events.get()
            reason = event.reason
            if reason in _STATUS:
                raise ApiError(_STATUS[reason], event.error or reason)
            yield event

    def cancel(self) -> None:
        self._scheduler.cancel(self.job)


def _usage(job: Job) -> dict[str, int]:
    return usage(len(job.prompt_ids), job.made)


async def _collected(running: _Finished, answer: Answer, prefix: str, request: Request) -> Response:
    """The answer as a whole; a client that leaves frees the row."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        running.cancel()

    watching = asyncio.create_task(watch())
    try:
        events = [event async for event in running.events()]
    finally:
        running.cancel()
        watching.cancel()
    text = prefix + "".join(event.text for event in events)
    return JSONResponse(answer.whole(text, events[-1].reason, _usage(running.job)))


async def _pieces(running: _Finished, answer: Answer, prefix: str, with_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    try:
        if prefix:
            yield _line(answer.whole(prefix, None))
        async for event in running.events():
            yield _line(answer.whole(event.text, event.reason))
    except ApiError as error:
        yield _line(error.body())
        return
    if with_usage:
        yield _line(answer.usage(_usage(running.job)))
    yield "data: [DONE]\n\n"


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Streamed(StreamingResponse):
    """Server-sent events; however they end, the row is freed. A client that does not read them has so many seconds."""

    def __init__(self, lines: AsyncIterator[str], running: _Finished, seconds: float) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._running, self._seconds = running, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read its answer within %.0f s", self._seconds)
        finally:
            self._running.cancel()


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413, it is too large; 408, it did not arrive in time.
    """
    too_large = ApiError(413, f"the body is larger than the {limits.body_bytes} bytes that are taken here")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} s") from None
    return bytes(body)


class _Counting:
    """Counts requests by route and status, as ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _refuse(_: Request, error: ApiError) -> Response:
    headers = {"Retry-After": str(error.retry)} if error.retry else None
    return JSONResponse(error.body(), error.status, headers)


def _http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse(ApiError(error.status_code, error.detail).body(), error.status_code, error.headers)


def _nobody(*_: object) -> Response:
    return Response(status_code=499)  # the client has left: nobody reads this


def _bug(*_: object) -> Response:
    return JSONResponse(ApiError(500, "an error of the server; its log says more").body(), 500)
