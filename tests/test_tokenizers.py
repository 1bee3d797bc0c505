"""Tokenizers in bundles: text that streams without a broken character, whatever decoder a ``tokenizer.json`` has."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsa_compile.export.bundle import BundleError, Manifest
from hsa_compile.export.text import add_tokenizer, load_tokenizer
from hsa_compile.model.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, TokenizerError
from kit import bpe_tokenizer

tokenizers = pytest.importorskip("tokenizers")

SIZE = 400
END = "<end>"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bpe_tokenizer(tmp_path_factory.mktemp("bpe") / "bpe.json", SIZE, [END])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose decoder puts spaces between words, but none before the first."""
    names = ["[UNK]", "to", "be", "or", "##e", "not"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    path = tmp_path_factory.mktemp("words") / "words.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of Llama: words with their spaces, and bytes for all else."""
    names = ["<unk>", "▁to", "▁be", "é", *(f"<0x{i:02X}>" for i in range(256))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(names)}, [], byte_fallback=True))
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Strip(" ", 1, 0)])
    path = tmp_path_factory.mktemp("fallback") / "fallback.json"
    made.save(str(path))
    return path


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push([i]) for i in ids), decoder.finish()]


@given(st.text(max_size=60))
@settings(deadline=None)
def test_text_streams_whole_characters(bpe: Path, text: str) -> None:
    for tokenizer in (JsonTokenizer(bpe), ByteTokenizer()):
        ids = tokenizer.encode(text)
        clean = text.encode(errors="replace").decode()
        assert tokenizer.decode(ids) == clean
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == clean
        if "\ufffd" not in clean:
            assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, SIZE + 20), max_size=60))
@settings(deadline=None)
def test_any_ids_stream_what_they_decode_to(bpe: Path, ids: list[int]) -> None:
    for tokenizer, known in ((JsonTokenizer(bpe), ids), (ByteTokenizer(), [i % 260 for i in ids])):
        assert "".join(streamed(tokenizer, known)) == tokenizer.decode(known)


def test_garbage_without_end_streams(bpe: Path) -> None:
    tokenizer = JsonTokenizer(bpe)
    [byte] = {tokenizer.id_of(name) for name in ("Ã",)}  # 0xC3, the first of two
    pieces = streamed(tokenizer, [byte] * 500)  # type: ignore[list-item]
    assert "".join(pieces) == "\ufffd" * 500
    assert max(map(len, pieces)) < 40


@given(st.lists(st.integers(0, 5), max_size=30))
@settings(deadline=None)
def test_decoders_that_put_spaces(words: Path, ids: list[int]) -> None:
    tokenizer = JsonTokenizer(words)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from(["▁to", "▁be", "é", "🙂", "ß"]), max_size=20))
@settings(deadline=None)
def test_bytes_among_words(fallback: Path, tokens: list[str]) -> None:
    tokenizer = JsonTokenizer(fallback)
    ids: list[int] = []
    for token in tokens:
        known = tokenizer.id_of(token)
        ids += [4 + byte for byte in token.encode()] if known is None else [known]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_arrays_hold_the_same_ids(bpe: Path) -> None:
    tokenizer = JsonTokenizer(bpe)
    text = "License\n\nand more: é\r\nof it"
    assert tokenizer.encode_array(text).dtype == np.uint32
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
    assert tokenizer.encode("") == []


def manifest(about: dict[str, Any], files: Iterable[str] = ("tokenizer.json",)) -> Manifest:
    return Manifest({"vocab_size": SIZE}, about, (), "float32", (), (), {}, dict.fromkeys(files, ""))


def test_a_bundle_gives_back_its_tokenizer(bpe: Path, tmp_path: Path) -> None:
    about = add_tokenizer(tmp_path, SIZE, bpe, [END])
    assert json.loads(json.dumps(about)) == about
    tokenizer = load_tokenizer(tmp_path, manifest(about))
    assert tokenizer.decode(tokenizer.encode("as it was")) == "as it was"
    assert tokenizer.end_ids == {0}
    assert tokenizer.decode([0]) == ""
    assert isinstance(load_tokenizer(tmp_path, manifest(add_tokenizer(tmp_path, 260))), ByteTokenizer)
    with pytest.raises(BundleError, match="its model takes ids; export it with"):
        load_tokenizer(tmp_path, manifest(add_tokenizer(tmp_path, 261)))


def test_tokenizers_that_do_not_fit(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    arguments: Any
    for arguments, message in (
        ((SIZE - 1, bpe), "has 400 tokens, the model 399"),
        ((SIZE, bpe, ["</s>"]), "has no token '</s>'"),
        ((260, None, ["</s>"]), "needs a tokenizer that has it"),
        ((SIZE, tmp_path / "none.json"), "no such tokenizer"),
        ((SIZE, tmp_path / "bad.json"), "is not a Hugging Face"),
    ):
        with pytest.raises(TokenizerError, match=message):
            add_tokenizer(tmp_path, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_manifests_with_wrong_tokenizers(bpe: Path, tmp_path: Path) -> None:
    about = add_tokenizer(tmp_path, SIZE, bpe)
    for change, files, message in (
        ({"kind": "words"}, ["tokenizer.json"], "kind 'words'"),
        ({}, [], "kind 'json'"),
        ({"file": "../x"}, ["tokenizer.json"], "kind 'json'"),
        ({"end_ids": [400]}, ["tokenizer.json"], "end_ids"),
        ({"end_ids": [True]}, ["tokenizer.json"], "end_ids"),
        ({"end_ids": None}, ["tokenizer.json"], "end_ids"),
    ):
        with pytest.raises(BundleError, match=message):
            load_tokenizer(tmp_path, manifest(about | change, files))
    (tmp_path / "tokenizer.json").write_text("[")
    with pytest.raises(BundleError, match="is not a Hugging Face"):
        load_tokenizer(tmp_path, manifest(about))
