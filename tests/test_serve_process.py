"""A real server process with a real bundle: the texts of the session alone, clients that misbehave, an orderly end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from export_kit import naive_kernel
from hsa_compile.export import Session, export_bundle, load_tokenizer
from hsa_compile.model.model import HsaModel
from kit import SMALL, bpe_tokenizer, lively
from serve_kit import events_of, text_of, until

CONFIG = replace(SMALL, d_model=16, mlp_dim=32, vocab_size=400)
PROMPTS = ("In the beginning", "x", "a long prompt " * 90, "été " * 9)


@dataclass
class Server:
    """A process that serves."""

    process: subprocess.Popen[str]
    client: httpx.Client

    def ask(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"temperature": 0, **body})

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def idle(self) -> bool:
        return self.metric("hsa_rows_in_use") == self.metric("hsa_requests_waiting") == 0

    def connect(self) -> socket.socket:
        url = self.client.base_url
        return socket.create_connection((url.host, url.port or 0), timeout=20)

    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes."""
        with self.connect() as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "hsa_compile.cli", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        said = ""
        while not (url := re.search(r"running on (http://[\d.:]+)", said)):
            line = process.stderr.readline()
            assert line, f"the server ended: {process.wait()}\n{said}"
            said += line
        assert "CPUExecutionProvider, float32" in said
        with httpx.Client(base_url=url.group(1), timeout=60, trust_env=False) as client:
            yield Server(process, client)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    kernels = [naive_kernel(problem, directory) for problem in CONFIG.problems()]
    tokenizer = bpe_tokenizer(directory / "bpe.json", CONFIG.vocab_size, ["<end>"])
    return export_bundle(lively(HsaModel(CONFIG), seed=3), directory / "tiny", kernels, tokenizer, ["<end>"])


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--rows", "3", "--queue", "30", "--body-bytes", "1000000") as running:
        yield running
        until(running.idle)


def alone(bundle: Path, prompt: str, count: int, **options: Any) -> str:
    """What the session says when nobody else asks."""
    session = Session(bundle, threads=1)
    tokenizer = load_tokenizer(bundle, session.manifest)
    tokens = session.generate(tokenizer.encode(prompt), count, stop_ids=list(tokenizer.end_ids), **options)
    return tokenizer.decode(tokens)


def test_many_at_once_get_the_texts_of_each_alone(server: Server, bundle: Path) -> None:
    asked = [(prompt, {"temperature": t, "seed": 5}) for prompt in PROMPTS for t in (0.0, 0.9)]
    expected = [alone(bundle, prompt, 40, **options) for prompt, options in asked]
    assert len(set(expected)) > 4, "answers that do not differ prove nothing"
    with ThreadPoolExecutor(16) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 40, **options} for prompt, options in asked]
        whole = list(pool.map(lambda body: server.ask(**body), bodies))
        streamed = list(pool.map(lambda body: server.ask(**body, stream=True), bodies))
    assert [answer.json()["choices"][0]["text"] for answer in whole] == expected
    assert [text_of(events_of(answer.text)) for answer in streamed] == expected
    assert server.metric("hsa_decode_step_seconds_count") < server.metric("hsa_new_tokens_total"), (
        "no rows decode together"
    )


def test_pieces_come_as_they_are_made(server: Server) -> None:
    times = []
    body = {"prompt": "x", "max_tokens": 1500, "temperature": 0, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    assert len(times) > 30
    assert times[len(times) // 4] < times[0] + (times[-1] - times[0]) * 0.9, "it came in one piece"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server: Server, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 4000, "temperature": 0, "stream": stream}
    before = server.metric('hsa_completions_total{reason="cancelled"}')
    made = server.metric("hsa_new_tokens_total")
    for _ in range(5):  # more than there are rows
        with server.connect() as connection:
            data = json.dumps(body).encode()
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            until(lambda: server.metric("hsa_rows_in_use") == 1)
        until(server.idle)
    assert server.metric('hsa_completions_total{reason="cancelled"}') == before + 5
    assert server.metric("hsa_new_tokens_total") - made < 5 * 3000, "they ran to their ends"
    assert server.ask(prompt="x", max_tokens=3).status_code == 200


def test_bytes_that_are_no_requests(server: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    for data, status in (
        (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", b"400"),
        (head + b"Content-Length: -3\r\n\r\n{}", b"400"),
        (head + b"Content-Length: 99999999999\r\n\r\n{}", b"413"),
        (head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (head + b"Content-Length: 2\r\n\r\n\xff\xfe", b"400"),
    ):
        answer = server.raw(data)
        assert answer.split(b" ")[1] == status, answer
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: 500\r\n\r\n{")  # and goes
    assert server.client.get("/healthz").status_code == 200


def test_a_body_that_is_too_large(server: Server) -> None:
    answer = server.ask(prompt="x" * 2_000_000)
    assert answer.status_code == 413
    assert "1000000 bytes" in answer.json()["error"]["message"]


def test_sigterm_lets_answers_end_and_takes_no_more(bundle: Path) -> None:
    with serving(bundle) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.ask, prompt="x", max_tokens=1000, stream=True)
        until(lambda: running.metric("hsa_new_tokens_total") > 0)
        running.process.send_signal(signal.SIGTERM)
        assert events_of(asked.result().text)[-1] == "[DONE]"
        with pytest.raises(httpx.TransportError):
            running.client.get("/healthz")
        assert running.process.wait(20) in (0, -signal.SIGTERM)


def test_mistakes_are_told_in_a_line(bundle: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path], "is not a bundle"),
        ([bundle, "--context", 1], "context must be at least 2"),
    ):
        command = [sys.executable, "-m", "hsa_compile.cli", "serve", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
