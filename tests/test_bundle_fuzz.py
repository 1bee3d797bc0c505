"""Descriptions of bundles that were damaged or made up: every one is refused with a message, or is what it says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsa_compile.export.bundle import BundleError, Manifest, TensorSpec, read_manifest, write_manifest
from hsa_compile.export.strict import MOST_BYTES, seal
from hsa_compile.export.text import load_tokenizer

FILES = {"model.onnx": b"graph", "libhsa_ops.so": b"library"}
MANIFEST = Manifest(
    model={"vocab_size": 260, "chunk_size": 16, "window": 4, "upper_layers": 2},
    tokenizer={"kind": "json", "file": "model.onnx", "end_ids": [1]},
    state=(TensorSpec("position", "int64", ("batch",)), TensorSpec("mem_k", "float32", ("batch", "rows", 2, 8))),
    dtype="float32",
    targets=("cpu:native",),
    kernels=({"kernel": "chunk_select", "target": "cpu:native", "schedule": "hand-picked"},),
    versions={"onnxruntime": "1.32.0"},
)
DATA: dict[str, Any] = json.loads(MANIFEST.to_json())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIGHT = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path, MANIFEST, FILES)
    return tmp_path


def places(value: Any) -> list[list[Any]]:
    """Paths to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *path] for key, below in inner for path in places(below))]


def replaced(value: Any, path: list[Any], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def sealed(data: Any) -> bytes:
    return json.dumps(data | {"sha256": seal(data)}).encode()


def opened(text: bytes) -> Manifest | None:
    """The manifest, and whether using it gives what it should or a BundleError, nothing else."""
    problem = ""
    try:
        manifest = Manifest.from_json(text)
    except BundleError as error:
        problem = str(error)
    if problem:
        assert len(problem.encode()) < 900, "what is wrong drowns in the message"
        return None
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert all(type(manifest.model[name]) is int for name in ("vocab_size", "chunk_size", "window", "upper_layers"))
    for spec in manifest.state:
        assert all(d in ("batch", "rows", "capacity") if isinstance(d, str) else 0 < d <= 1 << 31 for d in spec.shape)
    for call in (lambda: manifest.check_target("cpu"), lambda: load_tokenizer(Path("nowhere"), manifest)):
        with contextlib.suppress(BundleError):
            call()
    return manifest


def test_what_was_written_is_read(bundle: Path) -> None:
    assert read_manifest(bundle, FILES) == Manifest(
        **(vars(MANIFEST) | {"files": {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}})
    )


@given(st.integers(0), st.integers(1, 255))
@LIGHT
def test_every_flipped_byte_is_noticed(place: int, flip: int) -> None:
    text = bytearray(MANIFEST.to_json().encode())
    text[place % len(text)] ^= flip
    manifest = opened(bytes(text))
    assert manifest is None or manifest == MANIFEST, "a change of meaning went unnoticed"


@given(st.binary(max_size=300) | JSON.map(lambda x: json.dumps(x).encode()))
@LIGHT
def test_garbage_is_refused(text: bytes) -> None:
    assert opened(text) is None


@given(st.sampled_from(places(DATA)), JSON)
@LIGHT
def test_any_value_anywhere_is_refused_or_understood(path: list[Any], new: Any) -> None:
    data = replaced(DATA, path, new)
    opened(sealed(data) if isinstance(data, dict) else json.dumps(data).encode())


@given(st.sampled_from([path for path in places(DATA) if path]))
@settings(max_examples=60)
def test_nothing_may_be_left_out(path: list[Any]) -> None:
    parent: Any = DATA
    for key in path[:-1]:
        parent = parent[key]
    rest = parent.copy()
    del rest[path[-1]]
    opened(sealed(replaced(DATA, path[:-1], rest)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe{}", "not JSON .*utf-8"),
        (b"[" * 200_000, "not JSON .*deep"),
        (b'{"a":' * 100_000, "not JSON .*deep"),
        (b'{"format": 1, "format": 2}', "the key 'format' stands twice"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b'{"format": "\\ud800"}', "not JSON .*surrogates"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON .*digits"),
        (b" " * (MOST_BYTES + 1), f"of at most {MOST_BYTES}"),
        (sealed(DATA | {"format_version": "x" * 9999}), "has format version 'xxx"),
        (MANIFEST.to_json().replace("260", "261").encode(), "its SHA-256 differs"),
    ],
    ids=range(10),
)
def test_what_is_wrong_is_said(bundle: Path, text: bytes, message: str) -> None:
    (bundle / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match=message):
        read_manifest(bundle, FILES)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0", "a\nb", "é", "x" * 129, ".bashrc"]
)
def test_files_lie_in_the_bundle(bundle: Path, name: str) -> None:
    (bundle / "bundle.json").write_bytes(sealed(DATA | {"files": {name: "0" * 64}}))
    with pytest.raises(BundleError, match="is not a plain file name"):
        read_manifest(bundle, [])


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_link, "is a link"),
        (_make_folder, "is not a plain file|has no bundle.json"),
        (_make_pipe, "is not a plain file|has no bundle.json"),
        (Path.unlink, "lacks model.onnx|has no bundle.json"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "its SHA-256 differs|not JSON"),
        (lambda path: path.write_bytes(b""), "its SHA-256 differs|not JSON"),
    ],
    ids=["link", "folder", "pipe", "gone", "short", "empty"],
)
def test_files_that_are_none(bundle: Path, name: str, change: Callable[[Path], object], message: str) -> None:
    change(bundle / name)
    with pytest.raises(BundleError, match=message):
        read_manifest(bundle, FILES)


def test_unreadable_files(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(BundleError, match=r"bundle\.json cannot be read: Permission denied"):
        read_manifest(bundle, FILES)
