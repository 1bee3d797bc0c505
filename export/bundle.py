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
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsa_compile.schedules.target import TargetError, missing_features, resolve

FORMAT = "hsa-compile bundle"
FORMAT_VERSION = 2
MANIFEST = "bundle.json"
GRAPH = "model.onnx"
LIBRARY = "libhsa_ops.so"
README = "README.md"


# What running the model takes of its config.
_MODEL_SIZES = ("vocab_size", "chunk_size", "window", "upper_layers")


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
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of ``to_json``.

        Raises:
            BundleError: this is not a bundle's description, or one of another format version.
        """
        data = _parsed(text)
        try:
            return cls(
                model=data["model"] | {name: int(data["model"][name]) for name in _MODEL_SIZES},
                tokenizer=dict(data["tokenizer"]),
                state=tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data["state"]),
                dtype=str(data["dtype"]),
                targets=tuple(map(str, data["targets"])),
                kernels=tuple({key: str(k[key]) for key in ("kernel", "target", "schedule")} for k in data["kernels"]),
                versions=dict(data["versions"]),
                files=dict(data["files"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{MANIFEST} is damaged ({error!r}); export the bundle again") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{MANIFEST} is not JSON ({error}); export the bundle again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST} does not describe an hsa-compile bundle (no "format": "{FORMAT}")')
    if data.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format version {data.get('format_version')!r}, this hsa-compile reads {FORMAT_VERSION}; "
            "export it again or install the version that made it"
        )
    return data


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
    manifest = Manifest.from_json(path.read_text())
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"{directory} has no {name}; {_without(name)}")
    for name, digest in manifest.files.items():
        if os.path.basename(name) != name:
            raise BundleError(f"{MANIFEST} lists {name!r}, which is not a plain file name; do not use this bundle")
        if not (directory / name).is_file():
            raise BundleError(f"{directory} lacks {name}; copy the bundle again or export it again")
        if file_digest(directory / name) != digest:
            raise BundleError(
                f"{directory / name} is not the file that was exported (its SHA-256 differs); copy it again"
            )
    return manifest


def _without(name: str) -> str:
    if name == LIBRARY:
        return "open it with fused=False, or export it with compiled kernels"
    return "export the bundle again"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
