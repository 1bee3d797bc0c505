"""The tuner's loop on a made-up machine, what becomes of bad candidates, and records that are data and no more."""

import ast
import dataclasses
import errno
import json
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hsa_compile import dispatch, ops, tuning
from hsa_compile.bench import tuning as bench
from hsa_compile.cli import app
from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.ir.programs import CpuTile
from hsa_compile.schedules import ScheduleError, bucket, build, choice, choose, fingerprint, records, resolve
from hsa_compile.schedules.candidates import CandidateError, CpuLaboratory, Job, Limits
from hsa_compile.schedules.costs import Machine, Workload, estimate_ms, union_chunks
from hsa_compile.schedules.device import Device, device_for
from hsa_compile.schedules.fingerprint import program_digest
from hsa_compile.schedules.journal import Journal, JournalError, Trial
from hsa_compile.schedules.measure import check_loads
from hsa_compile.schedules.space import refusal, space_for
from hsa_compile.schedules.strategies import NAMES, Strategy
from hsa_compile.schedules.tuner import Search, best_so_far, job_flops, record_of
from hsa_compile.schedules.worker import Worker, WorkerError
from hsa_compile.schedules.workload import timing_case

PROBLEM = ChunkAttention(2, 1, 32, 16, 4)
JOB = Job(PROBLEM, "forward", "cpu:native", Workload(1, 256, 16))
LEVEL = resolve("cpu:native")
FIELDS = [field.name for field in dataclasses.fields(CpuTile)]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Records of this test alone."""
    monkeypatch.setenv("HSA_COMPILE_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "tuned")
    monkeypatch.setattr(records, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of trials a test
    monkeypatch.setattr(records, "_compiler_versions", lambda target, backend="": {"apache-tvm": "1"})
    caches = (choice._say, records._warn_once, records._load, dispatch._resolve, dispatch._load)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "records"
    for cache in caches:
        cache.cache_clear()


class FakeLaboratory:
    """Times by a formula; some tiles fail. ``now`` and then a made-up clock decides nothing: runs are finite."""

    clock = "wall"
    machine = Machine(2, 2e11)
    workers = 2
    rounds = (7, 15)

    def __init__(self, bad: dict[int, str] | None = None) -> None:
        self.bad, self.order, self.built = bad or {}, [], []

    def build(self, job: Job, tiles: list[CpuTile]) -> Iterator[tuple[CpuTile, Any]]:
        for tile in tiles:
            self.built.append(tile)
            fails = self.bad.get(tile.tokens) == "compile"
            yield tile, CandidateError("compile", "no such register") if fails else tile.tokens

    def check(self, job: Job, tile: CpuTile, built: Any) -> None:
        if self.bad.get(tile.tokens) in ("crash", "hang", "wrong"):
            raise CandidateError(self.bad[tile.tokens], "bad")  # type: ignore[arg-type]

    def time(self, job: Job, tile: CpuTile, built: Any) -> list[float]:
        self.order.append(tile)
        return [milliseconds(tile) * noise for noise in (1.0, 0.99, 1.01)]

    def resources(self, built: Any) -> dict[str, int]:
        return {}

    def rate(self) -> float | None:
        return None


def milliseconds(tile: CpuTile) -> float:
    """Best at 16 tokens, 4 x 3 register blocks, 128 rows; the hand-picked tile is far from it."""
    at = (math.log2(tile.tokens / 16), math.log2(tile.row_block / 4), tile.vector_block - 3, math.log2(tile.rows / 128))
    return 1.0 + 0.1 * sum(x * x for x in at)


def search(tmp_path: Path, lab: FakeLaboratory, strategy: str = "random", job: Job = JOB) -> Search:
    return Search(job, lab, Journal(tmp_path, {"test": 1}), strategy)  # type: ignore[arg-type]


def a_record(tile: CpuTile | None = None, length: int = 256, **changes: Any) -> records.Record:
    tile = tile or dataclasses.replace(choice.default_tile(PROBLEM, "forward", LEVEL), tokens=32)
    measured = {
        "date": "2026-01-01T00:00:00+00:00", "strategy": "random", "candidates": 3, "seconds": 1.0, "B": 1, "L": length,
        "C": 16, "threads": 2, "clock": "wall", "rounds": 3, "ms": 1.0, "ms_min": 0.9, "ms_max": 1.1, "default_ms": 2.0,
        "gflops": 10.0, "matmul_gflops": 100.0,
    }  # fmt: skip
    digest = program_digest(PROBLEM.op, "forward", LEVEL.name)
    data = {
        "problem": PROBLEM.to_dict(), "pass": "forward", "length": length, "tile": dataclasses.asdict(tile),
        "program": digest, "versions": {"apache-tvm": "1"}, "measured": measured,
    }  # fmt: skip
    return records.Record.model_validate(data | changes)


def save(*found: records.Record, device: Device | None = None, directory: Path | None = None) -> Path:
    return records.save(found, device or device_for(LEVEL.name), LEVEL.name, directory)


# The search


def test_a_programs_text_does_not_hang_on_the_version_of_python() -> None:
    tree = ast.parse("def f(x):\n    'doc'\n    return f\"B * {x['n']}\"")
    assert fingerprint._text(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')]), body=[Return(value=JoinedStr(values="
        "[Constant(value='B * '), FormattedValue(value=Subscript(value=Name(id='x', ctx=Load()), "
        "slice=Constant(value='n'), ctx=Load()), conversion=-1)]))])])"
    )


def test_a_search_of_everything_finds_the_best_and_says_how_much_better(tmp_path: Path) -> None:
    lab = FakeLaboratory()
    outcome = search(tmp_path, lab).run(5)
    space = space_for(PROBLEM, "forward", "cpu:native", JOB.load.L)
    assert len(outcome.trials) == outcome.space_size == len(space.tiles())
    assert milliseconds(outcome.best.tile) == min(map(milliseconds, space.tiles()))
    assert outcome.default_ms == pytest.approx(milliseconds(space.base))
    record = record_of(outcome)
    assert record.measured.ms < record.measured.default_ms
    assert record.measured.gflops == pytest.approx(job_flops(JOB) / outcome.best.ms / 1e6, rel=1e-3)
    best = [ms for _, _, ms in best_so_far(outcome.trials)]
    assert best == sorted(best, reverse=True)


def test_finalists_take_turns_and_each_begins_a_round(tmp_path: Path) -> None:
    lab = FakeLaboratory()
    outcome = search(tmp_path, lab).run(5)
    turns = lab.order[len(outcome.trials) :]
    size = len(outcome.finals)
    rounds = [turns[i : i + size] for i in range(0, len(turns), size)]
    assert {frozenset(one) for one in rounds} == {frozenset(final.tile for final in outcome.finals)}
    assert len({one[0] for one in rounds[:size]}) == min(size, len(rounds))


def test_the_hand_picked_tile_stays_unless_another_is_clearly_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = space_for(PROBLEM, "forward", "cpu:native", JOB.load.L).base
    lab = FakeLaboratory()
    monkeypatch.setattr(lab, "time", lambda job, tile, built: [1.0 if tile == base else 0.99] * 3)
    assert search(tmp_path, lab).run(2).best.tile == base


@pytest.mark.parametrize("kind", ["compile", "crash", "hang", "wrong"])
def test_a_bad_candidate_costs_itself_and_is_written_down(tmp_path: Path, kind: str) -> None:
    outcome = search(tmp_path, FakeLaboratory({16: kind})).run(5)
    failed = [trial for trial in outcome.trials if trial.tile["tokens"] == 16]
    assert failed
    assert all(trial.status == kind and trial.ms is None and trial.detail for trial in failed)
    assert outcome.failed == {kind: len(failed)}
    assert outcome.best.tile.tokens in (8, 32)


def test_a_hand_picked_tile_that_does_not_work_is_told(tmp_path: Path) -> None:
    base = space_for(PROBLEM, "forward", "cpu:native", JOB.load.L).base
    with pytest.raises(ScheduleError, match=r"the hand-picked tile .* does not work: bad"):
        search(tmp_path, FakeLaboratory({base.tokens: "wrong"})).run(0.1)


def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, tried = FakeLaboratory(), []

    def stop_at_ten(job: Job, tile: CpuTile, built: Any) -> None:
        tried.append(tile)
        if len(tried) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(lab, "check", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, lab).run(5)
    again = FakeLaboratory()
    resumed = search(tmp_path, again)
    assert resumed.resumed == 9
    outcome = resumed.run(5)
    assert len(outcome.trials) == len({json.dumps(trial.tile) for trial in outcome.trials}) == outcome.space_size
    assert outcome.best.tile == search(tmp_path / "other", FakeLaboratory()).run(5).best.tile


@pytest.mark.parametrize("name", NAMES)
def test_strategies_propose_each_candidate_once_and_repeatably(name: str) -> None:
    space = space_for(PROBLEM, "forward", "cpu:native", JOB.load.L)

    def order() -> list[CpuTile]:
        machine = Machine(2, 2e11)
        strategy = Strategy(name, space.tiles(), lambda tile: estimate_ms(PROBLEM, "forward", tile, JOB.load, machine))
        seen: dict[CpuTile, float] = {}
        while batch := strategy.propose(4, seen):
            seen |= {tile: math.inf if tile.tokens == 8 else milliseconds(tile) for tile in batch}
        return list(seen)

    tried = order()
    assert tried == order()
    assert len(set(tried)) == len(tried)
    assert (len(tried) == len(space.tiles())) == (name == "random")


def test_the_learner_finds_what_the_model_misjudges(tmp_path: Path) -> None:
    """The made-up machine disagrees with the cost model, so the model's order is a bad one here."""
    found = search(tmp_path, FakeLaboratory(), "random")
    found.run(5)
    rows = list(bench.replay(found, dict.fromkeys(found.scores, 1.0), 4, seeds=9))
    best = {(row["strategy"], row["candidates"]): row["best_ms"] / row["sample_best_ms"] for row in rows}
    assert best["learned", 32] < best["model", 32]
    assert best["learned", 32] < 1.2
    assert "learned" in str([column._cells for column in bench.table(_with_keys(rows)).columns])
    assert bench.plot(_with_keys(rows), tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def _with_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"problem": PROBLEM.to_dict(), "L": 256, "pass": "forward", **row} for row in rows]


