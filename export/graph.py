"""One ONNX graph for prefill and decode, from the model's step with static shapes (``step``)."""

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

from hsa_compile.export import schema
from hsa_compile.export.bundle import TensorSpec
from hsa_compile.export.functions import STANDARD_OPSET, attach_functions
from hsa_compile.export.fuse import drop_unused, fuse, value_shapes
from hsa_compile.export.step import Segment, StaticStep
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel

# Protobuf ends at 2 GiB; the graph itself and its function bodies take less than the rest.
EXTERNAL_DATA_ABOVE = (1 << 31) - (1 << 26)

# The baselines are there to be compared with, in PyTorch.
EXPORTED = ("hsa",)
DTYPES = ("float32", "float16", "bfloat16")

_hsa = Opset(schema.DOMAIN, schema.OPSET)
_standard = Opset("", STANDARD_OPSET)


def state_specs(config: ModelConfig, dtype: str = "float32") -> tuple[TensorSpec, ...]:
    """The state tensors in the order of the graph's inputs and outputs; all have static shapes for a batch and a
    ``capacity`` of the memory in chunks, of S ``rows`` each. Slot j mod W of a ring holds the rotated key j.

    Args:
        dtype: of the floating-point ones.
    """
    c = config
    layers = range(c.lower_layers + c.upper_layers)
    ring = ("batch", c.window, c.swa_kv_heads, c.swa_head_dim)
    rows = ("batch", "rows", c.hsa_kv_heads, c.hsa_head_dim)
    return (
        TensorSpec("position", "int64", ("batch",)),
        TensorSpec("pending", dtype, ("batch", c.chunk_size, c.d_model)),
        *(TensorSpec(f"swa_k.{i}", dtype, ring) for i in layers),
        *(TensorSpec(f"swa_v.{i}", dtype, ring) for i in layers),
        TensorSpec("mem_k", dtype, rows),
        TensorSpec("mem_v", dtype, rows),
        TensorSpec("landmark", dtype, ("batch", "capacity", c.retrieval_heads, c.retrieval_dim)),
    )


def export_graph(model: HsaModel, path: Path, external_data_above: int = EXTERNAL_DATA_ABOVE) -> Path:
    """Writes the model's step (``step.StaticStep``) as ONNX, with the operators' function bodies.

    Inputs are the fields of ``step.Segment`` and ``past.<state>``; outputs ``logits`` float [batch, wanted, V],
    ``token`` int64 [batch, wanted], chosen from them, and ``present.<state>``, see ``state_specs``. Each
    ``present`` may be bound to the buffer of its ``past``.

    Args:
        model: on the CPU, in float32, float16 or bfloat16, which becomes the graph's; exported as for inference.
        path: of the graph, in an existing folder; large weights go beside it, with ``.data`` appended.
        external_data_above: bytes of weights from which they go beside it.

    Returns:
        ``path``.

    Raises:
        ValueError: the model is not of one of these types, or not on the CPU.
        ConfigError: the architecture is not exported.
    """
    model.config.require("exporting", EXPORTED)
    dtype = graph_dtype(model)
    schema.register()
    training = model.training
    model.eval()
    try:
        program = _program(model, dtype)
    finally:
        model.train(training)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(path), external_data=size > external_data_above)
    proto = onnx.load(str(path), load_external_data=False)
    fix_shapes(proto.graph)
    fuse(proto.graph, path.parent)
    _strip(proto.graph)
    del proto.metadata_props[:]
    _name_dimensions(proto, model.config)
    attach_functions(proto)
    onnx.save(proto, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return path


def graph_dtype(model: HsaModel) -> str:
    """The type of a model's weights, by name.

    Raises:
        ValueError: they are of several types or of one that is not exported, or not on the CPU.
    """
    kinds = {(p.dtype, p.device.type) for p in model.parameters()}
    names = {(getattr(torch, name), "cpu"): name for name in DTYPES}
    if len(kinds) != 1 or not kinds <= names.keys():
        found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds, key=str))
        raise ValueError(f"only models in {', '.join(DTYPES)} on the CPU are exported, not {found}; use model.cpu()")
    return names[kinds.pop()]


def _program(model: HsaModel, dtype: str) -> Any:
    names = [spec.name for spec in state_specs(model.config)]
    with torch.no_grad(), _quiet():
        exported = torch.export.export(
            StaticStep(model), _example(model.config, dtype), dynamic_shapes=_dynamic_shapes(model), strict=False
        )
        return torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=STANDARD_OPSET,
            custom_translation_table=_translations(),
            input_names=[*Segment._fields, *(f"past.{name}" for name in names)],
            output_names=["logits", "token", *(f"present.{name}" for name in names)],
            verbose=False,
        )


def _example(config: ModelConfig, dtype: str) -> tuple[Any, ...]:
    """A step by shapes alone; no dynamic dimension is 0 or 1, which the exporter would take for fixed."""
    B, L, n = 2, 3 * config.chunk_size, 3
    sizes = {"batch": B, "capacity": 8, "rows": 8 * config.chunk_size}
    state = {}
    for spec in state_specs(config, dtype):
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        state[spec.name] = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    layers = range(config.lower_layers + config.upper_layers)
    rings = [[state.pop(f"{kind}.{i}") for i in layers] for kind in ("swa_k", "swa_v")]
    position, pending, *memory = state.values()
    segment = Segment(
        input_ids=torch.zeros(B, L, dtype=torch.int64),
        lengths=torch.full((B,), L),
        rows=torch.arange(B),
        tokens=torch.arange(L),
        upper=torch.arange(L - 2, L),
        logits_at=torch.zeros(B, 4, dtype=torch.int64),
        completing=torch.arange(B * n).view(B, n),
        temperature=torch.zeros(B),
        top_p=torch.ones(B),
        uniform=torch.zeros(B),
    )
    return (*segment, position, pending, *rings, *memory)


