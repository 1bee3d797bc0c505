"""The tuner's GPU half without a GPU: spaces, the cost model, searches on a made-up machine, records, who obeys them,
and what becomes of candidates that take the measuring process down."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_kit import H100, FakeGpuLaboratory, milliseconds
from typer.testing import CliRunner

from hsa_compile import dispatch, eager, gpu_measure, ops, tuning
from hsa_compile.bench import tuning as bench
from hsa_compile.cli import app
from hsa_compile.gpu_laboratory import GpuLaboratory
from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules import BuildError, ScheduleError, TargetError, choice, choose, records
from hsa_compile.schedules.candidates import CandidateError, Job, Limits
from hsa_compile.schedules.choice import backend_of, default_tile
from hsa_compile.schedules.costs import Workload
from hsa_compile.schedules.device import Device
from hsa_compile.schedules.fingerprint import program_digest
from hsa_compile.schedules.gpu_costs import estimate_ms
from hsa_compile.schedules.gpu_resources import blocks_of, refusal
from hsa_compile.schedules.journal import Journal
from hsa_compile.schedules.space import space_for
from hsa_compile.schedules.strategies import NAMES
from hsa_compile.schedules.target import resolve_gpu
from hsa_compile.schedules.together import search_together
from hsa_compile.schedules.triton import TritonTile
from hsa_compile.schedules.tuner import Outcome, Search, record_of, records_of

TARGET = "cuda:sm_90a"
LEVEL = resolve_gpu(TARGET)
PROBLEM = ChunkAttention(16, 1, 64, 64, 8, dtype="bfloat16")
JOB = Job(PROBLEM, "forward", TARGET, Workload(8, 4096, 64))
H100_NAME = Device("NVIDIA H100 80GB HBM3", ("compute capability 9.0",))
PROBLEMS: list[Problem] = [
    PROBLEM,
    ChunkAttention(32, 2, 128, 64, 16, dtype="bfloat16"),
    ChunkAttention(16, 16, 64, 64, 16, dtype="float16"),
    ChunkAttention(3, 1, 48, 80, 4, dtype="bfloat16"),
    ChunkAttention(2, 1, 32, 16, 4),
    ChunkSelect(1, 1, 64, 64, 16, dtype="bfloat16"),
    ChunkSelect(2, 2, 1024, 64, 60, dtype="bfloat16"),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Records and journals of this test alone, on a machine that has an H100 and its compilers."""
    monkeypatch.setenv("HSA_COMPILE_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("HSA_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "tuned")
    monkeypatch.setattr(records, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(records, "_compiler_versions", _versions)
    monkeypatch.setattr("hsa_compile.schedules.builder.compiler_versions", _versions)
    for module in (records, tuning, "hsa_compile.schedules.tuner"):
        where = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{where}.device_for", lambda target: H100_NAME)
    caches = (choice._say, records._warn_once, records._load, dispatch._resolve, dispatch._load)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "records"
    for cache in caches:
        cache.cache_clear()


def _versions(target: str, backend: str = "") -> dict[str, str]:
    return {"triton": "3.6.0"} if backend == "triton" else {"tilelang": "0.1.15"}


# Spaces and the model of their cost


@pytest.mark.parametrize("target", ["cuda:sm_90a", "cuda:sm_80"])
@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.op}-{p.digest}")
def test_spaces_hold_tiles_of_both_backends_that_can_run(problem: Problem, pass_name: str, target: str) -> None:
    level = resolve_gpu(target)
    for length in (1, 4096, None):
        space = space_for(problem, pass_name, target, length)
        tiles = space.tiles()
        kinds = {backend_of(tile) for tile in tiles}
        assert kinds == ({"triton"} if problem.dtype == "float32" else {"tilelang", "triton"})
        assert tiles[: len(kinds)] == space.first
        assert tiles[0] == space.base == default_tile(problem, pass_name, level, length)
        keys = [(backend_of(tile), *space.in_use(tile).items()) for tile in tiles]
        assert len(set(keys)) == len(keys), "the same code twice"
        assert all(refusal(problem, pass_name, tile, level) is None for tile in tiles)
        for tile in tiles:
            assert all(
                block.fitting(level) >= max(1, block.resident) for block in blocks_of(problem, pass_name, tile)
            ) or (tile in space.first)
        load = Workload(2, length or 4096, 100)
        assert all(0 < estimate_ms(problem, pass_name, tile, load, H100, level) < 1e6 for tile in tiles)
    if target == "cuda:sm_80" and pass_name == "forward":
        assert not any(getattr(tile, "wgmma", False) for tile in tiles)


