"""What ``diagnose`` reads and shows: a text's tokens, and a table, JSON and a picture of what was measured on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from hsa_compile.bench.record import common_keys
from hsa_compile.model.checkpoint import write_atomically
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.data import DataError, load_text, read_text, split_text
from hsa_compile.model.diagnose import Measured
from hsa_compile.model.recipe import TrainConfig
from hsa_compile.model.shards import Tokenizer
from hsa_compile.model.tasks.weave import pairs_sample
from hsa_compile.model.tokenizer import ByteTokenizer
from hsa_compile.model.train import TOKENIZER_NAME

LENGTH = 4096  # of a generated text
# What is averaged over tokens, by name: its heading, how it is written, and whether the picture shows it.
COLUMNS = {
    "pearson": ("Pearson", ".2f", True),
    "spearman": ("Spearman", ".2f", True),
    "recall": ("recall of best K", ".0%", True),
    "mass": ("mass selected", ".0%", False),
    "entropy": ("entropy, nats", ".2f", False),
    "empty": ("empty slots", ".0%", False),
}


def read_tokens(
    config: ModelConfig,
    checkpoint: Path,
    text: Path | None = None,
    tokenizer: Path | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """The tokens to measure on, int64 [L].

    Args:
        checkpoint: its ``tokenizer.json`` is taken where no other is given; without one tokens are bytes.
        text: a text file. Default: a part of the default book that training holds out, in bytes with the key-value
            pairs among it that training hides.
        length: the first so many tokens; by default all of a file, 4096 of the book.

    Raises:
        DataError: the text or the tokenizer cannot be used, or they are not the model's.
    """
    if tokenizer is None and (checkpoint / TOKENIZER_NAME).is_file():
        tokenizer = checkpoint / TOKENIZER_NAME
    if tokenizer is None and config.vocab_size > ByteTokenizer.vocab_size:
        raise DataError(f"the model has {config.vocab_size} tokens, which are not bytes: give its tokenizer.json")
    raw = split_text(load_text())[1] if text is None else read_text(text)
    if text is None:
        length = length or LENGTH
    if tokenizer is not None:
        ids = torch.from_numpy(Tokenizer(tokenizer).encode(raw)[:length].astype(np.int64))
    elif text is None and length is not None:
        recipe = TrainConfig()
        pairs = max(1, min(recipe.pairs, recipe.pairs * length // recipe.length))
        sample = pairs_sample(random.Random(seed), raw, length, pairs, recipe.fill, recipe.answer_weight)
        ids = torch.tensor(sample.ids[:length])
    else:
        ids = torch.frombuffer(bytearray(raw[:length]), dtype=torch.uint8).long() if raw else torch.empty(0).long()
    if not len(ids):
        raise DataError(f"{text} is empty; give a longer text")
    if (largest := int(ids.max())) >= config.vocab_size:
        known = f"the model knows {config.vocab_size}"
        raise DataError(f"the text has token {largest}, {known}: give the model's own tokenizer.json")
    return ids


def rows(measured: Sequence[Measured], config: ModelConfig, length: int, seed: int) -> list[dict[str, Any]]:
    """A measurement a layer: means over tokens and heads, and by head; null where nothing could be measured.

    ``rejecting`` counts the tokens that see more than K chunks, ``recall_by_chance`` is what any K of them would give.
    """
    common = {**common_keys("diagnose", seed), "L": length, "top_k": config.top_k}
    out = []
    for layer, found in enumerate(measured):
        row = {**common, "layer": layer, "queries": len(found.position)}
        rejecting = found.visible[found.visible > config.top_k]
        row["rejecting"], row["recall_by_chance"] = len(rejecting), _number((config.top_k / rejecting).mean())
        for name in COLUMNS:
            heads = getattr(found, name).nanmean(0)
            row[name] = _number(heads.nanmean())
            row[f"{name}_by_head"] = [_number(x) for x in heads]
        out.append(row)
    return out


def _number(x: Tensor) -> float | None:
    return None if x.isnan() else round(float(x), 6)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a layer: means, and the least and the most of its heads where they differ."""
    first = rows[0]
    chance = "" if first["recall_by_chance"] is None else f" ({first['recall_by_chance']:.1%} by chance)"
    out = Table(
        title=f"Selection scores beside the chunks' true mass, K = {first['top_k']}, {first['L']:,} tokens",
        caption=f"Means over {first['queries']} tokens, and (least … most) of the heads. Correlations are over a "
        f"token's visible chunks; recall is over the {first['rejecting']} tokens that see more than K{chance}.",
    )
    out.add_column("layer", justify="right")
    for heading, _, _ in COLUMNS.values():
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            str(row["layer"]), *(_cell(row[name], row[f"{name}_by_head"], COLUMNS[name][1]) for name in COLUMNS)
        )
    return out


def _cell(mean: float | None, heads: Sequence[float | None], form: str) -> str:
    known = [x for x in heads if x is not None]
    if mean is None or not known:
        return "–"
    least, most = (f"{x:{form}}" for x in (min(known), max(known)))
    return f"{mean:{form}}" + (f"\n({least} … {most})" if least != most else "")


def plot(measured: Sequence[Measured], path: Path) -> Path:
    """Correlations and recall by how many chunks a token sees: a dot a token, a line for the mean of its layer."""
    from matplotlib.figure import Figure

    shown = {name: heading for name, (heading, _, is_shown) in COLUMNS.items() if is_shown}
    figure = Figure(figsize=(4 * len(shown), 4), layout="constrained")
    for axis, (name, heading) in zip(figure.subplots(1, len(shown)), shown.items()):
        for layer, found in enumerate(measured):
            values, color = getattr(found, name).nanmean(1), f"C{layer}"
            known = ~values.isnan()
            if not known.any():
                continue  # a text so short that there is nothing to select from
            mean = float(values[known].mean())
            axis.scatter(found.visible[known].cpu(), values[known].cpu(), s=6, alpha=0.4, color=color)
            axis.axhline(mean, color=color, linestyle="--", label=f"layer {layer}: {mean:.2f}")
            axis.set_xscale("log")
            axis.legend()
        axis.set(title=heading, xlabel="visible chunks")
        axis.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    return path
