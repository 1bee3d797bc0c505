"""A bundle from export to generation: the session against the eager model, by kernels and by function bodies."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export_kit import CONFIG, FUSED, naive_kernel, shared_bundle
from hsa_compile.dispatch import use_backend
from hsa_compile.export import bundle as bundles
from hsa_compile.export.binding import StepError
from hsa_compile.export.bundle import BundleError, Manifest
from hsa_compile.export.library import LibraryError, build_library
from hsa_compile.export.package import export_bundle
from hsa_compile.export.sampling import GenerationError, Sampler
from hsa_compile.export.session import Session
from hsa_compile.export.state import CapacityError
from hsa_compile.export.strict import seal
from hsa_compile.model.model import HsaModel
from hsa_compile.schedules import build
from kit import lively

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> HsaModel:
    return lively(HsaModel(CONFIG))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def compiled(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a library of compiled kernels in place of the naive ones."""
    directory = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("compiled") / "tiny"))
    kernels = [build(problem) for problem in CONFIG.problems()]
    path = build_library(kernels, directory / "libhsa_ops.so")
    files = json.loads((directory / "bundle.json").read_text())["files"]
    edit(directory, files=files | {path.name: bundles.file_digest(path)})
    return directory


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


def eager_logits(model: HsaModel, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad(), use_backend("eager"):
        result: np.ndarray[Any, Any] = model(torch.from_numpy(ids)).numpy()
    return result


@FUSED
@pytest.mark.parametrize(
    ("batch", "parts"), [(1, [61]), (2, [61]), (1, [1] * 14), (3, [4, 8, 49]), (1, [1, 1, 3, 20, 2, 1, 32, 1])], ids=str
)
def test_any_split_gives_the_logits_of_one_pass(
    model: HsaModel, bundle: Path, batch: int, parts: list[int], fused: bool
) -> None:
    ids = tokens(batch, sum(parts))
    session = Session(bundle, batch, fused=fused, threads=2, reserve=0)
    ends = np.cumsum(parts)
    logits = [session.step(ids[:, end - part : end]) for part, end in zip(parts, ends)]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), eager_logits(model, ids), atol=TOLERANCE, rtol=1e-5)
    assert session.position == sum(parts)


@FUSED
def test_prefill_by_segments(model: HsaModel, bundle: Path, fused: bool) -> None:
    ids = tokens(1, 45)
    expected = eager_logits(model, ids)[:, -1]
    session = Session(bundle, fused=fused, threads=1, reserve=0)
    for segment in (1, 4, 7, 16, 45, None):
        session.reset()
        np.testing.assert_allclose(session.prefill(ids, segment=segment), expected, atol=TOLERANCE, rtol=1e-5)


@FUSED
def test_greedy_generation_is_the_models(model: HsaModel, bundle: Path, fused: bool) -> None:
    prompt = tokens(1, 30, seed=3)
    expected: list[int] = []
    with use_backend("eager"):
        logits, state = model.step(torch.from_numpy(prompt), model.start())
        for _ in range(25):
            expected.append(int(logits[0, -1].argmax()))
            logits, state = model.step(torch.tensor([[expected[-1]]]), state)
    session = Session(bundle, fused=fused)
    assert list(session.generate(prompt[0], 25)) == expected
    session.reset()
    first = list(session.generate(prompt[0], 10))  # and the text can be continued with what was not read
    assert first + list(session.generate([first[-1]], 15)) == expected


@pytest.mark.needs_compiler
def test_compiled_kernels_give_the_same(model: HsaModel, compiled: Path) -> None:
    ids = tokens(2, 200)
    session = Session(compiled, batch=2, threads=2)
    ends = [67, 134, 190, *range(191, 201)]
    logits = [session.step(ids[:, start:end]) for start, end in zip([0, *ends], ends)]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), eager_logits(model, ids), atol=TOLERANCE, rtol=1e-5)