@pytest.mark.parametrize("target", ["cpu:x86-64-v4", "cpu:x86-64-v3", "cpu:x86-64-v2", "cpu:aarch64"])
@pytest.mark.parametrize("problem", [PROBLEM, ChunkAttention(80, 1, 16, 16, 2), ChunkSelect(2, 2, 64, 16, 4)])
@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_spaces_hold_only_what_fits(target: str, problem: Any, pass_name: str) -> None:
    space = space_for(problem, pass_name, target)
    tiles = space.tiles()
    level = resolve(target)
    assert tiles[0] == space.base
    assert len(set(tiles)) == len(tiles)
    assert all(tile.row_block * tile.vector_block + tile.vector_block < level.registers for tile in tiles)
    assert all(refusal(problem, pass_name, tile, level) is None for tile in tiles)
    load = Workload(2, 300, 40)
    assert all(0 < estimate_ms(problem, pass_name, tile, load, Machine(2, 1e11)) < 1e6 for tile in tiles)


@pytest.mark.parametrize("problem", [PROBLEM, ChunkSelect(2, 2, 64, 16, 4)])
def test_a_space_holds_what_matters_at_its_length(problem: Any) -> None:
    """How a few tokens are split is searched where segments are short; what makes no difference is not tried twice."""
    few, many = (space_for(problem, "forward", "cpu:native", L).tiles() for L in (1, 300))
    assert {tile.few for tile in many} == {choice.default_tile(problem, "forward", LEVEL).few}
    assert len({tile.segments for tile in many}) == 1
    split = [tile for tile in few if tile.few > 0]
    whole = [dataclasses.replace(tile, few=many[0].few) for tile in few if tile.few == 0]
    assert split[0] == few[0] == many[0]
    assert len({tile.tokens for tile in split}) == 1
    assert set(whole) == set(many), "the tiles of tokens are the same at any length"
    assert (len({tile.segments for tile in split}) > 1) == isinstance(problem, ChunkSelect)
    machine, load = Machine(2, 1e11), Workload(1, 1, 4096)
    assert estimate_ms(problem, "forward", split[0], load, machine) < estimate_ms(
        problem, "forward", dataclasses.replace(split[0], few=0), load, machine
    ), "one tile of one token keeps one thread busy"


