"""The bundle: a folder with an exported model, its operator library and ``bundle.json``, which says what they are.

    model.onnx        the graph with the operators' function bodies; over 2 GB, weights lie in model.onnx.data
    libhsa_ops.so     the operators as compiled kernels for the bundle's targets (optional)
    README.md         what it is and how to run it
    bundle.json       format, model config, tokenizer, state, dtype, targets, kernels and the schedules they were built
                      by, versions, and the SHA-256 of every file

This module needs nothing that a bundle is made with.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsa_compile.export import strict
from hsa_compile.schedules.target import TargetError, missing_features, resolve

FORMAT = "hsa-compile bundle"
FORMAT_VERSION = 2
MANIFEST = "bundle.json"
GRAPH = "model.onnx"
LIBRARY = "libhsa_ops.so"
README = "README.md"


# What running the model takes of its config.
_MODEL_SIZES = ("vocab_size", "chunk_size", "window", "upper_layers")
_DTYPES = ("float32", "float16", "bfloat16", "int64")
_DIMENSIONS = ("batch", "rows", "capacity")
_MOST = 4096  # state tensors, kernels, files


class BundleError(RuntimeError):
    """A bundle is missing, damaged, foreign or not for this machine; the message says what to do."""


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor: ``past.<name>`` going in, ``present.<name>`` coming out; named dimensions vary."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class Manifest:
    """What ``bundle.json`` holds.

    Attributes:
        dtype: of weights and state.
        targets: CPU levels and GPU architectures that the operator library has kernels for; none without one.
        kernels: of that library; each has ``kernel``, ``target`` and ``schedule``, which says where its tile is from.
    """

    model: dict[str, Any]
    tokenizer: dict[str, Any]
    state: tuple[TensorSpec, ...]
    dtype: str
    targets: tuple[str, ...]
    kernels: tuple[dict[str, str], ...]
    versions: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)

    def check_target(self, provider: str) -> None:
        """Refuses a machine that cannot run the operator library.

        Args:
            provider: "cpu" or "cuda"; a library's GPU kernels check the GPU themselves.

        Raises:
            BundleError: none of the targets is for this machine.
        """
        mine = [target for target in self.targets if target.startswith(f"{provider}:")]
        advice = "Export the bundle for this machine, or open it with fused=False."
        if not mine:
            has = ", ".join(self.targets) or "nothing"
            raise BundleError(f"the operator library is for {has}, it has no kernels for {provider}. {advice}")
        if provider == "cuda":
            return
        try:
            lacks = {target: missing_features(resolve(target)) for target in mine}
        except TargetError as error:
            raise BundleError(f"the operator library is for another kind of machine: {error}. {advice}") from None
        if all(lacks.values()):
            needs = "; ".join(f"for {target} and needs {', '.join(missing)}" for target, missing in lacks.items())
            raise BundleError(f"the operator library is {needs}. {advice}")

    def to_json(self) -> str:
        data = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**data, "sha256": strict.seal(data)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Inverse of ``to_json``.

        Raises:
            BundleError: this is not a bundle's description, or one of another format version.
        """
        data = _parsed(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
        try:
            model = strict.mapping(data["model"])
            return cls(
                model=model | {name: strict.size(model[name]) for name in _MODEL_SIZES},
                tokenizer=strict.mapping(data["tokenizer"]),
                state=_state(data["state"]),
                dtype=strict.one_of(data["dtype"], _DTYPES[:-1]),
                targets=strict.items(data["targets"], strict.text, _MOST),
                kernels=strict.items(data["kernels"], _kernel, _MOST),
                versions={name: strict.text(v) for name, v in strict.mapping(data["versions"]).items()},
                files=_files(data["files"]),
            )
        except KeyError as error:
            raise BundleError(f"{MANIFEST} is damaged: it lacks {error}; export the bundle again") from None
        except ValueError as error:
            raise BundleError(f"{MANIFEST} is damaged: {error}; export the bundle again") from None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        data = strict.parse(text)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not JSON ({error}); copy the bundle again or export it again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST} does not describe an hsa-compile bundle (no "format": "{FORMAT}")')
    if data.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format version {data.get('format_version')!r:.80}, this hsa-compile reads "
            f"{FORMAT_VERSION}; export it again or install the version that made it"
        )
    if data.get("sha256") != strict.seal(data):
        raise BundleError(f"{MANIFEST} is not what was exported (its SHA-256 differs); copy it again")
    return data


def _state(value: Any) -> tuple[TensorSpec, ...]:
    def dimension(d: Any) -> str | int:
        return strict.one_of(d, _DIMENSIONS) if isinstance(d, str) else strict.size(d)

    def spec(x: Any) -> TensorSpec:
        tensor = strict.mapping(x)
        shape = strict.items(tensor["shape"], dimension, 8)
        if math.prod(d for d in shape if isinstance(d, int)) > strict.LARGEST:
            raise ValueError(f"the state {tensor['name']!r:.80} has the shape {shape}")
        return TensorSpec(strict.text(tensor["name"]), strict.one_of(tensor["dtype"], _DTYPES), shape)

    specs = strict.items(value, spec, _MOST)
    if len({spec.name for spec in specs}) < len(specs):
        raise ValueError("two state tensors have one name")
    return specs


def _kernel(value: Any) -> dict[str, str]:
    kernel = strict.mapping(value)
    return {key: strict.text(kernel[key]) for key in ("kernel", "target", "schedule")}


def _files(value: Any) -> dict[str, str]:
    files = strict.mapping(value)
    if len(files) > _MOST:
        raise ValueError(f"it lists {len(files)} files")
    return {strict.file_name(name): strict.digest(found) for name, found in files.items()}


def write_manifest(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Writes ``bundle.json`` with the hashes of the named files of the folder."""
    files = {name: file_digest(directory / name) for name in sorted(names)}
    (directory / MANIFEST).write_text(Manifest(**(vars(manifest) | {"files": files})).to_json())


def read_manifest(directory: Path, needed: Iterable[str]) -> Manifest:
    """Reads ``bundle.json`` and checks that the needed files are there and are those that were exported.

    Args:
        directory: the bundle.
        needed: names of files that the bundle must have; whatever it lists is checked.

    Raises:
        BundleError: the folder is not a bundle, or a file is missing or was changed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}. Make one with `hsa-compile export`.")
    try:
        _check_plain(path)
        with path.open("rb") as file:
            manifest = Manifest.from_json(file.read(strict.MOST_BYTES + 1))
        for name in needed:
            if name not in manifest.files:
                raise BundleError(f"{directory} has no {name}; {_without(name)}")
        for name, digest in manifest.files.items():
            _check_file(directory / name, digest)
    except OSError as error:
        raise BundleError(f"{error.filename or directory} cannot be read: {error.strerror}") from None
    return manifest


def _check_file(path: Path, digest: str) -> None:
    _check_plain(path)
    if file_digest(path) != digest:
        raise BundleError(f"{path} is not the file that was exported (its SHA-256 differs); copy it again")


def _check_plain(path: Path) -> None:
    """What is not a plain file may lead out of the bundle, or be read without end."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise BundleError(f"{path.parent} lacks {path.name}; copy the bundle again or export it again") from None
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
        raise BundleError(f"{path} is {kind}; a bundle holds its files itself: copy it with `cp -rL`")


def _without(name: str) -> str:
    if name == LIBRARY:
        return "open it with fused=False, or export it with compiled kernels"
    return "export the bundle again"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
