"""Training states: all that is needed to go on as if training had never stopped.

``<out>/state/step-00000500/`` holds weights and optimizer moments, written by torch.distributed.checkpoint (DCP) as one
safetensors file a process (its own format is a pickle), and ``state.json`` with the rest. A state of any number of
processes loads on any other. It is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from hsa_compile.model.checkpoint import CheckpointError
from hsa_compile.model.parallel import World
from hsa_compile.model.recipe import TrainConfig

FORMAT, VERSION = "hsa-compile training state", 1
STATES_NAME, ABOUT_NAME = "state", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UNREADABLE = (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError, KeyError, AssertionError)


def states(out: Path) -> list[Path]:
    """The complete training states of a run, oldest first."""
    return sorted(path for path in (out / STATES_NAME).glob("step-*") if path.is_dir())


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name; a tied weight once. They are the very tensors: loading writes into them."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key in _MOMENTS:
            if key in optimizer.state.get(parameter, {}):
                tensors[f"optimizer.{name}.{key}"] = optimizer.state[parameter][key]
    return tensors


def _updates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How often each parameter was updated: not at all where no gradient reached it."""
    return {
        name: float(optimizer.state[parameter]["step"])
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


def _prepare(model: nn.Module, optimizer: torch.optim.Optimizer, updates: dict[str, float]) -> None:
    """Moments to load into."""
    for name, parameter in model.named_parameters():
        if name in updates:
            state: dict[str, Any] = {key: torch.zeros_like(parameter) for key in _MOMENTS}
            # The fused optimizer wants its counter where the weights are.
            state["step"] = torch.tensor(updates[name], dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = state


def save_state(
    out: Path, step: int, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, about: dict[str, Any],
    keep: int,
) -> Path:  # fmt: skip
    """Writes the state after ``step`` steps and removes all but the newest ``keep``; called by every process.

    Args:
        about: JSON data that ``load_state`` gives back.

    Raises:
        CheckpointError: it could not be written, for one because the disk is full. Older states are untouched.
    """
    final = out / STATES_NAME / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    about = {
        "format": FORMAT, "version": VERSION, "step": step, "about": about,
        "updates": _updates(model, optimizer), "rng": [json.loads(x) for x in world.gather(json.dumps(_rng(world)))],
    }  # fmt: skip

    def clear() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    problem = world.on_main(clear, (OSError,))
    if not problem:
        problem = "; ".join(filter(None, world.gather(_write(temporary, _tensors(model, optimizer)))))
    if not problem:
        problem = world.on_main(lambda: _complete(temporary, final, about), (OSError,))
    if problem:
        world.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True), ())
        kept = states(out)
        todo = f"make room, then resume from {kept[-1].name}" if kept else "make room, then train again"
        raise CheckpointError(f"could not save the training state in {final.parent}: {problem}; {todo}")
    if world.main:
        for old in states(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _write(directory: Path, tensors: dict[str, Tensor]) -> str:
    """Writes this process's part; what went wrong, or ""."""
    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        causes = {str(cause) for cause, _ in error.failures.values()}
        return "; ".join(sorted(causes))
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def _complete(temporary: Path, final: Path, about: dict[str, Any]) -> None:
    """Writes ``state.json`` with the sizes of the other files, and gives the directory its name."""
    sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    with (temporary / ABOUT_NAME).open("w", encoding="utf-8") as file:
        json.dump(about | {"files": sizes}, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    parent = os.open(final.parent, os.O_RDONLY)  # the name itself has to reach the disk
    os.fsync(parent)
    os.close(parent)


def read_state(out: Path) -> tuple[Path, dict[str, Any]]:
    """The newest training state of a run and its ``state.json``.

    Raises:
        CheckpointError: there is none, or it is foreign or damaged.
    """
    found = states(out)
    if not found:
        raise CheckpointError(f"nothing to resume in {out}: it has no unfinished training; leave out --resume to start")
    path = found[-1]
    other = f"resume from {found[-2].name}" if len(found) > 1 else "train from the start"
    todo = f"remove that directory to {other}"
    try:
        about = json.loads((path / ABOUT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / ABOUT_NAME} is damaged or missing ({error}); {todo}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not an {FORMAT}: its "format" field does not say so; {todo}')
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {about.get('version')!r}, this program reads {VERSION}; "
            "use the version of hsa-compile that wrote it"
        )
    for name, size in about["files"].items():
        got = (path / name).stat().st_size if (path / name).is_file() else 0
        if got != size:
            raise CheckpointError(f"{path / name} is damaged: {got} bytes instead of {size}; {todo}")
    return path, about


def saved_recipe(out: str | Path) -> TrainConfig:
    """The recipe of the newest training state, to be continued in the same place.

    Raises:
        CheckpointError: there is none, or it is foreign or damaged.
    """
    _, about = read_state(Path(out))
    return dataclasses.replace(TrainConfig.from_dict(about["about"]["recipe"]), out=str(out))


def load_state(
    path: Path, about: dict[str, Any], world: World, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Puts weights, moments and random generators back as they were; called by every process.

    Args:
        path, about: from ``read_state``.

    Raises:
        CheckpointError: the tensors cannot be read or are not this model's.
    """
    _prepare(model, optimizer, about["updates"])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged or of another model ({error}); remove that directory") from None
    if len(about["rng"]) == world.size:
        _restore_rng(about["rng"][world.rank], world)


def _rng(world: World) -> dict[str, str]:
    """PyTorch's generators of this process, in hexadecimal."""
    state = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device).numpy().tobytes().hex()
    return state


def _restore_rng(state: dict[str, str], world: World) -> None:
    def tensor(name: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(state[name]), dtype=torch.uint8)

    torch.set_rng_state(tensor("cpu"))
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(tensor("cuda"), world.device)