def test_candidates_are_checked_on_both_sides_of_few() -> None:
    def lengths(problem: Any, pass_name: str, tokens: int, few: int) -> list[int]:
        return [load.L for load in check_loads(problem, pass_name, tokens, few)]

    assert lengths(PROBLEM, "forward", 256, 8) == [8, 259]
    assert lengths(PROBLEM, "forward", 256, 0) == [259]
    assert lengths(PROBLEM, "backward", 256, 8) == [259]
    assert lengths(ChunkAttention(64, 64, 32, 16, 64), "forward", 256, 8) == [8, 9], "the reference takes long"


# The journal


def test_a_line_cut_in_the_middle_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, {"a": 1})
    trials = [Trial(tile={"tokens": i}, status="ok", ms=float(i)) for i in (1, 2, 3)]
    for trial in trials[:2]:
        journal.append(trial)
    journal.path.write_bytes(journal.path.read_bytes()[:-7])
    assert journal.read() == trials[:1]
    assert "1 lines are cut off" in caplog.text
    journal.append(trials[2])
    assert journal.read() == [trials[0], trials[2]]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, {})
    journal.append(Trial(tile={}, status="ok", ms=1.0))
    before = journal.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JournalError, match=r"No space left on device; all trials before .* HSA_COMPILE_CACHE"):
        journal.append(Trial(tile={}, status="ok", ms=2.0))
    assert journal.path.read_bytes() == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=60), max_size=6))
