"""An engine whose answers can be told in advance, and clients, for the tests of ``hsa_compile.serve``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hsa_compile.export.sampling import Sampler
from hsa_compile.model.tokenizer import ByteTokenizer
from hsa_compile.serve.app import Limits, Service

VOCAB = 260
SEGMENT = 4


class CountingEngine:
    """After a token t comes t + 1 (after ``z``, ``a``). Checks how it is used: one thread, rows that are held.

    ``gate`` stops every step until it is set; the token ``broken`` raises, after ``nan`` no token can be chosen.
    """

    def __init__(self, rows: int, broken: int = -1, nan: int = -1) -> None:
        self.rows, self.broken, self.nan = rows, broken, nan
        self.gate = threading.Event()
        self.gate.set()
        self.unread: dict[int, list[int]] = {}
        self.samplers: dict[int, Sampler] = {}
        self.most = self.reads = self.together = 0
        self.released: list[tuple[int, int]] = []  # rows, and how many segments had been read by then
        self._threads: set[int] = set()

    def admit(self, prompt_ids: Sequence[int], sampler: Sampler) -> int:
        self._used()
        row = min(set(range(self.rows)) - set(self.unread))
        self.unread[row] = list(prompt_ids)
        self.samplers[row] = sampler
        self.most = max(self.most, len(self.unread))
        return row

    def read(self, row: int) -> int | None:
        self._step()
        self.reads += 1
        part, self.unread[row] = self.unread[row][:SEGMENT], self.unread[row][SEGMENT:]
        return None if self.unread[row] else self._after(row, part[-1])

    def decode(self, tokens: Mapping[int, int]) -> dict[int, int]:
        self._step()
        self.together = max(self.together, len(tokens))
        assert all(not self.unread[row] for row in tokens), "decoded before its prompt was read"
        return {row: self._after(row, token) for row, token in tokens.items()}

    def release(self, row: int) -> None:
        self._used()
        self.released.append((row, self.reads))
        del self.unread[row]

    def _after(self, row: int, token: int) -> int:
        if token == self.broken:
            raise RuntimeError("the device is on fire")
        after = ord("a") if token == ord("z") else token + 1
        sampler = self.samplers[row]
        if sampler.temperature > 1:  # hot texts skip letters at random
            after = ord("a") + int(26 * sampler.draw())
        return -1 if token == self.nan else after

    def _used(self) -> None:
        self._threads.add(threading.get_ident())
        assert len(self._threads) == 1, "the engine is used by several threads"

    def _step(self) -> None:
        self._used()
        assert self.gate.wait(30)


def counting_service(rows: int = 2, broken: int = -1, nan: int = -1, **limits: Any) -> tuple[Service, CountingEngine]:
    """A service of the alphabet."""
    engine = CountingEngine(rows, broken, nan)
    return Service(engine, ByteTokenizer(), VOCAB, "alphabet", Limits(**limits)), engine


def events_of(body: str) -> list[Any]:
    """What a body of server-sent events says, ``[DONE]`` as it is."""
    lines = [line for line in body.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines), body
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def text_of(events: Sequence[Any]) -> str:
    """The text of a streamed answer."""
    return "".join(c["text"] for e in events if e != "[DONE]" for c in e["choices"])


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what other threads do."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.005)


def alphabet(first: str, count: int) -> str:
    """What the counting engine says after ``first``."""

    def letters() -> Iterator[str]:
        at = first
        for _ in range(count):
            at = "a" if at == "z" else chr(ord(at) + 1)
            yield at

    return "".join(letters())
