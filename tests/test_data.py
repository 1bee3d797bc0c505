"""Text and retrieval samples."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch

from hsa_compile.model.data import (
    KEY_LETTERS,
    PAIR_BYTES,
    QUERY_BYTES,
    VALUE_DIGITS,
    DataError,
    load_text,
    question,
    retrieval_sample,
    split_text,
    stack,
    text_sample,
)

TEXT = bytes(range(65, 91)) * 400
PAIR = rb"\{(\w{%d}):(\d{%d})\}" % (KEY_LETTERS, VALUE_DIGITS)


def test_default_text_is_a_book() -> None:
    text = load_text()
    text.decode()
    assert len(text) > 3_000_000
    assert text.startswith(b"In the beginning")


def test_default_text_without_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert len(load_text()) > 100_000


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"b" * 5000)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_bytes(b"a" * 5000)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert load_text(tmp_path / "b.txt") == b"b" * 5000
    assert load_text(tmp_path) == b"b" * 5000 + b"\n" + b"a" * 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has 0 bytes"), (b"short", "has 5 bytes of text, training needs"), (b"\xff" * 9000, "not UTF-8"),
     (b"a\0" * 9000, "zero bytes")],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(path)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="no text files in"):
        load_text(tmp_path)


def test_split_leaves_the_end_out() -> None:
    train, held_out = split_text(TEXT)
    assert train + held_out == TEXT
    assert len(held_out) == pytest.approx(0.05 * len(TEXT), abs=1)


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_sample_asks_only_for_what_came_before(seed: int) -> None:
    sample, again = (retrieval_sample(random.Random(seed), TEXT, 300, 8, 0.7, 4.0) for _ in range(2))
    assert sample == again
    assert len(sample.ids) == 301
    assert len(sample.weights) == 300
    ids, known, asked = bytes(sample.ids), {}, 0
    weights = [1.0, *sample.weights]
    for match in re.finditer(PAIR, ids):
        key, value = match.groups()
        answer = 4.0 if key in known else 0.0
        first = match.start()
        assert weights[first + QUERY_BYTES : match.end()] == [answer] * VALUE_DIGITS + [0.0]
        assert not any(weights[max(1, first) : first + QUERY_BYTES])
        assert known.setdefault(key, value) == value
        asked += answer > 0
    assert 1 <= len(known) <= 8
    assert len(known) + asked == 301 * 7 // 10 // PAIR_BYTES


def test_short_texts_are_repeated() -> None:
    sample = text_sample(random.Random(0), b"abcd" * 10, 100)
    assert bytes(sample.ids[:48]) in b"abcd" * 100
    ids, targets, weights = stack([sample, sample])
    assert ids.shape == targets.shape == weights.shape == (2, 100)
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_question_has_one_answer_at_uniform_places() -> None:
    places = []
    for seed in range(200):
        prompt, value = question(random.Random(seed), TEXT, 1000, distractors=5)
        assert len(prompt) == 1000
        pairs = dict(re.findall(PAIR, prompt))
        assert len(pairs) == 6
        key = prompt[-KEY_LETTERS - 1 : -1]
        assert prompt[-QUERY_BYTES:] == b"{" + key + b":"
        assert pairs[key] == value
        places.append(prompt.index(b"{" + key))
    quarters = [sum(1 for place in places if 250 * i <= place < 250 * (i + 1)) for i in range(4)]
    assert min(quarters) > 25


def test_samples_that_cannot_fit() -> None:
    rng = random.Random(0)
    with pytest.raises(DataError, match="do not fit into 50% of 60"):
        retrieval_sample(rng, TEXT, 60, pairs=6, fill=0.5, answer_weight=1.0)
    with pytest.raises(DataError, match="do not fit into 20 bytes"):
        question(rng, TEXT, 20, distractors=3)
    with pytest.raises(DataError, match=f"only {26**KEY_LETTERS} keys"):
        question(rng, TEXT, 20_000, distractors=700)