def test_what_a_form_does_not_read_is_not_searched() -> None:
    few = space_for(PROBLEM, "forward", TARGET, 1)
    forms = {(tile.form, tile.wgmma): few.in_use(tile) for tile in few.tiles() if isinstance(tile, GpuTile)}
    assert set(forms) >= {("rows", True), ("rows", False), ("warps", True), ("token", True)}
    assert set(forms["token", True]) == {"form", "slots"}
    assert set(forms["rows", False]) == {"form", "wgmma", "tokens"}
    many = space_for(PROBLEM, "forward", TARGET, 4096)
    assert not any(getattr(tile, "form", "") == "token" for tile in many.tiles())


@pytest.mark.parametrize(
    ("problem", "pass_name", "tile", "complaint"),
    [
        (PROBLEM, "forward", GpuTile(tokens=600), r"tokens \* top_k must be at most 4096"),
        (PROBLEM, "forward", GpuTile(tokens=64), "at most 512 rows"),
        (PROBLEMS[1], "forward", GpuTile(tokens=32, stages=4), "KiB of shared memory"),
        (PROBLEM, "forward", GpuTile(tokens=4, stages=64), "KiB of shared memory"),
        (PROBLEM, "forward", GpuTile(tokens=4, stages=1), "at least 2 stages"),
        (PROBLEM, "backward", GpuTile(tokens=4, stages=1), "at least 2 stages"),
        (ChunkAttention(1, 1, 64, 64, 2, dtype="float16"), "backward", GpuTile(tokens=65), "at most 64 tokens"),
        (PROBLEMS[5], "forward", GpuTile(tokens=100), "whole 64 tokens"),
        (PROBLEM, "forward", TritonTile(warps=32), "at most 16 warps"),
        (PROBLEM, "forward", TritonTile(tokens=1 << 20), "too large"),
    ],
)
def test_tiles_that_cannot_run_are_refused(problem: Problem, pass_name: str, tile: Any, complaint: str) -> None:
    assert re.search(complaint, refusal(problem, pass_name, tile, LEVEL) or "")


def test_hand_picked_tiles_can_run_at_all_sizes() -> None:
    for G, D, S in itertools.product((1, 2, 3, 5, 8, 12, 16, 64), range(16, 257, 48), range(16, 257, 48)):
        problem = ChunkAttention(G, 1, D, S, 4, dtype="bfloat16")
        for pass_name, length in (("forward", None), ("forward", 1), ("backward", None)):
            assert refusal(problem, pass_name, default_tile(problem, pass_name, LEVEL, length), LEVEL) is None


def test_wgmma_is_refused_where_there_is_none() -> None:
    assert "has no wgmma" in (refusal(PROBLEM, "forward", GpuTile(tokens=4), resolve_gpu("cuda:sm_80")) or "")


