"""Packs a model, and the kernels compiled for it, into a bundle that ``session.Session`` runs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import onnxruntime as ort

from hsa_compile.export.bundle import GRAPH, LIBRARY, MANIFEST, README, BundleError, Manifest, write_manifest
from hsa_compile.export.graph import EXPORTED, EXTERNAL_DATA_ABOVE, export_graph, graph_dtype, state_specs
from hsa_compile.export.library import KernelObjects, LibraryError, Served, build_library
from hsa_compile.export.text import add_tokenizer
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel
from hsa_compile.schedules import choose


def export_bundle(
    model: HsaModel,
    directory: Path,
    kernels: Sequence[KernelObjects | Served] = (),
    tokenizer: Path | None = None,
    end_tokens: Sequence[str] = (),
    external_data_above: int = EXTERNAL_DATA_ABOVE,
) -> Path:
    """Writes a bundle: graph, operator library and description. It appears whole or not at all.

    Args:
        model: on the CPU, in float32, float16 or bfloat16, which becomes the bundle's type.
        directory: the bundle; an existing bundle there is replaced, anything else is refused.
        kernels: ``hsa_compile.kernels.exported``; without any, the bundle has no library and runs by the operators'
            function bodies alone.
        tokenizer, end_tokens: see ``text.add_tokenizer``; bytes by default.
        external_data_above: see ``graph.export_graph``.

    Returns:
        ``directory``.

    Raises:
        BundleError: ``directory`` exists and is not a bundle.
        LibraryError: a kernel is missing for this model, or the library cannot be built.
        ConfigError: the architecture is not exported.
        TokenizerError: the tokenizer cannot be read, or is not the model's.
        ValueError: the model is not on the CPU, or of another type.
    """
    model.config.require("exporting", EXPORTED)
    dtype = graph_dtype(model)
    directory = Path(directory)
    if directory.exists() and not (directory / MANIFEST).is_file():
        raise BundleError(f"{directory} exists and is not a bundle; choose another place or remove it")
    served = [one if isinstance(one, Served) else Served(one) for one in kernels]
    _check_kernels(model.config, served, dtype)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made = Path(scratch) / "bundle"
        made.mkdir()
        manifest = Manifest(
            model=json.loads(json.dumps(model.config.to_dict())),
            tokenizer=add_tokenizer(made, model.config.vocab_size, tokenizer, end_tokens),
            state=state_specs(model.config, dtype),
            dtype=dtype,
            targets=tuple(sorted({one.kernel.target for one in served})),
            kernels=tuple(_origin(one) for one in served),
            versions={
                "onnxruntime": ort.__version__,  # of whichever package it is from: there is onnxruntime-gpu, too
                **{name: version(name) for name in ("hsa-compile", "torch", "onnx")},
            },
        )
        export_graph(model, made / GRAPH, external_data_above)
        if served:
            build_library(served, made / LIBRARY)
        (made / README).write_text(_readme(directory.name, manifest))
        write_manifest(made, manifest, [path.name for path in made.iterdir()])
        _replace(made, directory, Path(scratch))
    return directory


def _check_kernels(config: ModelConfig, served: Sequence[Served], dtype: str) -> None:
    """On GPUs plain kernels serve what no compiled one does; on CPUs, windows alone have their function body."""
    have = {one.kernel.problem for one in served if one.kernel.target.startswith("cpu:")}
    needed = config.problems(dtype=dtype)  # type: ignore[arg-type]
    if missing := [problem for problem in needed if have and problem not in have]:
        raise LibraryError(f"kernels given, but none for {', '.join(map(str, missing))}; see ModelConfig.problems")


def _origin(one: Served) -> dict[str, str]:
    """A kernel's line in the manifest."""
    kernel = one.kernel
    # On a CPU one kernel serves every length.
    length = one.length or (1 if kernel.target.startswith("cuda:") else None)
    choice = choose(kernel.problem, "forward", kernel.target, length)
    schedule = {"default": "hand-picked", "environment": "given by the environment"}.get(choice.origin, "")
    if choice.record is not None:
        record, measured = choice.record.record, choice.record.record.measured
        schedule = f"record {choice.record.shelf.path.name}, L >= {record.length}, measured {measured.date}"
    name = f"{kernel.problem.op}, L >= {one.length}" if one.length else kernel.problem.op
    return {"kernel": f"{name}, {kernel.problem.dtype}", "target": kernel.target, "schedule": schedule}


_README = """# {name}

A language model for ONNX Runtime, made by hsa-compile {version}: {dtype}, kernels for {targets}. To run it:

```sh
pip install {runtime} hsa-compile
hsa-compile run {name} --prompt "In the beginning"
python -c "from hsa_compile.export import Session; print(list(Session('{name}').generate([1, 2, 3], 20)))"
```

`bundle.json` says what is in it, with the SHA-256 of every file.
"""


def _readme(name: str, manifest: Manifest) -> str:
    on_gpu = any(target.startswith("cuda:") for target in manifest.targets)
    return _README.format(
        name=name,
        version=manifest.versions["hsa-compile"],
        dtype=manifest.dtype,
        targets=", ".join(manifest.targets) or "no machine: its operators run by their function bodies",
        runtime="'onnxruntime-gpu[cuda,cudnn]'" if on_gpu else "onnxruntime",
    )


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
