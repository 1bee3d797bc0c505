"""The operators between a model's matrix products: in ONNX Runtime, by the definition of ONNX, on an emulated GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulate import EMULATOR, adapted
from export_kit import CONFIG, naive_kernel
from hsa_compile.export import functions, schema
from hsa_compile.export.graph import export_graph
from hsa_compile.export.library import build_library
from hsa_compile.ir import ChunkSelect
from hsa_compile.model.model import HsaModel
from inputs import Tensors
from passes import CASES, Pass

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
KINDS = {"cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT, "index": TensorProto.INT64}  # whatever the type
EMPTY = (
    Pass("AddNorm", (2, 0, 8)),
    Pass("RmsNorm", (0, 3, 8)),
    Pass("RotaryHeads", (2, 0, 8)),
    Pass("SwiGlu", (0, 4)),
    Pass("TakeRows", (0, 8), taken=(2, 0)),
)


def model_of(p: Pass, dtype: str) -> onnx.ModelProto:
    """A model of the operator alone, with its function."""
    schema.register()
    ranks = dict(zip((*p.inputs, *p.outputs), (x.dim() for x in _all(p))))

    def values(names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, KINDS.get(n, DTYPES[dtype]), [f"{n}_{i}" for i in range(ranks[n])])
            for n in names
        ]

    node = helper.make_node(p.op, p.inputs, p.outputs, domain="hsa", **p.attributes)
    graph = helper.make_graph([node], p.op, values(p.inputs), values(p.outputs))
    opsets = [helper.make_opsetid("", functions.STANDARD_OPSET), helper.make_opsetid("hsa", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    functions.attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _all(p: Pass) -> Tensors:
    inputs = p.make(torch.float32)
    return *inputs, *p.empty(inputs)


def session_of(p: Pass, dtype: str, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if library:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model_of(p, dtype).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, p: Pass, dtype: str, inputs: Tensors) -> Tensors:
    """By addresses: NumPy has no bfloat16."""
    bound, outputs = session.io_binding(), p.empty(inputs)
    for names, tensors, bind in ((p.inputs, inputs, bound.bind_input), (p.outputs, outputs, bound.bind_output)):
        for name, x in zip(names, tensors):
            bind(
                name, "cpu", 0, KINDS.get(name, DTYPES[dtype]), list(x.shape), x.data_ptr() or torch.zeros(1).data_ptr()
            )
    session.run_with_iobinding(bound)
    return outputs


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("naive")
    return build_library([naive_kernel(ChunkSelect(1, 1, 8, 4, 2), directory)], directory / "libhsa_ops.so")


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_the_library(library: Path, dtype: str) -> None:
    for seed, p in enumerate((*CASES, *EMPTY)):
        inputs = p.make(getattr(torch, dtype), seed)
        p.check(inputs, run(session_of(p, dtype, library), p, dtype, inputs))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_by_their_functions(dtype: str) -> None:
    for seed, p in enumerate((*CASES, *EMPTY)):
        inputs = p.make(getattr(torch, dtype), seed)
        # ONNX Runtime may leave out that a sum is rounded before it is normed.
        p.check(inputs, run(session_of(p, dtype, None), p, dtype, inputs), roundings=2)


def test_by_the_definition_of_onnx() -> None:
    for seed, p in enumerate(CASES):
        inputs = p.make(torch.float32, seed)
        got = ReferenceEvaluator(model_of(p, "float32")).run(None, dict(zip(p.inputs, (x.numpy() for x in inputs))))
        p.check(inputs, tuple(map(torch.from_numpy, got)))


def test_large_segments_go_to_several_threads(library: Path) -> None:
    for p in (
        Pass("AddNorm", (2, 3001, 64)),
        Pass("RotaryHeads", (1, 999, 64), (4, 2)),
        Pass("SwiGlu", (2001, 130)),
        Pass("TakeRows", (100, 64), taken=(3, 1000)),
    ):
        inputs = p.make(torch.float32)
        p.check(inputs, run(session_of(p, "float32", library), p, "float32", inputs))


def test_extremes(library: Path) -> None:
    """Of exponents, of half precisions' ranges, and what is no number."""
    x = torch.tensor([-torch.inf, -1e30, -100.0, -88.0, -1e-20, 0.0, 1e-20, 88.0, 100.0, 1e30, torch.inf, torch.nan])
    for dtype in DTYPES:
        gate = x.to(getattr(torch, dtype))
        p = Pass("SwiGlu", (1, len(x)))
        (o,) = run(session_of(p, dtype, library), p, dtype, (torch.cat((gate, torch.ones_like(gate)))[None],))
        has_value = gate > -torch.inf  # which times 0 has none
        want = torch.nn.functional.silu(gate.double()).to(gate.dtype)
        torch.testing.assert_close(o[0][has_value], want[has_value], equal_nan=True)
        assert bool(o[0, -1].isnan())
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    p = Pass("AddNorm", (1, 1 << 16))
    inputs = (every[None], torch.zeros_like(every)[None], torch.ones_like(every))
    total, _ = run(session_of(p, "float16", library), p, "float16", inputs)
    torch.testing.assert_close(total[0], every + 0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("p", "changed", "message"),
    [
        (Pass("AddNorm", (2, 3, 8)), {1: lambda x: x[:, :2]}, "added must be x's shape"),
        (Pass("AddNorm", (2, 3, 8)), {2: lambda x: x[:7]}, r"weight must be \[d\] = \[8\], got \[7\]"),
        (Pass("RmsNorm", (2, 8)), {1: lambda x: x[:4]}, r"weight must be \[d\]"),
        (Pass("SwiGlu", (2, 8)), {0: lambda x: x[:, :15]}, "two halves"),
        (Pass("TakeRows", (5, 8), taken=(3,)), {1: lambda i: i * 0 + 5}, r"index must lie in 0 … 4, got 5"),
        (Pass("TakeRows", (5, 8), taken=(3,)), {1: lambda i: i * 0 - 6}, r"index must lie in 0 … 4, got -6"),
        (Pass("RotaryHeads", (2, 3, 8)), {0: lambda x: x[:, :, :23]}, r"qkv must be \[B, L, \(Hq \+ 2\*Hkv\)\*D\]"),
        (Pass("RotaryHeads", (2, 3, 8)), {1: lambda x: x[:7]}, "an even width, got 7"),
        (Pass("RotaryHeads", (2, 3, 8)), {2: lambda x: x[:6]}, r"k_weight must be \[D\]"),
        (Pass("RotaryHeads", (3, 3, 8)), {3: lambda x: x[:2]}, r"cos must be \[B or 1, L, D/2\]"),
        (Pass("RotaryHeads", (3, 3, 8)), {4: lambda x: x[:1]}, "sin must be cos's shape"),
    ],
)
def test_bad_inputs_are_refused(library: Path, p: Pass, changed: dict[int, Callable[..., Any]], message: str) -> None:
    inputs = [x.numpy() for x in p.make(torch.float32)]
    for i, change in changed.items():
        inputs[i] = np.ascontiguousarray(change(inputs[i]))
    with pytest.raises(Exception, match=message):
        session_of(p, "float32", library).run(None, dict(zip(p.inputs, inputs)))