@pytest.mark.parametrize(
    ("sizes", "load", "forward", "backward"),
    [
        ((16, 1, 64, 64, 8), (8, 4096), 0.24, 0.72),
        ((16, 1, 64, 64, 16), (1, 65536), 0.91, 2.78),
        ((32, 2, 128, 64, 16), (1, 32768), 1.60, 5.21),
        ((16, 2, 64, 64, 16), (1, 32768), 0.63, 1.5),
        ((16, 16, 64, 64, 16), (1, 32768), 1.75, 3.8),
    ],
)
def test_the_model_knows_what_the_h100_took(
    sizes: tuple[int, ...], load: tuple[int, int], forward: float, backward: float
) -> None:
    """The hand-picked tiles' measured times, within a factor of two, and these tiles among the better ones."""
    problem = ChunkAttention(*sizes, dtype="bfloat16")
    work = Workload(*load, load[1] // 64)
    for pass_name, measured in (("forward", forward), ("backward", backward)):
        space = space_for(problem, pass_name, TARGET, load[1])
        of = {tile: estimate_ms(problem, pass_name, tile, work, H100, LEVEL) for tile in space.tiles()}
        assert measured / 2 < of[space.base] < 2 * measured
        assert sum(ms < of[space.base] for ms in of.values()) < 0.15 * len(of)


# Searches


def searches(tmp_path: Path, lab: FakeGpuLaboratory, *jobs: Job, strategy: str = "model") -> list[Search]:
    return [Search(job, lab, Journal(tmp_path, {"job": str(job)}), strategy) for job in jobs or (JOB,)]  # type: ignore[arg-type]


def run(found: list[Search], lab: FakeGpuLaboratory, seconds: float) -> list[Any]:
    return list(search_together(found, lab, seconds))  # type: ignore[arg-type]


def test_searches_side_by_side_find_the_best_of_each_space(tmp_path: Path) -> None:
    select = Job(PROBLEMS[5], "backward", TARGET, Workload(1, 16384, 256))
    lab = FakeGpuLaboratory()
    outcomes = run(searches(tmp_path, lab, JOB, select, strategy="random"), lab, 30)
    for outcome, job in zip(outcomes, (JOB, select), strict=True):
        tiles = space_for(job.problem, job.pass_name, TARGET, job.load.L).tiles()
        assert len(outcome.trials) == outcome.space_size == len(tiles)
        best = min(tiles, key=lambda tile, job=job: milliseconds(job, tile))  # type: ignore[misc]
        assert min(final.ms for final in outcome.finals) == milliseconds(job, best)
        assert {backend_of(final.tile) for final in outcome.finals} == {"tilelang", "triton"}
        assert outcome.resources[outcome.best.tile]["registers"] == 128
    assert lab.built[:2] == [space_for(j.problem, j.pass_name, TARGET, j.load.L).base for j in (JOB, select)]
    table = tuning.outcome_table(outcomes)
    assert str(table.columns[-1].header) == "regs\nspills\nshared"
    assert "747 to 747" in str(table.caption), "the rate after the rounds, where throttling shows"


@pytest.mark.parametrize("kind", ["compile", "crash", "hang", "wrong"])
def test_a_bad_candidate_costs_itself(tmp_path: Path, kind: str) -> None:
    lab = FakeGpuLaboratory(lambda tile: kind if getattr(tile, "form", "") == "warps" else "")
    (outcome,) = run(searches(tmp_path, lab), lab, 30)
    assert outcome.failed[kind] > 5
    assert getattr(outcome.best.tile, "form", "") != "warps"


def test_a_search_that_had_no_time_says_so_and_the_others_stand(tmp_path: Path) -> None:
    base = default_tile(PROBLEM, "forward", LEVEL, 4096)
    lab = FakeGpuLaboratory(lambda tile: "wrong" if tile == base else "")
    other = Job(PROBLEMS[5], "backward", TARGET, JOB.load)
    first, second = run(searches(tmp_path, lab, JOB, other), lab, 3)
    assert isinstance(first, ScheduleError)
    assert "does not work: a wrong" in str(first)
    assert isinstance(second, Outcome)


def test_searches_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, tried = FakeGpuLaboratory(), []

    def stop_at_twenty(job: Job, tile: Any, built: Any) -> None:
        tried.append(tile)
        if len(tried) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(lab, "check", stop_at_twenty)
    with pytest.raises(KeyboardInterrupt):
        run(searches(tmp_path, lab), lab, 30)
    assert lab.stopped, "its compilers still run"
    again = FakeGpuLaboratory()
    (resumed,) = searches(tmp_path, again)
    assert resumed.resumed == 19
    (outcome,) = run([resumed], again, 30)
    assert len({json.dumps([trial.backend, trial.tile]) for trial in outcome.trials}) == len(outcome.trials)
    assert {trial.backend for trial in outcome.trials} == {"", "triton"}


REPLAYED = {*NAMES, *(f"{name}, unaided" for name in NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_strategies_order_tiles_of_two_kinds(tmp_path: Path, name: str) -> None:
    lab = FakeGpuLaboratory()
    (search,) = searches(tmp_path, lab, strategy=name)
    run([search], lab, 10)
    rows = list(bench.replay(search, dict.fromkeys(search.scores, 1.0), 4, seeds=3))
    assert {row["strategy"] for row in rows} == REPLAYED


def test_the_benchmark_of_tuning_compares_with_hand_picked_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "common_keys", lambda *_: {"suite": "tuning"})
    kept: list[Outcome] = []
    other = Job(PROBLEMS[5], "forward", TARGET, Workload(1, 131072, 2048))
    rows = bench.run_gpu(
        [JOB, other], 8, sampled=[JOB], progress=lambda line: None, keep=lambda rows, found: kept.append(found),
        lab=FakeGpuLaboratory(),
    )  # fmt: skip
    tuned = [row for row in rows if row["strategy"].endswith("tuned")]
    assert [(row["pass"], row["L"]) for row in tuned] == [("forward", 4096), ("forward", 131072)]
    for row in tuned:
        assert row["best_ms"] <= row["default_ms"]
        assert {"tilelang_ms", "triton_ms", "tile", "tflops", "resources"} <= set(row)
    assert {row["strategy"] for row in rows if "sample_best_ms" in row} == REPLAYED
    assert [outcome.job for outcome in kept] == [JOB, other]
    assert json.loads(json.dumps(rows)) == rows
    assert "tilelang" in str([column._cells for column in bench.tuned_table(rows).columns])


def test_the_shapes_of_the_benchmark_are_all_tuned() -> None:
    jobs = bench.gpu_jobs(TARGET)
    assert len(jobs) == len({(job.problem, job.pass_name, job.load.L) for job in jobs})
    assert {(job.problem.op, job.pass_name) for job in jobs} == {
        (op, name) for op in ("chunk_attention", "chunk_select") for name in ("forward", "backward")
    }
    assert {job.load.L for job in bench.gpu_jobs(TARGET, [4096])} == {4096}


def test_a_batch_fills_the_gpu() -> None:
    loads = [job.load for job in tuning.jobs_for([PROBLEM], [1, 4096, 65536], ["forward"], TARGET)]
    assert loads == [Workload(64, 1, 64), Workload(8, 4096, 64), Workload(1, 65536, 1024)]
    (job,) = tuning.jobs_for([PROBLEM], [4096], ["forward"], TARGET, batch=2)
    assert job.load.B == 2


# Records


def a_record(tile: Any, ms: float, length: int = 4096, problem: Problem = PROBLEM, **changes: Any) -> records.Record:
    backend = backend_of(tile)
    measured = {
        "date": "2026-01-01T00:00:00+00:00", "strategy": "model", "candidates": 3, "seconds": 1.0, "B": 8, "L": length,
        "C": 64, "threads": 132, "clock": "device", "rounds": 5, "ms": ms, "ms_min": ms, "ms_max": ms,
        "default_ms": 2.0, "gflops": 10.0, "matmul_gflops": 100.0, "resources": {"registers": 1},
    }  # fmt: skip
    data = {
        "problem": problem.to_dict(), "pass": "forward", "length": length, "backend": backend,
        "tile": dataclasses.asdict(tile), "program": program_digest(problem.op, "forward", TARGET, backend),
        "versions": _versions(TARGET, backend), "measured": measured,
    }  # fmt: skip
    return records.Record.model_validate(data | changes, context={"level": LEVEL})


LANG = GpuTile(tokens=4, stages=3, blocks=3)
TRITON = TritonTile(tokens=4, warps=2, stages=3)


def save(*found: records.Record, device: Device = H100_NAME) -> Path:
    return records.save(found, device, TARGET)


def test_a_search_leaves_a_record_of_each_backend_and_the_faster_is_used(tmp_path: Path) -> None:
    lab = FakeGpuLaboratory()
    (outcome,) = run(searches(tmp_path, lab), lab, 5)
    found = records_of(outcome)
    assert {record.backend for record in found} == {"tilelang", "triton"}
    assert found[0].tile == dataclasses.asdict(outcome.best.tile)
    assert record_of(outcome).measured.matmul_gflops_after == pytest.approx(0.97 * H100.flops / 1e9, rel=1e-3)
    path = save(*found)
    assert records.load(path).records == tuple(sorted(found, key=lambda record: record.key))
    for backend in ("tilelang", "triton"):
        mine = choose(PROBLEM, "forward", TARGET, 4096, backend)  # type: ignore[arg-type]
        assert (mine.origin, backend_of(mine.tile)) == ("record", backend)


@pytest.mark.parametrize(("triton_ms", "wins"), [(0.5, TRITON), (0.99, LANG), (1.5, LANG)])
def test_triton_has_to_be_faster_by_more_than_chance(triton_ms: float, wins: Any) -> None:
    save(a_record(LANG, 1.0), a_record(TRITON, triton_ms))
    found = choose(PROBLEM, "forward", TARGET, 5000)
    assert found.tile == wins
    assert f"{backend_of(wins)} record of L >= 4096" in found.reason
    assert len(found.passed_over) == 1


def test_records_of_another_gpu_or_capability_or_compiler_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    save(a_record(LANG, 1.0), device=Device("NVIDIA H200", H100_NAME.features))
    found = choose(PROBLEM, "forward", TARGET, 4096)
    assert found.origin == "default"
    assert "another machine (NVIDIA H200)" in found.passed_over[0][1]
    save(a_record(LANG, 1.0), device=Device(H100_NAME.name, ("compute capability 10.0",)))
    assert "another machine, of other features" in str(choose(PROBLEM, "forward", TARGET, 4096).passed_over)
    save(a_record(LANG, 1.0, versions={"tilelang": "0.0"}))
    assert choose(PROBLEM, "forward", TARGET, 4096).origin == "default"
    save(a_record(LANG, 1.0))
    assert choose(PROBLEM, "forward", TARGET, 4096).tile == LANG
    monkeypatch.setattr(records, "_compiler_versions", lambda target, backend="": {"tilelang": "not installed"})
    assert choose(PROBLEM, "forward", TARGET, 4096).tile == LANG, "kernels that were built elsewhere run without it"


def test_a_record_edited_into_nonsense_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    path = save(a_record(LANG, 1.0), a_record(TRITON, 0.5))
    content = json.loads(path.read_text())
    for number, (field, value) in enumerate([("backend", "tvm"), ("tile", {**dataclasses.asdict(LANG), "stages": 99})]):
        changed = json.loads(json.dumps(content))
        where = next(i for i, record in enumerate(changed["records"]) if record["backend"] == "tilelang")
        changed["records"][where][field] = value
        path.write_text(json.dumps(changed) + " " * number)
        assert choose(PROBLEM, "forward", TARGET, 4096).tile == TRITON, "the other stands"
    assert "has no programs in tvm" in caplog.text
    assert "KiB of shared memory" in caplog.text


def test_programs_of_the_backends_have_digests_of_their_own() -> None:
    for op in ("chunk_attention", "chunk_select"):
        for name in ("forward", "backward"):
            digests = {program_digest(op, name, TARGET), program_digest(op, name, TARGET, "triton")}
            assert len(digests | {program_digest(op, name, "cpu:native")}) == 3
            assert program_digest(op, name, TARGET) == program_digest(op, name, TARGET, "tilelang")


# Who obeys them


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Dispatch takes CPU tensors for an H100's, and this is what ran: a built kernel's or a Triton program's tile."""
    ran: list[tuple[str, Any]] = []

    class FakeKernel:
        def __init__(self, tile: Any) -> None:
            self.tile = tile

        def __call__(self, tensors: tuple[torch.Tensor, ...], *dims: int) -> None:
            ran.append(("tilelang", self.tile))
            tensors[-1].zero_()

    class FakeTriton:
        DTYPES = (torch.bfloat16, torch.float32)
        OutOfResources = MemoryError

        @staticmethod
        def attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
            ran.append(("triton", rest[-1]))
            return torch.zeros_like(q)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(dispatch, "_target", lambda device: TARGET)
    monkeypatch.setattr(dispatch, "_triton", lambda: (FakeTriton, ""))
    monkeypatch.setattr(dispatch, "_device_lacks", lambda device: "")
    monkeypatch.setattr(dispatch, "CudaKernel", FakeKernel)
    monkeypatch.setattr(dispatch, "find", lambda problem, name, target, tile: tile)
    monkeypatch.setattr(dispatch, "build", lambda problem, name, target, tile: tile)
    return ran


def attend(L: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
    q, kv = torch.zeros(1, L, 16, 64, dtype=dtype), torch.zeros(1, 64, 1, 64, dtype=dtype)
    indices = torch.zeros(1, L, 1, 8, dtype=torch.int32)
    ops.chunk_attention(q, kv, kv, indices, torch.ones(1, L, 1, 8), 64)


def test_dispatch_takes_the_backend_and_the_tile_of_the_record(
    used: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(LANG, blocks=2)
    save(a_record(short, 1.0, 64), a_record(LANG, 1.0, 1024), a_record(TRITON, 0.5, 1024))
    with dispatch.use_backend("auto"):
        attend(64)
        attend(1024)
    with dispatch.use_backend("compiled"):
        attend(1024)
    with dispatch.use_backend("triton"):
        attend(1024)
        attend(64)
    default = default_tile(PROBLEM, "forward", LEVEL, 64, "triton")
    assert used == [
        ("tilelang", short), ("triton", TRITON), ("tilelang", LANG), ("triton", TRITON), ("triton", default),
    ]  # fmt: skip
    used.clear()
    monkeypatch.setattr(dispatch, "_triton", lambda: (None, "not installed"))
    dispatch._resolve.cache_clear()
    with dispatch.use_backend("auto"):
        attend(1024)
    assert used == [("tilelang", LANG)], "where there is no Triton its record is of no use"


def test_where_no_kernel_is_built_triton_serves_with_its_own_tile(
    used: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "find", lambda *_: None)
    save(a_record(LANG, 0.5, 1024), a_record(TRITON, 1.0, 1024))
    with dispatch.use_backend("auto"):
        attend(1024)
        monkeypatch.setenv("HSA_COMPILE_SCHEDULE", '{"blocks": 2}')
        attend(1024)
    assert used == [("triton", TRITON), ("triton", default_tile(PROBLEM, "forward", LEVEL, 1024, "triton"))]


def test_float32_is_served_by_triton_with_its_record(used: list[tuple[str, Any]]) -> None:
    wide = dataclasses.replace(PROBLEM, dtype="float32")
    save(a_record(TRITON, 1.0, 1024, wide))
    with dispatch.use_backend("auto"):
        attend(1024, torch.float32)
    assert used == [("triton", TRITON)]


def test_without_records_hand_picked_tiles_serve_and_one_line_says_so(
    used: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    save(a_record(LANG, 1.0, problem=dataclasses.replace(PROBLEM, top_k=3)))
    with dispatch.use_backend("auto"):
        for _ in range(3):
            attend(256)
            dispatch._resolve.cache_clear()
    assert used == [("tilelang", default_tile(PROBLEM, "forward", LEVEL, 256))] * 3
    assert caplog.text.count("hand-picked tile") == 1
    assert "hsa-compile tune makes one" in caplog.text


def test_deterministic_mode_pins_one(used: list[tuple[str, Any]]) -> None:
    save(a_record(dataclasses.replace(LANG, blocks=2), 1.0, 64), a_record(LANG, 1.0, 1024))
    torch.use_deterministic_algorithms(True)
    try:
        with dispatch.use_backend("auto"):
            attend(64)
            attend(2048)
    finally:
        torch.use_deterministic_algorithms(False)
    assert used == [("tilelang", LANG)] * 2


def test_explain_and_records_show_name_backend_and_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = json.dumps(PROBLEM.to_dict())
    path = save(a_record(LANG, 1.0), a_record(TRITON, 0.5))
    output = CliRunner().invoke(app, ["explain", "--target", "cuda", "--problem", problem, "--length", "4096"]).output
    assert "cuda:sm_90a on NVIDIA H100" in output
    rows = list(zip(*(column._cells for column in tuning.explain([PROBLEM], [4096], "cuda")[0].columns)))
    assert rows[0][3:5] == ("triton: tokens 4, warps 2, stages 3", "record")
    assert rows[1][1:5] == ("backward", "4096, any", rows[1][3], "default")
    shown = list(zip(*(column._cells for column in tuning.records_table(records.load(path)).columns)))
    assert [row[3].split(",")[0] for row in shown] == ["tilelang: form rows", "triton: tokens 4"]
    assert [row[-1] for row in shown] == ["current", "current"]
    assert "current" in CliRunner().invoke(app, ["records", "show", str(path)]).output


def test_doctor_counts_the_records_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from hsa_compile.doctor import _gpu_records

    assert torch.cuda.is_available() or list(_gpu_records()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert "tune --target cuda" in next(_gpu_records())[3]
    save(a_record(LANG, 1.0), a_record(TRITON, 0.5), a_record(LANG, 1.0, 64, program="of before"))
    assert next(_gpu_records())[1] == "2 for this GPU (1 of tilelang, 1 of triton), 1 stale"


def test_tuning_a_gpu_that_is_not_there_is_told_in_a_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    call = CliRunner().invoke(app, ["tune", "--target", "cuda", "--length", "64", "--budget", "1"])
    assert call.exit_code == 1
    assert "PyTorch finds none here" in call.output or "not installed" in call.output or "CUDA compiler" in call.output
    assert "unknown GPU target" in CliRunner().invoke(app, ["tune", "--target", "cuda:sm_1"]).output


# Processes


DEVICE = """
import os, sys, time
from hsa_compile.schedules.worker import serve
def handle(message):
    kind = message.get("symbol", "")
    if message["do"] == "look": return {"processors": 132, "flops": 7e14, "bandwidth": 3e12}
    if message["do"] == "prepare": raise ValueError("out of resource: shared memory")
    if kind == "illegal": os.write(2, b"an illegal memory access was encountered"); os._exit(70)
    if kind == "hang": time.sleep(60)
    if kind == "once" and not os.path.exists(message["library"]): open(message["library"], "w"); os._exit(70)
    if message["do"] == "time": return {"device": [1.0, float(os.getpid())]}
    return {"wrong": "off by 1" if kind == "wrong" else "", "resources": {}}
serve(handle)
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuLaboratory]:
    """With a measuring process that has a made-up device."""
    (tmp_path / "device.py").write_text(DEVICE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with GpuLaboratory(TARGET, Limits(build=60, check=1.0), 1, "device", require=False) as lab:
        yield lab


def test_candidates_that_poison_hang_or_lie_cost_themselves(lab: GpuLaboratory, tmp_path: Path) -> None:
    assert lab.machine.threads == 132
    tile = default_tile(PROBLEM, "forward", LEVEL)

    def built(symbol: str) -> dict[str, Any]:
        return {"library": str(tmp_path / "kernel.so"), "symbol": symbol, "resources": {"registers": 7}}

    def process() -> float:
        return lab.time(JOB, tile, built("good"))[1]

    for symbol, status, text in (
        ("illegal", "crash", "illegal memory access"),
        ("hang", "hang", "no answer within 1 s"),
        ("wrong", "wrong", "off by"),
    ):
        before = process()
        with pytest.raises(CandidateError, match=text) as error:
            lab.check(JOB, tile, built(symbol))
        assert error.value.status == status
        assert (process() == before) == (status == "wrong"), "a new process after those that took it down"
        lab.check(JOB, tile, built("good"))
    lab.check(JOB, tile, built("once"))  # what an earlier candidate did to the process is not this one's fault
    assert lab.resources(built("good")) == {"registers": 7}


def test_a_triton_candidate_that_does_not_fit_fails_to_compile(lab: GpuLaboratory) -> None:
    with pytest.raises(CandidateError, match="out of resource") as error:
        lab.build_one(JOB, TRITON)
    assert error.value.status == "compile"


def test_a_measuring_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"the measuring process does not start: .*No module named"):
        GpuLaboratory(TARGET, compilers=1, measurer="no_such_module", require=False)
    with pytest.raises(TargetError, match="unknown GPU target"):
        GpuLaboratory("cuda:sm_1", require=False)


SMALL = [
    ("forward", ChunkAttention(4, 2, 16, 16, 3)),
    ("backward", ChunkAttention(4, 2, 16, 16, 3)),
    ("forward", ChunkSelect(1, 1, 16, 16, 4)),
    ("backward", ChunkSelect(2, 1, 16, 16, 4)),
]


@pytest.mark.parametrize(("pass_name", "problem"), SMALL)
def test_checks_accept_right_results_and_refuse_others(
    pass_name: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu_measure.DEVICE != "cpu":
        pytest.skip("checked with kernels in tests/gpu")
    spoil: list[Any] = [lambda x: x]

    def plain(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if isinstance(problem, ChunkAttention):
            function = eager.attention_backward if pass_name == "backward" else eager.attention
            found = function(*inputs, problem.chunk_size, problem.off_by_one)
        elif pass_name == "backward":
            found = eager.select_backward(*inputs)
        else:
            found = eager.select(*inputs, problem.kv_heads, problem.chunk_size, problem.top_k, problem.visible_lag)
        first, *rest = found if isinstance(found, tuple) else (found,)
        return spoil[0](first), *rest

    monkeypatch.setattr(gpu_measure, "candidate", lambda *_: plain)
    message = {
        "do": "check", "problem": problem.to_dict(), "pass": pass_name, "seed": 0, "load": [2, 48, 12], "library": "",
    }  # fmt: skip
    assert gpu_measure.handle(dict(message)) == {"wrong": "", "resources": {}}
    spoil[0] = lambda x: x * 1.2 + 1 if x.is_floating_point() else x.flip(-1)
    assert "off by" in gpu_measure.handle(dict(message))["wrong"]
    if pass_name == "backward" or isinstance(problem, ChunkAttention):
        spoil[0] = lambda x: x + 1e-6 * torch.rand(())
        assert "repeat to the bit" in gpu_measure.handle(dict(message))["wrong"]
    spoil[0] = lambda x: x
    timing = gpu_measure.handle({**message, "do": "time", "least": 3, "round_seconds": 0.0})["device"]
    assert len(timing) == 3
    assert min(timing) > 0


@pytest.mark.slow
@needs_triton
def test_triton_tiles_are_tuned_in_the_interpreter(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: real candidates, built, checked and timed in their processes."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = tuning.jobs_for([ChunkAttention(4, 1, 16, 16, 2)], [16], ["forward"], TARGET, context=64, batch=1)
    with GpuLaboratory(TARGET, compilers=1, require=False) as lab:
        ((outcome, path),) = tuning.tune_gpu(jobs, 60, "model", lambda share, line: None, None, lab)
    assert not outcome.failed, [trial.detail for trial in outcome.trials]
    assert records.load(path).records[0].backend == "triton"
    assert choose(jobs[0].problem, "forward", TARGET, 16).origin == "record"
