"""Makes an exported graph take fewer passes over memory: what stands between its matrix products becomes few operators.

A layer leaves the exporter as products with norms, sums, splits, rotations and gates between them, each of which reads
and writes all tokens. The operators ``hsa.AddNorm``, ``RmsNorm``, ``RotaryHeads`` and ``SwiGlu`` take one pass each, as
what ``hsa_compile.model.fused`` has eager PyTorch run. ``TakeRows`` is ``Gather`` of rows, at the speed of memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from hsa_compile.export.schema import DOMAIN

Shape = tuple[int | str, ...]

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SAME_NUMBERS = ("Reshape", "Cast", "CastLike")


def fuse(graph: onnx.GraphProto, directory: Path) -> None:
    """Replaces what the operators compute by them, in place. Other nodes stay as they are.

    Args:
        graph: with the shapes of its values in ``value_info``.
        directory: where constants lie that are not in the graph itself.

    Raises:
        ValueError: a rotation is left, whose angles the standard operator may not take.
    """
    view = _View(graph, directory)
    for node in graph.node:
        if node.op_type == "Split":
            _fuse_swiglu(view, node)
            _fuse_heads(view, node)
    for node in graph.node:
        if node.op_type == "RMSNormalization" and view.stays(node):
            _fuse_norm(view, node)
    for node in graph.node:
        if node.op_type == "Gather":
            _fuse_gather(view, node)
    view.apply()
    if left := [node.name for node in graph.node if node.op_type == "RotaryEmbedding"]:
        raise ValueError(f"rotations that belong to no queries and keys of one product: {', '.join(left)}")


def value_shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Of each value that the graph says the shape of; dynamic dimensions by name."""
    shapes: dict[str, Shape] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)
    return shapes | {i.name: tuple(i.dims) for i in graph.initializer}


