"""ONNX schemas of the operators: domain ``hsa``, opset 1. ``hsa_compile.ops`` and ``window`` say what they compute."""

from __future__ import annotations

from typing import Any

from onnx import defs
from onnx.helper import make_attribute

DOMAIN = "hsa"
OPSET = 1

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = [("T", _FLOATS, "Type of what goes through the model and of its memory; sums are accumulated in float.")]

_SELECT_DOC = """
Selects the K best visible chunks of every token and kv head. Chunk i is visible to token t (position[b] + l) iff
(i+1)*chunk_size <= t - lag, with lag = window - chunk_size if window else 0, and i < chunks[b]. Scores are
q_r·landmark/sqrt(Dr). Output is ordered by chunk, newest first; exact ties go to the newer chunk; empty slots have
index -1 and score 0. Rows of landmark from chunks[b] on are not looked at.
"""

_ATTENTION_DOC = """
o[t,h] = sum_k weights[t,g,k] * softmax_j(q[t,h]·k[c,j]*scale) · v[c,j], c = indices[t,g,k], g the kv head of h.
Slots with index -1 contribute nothing. With off_by_one, 1 is added to the softmax denominators.
"""

_WINDOW_DOC = """
Causal softmax attention of each token to the window of W tokens that ends with it: token i of row b has position
p = position[b] + i and sees keys j with p - W < j <= p and j >= 0. Keys from position[b] on are in k, those before in a
ring, key j in slot j mod W. Scores are q·k/sqrt(D); q and k come rotated. Only the first lengths[b] tokens of a row
count; the output of the others is finite and means nothing. present_k and present_v are the rings after those tokens:
slot j mod W holds key j for the last W of them. They may be written over past_k and past_v.
"""

_SAMPLE_DOC = """
Chooses a token from each row of logits. With temperature 0 the likeliest, the first of equals. Else at random by
softmax(logits / temperature), cut to the fewest likeliest tokens that hold top_p of it: of these, in the order of their
ids, the first at which the cumulated probability passes uniform times what all of them hold. The token is -1 where a
logit is NaN or the largest is infinite.
"""

_ADD_NORM_DOC = """
sum = x + added, rounded to T; normed = sum / sqrt(mean(sum^2) + epsilon) * weight over the last dimension, computed in
float. What adds to a residual stream and norms it for what comes next.
"""

_RMS_NORM_DOC = """
normed = x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, computed in float and rounded once.
"""

_ROTARY_HEADS_DOC = """
Queries, keys and values out of one product: qkv holds Hq heads of queries, Hkv of keys and Hkv of values, of width D
each. With normalize, queries and keys are x / sqrt(mean(x^2) + epsilon) * weight a head. Then they are turned: element
i of the first half and element i of the second, (a, b), become (a*cos - b*sin, b*cos + a*sin). Computed in float and
rounded once.
"""

_SWIGLU_DOC = """
o = silu(gate) * up, where gate_up's last dimension holds gate, then up; silu(x) = x / (1 + exp(-x)).
"""

_TAKE_ROWS_DOC = """
Rows of the axis before the last, by number: Gather with axis = rank(x) - 2.
"""


def _schema(
    name: str,
    doc: str,
    inputs: dict[str, tuple[str, str]],
    outputs: dict[str, tuple[str, str]],
    attributes: dict[str, tuple[str, float | None]],
) -> Any:
    """Inputs and outputs are (type, shape) by name, attributes (meaning, default), None where one must be given."""
    return defs.OpSchema(
        name,
        DOMAIN,
        OPSET,
        doc=doc,
        inputs=[defs.OpSchema.FormalParameter(n, *about) for n, about in inputs.items()],
        outputs=[defs.OpSchema.FormalParameter(n, *about) for n, about in outputs.items()],
        type_constraints=_TYPES if any(kind == "T" for kind, _ in inputs.values()) else [],
        attributes=[_attribute(n, *about) for n, about in attributes.items()],
    )


def _attribute(name: str, doc: str, default: float | None) -> Any:
    """Of the default's type; an integer where there is none."""
    if default is None:
        return defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT, doc, required=True)
    return defs.OpSchema.Attribute(name, make_attribute(name, default), doc)


_EPSILON = ("added to the mean square", 1e-6)

