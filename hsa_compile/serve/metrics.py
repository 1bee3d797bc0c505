"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("hsa_http_requests", "HTTP requests answered", ["path", "status"], registry=registry)
        self.finished = Counter("hsa_completions", "Completions by why they ended", ["reason"], registry=registry)
        self.prompt_tokens = Counter("hsa_prompt_tokens", "Tokens of prompts read", registry=registry)
        self.new_tokens = Counter("hsa_new_tokens", "Tokens generated", registry=registry)
        self.first_token_seconds = Histogram(
            "hsa_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "hsa_decode_step_seconds", "One token in all rows that decode", buckets=_STEP_SECONDS, registry=registry
        )

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """A value that is looked up when it is asked for."""
        Gauge(name, meaning, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