def test_sampling_repeats_by_seed(bundle: Path) -> None:
    session = Session(bundle)
    texts = []
    for seed in (1, 1, 2):
        session.reset()
        texts.append(list(session.generate([1, 2, 3], 12, temperature=2.0, top_p=0.9, seed=seed)))
    assert texts[0] == texts[1] != texts[2]
    session.reset()
    stopped = list(session.generate([1, 2, 3], 12, temperature=2.0, top_p=0.9, seed=1, stop_ids=[texts[0][4]]))
    assert stopped == texts[0][: texts[0].index(texts[0][4])]


def test_reading_a_prompt_prepares_no_decoding(bundle: Path) -> None:
    """On a GPU each preparation is a CUDA graph, which ONNX Runtime keeps: a server reads prompts in forks."""
    session = Session(bundle).fork()
    prompt = tokens(1, 5)[0]
    want = session.prefill(prompt, segment=4)  # the last of one token
    assert not session._decoder._bound
    session.reset()
    np.testing.assert_allclose(session.step(prompt)[:, -1], want, atol=TOLERANCE)


def test_samplers_refuse_what_is_out_of_range() -> None:
    bad: Any
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampler(**bad)


@FUSED
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_rows_equal_one_pass(model: HsaModel, bundle: Path, fused: bool, data: st.DataObject) -> None:
    """Rows that take any numbers of tokens, are forgotten and copied, give what each text gives alone."""
    texts, B = tokens(3, 60), 3
    whole = eager_logits(model, texts)
    session = _ragged(bundle, fused)
    session.reset()
    at, text = [0] * B, list(range(B))
    for taken in data.draw(st.lists(st.tuples(*[st.integers(0, 9)] * B).filter(any), min_size=1, max_size=6)):
        lengths = [min(n, 60 - p) for n, p in zip(taken, at)]
        ids = np.zeros((B, max(1, *lengths)), np.int64)
        for b, n in enumerate(lengths):
            ids[b, :n] = texts[text[b], at[b] : at[b] + n]
        logits = session.step(ids, lengths)
        for b, n in enumerate(lengths):
            wanted = whole[text[b], at[b] : at[b] + n]
            np.testing.assert_allclose(logits[b, :n], wanted, atol=1e-4, rtol=1e-4)
            at[b] += n
        match data.draw(st.sampled_from(["go on", "reset", "copy"])):
            case "reset":
                session.reset(1)
                at[1], text[1] = 0, 2
            case "copy":
                session.copy_row(session, 2, to=0)
                at[0], text[0] = at[2], text[2]
        assert session.positions.tolist() == at


@functools.cache
def _ragged(bundle: Path, fused: bool) -> Session:
    return Session(bundle, batch=3, fused=fused, threads=1, reserve=0)


@FUSED
@pytest.mark.parametrize("segment", [1, 5, 16, None])
def test_short_prefill_gives_the_same(model: HsaModel, bundle: Path, fused: bool, segment: int | None) -> None:
    texts, lengths = tokens(3, 50, seed=5), [50, 9, 31]
    whole = eager_logits(model, texts)
    session = _ragged(bundle, fused)
    for prefill in (session.prefill, session.short_prefill):
        session.reset()
        logits = prefill(texts, lengths=lengths, segment=segment)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(logits[b], whole[b, n - 1], atol=TOLERANCE, rtol=1e-5)
        following = np.stack([texts[b, n : n + 1] if n < 50 else [0] for b, n in enumerate(lengths)])
        logits = session.step(following, [0, 1, 1])[:, 0]
        for b, n in ((1, 9), (2, 31)):
            np.testing.assert_allclose(logits[b], whole[b, n], atol=TOLERANCE, rtol=1e-5)


