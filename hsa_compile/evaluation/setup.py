"""What an evaluation is of: a checkpoint, its tokenizer, and held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hsa_compile.evaluation.plan import Plan
from hsa_compile.evaluation.samples import Samples
from hsa_compile.model.checkpoint import load_checkpoint, read_config, weight_files
from hsa_compile.model.config import ConfigError
from hsa_compile.model.data import load_text, split_text
from hsa_compile.model.model import HsaModel
from hsa_compile.model.tasks.haystack import Bytes, Codec, codec
from hsa_compile.model.train import TOKENIZER_NAME

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be asked.

    Attributes:
        about: what results hang on beside plan and task; the journal's first line.
        train_length: tokens of the samples that it was trained on, where that is known.
    """

    model: HsaModel
    samples: Samples
    about: dict[str, Any]
    train_length: int | None


def prepare(
    checkpoint: Path, plan: Plan, text: Path | None = None, tokenizer: Path | None = None,
    device: str = "cpu", dtype: str | None = None,
) -> Subject:  # fmt: skip
    """Loads a checkpoint and the text that hides facts.

    Args:
        text: a text file, or a directory of them, of which the last 5 %, held out in training, are read. Default: the
            text of the training, else a book.
        tokenizer: a Hugging Face ``tokenizer.json``; by default the checkpoint's, else bytes.
        device: ``cpu`` or ``cuda``.
        dtype: of weights and state; by default float32 on a CPU and bfloat16 on a GPU.

    Raises:
        CheckpointError: there is no whole checkpoint.
        DataError: text or tokenizer cannot be read.
        ConfigError: they are not the model's, or the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device; evaluate on --device cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config, training = read_config(checkpoint)
    recipe = training.get("recipe") or {}
    tokenizer = find_tokenizer(checkpoint, config.vocab_size, tokenizer)
    known = codec(None if tokenizer is None else str(tokenizer))
    tokens = _held_out(known, str(text) if text is not None else recipe.get("data"))
    samples = Samples(known, tokens, plan.seed, plan.patch_from)
    model = load_checkpoint(checkpoint, device).to(DTYPES[dtype])
    about = {
        "weights": _digest_of(weight_files(checkpoint)),
        "text": _digest(tokens.tobytes()),
        "dtype": dtype,
        "patch_from": plan.patch_from,
    }
    return Subject(model, samples, about, recipe.get("length"))


def find_tokenizer(checkpoint: Path, vocab_size: int, given: Path | None = None) -> Path | None:
    """The ``tokenizer.json`` that is given, else the checkpoint's; None where tokens are bytes.

    Args:
        vocab_size: of the model.

    Raises:
        DataError: it cannot be read.
        ConfigError: it is not the model's.
    """
    if given is None and (checkpoint / TOKENIZER_NAME).is_file():
        given = checkpoint / TOKENIZER_NAME
    if codec(None if given is None else str(given)).vocab_size > vocab_size or (given is None and vocab_size > 512):
        raise ConfigError(f"the model has {vocab_size} tokens: give its tokenizer.json")
    return given


def _held_out(known: Codec, text: str | None) -> NDArray[np.integer]:
    if text is not None and not Path(text).exists():
        raise ConfigError(f"the training's text, {text}, is not here: give a text")
    held_out = split_text(load_text(text))[1]
    if isinstance(known, Bytes):
        return np.frombuffer(held_out, np.uint8)
    # The cut may lie within a character.
    return known.encode(held_out.decode(errors="ignore").encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _digest_of(files: Iterable[Path]) -> str:
    """Of files, one after the other, none of which is held in memory."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]