_SCHEMAS = (
    _schema(
        "ChunkSelect",
        _SELECT_DOC,
        inputs={
            "q_r": ("T", "[B, L, Hr, Dr]"),
            "landmark": ("T", "[B, C, Hr, Dr]"),
            "position": ("tensor(int64)", "[B], absolute index of the first token"),
            "chunks": ("tensor(int64)", "[B], how many rows of landmark are filled"),
        },
        outputs={
            "indices": ("tensor(int32)", "[B, L, kv_num_heads, top_k]"),
            "scores": ("tensor(float)", "[B, L, kv_num_heads, top_k]"),
        },
        attributes={
            "kv_num_heads": ("Hkv; Hr is Hkv or 1", None),
            "chunk_size": ("S, tokens of a chunk", None),
            "top_k": ("K, slots of a token", None),
            "window": ("0, or the sliding window's width, at least S, to leave to it what it covers", 0),
        },
    ),
    _schema(
        "ChunkAttention",
        _ATTENTION_DOC,
        inputs={
            "q": ("T", "[B, L, Hq, D]"),
            "k": ("T", "[B, C*S, Hkv, D]"),
            "v": ("T", "[B, C*S, Hkv, D]"),
            "indices": ("tensor(int32)", "[B, L, Hkv, K], -1 (empty) … C-1"),
            "weights": ("tensor(float)", "[B, L, Hkv, K]"),
        },
        outputs={"o": ("T", "[B, L, Hq, D]")},
        attributes={
            "chunk_size": ("S, tokens of a chunk", None),
            "off_by_one": ("1: add 1 to the softmax denominators", 0),
            "scale": ("factor of the logits; 0 for 1/sqrt(D)", 0.0),
        },
    ),
    _schema(
        "SlidingWindow",
        _WINDOW_DOC,
        inputs={
            "q": ("T", "[B, L, Hq, D]"),
            "k": ("T", "[B, L, Hkv, D]"),
            "v": ("T", "[B, L, Hkv, D]"),
            "past_k": ("T", "[B, W, Hkv, D]"),
            "past_v": ("T", "[B, W, Hkv, D]"),
            "position": ("tensor(int64)", "[B], tokens before the segment"),
            "lengths": ("tensor(int64)", "[B], 0 … L, tokens of the segment that count"),
        },
        outputs={
            "o": ("T", "[B, L, Hq, D]"),
            "present_k": ("T", "[B, W, Hkv, D]"),
            "present_v": ("T", "[B, W, Hkv, D]"),
        },
        attributes={},
    ),
    _schema(
        "Sample",
        _SAMPLE_DOC,
        inputs={
            "logits": ("tensor(float)", "[B, w, V]"),
            "temperature": ("tensor(float)", "[B], at least 0"),
            "top_p": ("tensor(float)", "[B], above 0, at most 1"),
            "uniform": ("tensor(float)", "[B], random numbers, at least 0, below 1"),
        },
        outputs={"token": ("tensor(int64)", "[B, w], -1 … V-1")},
        attributes={},
    ),
    _schema(
        "AddNorm",
        _ADD_NORM_DOC,
        inputs={"x": ("T", "[..., d]"), "added": ("T", "[..., d]"), "weight": ("T", "[d]")},
        outputs={"sum": ("T", "[..., d]"), "normed": ("T", "[..., d]")},
        attributes={"epsilon": _EPSILON},
    ),
    _schema(
        "RmsNorm",
        _RMS_NORM_DOC,
        inputs={"x": ("T", "[..., d]"), "weight": ("T", "[d]")},
        outputs={"normed": ("T", "[..., d]")},
        attributes={"epsilon": _EPSILON},
    ),
    _schema(
        "RotaryHeads",
        _ROTARY_HEADS_DOC,
        inputs={
            "qkv": ("T", "[B, L, (Hq + 2*Hkv)*D]"),
            "q_weight": ("T", "[D]"),
            "k_weight": ("T", "[D]"),
            "cos": ("tensor(float)", "[B or 1, L, D/2]"),
            "sin": ("tensor(float)", "[B or 1, L, D/2]"),
        },
        outputs={"q": ("T", "[B, L, Hq, D]"), "k": ("T", "[B, L, Hkv, D]"), "v": ("T", "[B, L, Hkv, D]")},
        attributes={
            "num_heads": ("Hq", None),
            "kv_num_heads": ("Hkv", None),
            "normalize": ("1: norm queries and keys a head; 0: their weights are not looked at", 1),
            "epsilon": _EPSILON,
        },
    ),
    _schema(
        "SwiGlu",
        _SWIGLU_DOC,
        inputs={"gate_up": ("T", "[..., 2*n]")},
        outputs={"o": ("T", "[..., n]")},
        attributes={},
    ),
    _schema(
        "TakeRows",
        _TAKE_ROWS_DOC,
        inputs={"x": ("T", "[..., R, d]"), "index": ("tensor(int64)", "any shape, 0 … R-1")},
        outputs={"taken": ("T", "[..., *index, d]")},
        attributes={},
    ),
)


def register() -> None:
    """Makes the operators known to ``onnx`` (checker, shape inference, exporter). Calling it again changes nothing."""
    for schema in _SCHEMAS:
        if not defs.has(schema.name, DOMAIN):
            defs.register_schema(schema)