def test_a_journal_of_anything_is_read_without_harm(tmp_path: Path, lines: list[bytes]) -> None:
    journal = Journal(tmp_path, {"fuzz": 1})
    journal.path.write_bytes(b"\n".join(lines))
    journal.append(Trial(tile={"tokens": 1}, status="crash"))
    assert journal.read()[-1].tile == {"tokens": 1}
    found = Search(JOB, FakeLaboratory(), journal, "random")  # type: ignore[arg-type]
    assert not found.scores, "a tile without most of its fields"


# Records


def test_a_record_is_used_for_its_bucket_and_longer_segments(store: Path) -> None:
    long = dataclasses.replace(a_record().tile_for(LEVEL), tokens=64)
    save(a_record(), a_record(long, 4096))
    default = choice.default_tile(PROBLEM, "forward", LEVEL)
    tokens = {L: choose(PROBLEM, "forward", length=L).tile.tokens for L in (1, 255, 256, 1500, 4095, 4096, 10**6, None)}
    assert tokens == {
        1: default.tokens, 255: default.tokens, 256: 32, 1500: 32, 4095: 32, 4096: 64, 10**6: 64, None: 64,
    }  # fmt: skip
    assert choose(PROBLEM, "forward", length=300).origin == "record"
    assert choose(PROBLEM, "backward", length=300).origin == "default"
    assert choose(dataclasses.replace(PROBLEM, top_k=5), length=300).origin == "default"
    assert choose(dataclasses.replace(PROBLEM, off_by_one=True), length=300).origin == "default"


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (1, 1), (3, 1), (4, 4), (255, 64), (256, 256), (5000, 4096)])
def test_buckets(length: int, expected: int) -> None:
    assert bucket(length) == expected


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        (Device("another, 64 cores"), {}, r"measured on another machine \(another"),
        (Device(device_for(LEVEL.name).name, ("sse",)), {}, "of other features"),
        (None, {"program": "000000000000"}, "the program has changed"),
        (None, {"versions": {"apache-tvm": "0.1"}}, "made with apache-tvm 0.1"),
    ],
)
def test_what_does_not_fit_is_passed_over_with_a_reason(device: Any, changes: Any, reason: str) -> None:
    save(a_record(**changes), device=device)
    found = choose(PROBLEM, length=256)
    assert found.origin == "default"
    assert re.search(reason, found.reason)
    assert [len(found.passed_over), found.record] == [1, None]
    _, others = tuning.explain([PROBLEM], [256], "cpu:native")
    assert others is not None
    assert re.search(reason, str([column._cells for column in others.columns]))


