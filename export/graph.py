"""One ONNX graph for prefill and decode, with every length dynamic, from the model's cached step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript.values import Opset
from torch import Tensor, nn

from hsa_compile.export import schema
from hsa_compile.export.bundle import TensorSpec
from hsa_compile.export.functions import STANDARD_OPSET, attach_functions
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel

# Protobuf ends at 2 GiB; the graph itself and its function bodies take less than the rest.
EXTERNAL_DATA_ABOVE = (1 << 31) - (1 << 26)

# The baselines are there to be compared with, in PyTorch.
EXPORTED = ("hsa",)

_hsa = Opset(schema.DOMAIN, schema.OPSET)
_standard = Opset("", STANDARD_OPSET)


class _Step(nn.Module):
    """The cached step, with logits only at the rows asked for: a prefill of 32 M tokens needs those of one."""

    def __init__(self, model: HsaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, logits_at: Tensor, position: Tensor, chunks: Tensor, pending: Tensor, swa_k: list[Tensor],
        swa_v: list[Tensor], mem_k: Tensor, mem_v: Tensor, landmark: Tensor,
    ) -> Any:  # fmt: skip
        state = (position, chunks, pending, swa_k, swa_v, mem_k, mem_v, landmark)
        return self.model.step_tensors(ids, *state, logits_at=logits_at)


def state_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The state tensors in the order of the graph's inputs and outputs. Named dimensions: ``batch``; ``unfinished``
    tokens, position mod S; ``ring`` tokens, min(position, W - 1); ``rows`` = S * ``capacity`` of the memory."""
    c = config
    layers = range(c.lower_layers + c.upper_layers)
    ring = ("batch", "ring", c.swa_kv_heads, c.swa_head_dim)
    rows = ("batch", "rows", c.hsa_kv_heads, c.hsa_head_dim)
    return (
        TensorSpec("position", "int64", ("batch",)),
        TensorSpec("chunks", "int64", ("batch",)),
        TensorSpec("pending", "float32", ("batch", "unfinished", c.d_model)),
        *(TensorSpec(f"swa_k.{i}", "float32", ring) for i in layers),
        *(TensorSpec(f"swa_v.{i}", "float32", ring) for i in layers),
        TensorSpec("mem_k", "float32", rows),
        TensorSpec("mem_v", "float32", rows),
        TensorSpec("landmark", "float32", ("batch", "capacity", c.retrieval_heads, c.retrieval_dim)),
    )


