"""Checkpoints: a directory with ``model.safetensors`` and ``config.json``, nothing that runs code when read.

To be published, weights are split into shards, ``model-00001-of-00002.safetensors`` …, with an index as Hugging Face
transformers has it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hsa_compile.model.config import ConfigError, ModelConfig
from hsa_compile.model.model import HsaModel

FORMAT = "hsa-compile checkpoint"
VERSION = 1
# By these two, Hugging Face transformers find the classes of model/huggingface.py.
MODEL_TYPE, ARCHITECTURE = "hsa", "HsaForCausalLM"
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
INDEX_NAME = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, foreign or damaged; the message says which file and what to do."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary file beside ``path`` and then renames it: readers see all of it or nothing."""
    write_together({path: write})


def write_together(writes: dict[Path, Callable[[Path], None]]) -> None:
    """``write_atomically`` of several files, none of which gets its name before all are written."""
    temporary: dict[Path, Path] = {}
    try:
        for path, write in writes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
            os.close(handle)
            temporary[path] = Path(name)
            write(temporary[path])
            os.chmod(name, 0o644)
        for path, written in temporary.items():
            os.replace(written, path)
    except BaseException:
        for written in temporary.values():
            written.unlink(missing_ok=True)
        raise


def save_checkpoint(
    model: HsaModel, directory: str | Path, training: dict[str, Any] | None = None, shard_bytes: int | None = None
) -> Path:
    """Writes the model to ``directory`` and returns it.

    Args:
        model: its weights are saved as they are, in their dtype.
        directory: made if missing; a checkpoint in it is replaced.
        training: JSON data kept beside the model's config: how it was trained.
        shard_bytes: split weights into files of at most this size, but for a larger tensor; by default into none.

    Raises:
        CheckpointError: it could not be written, for one because the disk is full. What was there is untouched.
    """
    directory = Path(directory)
    weights = {name: x.detach().contiguous().cpu() for name, x in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["head.weight"]
    about = {
        "format": FORMAT, "version": VERSION, "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE],
        "model": model.config.to_dict(), "training": training or {},
    }  # fmt: skip
    shards = [list(weights)] if shard_bytes is None else _shards(weights, shard_bytes)
    writes: dict[Path, Callable[[Path], None]] = {}
    for i, names in enumerate(shards):
        part = {name: weights[name] for name in names}
        writes[directory / _shard_name(i, len(shards))] = lambda path, part=part: save_file(  # type: ignore[misc]
            part, path, metadata={"format": "pt"}
        )
    if len(shards) > 1:
        where = {name: _shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
        index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": where}
        writes[directory / INDEX_NAME] = lambda path: write_text(path, json.dumps(index, indent=2) + "\n")
    writes[directory / CONFIG_NAME] = lambda path: write_text(path, json.dumps(about, indent=2) + "\n")
    try:
        write_together(writes)
        for old in directory.glob("model*.safetensors*"):
            if old not in writes:
                old.unlink()  # of a checkpoint before, in other shards
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not save the checkpoint in {directory}: {error}; make room and try again"
        ) from None
    return directory


def _shards(weights: dict[str, torch.Tensor], most: int) -> list[list[str]]:
    """Names of the weights of each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, x in weights.items():
        if shards[-1] and size + x.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += x.nbytes
    return shards


def _shard_name(i: int, count: int) -> str:
    return WEIGHTS_NAME if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def weight_files(directory: str | Path) -> list[Path]:
    """The files of a checkpoint's weights.

    Raises:
        CheckpointError: there are none, or their index cannot be read.
    """
    directory = Path(directory)
    if not (index := directory / INDEX_NAME).is_file():
        if not (directory / WEIGHTS_NAME).is_file():
            raise CheckpointError(f"the checkpoint in {directory} has no {WEIGHTS_NAME}; its writing was not finished")
        return [directory / WEIGHTS_NAME]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); restore it from a copy") from None
    for name in names:
        if "/" in name or not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}, which {INDEX_NAME} names; restore it from a copy")
    return [directory / name for name in names]


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8."""
    path.write_text(text, encoding="utf-8")


def read_config(directory: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config and the training notes of a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, it is not one of ours, or its config cannot be read.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"no checkpoint in {directory}: {CONFIG_NAME} is missing; train one or give another path")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); train again or restore it from a copy") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not an {FORMAT}: its "format" field does not say so')
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {about.get('version')!r}, this program reads {VERSION}; "
            "use the version of hsa-compile that wrote it"
        )
    try:
        return ModelConfig.from_dict(about.get("model")), about.get("training") or {}  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_checkpoint(directory: str | Path, device: str | torch.device = "cpu") -> HsaModel:
    """The model of a checkpoint, in eval mode.

    Raises:
        CheckpointError: a file is missing, foreign, damaged, or does not fit the config.
    """
    config, _ = read_config(directory)
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        try:
            weights |= load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); train again or restore it from a copy") from None
    with torch.device(device):
        model = HsaModel(config)
    if config.tie_embeddings and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    _check_weights(path, model.state_dict(), weights)
    model.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return model.eval()


def _check_weights(path: Path, want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    if missing := sorted(set(want) - set(got)):
        raise CheckpointError(f"{path} lacks {missing[0]} (of {len(missing)} missing): it is not this config's model")
    if extra := sorted(set(got) - set(want)):
        raise CheckpointError(f"{path} has unknown {extra[0]} (of {len(extra)}): it is not this config's model")
    for name, x in want.items():
        if x.shape != got[name].shape:
            raise CheckpointError(f"{path}: {name} is {list(got[name].shape)}, the config says {list(x.shape)}")