def test_a_missing_record_warns_once_where_the_user_has_tuned_and_is_quiet_elsewhere(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", logger="hsa_compile")
    choose(PROBLEM, length=256)
    save(a_record(program="0" * 12), directory=tmp_path / "packaged")
    choose(PROBLEM, length=300)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    caplog.clear()
    save(a_record(program="0" * 12))
    for length in (256, 300, 256):
        choose(PROBLEM, length=length)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "hand-picked tile" in caplog.text


def test_the_users_record_comes_before_the_packaged_one(tmp_path: Path) -> None:
    save(a_record(dataclasses.replace(a_record().tile_for(LEVEL), tokens=8)), directory=tmp_path / "packaged")
    assert choose(PROBLEM, length=256).tile.tokens == 8
    save(a_record())
    assert choose(PROBLEM, length=256).tile.tokens == 32


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("tile", {"tokens": 10**9}, "field required|missing|tile"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "tokens": 1 << 22}, "buffers would take"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "row_block": 16, "vector_block": 8}, "registers"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "row_block": 3}, "power of two"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "few": 1 << 20}, "parts of 1048576 tokens"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "segments": 0}, "at least 1"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "few": True}, "integer and not negative"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "tokens": "many"}, "integer and not negative"),
        ("tile", {**dataclasses.asdict(a_record().tile_for(LEVEL)), "speed": 11}, "no field speed"),
        ("problem", {"op": "sudoku"}, "unknown operator"),
        ("problem", {"op": ["x"]}, "unknown operator"),
        ("length", 300, "least of a bucket"),
        ("measured", {"ms": float("nan")}, "measured"),
        ("pass", "sideways", "forward"),
    ],
)
def test_a_record_edited_into_nonsense_is_refused_and_the_others_stand(
    field: str, value: Any, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(a_record(), a_record(length=4096))
    data = json.loads(path.read_text())
    data["records"][1][field] = value
    path.write_text(json.dumps(data))
    found = choose(PROBLEM, length=10**5)
    assert found.record is not None
    assert found.record.record.length == json.loads(path.read_text())["records"][0]["length"]
    assert re.search(rf"record 1 of .* is refused: .*({complaint})", caplog.text)
    save(a_record(length=1024))
    assert (path.parent / (path.name + ".bad")).exists(), "what was refused is gone"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_records_of_anything_never_do_harm(data: Any) -> None:
    """Any value anywhere in a file of records: a tile that makes sense comes out, or the hand-picked one."""
    path = save(a_record())
    content = json.loads(path.read_text())
    where: Any = content
    while isinstance(where, dict | list) and where:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if not isinstance(where[key], dict | list) or not where[key] or data.draw(st.booleans()):
            where[key] = data.draw(json_values)
            break
        where = where[key]
    path.write_text(json.dumps(content))
    tile = choose(PROBLEM, length=256).tile
    assert refusal(PROBLEM, "forward", tile, LEVEL) is None
    path.unlink(missing_ok=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80))
def test_files_of_anything_never_do_harm(content: bytes, store: Path) -> None:
    store.mkdir(exist_ok=True)
    (store / "x.json").write_bytes(content)
    assert choose(PROBLEM, length=256).origin == "default"


def _save_some(directory: str, first: int) -> None:
    for i in range(8):
        one = a_record(length=4 ** (first + i))
        records.save([one], device_for(LEVEL.name), LEVEL.name, Path(directory))


def test_two_tuners_on_one_store_lose_nothing(store: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_save_some, args=(str(store), first)) for first in (0, 8)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    shelf = records.load(next(store.glob("*.json")))
    assert sorted(record.length for record in shelf.records) == [4**i for i in range(16)]
    assert {path.suffix for path in store.iterdir() if path.name != ".lock"} == {".json"}


