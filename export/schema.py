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
o[t,h] = sum_k weights[t,g,k] * softmax_j(q[t,h]·k[c,j]/sqrt(D)) · v[c,j], c = indices[t,g,k], g the kv head of h.
Slots with index -1 contribute nothing. With off_by_one, 1 is added to the softmax denominators.
"""


def _parameter(name: str, kind: str, doc: str) -> Any:
    return defs.OpSchema.FormalParameter(name, kind, doc)


def _integer(name: str, doc: str, default: int | None = None) -> Any:
    kind = defs.OpSchema.AttrType.INT
    if default is None:
        return defs.OpSchema.Attribute(name, kind, doc, required=True)
    return defs.OpSchema.Attribute(name, make_attribute(name, default), doc)


def _chunk_select() -> Any:
    return defs.OpSchema(
        "ChunkSelect",
        DOMAIN,
        OPSET,
        doc=_SELECT_DOC,
        inputs=[
            _parameter("q_r", "T", "[B, L, Hr, Dr]"),
            _parameter("landmark", "T", "[B, C, Hr, Dr]"),
            _parameter("position", "tensor(int64)", "[B], absolute index of the first token"),
            _parameter("chunks", "tensor(int64)", "[B], how many rows of landmark are filled"),
        ],
        outputs=[
            _parameter("indices", "tensor(int32)", "[B, L, kv_heads, top_k]"),
            _parameter("scores", "tensor(float)", "[B, L, kv_heads, top_k]"),
        ],
        type_constraints=_TYPES,
        attributes=[
            _integer("kv_heads", "Hkv; Hr is Hkv or 1"),
            _integer("chunk_size", "S, tokens of a chunk"),
            _integer("top_k", "K, slots of a token"),
            _integer("window", "0, or the sliding window's width, at least S, to leave to it what it covers", 0),
        ],
    )


def _chunk_attention() -> Any:
    return defs.OpSchema(
        "ChunkAttention",
        DOMAIN,
        OPSET,
        doc=_ATTENTION_DOC,
        inputs=[
            _parameter("q", "T", "[B, L, Hq, D]"),
            _parameter("k", "T", "[B, C*S, Hkv, D]"),
            _parameter("v", "T", "[B, C*S, Hkv, D]"),
            _parameter("indices", "tensor(int32)", "[B, L, Hkv, K], -1 (empty) … C-1"),
            _parameter("weights", "tensor(float)", "[B, L, Hkv, K]"),
        ],
        outputs=[_parameter("o", "T", "[B, L, Hq, D]")],
        type_constraints=_TYPES,
        attributes=[
            _integer("chunk_size", "S, tokens of a chunk"),
            _integer("off_by_one", "1: add 1 to the softmax denominators", 0),
        ],
    )


def register() -> None:
    """Makes both operators known to ``onnx`` (checker, shape inference, exporter). Calling it again changes nothing."""
    for schema in (_chunk_select(), _chunk_attention()):
        if not defs.has(schema.name, DOMAIN):
            defs.register_schema(schema)
