"""Building and caching: what is rebuilt, what is refused, what is never half-written."""

import concurrent.futures
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.ir.programs import CpuTile
from hsa_compile.schedules import BuildError, TargetError, build, builder, find, missing_features, resolve
from hsa_compile.schedules.costs import split_bytes, workspace_bytes
from hsa_compile.schedules.cpu import tile_for

PROBLEM = ChunkSelect(1, 1, 8, 4, 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HSA_COMPILE_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the compiler: what is under test here is what happens around it."""
    builds: list[str] = []

    def worker(request: dict[str, object], directory: Path) -> str:
        builds.append(str(request["pass"]))
        for name in ("program.o", "glue.o", "glue.c", "kernel.so"):
            (directory / name).write_text(f"{name} of {request['pass']}")
        return "symbol"

    monkeypatch.setattr(builder, "_run_worker", worker)
    monkeypatch.setattr(builder, "compiler_version", lambda: "0")
    return builds


def test_built_once_and_found_again(cache: Path, count_builds: list[str]) -> None:
    first = build(PROBLEM)
    assert build(PROBLEM) == first
    assert first.problem == PROBLEM
    assert build(PROBLEM, "backward") != first
    assert count_builds == ["forward", "backward"]
    assert {p.suffix for p in cache.iterdir()} <= {"", ".lock"}, "a temporary file was left"


def test_many_at_once_build_once(cache: Path, count_builds: list[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        artifacts = set(pool.map(lambda _: build(PROBLEM), range(8)))
    assert len(artifacts) == 1
    assert count_builds == ["forward"]


@pytest.mark.parametrize("damage", ["library", "manifest", "missing", "not json"])
def test_what_is_damaged_is_built_anew(
    cache: Path, count_builds: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = build(PROBLEM)
    manifest = artifact.directory / "manifest.json"
    if damage == "library":
        artifact.library.write_bytes(b"\x7fELF torn")
    elif damage == "manifest":
        manifest.write_text(json.dumps({"files": {}}))
    elif damage == "missing":
        (artifact.directory / "glue.o").unlink()
    else:
        manifest.write_text("{")
    assert build(PROBLEM) == artifact
    assert count_builds == ["forward", "forward"]
    assert artifact.library.read_text() == "kernel.so of forward"
    assert "building it anew" in caplog.text


def test_sources_are_part_of_the_name(cache: Path, count_builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(PROBLEM)
    monkeypatch.setattr(builder, "_sources_digest", lambda: "other")
    assert find(PROBLEM, "forward", "cpu:native") is None
    assert build(PROBLEM).directory != first.directory


def test_another_compilers_kernel_is_built_anew_but_serves_where_there_is_none(
    cache: Path, count_builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(PROBLEM)
    monkeypatch.setattr(builder, "compiler_version", lambda: None)
    assert find(PROBLEM, "forward", "cpu:native") == build(PROBLEM) == first
    monkeypatch.setattr(builder, "compiler_version", lambda: "1")
    assert find(PROBLEM, "forward", "cpu:native") is None
    assert count_builds == ["forward"]
    assert build(PROBLEM) == find(PROBLEM, "forward", "cpu:native") == first
    assert count_builds == ["forward", "forward"]


def test_a_failed_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: dict[str, object], directory: Path) -> str:
        (directory / "program.o").write_text("half")
        raise BuildError("no")

    monkeypatch.setattr(builder, "_run_worker", fail)
    monkeypatch.setattr(builder, "compiler_version", lambda: "0")
    with pytest.raises(BuildError, match="no"):
        build(PROBLEM)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_missing_compilers_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "compiler_version", lambda: None)
    with pytest.raises(BuildError, match="pip install 'hsa-compile\\[compile\\]'"):
        build(PROBLEM)
    monkeypatch.setattr(builder, "compiler_version", lambda: "0")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="no C compiler found"):
        build(PROBLEM)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file where the directory should be stops root as well
    monkeypatch.setenv("HSA_COMPILE_CACHE", str(blocked))
    monkeypatch.setattr(builder, "compiler_version", lambda: "0")
    with pytest.raises(BuildError, match=r"cannot write to the kernel cache .* set HSA_COMPILE_CACHE"):
        build(PROBLEM)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="pass must be one of"):
        build(PROBLEM, "sideways")
    with pytest.raises(TargetError, match="unknown target 'gpu:h100'; known: cpu:native, cpu:x86-64-v4"):
        build(PROBLEM, target="gpu:h100")


def test_native_is_a_target_that_this_machine_runs() -> None:
    assert missing_features(resolve("cpu:native")) == []
    other = "cpu:aarch64" if resolve("cpu:native").machine != "aarch64" else "cpu:x86-64-v3"
    assert missing_features(resolve(other))


def test_tiles_fit_their_register_files() -> None:
    for name in ("cpu:x86-64-v4", "cpu:x86-64-v3", "cpu:x86-64-v2", "cpu:aarch64"):
        target = resolve(name)
        for problem in (ChunkAttention(16, 1, 64, 64, 8), ChunkAttention(1, 1, 8, 4, 2), PROBLEM):
            tile = tile_for(problem, target)
            accumulators = tile.row_block * tile.vector_block
            assert accumulators + tile.vector_block + 1 <= target.registers
    with pytest.raises(ValueError, match="lanes must be a power of two"):
        CpuTile(12, 8, 2, 64, 64, 64, 8, 16)
    with pytest.raises(ValueError, match="multiple of row_block"):
        CpuTile(16, 8, 2, 64, 60, 64, 8, 16)


@pytest.mark.needs_compiler
@pytest.mark.skipif(bool(missing_features(resolve("cpu:x86-64-v3"))), reason="the machine lacks AVX2")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_levels_compute_the_same(dtype: str) -> None:
    import torch

    from hsa_compile.native import Kernel
    from kit import assert_as_good_as, attention_inputs

    problem = ChunkAttention(4, 2, 24, 12, 3, dtype=dtype)  # type: ignore[arg-type]
    *tensors, indices, weights = attention_inputs(problem, 1, 40, 5)
    inputs = (*(x.to(getattr(torch, dtype)) for x in tensors), indices, weights)
    outputs = []
    for name in ("cpu:native", "cpu:x86-64-v3"):
        out = torch.full_like(inputs[0], torch.nan)
        Kernel(build(problem, target=name))((*inputs, out), 1, 40, 5)
        outputs.append(out)
    # Rounded to as many bits as are stored, and with sums in another order.
    floor = 2e-6 if dtype == "float32" else torch.finfo(outputs[0].dtype).eps
    assert_as_good_as(outputs[1], outputs[0], outputs[0], floor)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_level_lowers_every_dtype(every: bool) -> None:
    code = """
import sys
from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.schedules.cpu import tile_for
from hsa_compile.schedules.cpu_worker import lower, program_for
from hsa_compile.schedules.target import CPU_TARGETS
every = sys.argv[1] == "True"
for target in CPU_TARGETS:
    # One level shows that a dtype lowers, one dtype that a level does.
    for dtype in ("float32", "float16", "bfloat16") if every or target == CPU_TARGETS[-1] else ("float32",):
        for problem in (ChunkAttention(2, 1, 24, 12, 2, dtype=dtype), ChunkSelect(1, 1, 24, 4, 2, dtype=dtype)):
            # Of half precisions the forward has all of the loads and stores that the backward has.
            for pass_name in ("forward", "backward") if every and dtype == "float32" else ("forward",):
                program = program_for(problem, pass_name, tile_for(problem, target))
                assert lower(program, "hsa", target).inspect_source("asm")
"""
    subprocess.run([sys.executable, "-c", code, str(every)], check=True)


class KernelTable(ctypes.Structure):
    """The part of ``hsa_kernel`` in ``schedules/host/kernel.h`` that tells a kernel's memory."""

    _fields_ = (
        ("abi", ctypes.c_int32), ("problem", ctypes.c_char_p), ("pass_name", ctypes.c_char_p),
        ("tensors", ctypes.c_int32), ("stages", ctypes.c_int32), ("units", ctypes.c_void_p),
        ("scratch_bytes", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)),
        ("workspace_bytes", ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)),
    )  # fmt: skip