def test_a_full_disk_leaves_the_records_as_they_were(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(a_record())
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(records.RecordError, match=r"No space left on device; free space.*HSA_COMPILE_RECORDS"):
        save(a_record(length=1024))
    assert path.read_bytes() == before
    assert {found.name for found in store.iterdir()} == {path.name, ".lock"}


def test_merge_keeps_the_later_and_diff_shows_it(store: Path, tmp_path: Path) -> None:
    late = a_record().model_dump(by_alias=True)
    late["measured"] |= {"date": "2026-02-01T00:00:00+00:00", "ms": 0.5}
    other = save(records.Record.model_validate(late), a_record(length=1024), directory=tmp_path / "other")
    mine = save(a_record())
    assert [(old is None, new is not None) for _, old, new in records.diff(mine, other)] == [
        (True, True),
        (False, True),
    ]
    call = CliRunner().invoke(app, ["records", "merge", str(other)])
    assert "2 records taken" in call.output
    assert {record.length: record.measured.ms for record in records.load(mine).records} == {256: 0.5, 1024: 1.0}
    assert records.merge([other]) == {mine: 0}
    assert records.diff(mine, other) == []
    shown = CliRunner().invoke(app, ["records", "show"]).output
    assert "current" in shown
    assert "2.00×" in shown


# Use


def test_build_takes_the_record_an_argument_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from hsa_compile.schedules import builder

    monkeypatch.setattr(builder, "compiler_version", lambda: "1")
    requests: list[Any] = []
    monkeypatch.setattr(builder, "_load", lambda directory, _: requests.append(directory) or "artifact")
    save(a_record())

    def tokens(**arguments: Any) -> Any:
        return builder.build_request(PROBLEM, "forward", "cpu:native", **arguments)["tile"]["tokens"]  # type: ignore[index]

    default = choice.default_tile(PROBLEM, "forward", LEVEL)
    assert tokens(length=256) == tokens() == 32
    assert tokens(length=1) == default.tokens
    assert tokens(tile=dataclasses.replace(default, tokens=8)) == 8
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "default")
    assert tokens(length=256) == default.tokens
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", '{"tokens": 16}')
    assert tokens(length=256) == 16
    build(PROBLEM)
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "default")
    build(PROBLEM)
    assert len(set(requests)) == 2
    for nonsense in ("fastest", '{"tokens": "x"}', '{"tokenz": 1}', '{"row_block": 3}', "[]"):
        monkeypatch.setenv("HSA_COMPILE_SCHEDULE", nonsense)
        with pytest.raises(ScheduleError, match="HSA_COMPILE_SCHEDULE must be"):
            tokens()


def test_dispatch_picks_by_length_and_deterministic_mode_pins_one(
    monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    class FakeKernel:
        def __init__(self, tile: CpuTile) -> None:
            self.tile = tile

        def __call__(self, tensors: tuple[torch.Tensor, ...], *dims: int) -> None:
            used.append(self.tile.tokens)
            tensors[-1].zero_()

    used: list[int] = []
    built: list[CpuTile] = []
    monkeypatch.setattr(dispatch, "build", lambda problem, name, target, tile: built.append(tile) or tile)
    monkeypatch.setattr(dispatch, "Kernel", FakeKernel)
    save(a_record(), a_record(dataclasses.replace(a_record().tile_for(LEVEL), tokens=64), 1024))

    def attend(L: int) -> int:
        q, kv = torch.zeros(1, L, 2, 32), torch.zeros(1, 32, 1, 32)
        indices = torch.zeros(1, L, 1, 4, dtype=torch.int32)
        ops.chunk_attention(q, kv, kv, indices, torch.ones(1, L, 1, 4), 16)
        return used[-1]

    default = choice.default_tile(PROBLEM, "forward", LEVEL).tokens
    lengths = (1, 200, 256, 1023, 1024, 2000)
    with dispatch.use_backend("compiled"):
        assert [attend(L) for L in lengths] == [default, default, 32, 32, 64, 64]
        assert len(built) == 3, "one build a tile, whatever the number of buckets"
        torch.use_deterministic_algorithms(True)
        try:
            assert {attend(L) for L in lengths} == {64}
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "default")
        assert {attend(L) for L in lengths} == {default}
    assert len(built) == 3