def export_graph(model: HsaModel, path: Path, external_data_above: int = EXTERNAL_DATA_ABOVE) -> Path:
    """Writes the model's cached step as ONNX, in float32, with the operators' function bodies.

    Inputs are ``input_ids`` int64 [batch, segment], ``logits_at`` int64 [wanted] (rows of the segment) and
    ``past.<state>``; outputs ``logits`` float [batch, wanted, V] and ``present.<state>``, see ``state_specs``.
    The memory of ``present`` may be bound to the buffer of ``past``.

    Args:
        model: in float32, on the CPU; exported as for inference.
        path: of the graph, in an existing folder; large weights go beside it, with ``.data`` appended.
        external_data_above: bytes of weights from which they go beside it.

    Returns:
        ``path``.

    Raises:
        ConfigError: the architecture is not exported.
        ValueError: the model is not float32 on the CPU.
    """
    model.config.require("exporting", EXPORTED)
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("only float32 models on the CPU are exported; use model.float().cpu()")
    schema.register()
    training = model.training
    model.eval()
    try:
        program = _program(model)
    finally:
        model.train(training)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(path), external_data=size > external_data_above)
    proto = onnx.load(str(path), load_external_data=False)
    _strip(proto.graph)
    del proto.metadata_props[:]
    _name_dimensions(proto, model.config)
    attach_functions(proto)
    onnx.save(proto, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return path


def _program(model: HsaModel) -> Any:
    names = [spec.name for spec in state_specs(model.config)]
    with torch.no_grad(), _quiet():
        exported = torch.export.export(
            _Step(model), _example(model.config), dynamic_shapes=_dynamic_shapes(model), strict=False
        )
        return torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=STANDARD_OPSET,
            custom_translation_table=_translations(),
            input_names=["input_ids", "logits_at", *(f"past.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            verbose=False,
        )


def _example(config: ModelConfig) -> tuple[Any, ...]:
    """A step by shapes alone; no dynamic dimension is 0 or 1, which the exporter would take for fixed."""
    sizes = {"batch": 2, "unfinished": 3, "ring": 3, "capacity": 8, "rows": 8 * config.chunk_size}
    state = {}
    for spec in state_specs(config):
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        state[spec.name] = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    layers = range(config.lower_layers + config.upper_layers)
    rings = [[state.pop(f"{kind}.{i}") for i in layers] for kind in ("swa_k", "swa_v")]
    position, chunks, pending, *memory = state.values()
    segment = torch.zeros(2, 3 * config.chunk_size, dtype=torch.int64)
    return (segment, torch.arange(3), position, chunks, pending, *rings, *memory)


def _dynamic_shapes(model: HsaModel) -> tuple[Any, ...]:
    batch, segment, wanted, unfinished, ring, capacity = (
        torch.export.Dim(name) for name in ("batch", "segment", "wanted", "unfinished", "ring", "capacity")
    )
    rows = {0: batch, 1: model.config.chunk_size * capacity}
    rings = [{0: batch, 1: ring}] * len(model.swa_layers())
    return (
        {0: batch, 1: segment}, {0: wanted}, {0: batch}, {0: batch}, {0: batch, 1: unfinished}, rings, rings,
        rows, rows, {0: batch, 1: capacity},
    )  # fmt: skip


def _translations() -> dict[Any, Any]:
    def select(
        q_r: Any, landmark: Any, position: Any, chunks: Any, kv_heads: int, chunk_size: int, top_k: int, window: int = 0
    ) -> Any:
        sizes = {"kv_num_heads": kv_heads, "chunk_size": chunk_size, "top_k": top_k, "window": window}
        return _hsa.ChunkSelect(q_r, landmark, position, chunks, **sizes)

    def attention(q: Any, k: Any, v: Any, indices: Any, weights: Any, chunk_size: int, off_by_one: bool = False) -> Any:
        return _hsa.ChunkAttention(q, k, v, indices, weights, chunk_size=chunk_size, off_by_one=int(off_by_one))

    def cache_write(cache: Any, update: Any, start: Any) -> Any:
        return _standard.TensorScatter(cache, update, start, axis=1)

    ops = torch.ops.hsa
    return {
        ops.chunk_select.default: select,
        ops.chunk_attention.default: attention,
        ops.cache_write.default: cache_write,
    }


def _strip(graph: onnx.GraphProto) -> None:
    """Removes what the exporter notes for debugging: stack traces with local paths, and symbolic shapes within."""
    del graph.metadata_props[:], graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)


def _name_dimensions(proto: onnx.ModelProto, config: ModelConfig) -> None:
    """Gives dynamic dimensions their names. What changes from past to present must not share one: the runtime plans
    its buffers by them."""
    changing = {"unfinished": "next_unfinished", "ring": "next_ring"}
    shapes: dict[str, tuple[str | int, ...]] = {
        "input_ids": ("batch", "segment"),
        "logits_at": ("wanted",),
        "logits": ("batch", "wanted", config.vocab_size),
    }
    for spec in state_specs(config):
        shapes[f"past.{spec.name}"] = spec.shape
        shapes[f"present.{spec.name}"] = tuple(changing.get(str(d), d) for d in spec.shape)
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            if isinstance(name, str):
                dimension.dim_param = name
            else:
                dimension.dim_value = name


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of optional packages that nothing here needs, and of its own use of PyTorch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