@FUSED
def test_a_batch_generates_what_each_text_does_alone(bundle: Path, fused: bool) -> None:
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (13, 2, 30)]
    alone, together = Session(bundle, fused=fused), _ragged(bundle, fused)
    for options in ({}, {"temperature": 1.5, "top_p": 0.9}):
        texts = []
        for b, prompt in enumerate(prompts):
            alone.reset()
            texts.append(list(alone.generate(prompt, 9, seed=b, **options)))  # type: ignore[arg-type]
        together.reset()
        rows = list(together.generate_batch(prompts, 9, **options))  # type: ignore[arg-type]
        assert [list(text) for text in zip(*rows)] == texts
        stop = texts[0][4]
        together.reset()
        rows = list(together.generate_batch(prompts, 9, stop_ids=[stop], **options))  # type: ignore[arg-type]
        for text, got in zip(texts, zip(*rows)):
            n = text.index(stop) if stop in text else 9
            assert list(got) == (text[:n] + [-1] * 9)[: len(got)]
    with pytest.raises(ValueError, match="3, one a row"):
        together.generate_batch(prompts[:2], 3)
    with pytest.raises(ValueError, match="generate_batch"):
        together.generate(prompts[0], 3)


def test_rows_move_between_sessions(model: HsaModel, bundle: Path) -> None:
    """As continuous batching does: a prompt is read by itself, then its row joins the others."""
    text = tokens(1, 50, seed=4)
    session = Session(bundle, batch=2, threads=1, reserve=0)
    session.step(tokens(2, 3), [3, 1])
    reader = session.fork()
    reader.prefill(text[:, :37])
    session.copy_row(reader, 0, to=1)
    reader.reset()
    assert session.positions.tolist() == [3, 37]
    got = session.step(np.repeat(text[:, 37:], 2, axis=0), [0, 13])[1]
    np.testing.assert_allclose(got, eager_logits(model, text)[0, 37:], atol=TOLERANCE, rtol=1e-5)
    for arguments, message in (((reader, 1, 0), "rows 0 … 0, not 1"), ((reader, 0, 2), "rows 0 … 1, not 2")):
        with pytest.raises(ValueError, match=message):
            session.copy_row(*arguments)
    with pytest.raises(ValueError, match="not 7"):
        session.reset(7)


def test_memory_is_written_in_place_and_grows(bundle: Path) -> None:
    session = Session(bundle, reserve=40)
    ids = tokens(1, 60)

    def addresses() -> dict[str, int]:
        return {name: buffer.pointer for name, buffer in session.state.buffers.items()}

    at_first = addresses()
    assert all(address % 64 == 0 for address in at_first.values())
    session.step(ids[:, :11])
    session.step(ids[:, 11:40])
    assert addresses() == at_first
    landmark = session.state.buffers["landmark"].host.copy()
    assert (np.abs(landmark).sum((0, 2, 3)) > 0).all()
    session.step(ids[:, 40:])
    assert session.state.capacity == 20
    np.testing.assert_array_equal(session.state.buffers["landmark"].host[:, :10], landmark)
    assert {name for name, address in addresses().items() if address != at_first[name]} == {
        "mem_k",
        "mem_v",
        "landmark",
    }


def test_a_session_has_a_limit(model: HsaModel, bundle: Path) -> None:
    session, ids = Session(bundle, limit=20, threads=1), tokens(1, 21)
    assert session.state.capacity == 5
    session.prefill(ids[:, :18])
    for too_much in (session.step, session.prefill):
        with pytest.raises(CapacityError, match="21 tokens, and the session was opened for 20"):
            too_much(ids[:, 18:])
    np.testing.assert_allclose(session.step(ids[:, 18:20]), eager_logits(model, ids)[:, 18:20], atol=TOLERANCE)
    with pytest.raises(CapacityError):
        list(session.generate([1], 1))
    longer = Session(bundle, threads=1)
    longer.prefill(ids)
    with pytest.raises(CapacityError, match="21 tokens, of at most 20"):
        session.copy_row(longer, 0, 0)