def _dynamic_shapes(model: HsaModel) -> tuple[Any, ...]:
    batch, segment, upper, wanted, completing, capacity = (
        torch.export.Dim(name) for name in ("batch", "segment", "upper", "wanted", "completing", "capacity")
    )
    rows = {0: batch, 1: model.config.chunk_size * capacity}
    rings = [{0: batch}] * len(model.swa_layers())
    return (
        {0: batch, 1: segment}, {0: batch}, {0: batch}, {0: segment}, {0: upper}, {0: batch, 1: wanted},
        {0: batch, 1: completing}, *[{0: batch}] * 5, rings, rings, rows, rows, {0: batch, 1: capacity},
    )  # fmt: skip


def _translations() -> dict[Any, Any]:
    def select(
        q_r: Any, landmark: Any, position: Any, chunks: Any, kv_heads: int, chunk_size: int, top_k: int, window: int = 0
    ) -> Any:
        sizes = {"kv_num_heads": kv_heads, "chunk_size": chunk_size, "top_k": top_k, "window": window}
        return _hsa.ChunkSelect(q_r, landmark, position, chunks, **sizes)

    def attention(q: Any, k: Any, v: Any, indices: Any, weights: Any, chunk_size: int, off_by_one: bool = False) -> Any:
        return _hsa.ChunkAttention(q, k, v, indices, weights, chunk_size=chunk_size, off_by_one=int(off_by_one))

    def window(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, position: Any, lengths: Any) -> Any:
        return _hsa.SlidingWindow(q, k, v, past_k, past_v, position, lengths)

    def sample(logits: Any, temperature: Any, top_p: Any, uniform: Any) -> Any:
        return _hsa.Sample(logits, temperature, top_p, uniform)

    def cache_write(cache: Any, update: Any, start: Any) -> Any:
        return _standard.TensorScatter(cache, update, start, axis=1)

    def rotary(x: Any, cos: Any, sin: Any) -> Any:
        # In float, as the angles are; ``fuse`` makes it a part of what it belongs to.
        H, D = (int(d) for d in x.shape[2:])
        flat = _standard.Reshape(_standard.Cast(x, to=1), _standard.Constant(value_ints=[0, 0, H * D]))
        rotated = _standard.RotaryEmbedding(flat, cos, sin, num_heads=H)
        return _standard.CastLike(_standard.Reshape(rotated, _standard.Constant(value_ints=[0, 0, H, D])), x)

    def whole_part(x: Any, divisor: Any, rounding_mode: str) -> Any:
        # The exporter's own goes through floats, which do not hold every position.
        if rounding_mode != "trunc" or "INT" not in str(x.dtype):
            raise ValueError("only integers are divided with rounding here, towards zero")
        return _standard.Div(x, _standard.Constant(value_int=int(divisor)))

    ops = torch.ops.hsa
    return {
        ops.chunk_select.default: select,
        ops.chunk_attention.default: attention,
        ops.sliding_window.default: window,
        ops.sample.default: sample,
        ops.cache_write.default: cache_write,
        ops.rotary.default: rotary,
        torch.ops.aten.div.Tensor_mode: whole_part,
    }


def fix_shapes(graph: onnx.GraphProto) -> None:
    """Gives each Reshape whose target is computed from shapes a constant one, and drops what computed it.

    A dynamic dimension that stays at its place becomes 0 ("as before"), one other -1. On a GPU, arithmetic with shapes
    would run on the CPU, and a graph without it has all its operators on one device.

    Raises:
        ValueError: a Reshape has more than one dynamic dimension that does not stay.
    """
    shapes = value_shapes(graph)
    constant = {i.name for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] not in constant:
            target = _target(shapes[node.input[0]], shapes[node.output[0]], node.name)
            name = f"{node.output[0]}.shape"
            graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(target)], target))
            node.input[1] = name
            del node.attribute[:]  # allowzero, which would take the 0 for itself
    drop_unused(graph)


def _target(before: tuple[int | str, ...], after: tuple[int | str, ...], name: str) -> list[int]:
    stays = [i < len(before) and before[i] == d for i, d in enumerate(after)]
    target = [d if isinstance(d, int) else 0 if stay else -1 for d, stay in zip(after, stays)]
    if target.count(-1) > 1:
        raise ValueError(f"{name} reshapes {before} to {after}, which no constant shape says; export another form")
    return target


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
    """Gives dynamic dimensions their names."""
    shapes: dict[str, tuple[str | int, ...]] = {
        "input_ids": ("batch", "segment"),
        "lengths": ("batch",),
        "rows": ("batch",),
        "tokens": ("segment",),
        "upper": ("upper",),
        "logits_at": ("batch", "wanted"),
        "completing": ("batch", "completing"),
        **dict.fromkeys(("temperature", "top_p", "uniform"), ("batch",)),
        "logits": ("batch", "wanted", config.vocab_size),
        "token": ("batch", "wanted"),
    }
    for spec in state_specs(config):
        shapes[f"past.{spec.name}"] = shapes[f"present.{spec.name}"] = spec.shape
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
