"""From a GPU program to a library: launch code, the C interface, what is refused. No GPU is needed."""

import ctypes
import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.ir.programs import GpuProgram, Launch, Region
from hsa_compile.native import CudaKernel
from hsa_compile.schedules import BuildError, TargetError, build, builder, gpu_target
from hsa_compile.schedules.cuda_glue import Lowered, TensorMap, image_source, launcher_source, table_source

PROBLEM = ChunkAttention(4, 1, 64, 64, 2, dtype="bfloat16")
MAP = TensorMap("k_desc", "k", "9", ("64", "v_C"), ("2", "128"), ("64", "64"), ("1", "1"), ("0", "3", "2", "0"))
KERNEL = Lowered(
    "// kernel", "walk_kernel", ("k_desc", "o", "tiles"), ("k", "o"), ("v_tiles", "1", "1"), ("128", "1", "1"), 65536,
    {"k_desc": MAP},
)  # fmt: skip
LAUNCH = Launch("walk", None, ("k", "o"), {"tiles": "(L + 7) / 8", "C": "C"})

needs_gpu_compiler = pytest.mark.skipif(
    builder.gpu_compiler_version() is None or not any(map(builder.shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc"))),
    reason="TileLang or nvcc is not installed",
)


def test_a_launcher_passes_maps_pointers_and_dims_in_the_kernels_order() -> None:
    source = launcher_source(LAUNCH, KERNEL, "walk_image")
    assert "void* arguments[] = {&k_desc, (void*)&pointers[1], &v_tiles};" in source
    assert "return (L + 7) / 8; }();" in source
    assert "hsa_tensor_map(&k_desc, 9, 2, pointers[0], scratch," in source
    assert 'static hsa_embedded kernel = {&walk_image, "walk_kernel"};' in source
    assert "arguments, 65536, stream);" in source
    assert "if (grid[0] * grid[1] * grid[2] == 0) return 0;" in source


def test_a_launch_that_does_not_fit_its_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"walk needs tiles, which the launch's dims do not give"):
        launcher_source(dataclasses.replace(LAUNCH, dims={"C": "C"}), KERNEL, "walk_image")
    with pytest.raises(ValueError, match=r"takes \('k', 'o'\), but the launch gives \('k',\)"):
        launcher_source(dataclasses.replace(LAUNCH, arguments=("k",)), KERNEL, "walk_image")


def test_an_image_holds_a_files_bytes(tmp_path: Path) -> None:
    (tmp_path / "walk.cubin").write_bytes(b"cubin\0of walk")
    look = 'extern "C" const void* look() { return walk_image.code; }'
    (tmp_path / "host.cc").write_text(
        f"struct hsa_image {{ const void* code; }};\n{image_source('walk_image', 'walk.cubin')}\n{look}\n"
    )
    subprocess.run(["g++", "-shared", "-fPIC", "host.cc", "-o", "host.so"], cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "host.so"))
    library.look.restype = ctypes.c_void_p
    assert ctypes.string_at(library.look(), 13) == b"cubin\0of walk"
    assert library.look() % 64 == 0


def test_the_table_lays_scratch_out_and_runs_launches_in_order() -> None:
    program = GpuProgram(
        ("q", "o"),
        (Region("lists", "int32", "B * L"), Region("sums", "float32", "C")),
        (
            dataclasses.replace(LAUNCH, symbol="first", arguments=("q", "lists")),
            dataclasses.replace(LAUNCH, symbol="second", arguments=("sums", "o")),
        ),
    )
    symbol, source = table_source(program, PROBLEM, "forward", ["first_kernel", "second_kernel"])
    assert symbol == f"hsa_cuda_kernel_{PROBLEM.digest}_forward"
    assert "INT64_C(0) + up(INT64_C(4) * (B * L)) + up(INT64_C(4) * (C))" in source
    assert "void* sums_ = (char*)lists_ + up(INT64_C(4) * (B * L));" in source
    assert source.index("{tensors[0], lists_}") < source.index("first_kernel_launch(pointers")
    assert source.index("first_kernel_launch(pointers") < source.index("{sums_, tensors[1]}")
    assert json.dumps(json.dumps(PROBLEM.to_dict(), sort_keys=True)) in source


def test_devices_find_the_target_that_they_run() -> None:
    names = {
        capability: getattr(gpu_target(capability), "name", None) for capability in ((9, 0), (8, 6), (10, 0), (7, 5))
    }
    assert names == {(9, 0): "cuda:sm_90a", (8, 6): "cuda:sm_80", (10, 0): None, (7, 5): None}


def test_what_gpus_have_no_kernels_for_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="GPU kernels are float16 or bfloat16; float32 runs on the Triton path"):
        build(dataclasses.replace(PROBLEM, dtype="float32"), "forward", "cuda:sm_90a")
    with pytest.raises(TargetError, match=r"unknown GPU target 'cuda:sm_12'; known: cuda:sm_90a, cuda:sm_80"):
        build(PROBLEM, "forward", "cuda:sm_12")
    monkeypatch.setenv("HSA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "gpu_compiler_version", lambda: None)
    with pytest.raises(BuildError, match=r"pip install 'hsa-compile\[cuda\]'"):
        build(PROBLEM, "forward", "cuda:sm_90a")
    monkeypatch.setattr(builder, "gpu_compiler_version", lambda: "0")
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="no CUDA compiler found"):
        build(PROBLEM, "forward", "cuda:sm_90a")


@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize("problem", [PROBLEM, ChunkSelect(1, 1, 64, 64, 4, dtype="bfloat16")])
def test_every_pass_builds_to_a_library_that_loads_without_a_gpu(
    problem: ChunkAttention | ChunkSelect, pass_name: str
) -> None:
    artifact = build(problem, pass_name, "cuda:sm_90a")
    _loads(artifact, problem, pass_name)


@needs_gpu_compiler
def test_a_built_library_loads_without_a_gpu() -> None:
    _loads(build(PROBLEM, "forward", "cuda:sm_90a"), PROBLEM, "forward")


def _loads(artifact: builder.Artifact, problem: ChunkAttention | ChunkSelect, pass_name: str) -> None:
    kernel = CudaKernel(artifact)
    assert json.loads(kernel._table.problem) == problem.to_dict()
    assert kernel._table.pass_name.decode() == pass_name
    few, many = (kernel._table.scratch_bytes((ctypes.c_int64 * 3)(1, L, 4)) for L in (256, 512))
    assert few <= many < 1 << 24
    resources = json.loads((artifact.directory / "resources.json").read_text())
    assert all(kernel["registers"] > 0 and kernel["spill_bytes"] == 0 for kernel in resources.values())
