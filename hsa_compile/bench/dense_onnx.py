"""The dense peer in ONNX Runtime: its graph, with ``com.microsoft.GroupQueryAttention`` over a cache that is written in
place, and the session that runs it.

Shape letters: L tokens of a step, T capacity of the cache, d model width, H query heads, Hkv key/value heads, D head
width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hsa_compile.bench.dense import DenseModel
from hsa_compile.export.runtime import PROVIDERS
from hsa_compile.export.session import Ids
from hsa_compile.model.layers import NORM_EPS, SwaLayer, rotations

MICROSOFT = "com.microsoft"
OPSET = 23  # RMSNormalization
SEGMENTS = {"cpu": 512, "cuda": 4096}  # tokens a step: the CPU's kernel keeps the scores [H, L, T]


class _Graph:
    """Nodes and weights of a graph that grows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, value: Tensor) -> str:
        name = f"weight{len(self.weights)}"
        value = value.to(self.dtype) if value.is_floating_point() else value
        self.weights.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def add(
        self, op: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, domain: str = "", **sizes: Any
    ) -> Any:
        """A node; its output's name, or all of several."""
        made = [f"x{len(self.nodes)}.{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), made, domain=domain, **sizes))
        return made[0] if len(made) == 1 else made

    def linear(self, x: str, weight_OI: Tensor) -> str:
        return str(self.add("MatMul", [x, self.weight(weight_OI.T)]))

    def norm(self, x: str, module: Any) -> str:
        """RMSNorm over the last axis; nothing where the model has none."""
        if not hasattr(module, "weight"):
            return x
        return str(self.add("RMSNormalization", [x, self.weight(module.weight)], axis=-1, epsilon=NORM_EPS))

    def heads_norm(self, x: str, module: Any, heads: int, width: int) -> str:
        """RMSNorm a head, of [1, L, heads * width]."""
        split, merged = (torch.tensor(shape) for shape in ([0, 0, heads, width], [0, 0, heads * width]))
        x = self.norm(self.add("Reshape", [x, self.weight(split)]), module)
        return str(self.add("Reshape", [x, self.weight(merged)]))


def dense_graph(model: DenseModel, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """The model's step.

    Inputs: ``input_ids`` int64 [1, L], ``last`` int32 [1] and ``total`` int32 [], the position of the last token and
    the tokens with it, ``past_k.i`` and ``past_v.i`` [1, Hkv, T, D]. Outputs: ``logits`` [1, V] after the last token,
    ``present_k.i`` and ``present_v.i``, which may be bound to the buffers of the past.

    Args:
        model: in float32, with the capacity T.
        dtype: of weights and cache: float32 or float16.
    """
    c, g = model.config, _Graph(dtype)
    cos, sin = (g.weight(x[:, 0]) for x in rotations(model.capacity, c.swa_head_dim, c.rope_base, torch.device("cpu")))
    x = g.add("Gather", [g.weight(model.embedding.weight), "input_ids"])
    embedding = g.weights[-1].name
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, SwaLayer)
        x = _layer(g, layer, x, i, cos, sin)
    x = g.norm(g.add("Gather", [x, g.weight(torch.tensor(-1))], axis=1), model.norm)
    g.add("Gemm", [x, embedding], ["logits"], transB=1)
    kind = numpy_helper.to_array(g.weights[0]).dtype
    real = helper.np_dtype_to_tensor_dtype(kind)
    places = [1, c.swa_kv_heads, model.capacity, c.swa_head_dim]
    cache = [(f"{kv}.{i}", places) for i in range(len(model.layers)) for kv in "kv"]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "L"]),
        helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
        *(helper.make_tensor_value_info(f"past_{name}", real, shape) for name, shape in cache),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", real, [1, c.vocab_size]),
        *(helper.make_tensor_value_info(f"present_{name}", real, shape) for name, shape in cache),
    ]
    graph = helper.make_graph(g.nodes, "dense", inputs, outputs, initializer=g.weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def _layer(g: _Graph, layer: SwaLayer, x: str, i: int, cos: str, sin: str) -> str:
    attention = layer.attention
    heads, kv_heads, _ = attention.heads
    width = attention.qkv.out_features // sum(attention.heads)
    parts = attention.qkv.weight.split([n * width for n in attention.heads])
    normed = g.norm(x, layer.norm)
    q, k, v = (g.linear(normed, part) for part in parts)
    q = g.heads_norm(q, attention.q_norm, heads, width)
    k = g.heads_norm(k, attention.k_norm, kv_heads, width)
    inputs = [q, k, v, f"past_k.{i}", f"past_v.{i}", "last", "total", cos, sin]
    names = [f"attended.{i}", f"present_k.{i}", f"present_v.{i}"]
    sizes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "scale": 1 / math.sqrt(width)}
    o, _, _ = g.add("GroupQueryAttention", inputs, names, domain=MICROSOFT, **sizes)
    x = g.add("Add", [x, g.linear(o, attention.out.weight)])
    gate, up = (g.linear(g.norm(x, layer.mlp_norm), part) for part in layer.mlp.gate_up.weight.chunk(2))
    inner = g.add("Mul", [g.add("Mul", [gate, g.add("Sigmoid", [gate])]), up])
    return str(g.add("Add", [x, g.linear(inner, layer.mlp.down.weight)]))


class DenseSession:
    """One text in ONNX Runtime, with a cache of the model's capacity that is allocated once.

    Args:
        model: see ``dense_graph``.
        provider: "cpu" or "cuda", in float16 there, which its kernels take.
        threads: of ONNX Runtime.
    """

    def __init__(self, model: DenseModel, provider: str = "cpu", threads: int | None = None) -> None:
        self.position, self.capacity, self.provider = 0, model.capacity, provider
        self.dtype = "float16" if provider == "cuda" else "float32"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        proto = dense_graph(model, getattr(torch, self.dtype)).SerializeToString()
        self._session = ort.InferenceSession(proto, options, providers=[PROVIDERS[provider]])
        kind = np.dtype(self.dtype).type
        self._cache = {
            x.name: ort.OrtValue.ortvalue_from_shape_and_type(x.shape, kind, provider, 0)
            for x in self._session.get_inputs() if x.name.startswith("past_")
        }  # fmt: skip

    def reset(self) -> None:
        """Forgets the text."""
        self.position = 0

    def prefill(self, ids: Sequence[int] | Ids, segment: int | None = None) -> Any:
        """Reads the next tokens, at least one, in segments: logits [V] after the last."""
        segment = segment or SEGMENTS[self.provider]
        if self.position + len(ids) > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens")
        for start in range(0, len(ids), segment):
            logits = self._step(ids[start : start + segment])
        return logits

    def _step(self, ids: Sequence[int] | Ids) -> Any:
        self.position += len(ids)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("last", np.array([self.position - 1], np.int32))
        binding.bind_cpu_input("total", np.array(self.position, np.int32))
        binding.bind_output("logits", "cpu")
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[0]