@pytest.mark.needs_compiler
@pytest.mark.parametrize("problem", [ChunkAttention(8, 2, 64, 64, 4), ChunkSelect(2, 2, 64, 16, 4)])
def test_the_tuner_knows_the_memory_of_kernels(problem: ChunkAttention | ChunkSelect) -> None:
    tile = tile_for(problem, resolve("cpu:native"))
    tables = {}
    for pass_name in ("forward", "backward"):
        artifact = build(problem, pass_name)
        tables[pass_name] = KernelTable.in_dll(ctypes.CDLL(str(artifact.library)), artifact.symbol)
        workspace = tables[pass_name].workspace_bytes((ctypes.c_int64 * 3)(3, 8, 5))
        assert 0 <= workspace - workspace_bytes(problem, pass_name, tile) < 20 * 64, "but for the regions' alignment"
    lengths = (tile.few, 1, tile.few + 1)
    scratch = [tables["forward"].scratch_bytes((ctypes.c_int64 * 3)(3, L, 5)) for L in lengths]
    whole = 3 * split_bytes(problem, tile)
    assert scratch == [whole, whole // tile.few, 0]


@pytest.mark.needs_compiler
def test_a_library_needs_no_compiler_to_run(tmp_path: Path) -> None:
    artifact = build(PROBLEM)
    needed = subprocess.run(["ldd", str(artifact.library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split("/")[-1].split(".")[0] for line in needed.splitlines()}
    assert names <= {"linux-vdso", "libc", "libm", "ld-linux-x86-64", "ld-linux-aarch64"}
    code = "import sys, hsa_compile.dispatch; print([m for m in sys.modules if m in ('tvm', 'tilelang')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.needs_compiler
def test_a_compiler_error_is_reported_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(BuildError, match=r"(?s)compiling .* failed:.*/bin/false"):
        build(PROBLEM)