def test_explain_and_doctor_name_the_record(store: Path) -> None:
    path = save(a_record())
    output = CliRunner().invoke(app, ["explain", "--length", "256", "--length", "1"]).output
    assert "tokens 32" in output
    assert "record" in output
    assert "its records are for" in " ".join(output.replace("│", " ").split())
    (row,) = [row for row in _doctor_rows() if row[0] == "tuning records"]
    assert "1 for this machine; tiny's attention: record" in row[1]
    path.unlink()
    (row,) = [row for row in _doctor_rows() if row[0] == "tuning records"]
    assert "hsa-compile tune" in row[3]


def _doctor_rows() -> list[tuple[Any, ...]]:
    from hsa_compile.doctor import report

    return list(zip(*(column._cells for column in report()[0].columns)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--problem", "{}"), "unknown operator 'None'"),
        (("tune", "--problem", "/nowhere"), "neither a file nor a problem in JSON"),
        (("tune", "--length", "0"), "lengths are at least 1"),
        (("tune", "--preset", "huge"), "unknown preset 'huge'"),
        (("tune", "--target", "gpu:x"), "unknown target 'gpu:x'"),
        (("explain", "--target", "gpu:x"), "unknown target 'gpu:x'"),
        (("records", "show", "/nowhere"), "cannot read the records /nowhere"),
        (("records", "merge", __file__), "is no file of tuning records"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1
    assert message in result.output


# Processes


WORKER = """
import os, sys, time
from hsa_compile.schedules.worker import serve
def handle(message):
    if message["do"] == "crash": os.abort()
    if message["do"] == "hang": time.sleep(60)
    if message["do"] == "raise": raise ValueError("no")
    print("noise on stdout"); return {"pid": os.getpid()}
serve(handle)
"""


def test_a_worker_survives_crash_hang_noise_and_errors(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(WORKER)
    with Worker("child", {"PYTHONPATH": str(tmp_path)}) as worker:
        first = worker.ask({"do": "x"}, 60)
        assert worker.ask({"do": "x"}, 60) == first
        for do, kind, text in (("raise", "refused", "ValueError: no"), ("crash", "crash", "SIGABRT")):
            with pytest.raises(WorkerError, match=text) as error:
                worker.ask({"do": do}, 60)
            assert error.value.kind == kind
        second = worker.ask({"do": "x"}, 60)
        assert second != first
        with pytest.raises(WorkerError, match=r"no answer within 0\.2 s"):
            worker.ask({"do": "hang"}, 0.2)
        with pytest.raises(ProcessLookupError):
            os.kill(second["pid"], 0)
        assert worker.ask({"do": "x"}, 60) != second


CANDIDATE = """
#include "kernel.h"
#include <stdlib.h>
#include <unistd.h>
static int64_t one(int32_t stage, const int64_t* dims) { return 1; }
static int64_t none(const int64_t* dims) { return 0; }
static void run(int32_t stage, void* const* t, const int64_t* dims, void* s, void* w, int64_t b, int64_t e) {
  float* o = t[5]; (void)o; BODY; }
const hsa_kernel bad = {HSA_KERNEL_ABI, "", "forward", 6, 1, one, none, none, run};
"""


@pytest.mark.needs_compiler
def test_candidates_that_crash_hang_lie_or_overrun_fail_each_by_itself(
    tmp_path: Path, compiled: Callable[[str, str], Path]
) -> None:
    tile = choice.default_tile(PROBLEM, "forward", LEVEL)
    bodies = {
        "crash": ("abort()", "SIGABRT"),
        "hang": ("for (;;) sleep(1)", "no answer within"),
        "wrong": ("for (int i = 0; i < 64; ++i) o[i] = 1", "off by"),
        "overrun": ("o[-1] = 1", "writes outside"),
    }
    with CpuLaboratory("cpu:native", "cpu", 1, Limits(check=4.0)) as lab:
        good = build(PROBLEM, tile=tile)
        for name, (body, message) in bodies.items():
            library = compiled(name, CANDIDATE.replace("BODY", body))
            with pytest.raises(CandidateError, match=message) as error:
                lab.check(JOB, tile, {"library": str(library), "symbol": "bad"})
            assert error.value.status == ("wrong" if name == "overrun" else name)
            lab.check(JOB, tile, {"library": str(good.library), "symbol": good.symbol})
        assert all(ms > 0 for ms in lab.time(JOB, tile, {"library": str(good.library), "symbol": good.symbol}))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize(
    "problem", [ChunkAttention(8, 2, 64, 64, 4, dtype="bfloat16"), ChunkSelect(2, 2, 64, 16, 4, dtype="float16")]
)
def test_candidates_of_half_precisions_are_measured(problem: Any, pass_name: str) -> None:
    tile = choice.default_tile(problem, pass_name, LEVEL)
    found = build(problem, pass_name, tile=tile)
    built = {"library": str(found.library), "symbol": found.symbol}
    with CpuLaboratory("cpu:native", "cpu", 1) as lab:
        for L in (1, 100):
            job = Job(problem, pass_name, "cpu:native", Workload(1, L, 8))
            lab.check(job, tile, built)
            assert all(ms > 0 for ms in lab.time(job, tile, built))


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str, str], Path]:
    import subprocess

    from hsa_compile.schedules.builder import compiler
    from hsa_compile.schedules.cpu import __file__ as schedules

    host = Path(schedules).parent / "host"

    def make(name: str, source: str) -> Path:
        (tmp_path / f"{name}.c").write_text(source)
        out = tmp_path / f"{name}.so"
        command = [
            *compiler("C"),
            "-shared",
            "-fPIC",
            f"-I{host}",
            str(tmp_path / f"{name}.c"),
            str(host / "execute.c"),
        ]
        subprocess.run([*command, "-o", str(out)], check=True)
        return out

    return make


@pytest.mark.slow
@pytest.mark.needs_compiler
@pytest.mark.parametrize(
    ("problem", "pass_name"),
    [
        (PROBLEM, "forward"),
        (PROBLEM, "backward"),
        (ChunkSelect(2, 1, 24, 8, 5, window=16), "forward"),
        (ChunkSelect(2, 2, 24, 8, 5), "forward"),
    ],
)
def test_tuning_ends_in_a_record_that_is_used(
    problem: Any, pass_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HSA_COMPILE_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("HSA_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HSA_COMPILE_SCHEDULE", "tuned")
    arguments = ["tune", "--problem", json.dumps(problem.to_dict()), "--pass", pass_name, "--budget", "60"]
    result = CliRunner().invoke(app, [*arguments, "--length", "64", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "GFLOP/s" in result.output
    assert (tmp_path / "out" / "tune.png").read_bytes().startswith(b"\x89PNG")
    found = choose(problem, pass_name, length=64)
    assert found.origin == "record"
    (journal,) = (tmp_path / "cache" / "tuning").glob("*.jsonl")
    trials = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert all(trial["status"] == "ok" for trial in trials), trials
    assert build(problem, pass_name, length=64).library.exists()


def test_a_record_says_on_which_selections_it_was_timed(tmp_path: Path) -> None:
    local, random = (
        tuning.jobs_for([PROBLEM], [1024], ["forward"], "cpu:native", selection=kind)[0] for kind in ("local", "random")
    )
    loads = [local.load, random.load]
    assert [load.selection for load in loads] == ["local", "random"]
    rows = [timing_case(PROBLEM, "forward", load, 0).inputs[3] for load in loads]
    kept = [float((x[:, 1:] == x[:, :-1]).mean()) for x in rows]
    assert kept[0] > 0.5 > kept[1]
    assert union_chunks(16, 8, 100, "random") > 1.5 * union_chunks(16, 8, 100, "local")
    record = record_of(search(tmp_path, FakeLaboratory(), job=random).run(2))
    assert record.measured.selection == "random"