def test_bad_attributes_are_refused(library: Path) -> None:
    for p, message in (
        (Pass("RotaryHeads", (1, 1, 8), (0, 1)), "num_heads must be positive, got 0"),
        (Pass("RotaryHeads", (1, 1, 8), normalize=7), "normalize must be 0 or 1, got 7"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Exception, match=message):
            session_of(p, "float32", library)


def test_shapes_are_inferred(library: Path) -> None:
    """Without its function in the model, the library alone tells what comes out."""
    for p, width, shapes in (
        (Pass("AddNorm", (1, 2, 8)), 8, [["x_0", "x_1", 8]] * 2),
        (Pass("RmsNorm", (2, 8)), 8, [["x_0", 8]]),
        (Pass("RotaryHeads", (1, 2, 8), (4, 2)), 64, [["qkv_0", "qkv_1", h, 8] for h in (4, 2, 2)]),
        (Pass("SwiGlu", (1, 2, 8)), 16, [["gate_up_0", "gate_up_1", 8]]),
        (Pass("TakeRows", (2, 3, 8), taken=(4, 5)), 8, [["x_0", "index_0", "index_1", 8]]),
    ):
        model = model_of(p, "float16")
        model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value = width
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        del model.functions[:]
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert [o.shape for o in session.get_outputs()] == shapes
        assert {o.type for o in session.get_outputs()} == {"tensor(float16)"}


# ----------------------------------------------------------------------------------------------------------------- GPUs

# Names of CUDA's that the emulator does not have.
PREAMBLE = """#include "cuda_on_cpu.h"
#include "fused.h"
#define __device__
#define __half half_t
#define __nv_bfloat16 bfloat16_t
#define rsqrtf(x) (1.0f / sqrtf(x))
#define __fdividef(a, b) ((a) / (b))
#define __expf expf
"""


class EmulatedPass(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_int32), ("dtype", ctypes.c_int32), ("rows", ctypes.c_int64), ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float), ("normalize", ctypes.c_int32), ("q_heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64), ("angles", ctypes.c_int64), ("indices", ctypes.c_int64),
        ("table", ctypes.c_int64), ("tensors", ctypes.c_void_p * 8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pass, Tensors], Tensors]:
    """Runs a pass by the CUDA kernels."""
    directory = tmp_path_factory.mktemp("emulated")
    native, host = (Path(str(resources.files(f"hsa_compile.{name}"))) for name in ("export.native", "schedules.host"))
    source = adapted((native / "fused.cu").read_text())
    (directory / "fused.cc").write_text(PREAMBLE + re.sub(r"\(const void\*\)kernel", "kernel", source))
    folders = [f"-I{folder}" for folder in (EMULATOR, native, host)]
    compile = ["g++", "-std=c++20", "-O1", "-march=native", "-w", "-shared", "-fPIC", *folders]
    subprocess.run([*compile, str(directory / "fused.cc"), "-o", str(directory / "fused.so")], check=True)
    kernel = ctypes.CDLL(str(directory / "fused.so")).hsa_gpu_pass

    def compute(p: Pass, inputs: Tensors) -> Tensors:
        outputs = p.empty(inputs)
        tensors: list[Any] = [*inputs, *outputs]
        if p.op == "RmsNorm":
            tensors = [inputs[0], None, inputs[1], None, outputs[0]]
        places = [x if x is None else x.data_ptr() for x in tensors]
        sized = outputs[0] if p.op == "TakeRows" else inputs[0]
        rows = sized.numel() // sized.shape[-1]
        angles = inputs[3].shape[0] * inputs[3].shape[1] if p.op == "RotaryHeads" else 0
        taken = (inputs[1].numel(), p.shape[-2]) if p.op == "TakeRows" else (0, 0)
        which = 4 + ("AddNorm", "RmsNorm", "RotaryHeads", "SwiGlu", "TakeRows").index(p.op)
        sizes = (which, list(DTYPES).index(str(inputs[0].dtype).removeprefix("torch.")), rows, p.shape[-1], 1e-3)
        asked = EmulatedPass(*sizes, int(p.normalize), *p.heads, angles, *taken, (ctypes.c_void_p * 8)(*places))
        assert kernel(ctypes.byref(asked), None) == 0
        return outputs

    return compute


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_kernels(emulated: Callable[[Pass, Tensors], Tensors], dtype: str) -> None:
    for seed, p in enumerate(CASES):
        inputs = p.make(getattr(torch, dtype), seed)
        p.check(inputs, emulated(p, inputs))


def test_cuda_kernels_at_any_address(emulated: Callable[[Pass, Tensors], Tensors]) -> None:
    for seed, p in enumerate(CASES):
        inputs = p.make(torch.bfloat16, seed)
        moved = tuple(torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in inputs)
        p.check(moved, emulated(p, moved))


@pytest.mark.parametrize("external_data_above", [0, 1 << 30], ids=["constants beside the graph", "constants in it"])
def test_whole_graphs_are_fused(tmp_path: Path, external_data_above: int) -> None:
    """The encoder's rotations are by constants, of which the exporter leaves equal ones where they are this large."""
    config = replace(CONFIG, chunk_size=64, swa_head_dim=64, leave_window=False)
    model = HsaModel(config).bfloat16().eval()
    graph = onnx.load(export_graph(model, tmp_path / "model.onnx", external_data_above), load_external_data=False).graph
    made = Counter(node.op_type for node in graph.node)
    layers = CONFIG.lower_layers + CONFIG.upper_layers
    assert made["RotaryHeads"] == layers + CONFIG.encoder_layers
    assert made["SwiGlu"] >= made["RotaryHeads"]
    assert not made.keys() & {"Sigmoid", "RMSNormalization", "RotaryEmbedding"}
