"""Packs a model, and the kernels compiled for it, into a bundle that ``session.Session`` runs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from hsa_compile.export.bundle import GRAPH, LIBRARY, MANIFEST, BundleError, Manifest, write_manifest
from hsa_compile.export.graph import EXPORTED, EXTERNAL_DATA_ABOVE, export_graph, state_specs
from hsa_compile.export.library import KernelObjects, LibraryError, build_library
from hsa_compile.export.text import add_tokenizer
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel


def export_bundle(
    model: HsaModel,
    directory: Path,
    kernels: Sequence[KernelObjects] = (),
    tokenizer: Path | None = None,
    end_tokens: Sequence[str] = (),
    external_data_above: int = EXTERNAL_DATA_ABOVE,
) -> Path:
    """Writes a bundle: graph, operator library and description. It appears whole or not at all.

    Args:
        model: in float32, on the CPU.
        directory: the bundle; an existing bundle there is replaced, anything else is refused.
        kernels: ``schedules.build`` of each of ``model.config.problems()``; without any, the bundle has no
            library and runs by the operators' function bodies alone.
        tokenizer, end_tokens: see ``text.add_tokenizer``; bytes by default.
        external_data_above: see ``graph.export_graph``.

    Returns:
        ``directory``.

    Raises:
        BundleError: ``directory`` exists and is not a bundle.
        LibraryError: a kernel is missing for this model, or the library cannot be built.
        ConfigError: the architecture is not exported.
        TokenizerError: the tokenizer cannot be read, or is not the model's.
        ValueError: the model is not float32 on the CPU.
    """
    model.config.require("exporting", EXPORTED)
    directory = Path(directory)
    if directory.exists() and not (directory / MANIFEST).is_file():
        raise BundleError(f"{directory} exists and is not a bundle; choose another place or remove it")
    _check_kernels(model.config, kernels)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made = Path(scratch) / "bundle"
        made.mkdir()
        manifest = Manifest(
            model=json.loads(json.dumps(model.config.to_dict())),
            tokenizer=add_tokenizer(made, model.config.vocab_size, tokenizer, end_tokens),
            state=state_specs(model.config),
            target=_target(kernels),
            versions={name: version(name) for name in ("hsa-compile", "torch", "onnx", "onnxruntime")},
        )
        export_graph(model, made / GRAPH, external_data_above)
        if kernels:
            build_library(kernels, made / LIBRARY)
        write_manifest(made, manifest, [path.name for path in made.iterdir()])
        _replace(made, directory, Path(scratch))
    return directory


def _check_kernels(config: ModelConfig, kernels: Sequence[KernelObjects]) -> None:
    have = {kernel.problem for kernel in kernels}
    if missing := [problem for problem in config.problems() if kernels and problem not in have]:
        raise LibraryError(f"kernels given, but none for {', '.join(map(str, missing))}; see ModelConfig.problems")


def _target(kernels: Sequence[KernelObjects]) -> str | None:
    """The CPU level that the kernels were built for."""
    names = sorted({kernel.target for kernel in kernels})
    if len(names) > 1:
        raise LibraryError(f"kernels for different machines: {', '.join(names)}")
    return names[0] if names else None


def _replace(made: Path, directory: Path, scratch: Path) -> None:
    """Renames the new bundle into place; the old one goes with the scratch folder."""
    if directory.exists():
        os.replace(directory, scratch / "old")
    try:
        os.replace(made, directory)
    except OSError:
        if (scratch / "old").exists():
            shutil.move(scratch / "old", directory)
        raise
