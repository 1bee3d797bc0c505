"""A bundle on a port, until it is told to stop."""

from __future__ import annotations

from pathlib import Path

import uvicorn

from hsa_compile.export.runtime import Provider
from hsa_compile.export.session import Session
from hsa_compile.export.text import load_tokenizer
from hsa_compile.serve.app import Limits, Service
from hsa_compile.serve.engine import SessionEngine

SHUTDOWN_SECONDS = 30  # in which running answers may still come to their end
# Connections beside those that have a row or wait for one: health, metrics, and what is told to come later.
MORE_CONNECTIONS = 256


def bundle_service(
    bundle: Path, rows: int = 8, limits: Limits | None = None, name: str | None = None, provider: Provider = "auto",
    fused: bool = True, threads: int | None = None,
) -> Service:  # fmt: skip
    """The service of a bundle.

    Args:
        bundle: directory that ``export`` wrote.
        rows: texts at a time.
        limits: of requests.
        name: of the model, told to clients; default: the bundle's directory's.
        provider, fused, threads: see ``Session``.

    Raises:
        BundleError: the bundle cannot be opened.
        ValueError: a number is out of range.
    """
    limits = limits or Limits()
    session = Session(bundle, rows, provider, fused, threads, limit=limits.context)
    tokenizer = load_tokenizer(Path(bundle), session.manifest)
    name = name or Path(bundle).resolve().name
    return Service(SessionEngine(session), tokenizer, session.vocab_size, name, limits)


def serve(service: Service, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves until SIGINT or SIGTERM; then takes no more requests and gives running ones some seconds to end."""
    uvicorn.run(
        service.app, host=host, port=port, loop="asyncio", http="h11", ws="none", access_log=False,
        server_header=False, proxy_headers=False,
        limit_concurrency=service.scheduler.capacity + MORE_CONNECTIONS, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )  # fmt: skip
