"""The hand-declared slots of ONNX Runtime's C interface against the official headers, where these are installed."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import resources
from pathlib import Path

import onnxruntime as ort
import pytest

from export_kit import naive_kernel, operator_model
from hsa_compile.export.library import build_library
from hsa_compile.ir import ChunkSelect

HEADERS = [os.environ.get("ORT_INCLUDE", "."), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
ABI = Path(str(resources.files("hsa_compile.export.native"))) / "ort_abi.h"


def _headers() -> Path:
    for folder in map(Path, HEADERS):
        if (folder / "onnxruntime_c_api.h").exists():
            return folder
    pytest.skip("onnxruntime_c_api.h not found; Debian has it in libonnxruntime-dev, or set ORT_INCLUDE")


def test_slots_are_those_of_the_official_headers(tmp_path: Path) -> None:
    headers = _headers()
    text = ABI.read_text()
    slots = re.findall(r"X\((\d+), (\w+),", text)
    allocator = re.findall(r"\(\*(\w+)\)", text[text.index("struct Allocator {") : text.index("struct ApiBase")])
    struct = text[text.index("struct CustomOp {") : text.index("static_assert")]
    fields = re.findall(r"\(\*(\w+)\)", struct)
    assert len(slots) > 20
    assert len(fields) == 25
    lines = [f'static_assert(offsetof(OrtApi, {name}) == {slot} * sizeof(void*), "{name}");' for slot, name in slots]
    lines += [
        f'static_assert(offsetof(OrtCustomOp, {name}) == offsetof(ort::CustomOp, {name}), "{name}");' for name in fields
    ]
    lines += [
        f'static_assert(offsetof(OrtAllocator, {name}) == offsetof(ort::Allocator, {name}), "{name}");'
        for name in allocator
    ]
    elements = {"kFloat": "FLOAT", "kInt32": "INT32", "kInt64": "INT64", "kFloat16": "FLOAT16", "kBFloat16": "BFLOAT16"}
    lines += [
        f"static_assert(int(ort::{own}) == ONNX_TENSOR_ELEMENT_DATA_TYPE_{name});" for own, name in elements.items()
    ]
    lines += [
        "static_assert(int(ort::kAttributeInt) == ORT_OP_ATTR_INT);",
        "static_assert(int(ort::kInvalidArgument) == ORT_INVALID_ARGUMENT);",
    ]
    lines += ["static_assert(sizeof(OrtCustomOp) == sizeof(ort::CustomOp) || ORT_API_VERSION > 29);"]
    source = tmp_path / "slots.cc"
    source.write_text("\n".join(['#include "onnxruntime_c_api.h"', f'#include "{ABI}"', *lines]))
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", f"-I{headers}", str(source)], check=True)


def test_shapes_are_inferred(tmp_path: Path) -> None:
    """Without its function in the model, the library alone tells what comes out."""
    problem = ChunkSelect(2, 1, 4, 4, 3)
    model = operator_model("ChunkSelect", kv_num_heads=2, chunk_size=4, top_k=3)
    for name in ("indices", "scores"):
        output = next(o for o in model.graph.output if o.name == name)
        del output.type.tensor_type.shape.dim[:]
        output.type.tensor_type.ClearField("shape")
    del model.functions[:]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(build_library([naive_kernel(problem, tmp_path)], tmp_path / "lib.so")))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [o.shape for o in session.get_outputs()] == [["q_r_0", "q_r_1", 2, 3]] * 2
    assert [o.type for o in session.get_outputs()] == ["tensor(int32)", "tensor(float)"]
