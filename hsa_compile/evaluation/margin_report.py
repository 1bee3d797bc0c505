"""Margins of an evaluation's questions as JSON, a table and a picture: the suite ``margins``.

Shape letters: N tokens of all questions of a task and length, G HSA layers, Hr retrieval heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from hsa_compile.bench.record import common_keys
from hsa_compile.evaluation.margins import Asked
from hsa_compile.evaluation.report import human
from hsa_compile.model.checkpoint import write_atomically
from hsa_compile.model.margin import needed

ANY = "any"
LOW = 0.1  # the quantile of z that is shown beside its mean
Rows = Sequence[dict[str, Any]]


def rows(
    asked: Iterable[Asked], top_k: int, train_length: int | None, seed: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """The suite ``margins``: for each task and length an object a layer, and one for the best of all.

    Of a layer, tokens and heads are alike: ``z`` is the mean over all of them, ``z_p10`` their 10th percentile,
    ``recall`` the share that selected a right chunk, ``weight`` the mean of what right chunks got. ``rank`` is the
    median. With the layer ``any``, of each token the layer and head where z is largest counts, selected is what any of
    them selected; ``matched`` is the share of tokens predicted right, ``matched_selected`` and ``matched_missed`` of
    those where a right chunk was selected or not. ``bar``, ``tail`` and ``needed`` are those of ``model/margin.py``.
    ``unseen`` counts tokens that see no right chunk; z, rank, recall and weight are of the others. What nothing is
    known of is null.
    """
    common = {**common_keys("margins", seed, device), "train_length": train_length, "top_k": top_k}
    groups: dict[tuple[str, int], list[Asked]] = {}
    for one in asked:
        groups.setdefault((one.task, one.length), []).append(one)
    found = []
    for (task, length), questions in groups.items():
        visible = torch.cat([one.layers[0].visible for one in questions])
        unseen = torch.cat([one.layers[0].right for one in questions]) == 0
        fields = {"task": task, "L": length, "n": len(questions), "tokens": len(unseen), "unseen": int(unseen.sum())}
        fields |= {"visible": int(visible.max()), "needed": _number(needed(int(visible.max()), top_k))}
        for layer, values in enumerate(_by_layer(questions)):
            found.append({**common, **fields, "layer": layer, **_summary(values)})
        best = _best(questions)
        right = torch.cat([one.right for one in questions])
        found.append({**common, **fields, "layer": ANY, **_summary(best), **_matched(right, best["selected"])})
    return found


_MEASURED = ("z", "bar", "tail", "rank", "selected", "weight", "pearson")


def _stacked(questions: Sequence[Asked], name: str) -> Tensor:
    """[G, N, Hr]."""
    layers = range(len(questions[0].layers))
    return torch.stack([torch.cat([getattr(one.layers[layer], name) for one in questions]) for layer in layers])


def _by_layer(questions: Sequence[Asked]) -> list[dict[str, Tensor]]:
    """[N * Hr] of each layer."""
    all_layers = {name: _stacked(questions, name).flatten(1) for name in _MEASURED}
    return [{name: x[layer] for name, x in all_layers.items()} for layer in range(len(questions[0].layers))]


def _best(questions: Sequence[Asked]) -> dict[str, Tensor]:
    """[N], of the layer and head of largest z; selected where any did."""
    flat = {name: _stacked(questions, name).transpose(0, 1).flatten(1) for name in _MEASURED}  # [N, G * Hr]
    at = flat["z"].nan_to_num(-torch.inf).argmax(-1, keepdim=True)
    best = {name: x.gather(-1, at)[:, 0] for name, x in flat.items()}
    return best | {"selected": flat["selected"].amax(-1)}


def _summary(values: dict[str, Tensor]) -> dict[str, float | None]:
    z = values["z"][~values["z"].isnan()]
    out = {"z": _mean(z), "z_p10": _number(z.quantile(LOW)) if len(z) else None}
    out |= {name: _mean(values[name]) for name in ("bar", "tail", "weight", "pearson")}
    return out | {"recall": _mean(values["selected"]), "rank": _number(values["rank"].nanmedian())}


def _matched(right: Tensor, selected: Tensor) -> dict[str, float | None]:
    parts = {"matched": right, "matched_selected": right[selected == 1], "matched_missed": right[selected == 0]}
    return {name: _mean(x.double()) for name, x in parts.items()}


def _mean(x: Tensor) -> float | None:
    return _number(x.nanmean())


def _number(x: Tensor | float | None) -> float | None:
    return None if x is None or x != x else round(float(x), 4)


# Heading: key and form, in the order of the table.
_COLUMNS = {
    "z": ("z", ".1f"),
    "10 %": ("z_p10", ".1f"),
    "normal": ("needed", ".1f"),
    "K-th": ("bar", ".1f"),
    "max": ("tail", ".1f"),
    "recall": ("recall", ".0%"),
    "weight": ("weight", ".2f"),
    "mass": ("pearson", ".2f"),
    "right": ("matched", ".0%"),
    "found": ("matched_selected", ".0%"),
    "missed": ("matched_missed", ".0%"),
}


def table(found: Rows) -> Table:
    """A line a task, length and layer."""
    out = Table(
        title=f"How far the right chunk's score lies above the others', K = {found[0]['top_k']}",
        caption="z: in the others' standard deviations from their mean, mean and 10th percentile over the answers' "
        "tokens. K-th: the K-th largest of the others, which a selected one beats; normal: the same, were their scores "
        "normal; max: the largest. Recall: of the right chunk. Mass: correlation of score and log-mass. Right: tokens "
        "predicted, of all, and of those whose chunk was found or missed.",
        show_edge=False,
    )
    for name in ("task", "tokens", "layer", *_COLUMNS):
        out.add_column(name, justify="left" if name == "task" else "right")
    for row in found:
        values = (
            "" if key not in row else "–" if row[key] is None else f"{row[key]:{form}}"
            for key, form in _COLUMNS.values()
        )
        out.add_row(row["task"], human(row["L"]), str(row["layer"]), *values, end_section=row["layer"] == ANY)
    return out


def plot(found: Rows, path: Path) -> Path:
    """z of the best layer by length, a line a task and a thin one of its 10th percentile, and what selection takes."""
    from matplotlib.figure import Figure

    best = [row for row in found if row["layer"] == ANY]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for i, task in enumerate(dict.fromkeys(row["task"] for row in best)):
        mine = sorted((row for row in best if row["task"] == task), key=lambda row: row["L"])
        L, z, low, bar = ([_or_nan(row[key]) for row in mine] for key in ("L", "z", "z_p10", "bar"))
        axis.plot(L, z, marker="o", color=f"C{i}", label=task)
        axis.plot(L, low, marker="v", color=f"C{i}", linewidth=0.7)
        axis.plot(L, bar, linestyle=":", color=f"C{i}")
    seen = {row["L"]: _or_nan(row["needed"]) for row in best}
    lengths = sorted(seen)
    axis.plot(lengths, [seen[L] for L in lengths], color="black", linestyle="--", label="quantile, were others normal")
    axis.plot([], [], color="gray", linestyle=":", label="K-th of the others")
    axis.set_xscale("log")
    axis.set_xticks(lengths, [human(L) for L in lengths], minor=False)
    axis.minorticks_off()
    axis.set(xlabel="tokens of context", ylabel="standard deviations of the others' scores")
    axis.set_title("Right chunk's score: mean, and 10th percentile (thin)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
    return path


def _or_nan(x: float | None) -> float:
    return float("nan") if x is None else x
