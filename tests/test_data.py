"""Text, and samples of it."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from hsa_compile.model.data import DataError, load_text, split_text, stack, text_sample

TEXT = bytes(range(65, 91)) * 400


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


def test_short_texts_are_repeated() -> None:
    sample = text_sample(random.Random(0), b"abcd" * 10, 100)
    assert bytes(sample.ids[:48]) in b"abcd" * 100
    ids, targets, weights = stack([sample, sample])
    assert ids.shape == targets.shape == weights.shape == (2, 100)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
