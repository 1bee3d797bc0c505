"""The tuner on a GPU: searches end in records that dispatch obeys, and what breaks the device costs one candidate."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch

from hsa_compile import dispatch, ops, tuning
from hsa_compile.bench.selections import synthetic_selection
from hsa_compile.gpu_laboratory import GpuLaboratory
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.native import CudaKernel
from hsa_compile.schedules import build, builder, choose, records
from hsa_compile.schedules.candidates import CandidateError, Job
from hsa_compile.schedules.choice import backend_of, default_tile
from hsa_compile.schedules.costs import Workload
from hsa_compile.schedules.target import resolve_gpu
from hsa_compile.schedules.triton import TritonTile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROBLEM = ChunkAttention(16, 1, 64, 64, 8, dtype="bfloat16")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("tilelang")
    monkeypatch.setenv("HSA_COMPILE_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("HSA_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "tuned")
    dispatch._resolve.cache_clear()
    dispatch._load.cache_clear()
    return tuning.full_target("cuda")


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize("problem", [PROBLEM, ChunkSelect(1, 1, 64, 64, 16, dtype="bfloat16")])
def test_a_search_ends_in_records_of_both_backends(problem: Problem, pass_name: str, target: str) -> None:
    jobs = tuning.jobs_for([problem], [2048], [pass_name], target)
    ((outcome, path),) = tuning.tune_gpu(jobs, 90, "model", lambda share, line: None)
    assert not {"crash", "hang", "wrong"} & set(outcome.failed), [trial.detail for trial in outcome.trials]
    assert {record.backend for record in records.load(path).records} == {"tilelang", "triton"}
    assert {"registers", "spill_bytes", "shared_bytes"} <= set(outcome.resources[outcome.best.tile]) or (
        pass_name == "backward"
    )
    assert outcome.rate_after
    assert choose(problem, pass_name, target, 2048).tile == outcome.best.tile or len(outcome.finals) > 1


def test_dispatch_obeys_the_record_without_waiting_for_the_device(target: str) -> None:
    (job,) = tuning.jobs_for([PROBLEM], [1024], ["forward"], target)
    list(tuning.tune_gpu([job], 60, "model", lambda share, line: None))
    tile = choose(PROBLEM, "forward", target, 1024, "tilelang").tile
    build(PROBLEM, "forward", target, length=1024)
    q = torch.randn(2, 1024, 16, 64, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(2, 1024, 1, 64, device="cuda", dtype=torch.bfloat16)
    indices = synthetic_selection(2, 1024, 1, 8, 64, "local", 0, "cuda")
    inputs = (q, kv, kv, indices, torch.rand(indices.shape, device="cuda"), 64)
    with dispatch.use_backend("compiled"):
        kernel = dispatch._kernel(PROBLEM, "forward", q)
        assert isinstance(kernel, CudaKernel)
        assert kernel.artifact == build(PROBLEM, "forward", target, tile)
    fastest = choose(PROBLEM, "forward", target, 1024).tile
    with dispatch.use_backend("auto"):
        ops.chunk_attention(*inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.chunk_attention(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = dispatch._kernel(PROBLEM, "forward", q)
    assert isinstance(found, CudaKernel) == (backend_of(fastest) == "tilelang")


WILD = """
#include "cuda_kernel.h"
#include <cuda_runtime.h>
__global__ void wild(int* where) { BODY; }
static int64_t none(const int64_t*) { return 0; }
static int32_t run(void* const*, const int64_t*, void*, void* stream) {
  wild<<<1, 1, 0, (cudaStream_t)stream>>>((int*)8);
  return 0;
}
static const char* message(int32_t error) { return "?"; }
extern "C" const hsa_cuda_kernel wild_kernel;
const hsa_cuda_kernel wild_kernel = {HSA_CUDA_KERNEL_ABI, "", "forward", 6, none, run, message};
"""


@pytest.mark.parametrize(
    ("body", "status"), [("*where = 1", "crash"), ("for (volatile int i = 0; i < 1;) (void)i", "hang"), ("", "wrong")]
)
def test_a_candidate_that_breaks_the_device_costs_itself(body: str, status: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "wild.cu").write_text(WILD.replace("BODY", body))
    host = Path(str(builder.__file__)).parent / "host"
    flags = ["-shared", "-Xcompiler", "-fPIC", "-arch", resolve_gpu(target).arch, f"-I{host}", "-cudart", "static"]
    command = [builder.cuda_compiler(), *flags, "wild.cu", "-o", "kernel.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    job = Job(PROBLEM, "forward", target, Workload(1, 256, 4))
    with GpuLaboratory(target, compilers=1) as lab:
        lab.limits = dataclasses.replace(lab.limits, check=15.0)
        tile = default_tile(PROBLEM, "forward", resolve_gpu(target), 256)
        with pytest.raises(CandidateError) as error:
            lab.check(job, tile, {"library": str(tmp_path / "kernel.so"), "symbol": "wild_kernel"})
        assert error.value.status == status
        good = TritonTile(tokens=4, warps=4, stages=2)
        lab.limits = dataclasses.replace(lab.limits, check=120.0)
        built = lab.build_one(job, good)
        lab.check(job, good, built)
        assert lab.resources(built)["registers"] > 0
        assert min(lab.time(job, good, built)) > 0