def test_a_failed_run_leaves_an_empty_session(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(bundle, threads=1)
    session.step([1, 2, 3, 4, 5])
    with monkeypatch.context() as broken:
        broken.setattr(session.state, "make_room", lambda *_: None)
        with pytest.raises(StepError, match="forgot its texts"):
            session.step(np.zeros((1, 5000), np.int64))
    assert session.position == 0
    np.testing.assert_array_equal(session.step([1, 2]), Session(bundle, threads=1).step([1, 2]))


def test_options_are_checked(bundle: Path) -> None:
    wrong: Any
    for wrong, message in (
        ({"threads": 0}, "threads"), ({"reserve": -1}, "reserve"), ({"limit": 0}, "limit"), ({"batch": 0}, "batch"),
        ({"provider": "tpu"}, "provider must be auto, cpu or cuda"), ({"host_memory": True}, 'for provider="cuda"'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Session(bundle, **wrong)
    with pytest.raises(BundleError, match="no CUDA provider"):
        Session(bundle, provider="cuda")
    session = Session(bundle)
    assert "CPUExecutionProvider, float32" in session.describe()
    assert "chunk_select, float32 for cpu:" in session.describe()
    assert "function bodies" in Session(bundle, fused=False).describe()
    for wrong in ([3], [-1, 0], [0.5], [[1]]):
        with pytest.raises(ValueError, match="1 integers from 0 to 2"):
            session.step([1, 2], wrong)


def test_a_refused_step_changes_nothing(model: HsaModel, bundle: Path) -> None:
    ids = tokens(1, 20)
    session = Session(bundle)
    session.step(ids[:, :9])
    bad: Any
    for bad, message in (
        ([50], "0 … 49, found 50"),
        ([3, -1], "0 … 49, found -1"),
        ([], "no tokens"),
        ([0.5], "integers"),
        ([[1], [2]], "batch=1"),
    ):
        with pytest.raises(ValueError, match=message):
            session.step(bad)
        with pytest.raises(ValueError, match=message):
            session.generate(bad, 3)  # at the call, not at the first token
    with pytest.raises(ValueError, match="segment"):
        session.prefill([1], segment=0)
    np.testing.assert_allclose(session.step(ids[:, 9:]), eager_logits(model, ids)[:, 9:], atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "libhsa_ops.so"])
def test_changed_and_missing_files_are_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}.*not the file that was exported"):
        Session(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        Session(copy)


def edit(directory: Path, **changed: Any) -> None:
    path = directory / "bundle.json"
    data = json.loads(path.read_text()) | changed
    path.write_text(json.dumps(data | {"sha256": seal(data)}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "other"}, "does not describe an hsa-compile bundle"),
        ({"format_version": 99}, "format version 99"),
        ({"state": None}, "damaged"),
        ({"model": {"vocab_size": 50}}, "damaged"),
        ({"files": {}}, "no model.onnx"),
        ({"files": {"../model.onnx": "0" * 64}}, "'../model.onnx' is not a plain file name"),
        ({"targets": ["cpu:plan9"]}, "another kind of machine: unknown target 'cpu:plan9'.*fused=False"),
    ],
)
def test_foreign_descriptions_are_refused(copy: Path, changed: dict[str, Any], message: str) -> None:
    edit(copy, **changed)
    with pytest.raises(BundleError, match=message):
        Session(copy)


def test_graphs_of_another_model_are_refused(copy: Path) -> None:
    data = json.loads((copy / "bundle.json").read_text())
    state = data["state"]
    wide = [spec | {"shape": [*spec["shape"][:-1], 2 * spec["shape"][-1]]} for spec in state[1:]]
    for changed in ({"state": [state[0], *wide]}, {"state": state[:-1]}, {"model": data["model"] | {"vocab_size": 51}}):
        edit(copy, **(data | changed))
        with pytest.raises(BundleError, match=r"model\.onnx is not the graph that bundle\.json describes"):
            Session(copy)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        Session(tmp_path)
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        Session(tmp_path)


