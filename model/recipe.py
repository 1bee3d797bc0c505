"""What to train and how: one frozen dataclass, checked when it is made, and the files it is read from."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hsa_compile.model.config import PRESETS, ConfigError, ModelConfig, preset
from hsa_compile.model.tasks.registry import find_tasks

TrainDtype = Literal["float32", "bfloat16"]

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "str | None": (str, type(None)),
    "TrainDtype": (str,), "ModelConfig": (ModelConfig,), "dict[str, float]": (dict,),
}  # fmt: skip
# What may change between a run and its continuation: none of it reaches the weights.
FREE_ON_RESUME = (
    "out", "device", "workers", "threads", "progress", "save_every", "keep", "eval_every", "recompute", "graphs",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. The defaults are the demo's: minutes on two CPU cores for the ``tiny`` preset.

    Args:
        out: directory of the checkpoint, metrics and plot.
        model: the model's shape.
        data: a text file, a directory of them, or a directory of token shards (``model/shards.py``); by default a book.
        tokenizer: a Hugging Face ``tokenizer.json`` for text; by default tokens are bytes.
        init: a checkpoint whose weights training starts from, of the same model but for ``train_top_k`` and
            ``selection_noise``; by default from random ones.
        steps, batch, length: updates, samples an update, tokens a sample.
        short_part, short_length: the first part of the updates is on shorter samples, as many tokens an update: of this
            length, then of twice that, and so on. Finding a fact among few chunks comes much sooner, and carries over.
        accumulate: parts of a batch that go through the model one after the other; gradients add up.
        dtype: of matrix products; "bfloat16" is autocast, weights and optimizer stay in float32.
        recompute: keep no activations inside layers, make them again in the backward: less memory, a third more work.
        graphs: on a GPU, compute gradients from CUDA graphs (``model/gradients.py``): for models so small that an
            update waits for launches. Not with ``accumulate`` or several processes.
        dense_escape: attend densely, by PyTorch's own kernels, where a text has at most K chunks, so that every token
            selects all it sees anyway; the same up to rounding.
        noise_from, noise_full: parts of the steps: up to the first there is no noise on the selection (the model's
            ``selection_noise``), from the second on all of it. What is not learnt yet is learnt later with noise.
        lr, min_lr, warmup: peak and last learning rate of a cosine schedule, and steps up to the peak.
        weight_decay: of matrices; vectors and the embedding have none.
        clip: largest norm of the gradient.
        text_share: part of every batch that is plain text; the rest hides facts and asks for them. On token shards it
            must be 1: to write facts, the tokenizer is needed.
        tasks: what is asked for, of ``model/tasks``, each with how often; ``pairs`` is for bytes alone.
        pairs: at most, in a sample of ``length`` tokens of the task ``pairs``; fewer in short ones, and never more than
            there are letters.
        fill: part of a sample with questions that is facts, questions and answers.
        answer_weight: of an answer's token in the loss; a token of text has 1.
        straddle: probability that a fact in text is moved so that it lies across two of the model's chunks, its last
            1 to 8 tokens in the second, where there is text enough for that. The task ``pairs`` on bytes has none.
        eval_every: steps between held-out losses.
        save_every: steps between training states to resume from; 0 keeps none, not even when interrupted.
        keep: training states that are kept, the newest ones.
        seed: of weights and data.
        workers: processes that draw batches ahead; 0 draws in the training process. Batches are the same.
        threads: CPU threads, 0 leaves PyTorch's.
        device: where to train.
        progress: show a progress bar.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    out: str = "runs/tiny"
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    data: str | None = None
    tokenizer: str | None = None
    init: str | None = None
    steps: int = 2000
    batch: int = 8
    length: int = 256
    short_part: float = 0.5
    short_length: int = 128
    accumulate: int = 1
    dtype: TrainDtype = "float32"
    recompute: bool = False
    graphs: bool = False
    dense_escape: bool = False
    noise_from: float = 0.0
    noise_full: float = 0.0
    lr: float = 4e-3
    min_lr: float = 2e-4
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    text_share: float = 0.125
    tasks: dict[str, float] = field(default_factory=lambda: {"pairs": 1.0})
    pairs: int = 16
    fill: float = 0.7
    answer_weight: float = 20.0
    straddle: float = 0.0
    eval_every: int = 100
    save_every: int = 500
    keep: int = 2
    seed: int = 0
    workers: int = 0
    threads: int = 0
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("steps", "batch", "length", "short_length", "accumulate", "warmup", "pairs", "eval_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("save_every", "workers", "threads", "min_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("short_part", "text_share", "fill", "straddle"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in 0 … 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "answer_weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.noise_from <= self.noise_full <= 1:
            raise ConfigError(
                f"0 <= noise_from <= noise_full <= 1 must hold, got {self.noise_from} and {self.noise_full}"
            )
        find_tasks(list(self.tasks))
        if not self.tasks or not all(isinstance(x, int | float) and 0 < x < math.inf for x in self.tasks.values()):
            raise ConfigError(f"tasks must name tasks, each with a share above 0, got {self.tasks!r}")
        if self.graphs and self.accumulate > 1:
            raise ConfigError("graphs take a batch as a whole: train without them, or with accumulate = 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")

    def _check_types(self) -> None:
        for x in dataclasses.fields(self):
            value, allowed = getattr(self, x.name), _TYPES[str(x.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise ConfigError(f"{x.name} must be {x.type}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{x.name} must be a finite number, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """Inverse of ``to_dict``. Missing fields take their defaults.

        ``model`` is the name of a preset, or fields of ``ModelConfig``; with ``preset`` among them, changes of it.

        Raises:
            ConfigError: ``data`` has an unknown field or an invalid value.
        """
        known = {x.name for x in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ConfigError(f"unknown training fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**data | ({"model": _model(data["model"])} if "model" in data else {}))

    def differences(self, other: TrainConfig) -> list[str]:
        """What of another recipe would train other weights, as "field: mine, theirs"."""
        mine, theirs = (_flat(config.to_dict()) for config in (self, other))
        names = [name for name in mine if name not in FREE_ON_RESUME]
        return [f"{name}: {mine[name]!r}, {theirs[name]!r}" for name in names if mine[name] != theirs[name]]


def _model(given: object) -> ModelConfig:
    if isinstance(given, str):
        return preset(given)
    if isinstance(given, dict) and "preset" in given:
        fields = {name: value for name, value in given.items() if name != "preset"}
        return ModelConfig.from_dict(preset(given["preset"]).to_dict() | fields)
    return ModelConfig.from_dict(given)  # type: ignore[arg-type]


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    model = {f"model.{name}": value for name, value in recipe["model"].items()}
    return {name: value for name, value in recipe.items() if name != "model"} | model


def read_recipe(path: str | Path) -> TrainConfig:
    """The recipe in a TOML or JSON file, whose fields are those of ``TrainConfig``.

    Raises:
        ConfigError: the file cannot be read, or ``TrainConfig.from_dict`` refuses what it says.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a TOML or JSON file") from None
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} is not valid {kind}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a table of training fields, got {type(data).__name__}")
    try:
        return TrainConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
