"""The server on an engine that counts: answers, streams, limits, faults, and rows that always come back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from hsa_compile.serve.app import Limits
from hsa_compile.serve.stops import StopText
from serve_kit import CountingEngine, alphabet, counting_service, events_of, text_of, until


@contextmanager
def serving(**options: Any) -> Iterator[tuple[TestClient, CountingEngine]]:
    """A client of a running service; in the end no row may be held."""
    service, engine = counting_service(**options)
    with TestClient(service.app, raise_server_exceptions=False) as client:
        yield client, engine
        until(lambda: service.scheduler.rows_in_use == service.scheduler.waiting == 0)
        assert not engine.unread, "rows were not given back"
    assert not service.scheduler.alive


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving() as (client, _):
        yield client


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"temperature": 0, **body})


def test_an_answer_is_as_openai_writes_it(client: TestClient) -> None:
    answer = ask(client, prompt="ab", max_tokens=5, model="alphabet", user="me", n=1, presence_penalty=0.0).json()
    assert answer["choices"] == [{"index": 0, "text": "cdefg", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert (answer["object"], answer["model"]) == ("text_completion", "alphabet")
    assert answer["id"].startswith("cmpl-")
    assert ask(client, prompt=[97, 98]).json()["choices"][0]["text"] == alphabet("b", 16)


def test_a_stream_says_the_same_piece_by_piece(client: TestClient) -> None:
    body = {"prompt": "a", "max_tokens": 30, "stop": ["xyz", "q!"]}
    whole = ask(client, **body).json()
    answer = ask(client, **body, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, done = events_of(answer.text)
    assert text_of(events) == whole["choices"][0]["text"] == alphabet("a", 22)
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * (len(events) - 1) + ["stop"]
    assert len({e["id"] for e in (*events, last)}) == 1
    assert (last["choices"], last["usage"], done) == ([], whole["usage"], "[DONE]")


def test_echo_and_no_new_tokens(client: TestClient) -> None:
    assert ask(client, prompt="hé", echo=True, max_tokens=0).json()["choices"][0]["text"] == "hé"
    assert ask(client, prompt=[98], echo=True, max_tokens=2).json()["choices"][0]["text"] == "bcd"
    events = events_of(ask(client, prompt="b", echo=True, max_tokens=2, stream=True).text)
    assert text_of(events) == "bcd"
    assert events_of(ask(client, prompt="b", max_tokens=0, stream=True).text)[-1] == "[DONE]"


def test_characters_arrive_whole(client: TestClient) -> None:
    # 0xC2 is followed by 0xC3, 0xC4, …, none of which go on with a character.
    streamed = events_of(ask(client, prompt=[0xC1], max_tokens=3, stream=True).text)
    assert text_of(streamed) == ask(client, prompt=[0xC1], max_tokens=3).json()["choices"][0]["text"] == "\ufffd" * 3


def test_seeds_repeat(client: TestClient) -> None:
    texts = [
        ask(client, prompt="a", temperature=10, seed=s, max_tokens=30).json()["choices"][0]["text"] for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_concurrent_answers_are_those_alone() -> None:
    with serving(rows=3, queue=40) as (client, engine):
        prompts = [chr(97 + i) * (1 + 3 * i % 11) for i in range(24)]
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda p: ask(client, prompt=p, max_tokens=40, stream=p < "m"), prompts))
        for prompt, answer in zip(prompts, answers):
            text = text_of(events_of(answer.text)) if prompt < "m" else answer.json()["choices"][0]["text"]
            assert text == alphabet(prompt[-1], 40)
        assert engine.most == engine.together == 3


def test_long_prompts_do_not_hold_up_others() -> None:
    with serving(rows=2) as (client, engine), ThreadPoolExecutor(2) as pool:
        engine.gate.clear()
        long = pool.submit(ask, client, prompt="a" * 40_000, max_tokens=1)
        until(lambda: len(engine.unread) == 1)
        short = pool.submit(ask, client, prompt="b", max_tokens=20)
        until(lambda: "hsa_requests_waiting 1.0" in client.get("/metrics").text)
        engine.gate.set()
        assert short.result().json()["choices"][0]["text"] == alphabet("b", 20)
        assert long.result().json()["choices"][0]["text"] == "b"
    (first, reads), _ = engine.released
    assert first == 1, "the long prompt was read first"
    assert reads < 30


def test_a_flood_is_told_to_come_later() -> None:
    with serving(rows=2, queue=3) as (client, engine):
        engine.gate.clear()
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(ask, client, prompt="a", max_tokens=3) for _ in range(20)]
            until(lambda: sum(answer.done() for answer in asked) >= 15)
            assert client.get("/healthz").status_code == 200
            engine.gate.set()
            answers = [answer.result() for answer in asked]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 15
        assert all(a.headers["retry-after"] == "1" and a.json()["error"]["type"] == "rate_limit_error" for a in refused)
        assert all(a.json()["choices"][0]["text"] == "bcd" for a in answers if a.status_code == 200)
        assert 'hsa_http_requests_total{path="/v1/completions",status="429"} 15.0' in client.get("/metrics").text


def test_faults_end_what_they_hit_and_nothing_else() -> None:
    with serving(rows=2, broken=ord("q"), nan=ord("x")) as (client, _):
        answer = ask(client, prompt="o", max_tokens=9)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "the device is on fire" in answer.json()["error"]["message"]
        *events, error = events_of(ask(client, prompt="u", max_tokens=9, stream=True).text)
        assert text_of(events) == "vwx"
        assert "NaN" in error["error"]["message"]
        assert ask(client, prompt="q").status_code == 500
        assert ask(client, prompt="a", max_tokens=3).json()["choices"][0]["text"] == "bcd"
        assert 'hsa_completions_total{reason="error"} 3.0' in client.get("/metrics").text


def test_time_is_limited() -> None:
    with serving(rows=1, seconds=0.3) as (client, engine):
        engine.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ask, client, prompt="a", stream=stream) for stream in (False, True)]
            until(lambda: len(engine.unread) == 1)
            threading.Timer(0.5, engine.gate.set).start()
            whole, streamed = (answer.result() for answer in asked)
        assert whole.status_code == 504
        assert "not done within 0 s" in whole.json()["error"]["message"]
        assert events_of(streamed.text)[-1]["error"]["type"] == "server_error"


def test_what_runs_is_ended_when_the_server_ends() -> None:
    service, engine = counting_service(rows=1)
    with TestClient(service.app) as client, ThreadPoolExecutor(2) as pool:
        engine.gate.clear()
        asked = [pool.submit(ask, client, prompt="a", max_tokens=4000) for _ in range(2)]
        until(lambda: len(engine.unread) == 1 and service.scheduler.waiting == 1)
        threading.Timer(0.2, engine.gate.set).start()
        service.scheduler.__exit__()
        assert [answer.result().status_code for answer in asked] == [503, 503]
        assert client.get("/healthz").status_code == 503
        assert ask(client, prompt="a").status_code == 503
    assert not engine.unread


WRONG: list[tuple[Any, str]] = [
    (b"", "Invalid JSON"),
    (b"{", "Invalid JSON"),
    (b'{"prompt": "\xff"}', "Invalid JSON"),
    (b'{"prompt": "\\ud800"}', "Invalid JSON"),
    (b"[" * 100_000, "Invalid JSON"),
    (b'{"prompt":' * 10_000, "Invalid JSON"),
    (b"[]", "should be an object"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ({}, "prompt"),
    ({"prompt": ""}, "at least one token"),
    ({"prompt": []}, "at least one token"),
    ({"prompt": [1, 260]}, "token id 260 is outside the vocabulary 0 … 259"),
    ({"prompt": [-1]}, "token id -1"),
    ({"prompt": [1 << 70]}, "token id 1180591620717411303424"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": "a", "max_tokens": 5000}, "max_tokens: at most 4096 here, got 5000"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a" * 65_536}, "65536 tokens and 16 new ones are more than the 65536"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "n": 2}, "n"),
    ({"prompt": "a", "logprobs": 3}, "logprobs"),
    ({"prompt": "a", "stop": ["x"] * 5}, "stop"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "voice": "alto"}, "voice"),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_requests_are_told_what_is_wrong(client: TestClient, body: Any, message: str) -> None:
    answer = client.post("/v1/completions", content=body if isinstance(body, bytes) else json.dumps(body))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_wrongs(client: TestClient) -> None:
    for answer, status in (
        (client.get("/v1/completions"), 405),
        (client.get("/nowhere"), 404),
        (ask(client, prompt="a", model="gpt"), 404),
        (client.get("/v1/models/gpt"), 404),
        (client.post("/v1/completions", content=b" " * (5 << 20)), 413),
        (client.post("/v1/completions", content=iter([b" " * (1 << 20)] * 5)), 413),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "echo", "stream", "stream_options", "n", "model"]
)
GUESSES = (
    st.none() | st.booleans() | st.integers(-2, 300) | st.text(max_size=20) | st.lists(st.integers(-2, 300)) | JSON
)


BODIES = (
    st.binary(max_size=200)
    | JSON.map(lambda x: json.dumps(x).encode())
    | st.dictionaries(FIELDS, GUESSES).map(lambda x: json.dumps({"prompt": "a", **x}).encode())
)


@given(BODIES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_answered_politely(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_models_health_and_metrics(client: TestClient) -> None:
    ask(client, prompt="abcdef", max_tokens=3)
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["alphabet"]
    assert client.get("/v1/models/alphabet").json() == listed["data"][0]
    assert client.get("/healthz").json() == {"status": "ok"}
    text = client.get("/metrics").text
    assert "hsa_rows 2.0\n" in text
    assert "hsa_rows_in_use 0.0\n" in text
    for name in ("hsa_prompt_tokens_total", "hsa_new_tokens_total", "hsa_time_to_first_token_seconds_count"):
        assert float(text.split(f"\n{name} ")[1].split()[0]) > 0


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.randoms())
@settings(deadline=None)
def test_stop_strings_cut_however_text_arrives(text: str, stops: list[str], random: Any) -> None:
    cut, got, at = StopText(stops), "", 0
    while at < len(text) and not cut.stopped:
        step = random.randint(1, 3)
        got, at = got + cut.push(text[at : at + step]), at + step
        assert text.startswith(got)
    ends = [text.find(stop) for stop in stops if stop in text[:at]]
    assert cut.stopped == bool(ends)
    assert got + cut.finish() == (text[: min(ends)] if ends else text)
    assert cut.push("a") == "" or not ends


def test_limits_are_checked() -> None:
    for wrong in ({"context": 1}, {"max_tokens": 0}, {"queue": -1}, {"body_bytes": 1}, {"seconds": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]