@FUSED
def test_weights_that_are_no_numbers(copy: Path, fused: bool) -> None:
    path = copy / "model.onnx.data"
    path.write_bytes(b"\xff" * path.stat().st_size)
    files = json.loads((copy / "bundle.json").read_text())["files"]
    edit(copy, files=files | {path.name: bundles.file_digest(path)})
    session = Session(copy, fused=fused)
    for options in ({}, {"temperature": 1.0}):
        session.reset()
        with pytest.raises(GenerationError, match="NaN or infinite: its weights are damaged"):
            list(session.generate([1, 2, 3], 5, **options))


def test_missing_cpu_features_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = json.loads((copy / "bundle.json").read_text())["targets"][0]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("hsa_compile.schedules.target.machine_features", lambda: frozenset({"ssse3"}))
        with pytest.raises(BundleError, match=f"is for {target} and needs .*fused=False"):
            Session(copy)
        assert Session(copy, fused=False).step([1]).shape == (1, 1, 50)
    Session(copy)


def test_old_runtime_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.24.4")
    with pytest.raises(BundleError, match=r"ONNX Runtime 1.25 or later, this is 1.24.4"):
        Session(bundle)


def test_bundle_without_library_runs_by_its_functions(copy: Path) -> None:
    files = json.loads((copy / "bundle.json").read_text())["files"]
    files.pop("libhsa_ops.so")
    edit(copy, files=files, targets=[], kernels=[])
    (copy / "libhsa_ops.so").unlink()
    with pytest.raises(BundleError, match=r"no libhsa_ops.so; open it with fused=False"):
        Session(copy)
    assert Session(copy, fused=False).step([1]).shape == (1, 1, 50)


def test_graph_is_clean(bundle: Path) -> None:
    proto = onnx.load(bundle / "model.onnx", load_external_data=False)
    fused = {"AddNorm", "RmsNorm", "RotaryHeads", "SwiGlu", "TakeRows"}
    assert {f.name for f in proto.functions} == {"ChunkSelect", "ChunkAttention", "SlidingWindow", "Sample", *fused}
    # Nothing is left of what they are composed of.
    assert not {node.op_type for node in proto.graph.node} & {
        "RMSNormalization",
        "RotaryEmbedding",
        "Sigmoid",
        "Gather",
    }
    assert fused <= {node.op_type for node in proto.graph.node}
    on_the_host = {"Shape", "Size", "Range", "Expand", "If", "Loop", "GatherND"}
    assert not {node.op_type for node in proto.graph.node} & on_the_host
    assert {o.domain: o.version for o in proto.opset_import} == {"": 24, "hsa": 1}
    assert not any("Einsum" in node.op_type for f in proto.functions for node in f.node)
    text = (bundle / "model.onnx").read_bytes()
    for trace in (b".py", b"/home", b"site-packages", str(Path.cwd()).encode()):
        assert trace not in text
    names = [i.name for i in proto.graph.input]
    state = Manifest.from_json((bundle / "bundle.json").read_text()).state
    segment = ["input_ids", "lengths", "rows", "tokens", "upper", "logits_at", "completing"]
    segment += ["temperature", "top_p", "uniform"]
    assert names == [*segment, *(f"past.{s.name}" for s in state)]
    assert [o.name for o in proto.graph.output] == ["logits", "token", *(f"present.{s.name}" for s in state)]
    readers = [name for node in proto.graph.node for name in node.input if name.startswith("past.")]
    assert sorted(readers) == sorted(f"past.{s.name}" for s in state)  # so that they can be written in place


def test_export_refuses_what_it_cannot_do(model: HsaModel, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="not a bundle"):
        export_bundle(model, tmp_path)
    with pytest.raises(LibraryError, match="none for ChunkAttention"):
        export_bundle(model, tmp_path / "b", [naive_kernel(CONFIG.problems()[0], tmp_path)])
    with pytest.raises(ValueError, match=r"not torch\.float64 on cpu"):
        export_bundle(HsaModel(CONFIG).double(), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