def drop_unused(graph: onnx.GraphProto) -> None:
    """Removes nodes and initializers that nothing comes of."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used & set(node.output):
            kept.append(node)
            used |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


class _View:
    """A graph, who makes and uses its values, and what is to become of its nodes."""

    def __init__(self, graph: onnx.GraphProto, directory: Path) -> None:
        self.graph, self.directory = graph, directory
        self.shapes = value_shapes(graph)
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
        self.types |= {i.name: i.data_type for i in graph.initializer}
        self.initializers = {i.name: i for i in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.users[name].append(node)
        self._replaced: dict[str, NodeProto | None] = {}  # by their first outputs

    def only_user(self, name: str, *kinds: str) -> NodeProto | None:
        """The one node that takes a value, if it is of one of these kinds."""
        users = self.users[name]
        return users[0] if len(users) == 1 and users[0].op_type in kinds else None

    def same(self, a: Sequence[str], b: Sequence[str]) -> bool:
        """Whether values are the same one by one, or constants that equal each other."""
        return len(a) == len(b) and all(x == y or self._constant(x) == self._constant(y) != b"" for x, y in zip(a, b))

    def _constant(self, name: str) -> bytes:
        return self.array(name).tobytes() if name in self.initializers else b""

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A constant's value."""
        return numpy_helper.to_array(self.initializers[name], base_dir=str(self.directory))

    def add_initializer(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """A constant of the graph, the same one where it has one of that name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
            self.graph.initializer.append(self.initializers[name])
        return name

    def stays(self, node: NodeProto) -> bool:
        """Whether nothing has taken its place."""
        return node.output[0] not in self._replaced

    def replace(self, nodes: Sequence[NodeProto], by: NodeProto, first: bool = False) -> None:
        """Puts a node into the place of the last of ``nodes`` in the graph's order, or of the first."""
        names = {node.output[0] for node in nodes}
        ordered = [node.output[0] for node in self.graph.node if node.output[0] in names]
        self._replaced |= dict.fromkeys(ordered)
        self._replaced[ordered[0 if first else -1]] = by

    def apply(self) -> None:
        """Makes the changes."""
        kept = [self._replaced.get(node.output[0], node) for node in self.graph.node]
        del self.graph.node[:]
        self.graph.node.extend(node for node in kept if node is not None)
        drop_unused(self.graph)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _fuse_gather(view: _View, gather: NodeProto) -> None:
    """ONNX Runtime's own copies element by element: 1.1 TB/s on an H100."""
    table, index = gather.input
    rank, axis = len(view.shapes[table]), _attributes(gather).get("axis", 0)
    if rank < 2 or axis % rank != rank - 2 or view.types[table] not in _FLOATS:
        return
    if view.types[index] == onnx.TensorProto.INT64:
        view.replace([gather], helper.make_node("TakeRows", gather.input, gather.output, domain=DOMAIN))


def _fuse_swiglu(view: _View, split: NodeProto) -> None:
    if len(split.output) != 2 or _attributes(split).get("axis", 0) not in (-1, len(view.shapes[split.input[0]]) - 1):
        return
    gate, up = split.output
    sigmoid = next((user for user in view.users[gate] if user.op_type == "Sigmoid"), None)
    product = view.only_user(up, "Mul")
    if sigmoid is None or product is None or len(view.users[gate]) != 2:
        return
    silu = view.only_user(sigmoid.output[0], "Mul")
    if silu is None or gate not in silu.input or set(product.input) != {silu.output[0], up}:
        return
    fused = helper.make_node("SwiGlu", split.input[:1], product.output, domain=DOMAIN)
    view.replace([split, sigmoid, silu, product], fused)


def _fuse_heads(view: _View, split: NodeProto) -> None:
    """A split into queries, keys and values, of which the first two are turned, and normed before that or not."""
    if len(split.output) != 3:
        return
    parts = [_Heads(view, name) for name in split.output[:2]]
    values = view.only_user(split.output[2], "Reshape")
    q, k = parts
    if values is None or len(q.angles) != 2 or not view.same(q.angles, k.angles):
        return
    if bool(q.norm) != bool(k.norm) or q.epsilon != k.epsilon:
        return
    (Hq, D), (Hkv, _) = (view.shapes[part.end][2:] for part in parts)
    inputs = [split.input[0], *(part.weight(int(D)) for part in parts), *(_as_float(view, x) for x in q.angles)]
    fused = helper.make_node(
        "RotaryHeads", inputs, [q.end, k.end, values.output[0]], domain=DOMAIN,
        num_heads=Hq, kv_num_heads=Hkv, normalize=int(bool(q.norm)), epsilon=q.epsilon,
    )  # fmt: skip
    view.replace([split, *q.nodes, *k.nodes, values], fused)


class _Heads:
    """What becomes of queries or keys after the split.

    Attributes:
        norm, rotation: the nodes, None where there is none.
        end: the value that they end up in, [B, L, H, D].
        nodes: all those that it takes the place of.
    """

    def __init__(self, view: _View, name: str) -> None:
        self.view = view
        self.nodes: list[NodeProto] = []
        name = self._skip(name)
        if norm := view.only_user(name, "RMSNormalization"):
            self.nodes.append(norm)
            name = self._skip(norm.output[0])
        self.norm, self.rotation = norm, view.only_user(name, "RotaryEmbedding")
        if self.rotation:
            self.nodes.append(self.rotation)
            name = self._skip(self.rotation.output[0])
        self.end = name

    def _skip(self, name: str) -> str:
        while node := self.view.only_user(name, *_SAME_NUMBERS):
            self.nodes.append(node)
            name = node.output[0]
        return name

    @property
    def angles(self) -> tuple[str, ...]:
        return tuple(self.rotation.input[1:3]) if self.rotation else ()

    @property
    def epsilon(self) -> float:
        return _attributes(self.norm)["epsilon"] if self.norm else 0.0

    def weight(self, D: int) -> str:
        """The norm's; ones, which are not looked at, where there is none."""
        if self.norm:
            return self.norm.input[1]
        dtype = helper.tensor_dtype_to_np_dtype(self.view.types[self.end])
        return self.view.add_initializer(f"ones.{D}", np.ones(D, dtype))


def _as_float(view: _View, name: str) -> str:
    """An input in float32; constants may have come in the model's type."""
    constant = view.initializers.get(name)
    if constant is None or constant.data_type == onnx.TensorProto.FLOAT:
        return name
    return view.add_initializer(f"{name}.float", view.array(name).astype(np.float32))


def _fuse_norm(view: _View, norm: NodeProto) -> None:
    if _attributes(norm)["axis"] not in (-1, len(view.shapes[norm.input[0]]) - 1):
        return
    epsilon = _attributes(norm)["epsilon"]
    added = view.maker.get(norm.input[0])
    sums = added is not None and added.op_type == "Add" and view.stays(added)
    if added is None or not sums or len({view.shapes[name] for name in added.input}) != 1:
        view.replace([norm], helper.make_node("RmsNorm", norm.input, norm.output, domain=DOMAIN, epsilon=epsilon))
        return
    inputs, outputs = [*added.input, norm.input[1]], [added.output[0], norm.output[0]]
    fused = helper.make_node("AddNorm", inputs, outputs, domain=DOMAIN, epsilon=epsilon)
    view.replace([added, norm], fused, first=True)
