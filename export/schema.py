"""ONNX schemas of the two operators: domain ``hsa``, opset 1. See ``hsa_compile.ops`` for what they compute."""

from __future__ import annotations

from typing import Any

from onnx import defs
from onnx.helper import make_attribute

DOMAIN = "hsa"
OPSET = 1

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = [("T", _FLOATS, "Type of the queries and of the memory; sums are accumulated in float.")]

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
        type_constraints=_TYPES,
        attributes=[_attribute(n, *about) for n, about in attributes.items()],
    )


def _attribute(name: str, doc: str, default: float | None) -> Any:
    """Of the default's type; an integer where there is none."""
    if default is None:
        return defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT, doc, required=True)
    return defs.OpSchema.Attribute(name, make_attribute(name, default), doc)


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
)


def register() -> None:
    """Makes both operators known to ``onnx`` (checker, shape inference, exporter). Calling it again changes nothing."""
    for schema in _SCHEMAS:
        if not defs.has(schema.name, DOMAIN):
            defs.register_schema(schema)
