"""The way through, as a user walks it, and what the command line says to mistakes."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hsa_compile import validate
from hsa_compile.bench import kernels
from hsa_compile.cli import app
from hsa_compile.model.checkpoint import read_config
from hsa_compile.model.config import preset

BENCH_KEYS = {
    "suite",
    "device",
    "date",
    "commit",
    "command",
    "versions",
    "seed",
    "metric",
    "runtime",
    "L",
    "batch",
    "value",
}


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    call("train", "--steps", 4, "--batch", 2, "--output", out)
    return out


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "bundle"
    call("export", checkpoint, "--output", out)
    return out


def test_train_leaves_checkpoint_metrics_and_plot(checkpoint: Path) -> None:
    assert {"config.json", "model.safetensors", "metrics.jsonl", "loss.png"} <= {p.name for p in checkpoint.iterdir()}
    assert (checkpoint / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.needs_compiler
def test_build_lists_what_it_built(checkpoint: Path) -> None:
    output = call("build", checkpoint).output
    assert output.count("chunk_attention") == 2
    assert output.count("chunk_select") == 2


@pytest.mark.needs_compiler
def test_run_streams_the_same_text_with_and_without_kernels(bundle: Path) -> None:
    fused, plain = (
        call("run", bundle, "--prompt", "In the beginning", "-n", 20, flag).output for flag in ("--fused", "--no-fused")
    )
    assert fused == plain
    assert fused.startswith("In the beginning")
    assert len(fused) > len("In the beginning") + 5


@pytest.mark.needs_compiler
def test_validate_passes_and_saves_its_table(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    output = call("validate", checkpoint, bundle, "--output", tmp_path / "parity.jsonl").output
    rows = [json.loads(line) for line in (tmp_path / "parity.jsonl").read_text().splitlines()]
    assert {row["leg"] for row in rows} == {"eager", "compiled", "ort-fused", "ort-function"}
    for row in rows:
        assert row["passed"]
        assert row["max_error"] <= row["tolerance"]
        assert row["rms_error"] <= row["rms_tolerance"]
    assert f"{validate.GENERATED_TOKENS}/{validate.GENERATED_TOKENS}" in output
    assert "FAILED" not in output


@pytest.mark.needs_compiler
def test_validate_notices_a_bundle_of_another_model(bundle: Path, tmp_path: Path) -> None:
    call("train", "--steps", 1, "--batch", 2, "--seed", 7, "--output", tmp_path)
    result = call("validate", tmp_path, bundle, code=1)
    assert "FAILED" in result.output
    assert "comparisons failed" in result.output


@pytest.mark.needs_compiler
def test_bench_e2e_saves_json_and_picture(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    call("bench", "e2e", bundle, "--checkpoint", checkpoint, "--lengths", "1K", "--seconds", 4, "--output", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "e2e.jsonl").read_text().splitlines()]
    assert {row["runtime"] for row in rows} == {"eager", "compiled", "ort-cpu", "ort-dense"}
    assert {row["metric"] for row in rows} == {"prefill_tokens_per_s", "ttft_ms", "decode_ms", "peak_gib"}
    assert all(set(row) >= BENCH_KEYS and row["value"] > 0 for row in rows)
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")
    assert "no checkpoint in" in call("bench", "e2e", bundle, "--checkpoint", tmp_path, code=1).output


@pytest.mark.needs_compiler
def test_bench_kernels_checks_before_it_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [kernels.Shape(256, 8, 2, 64, 4, selection=kind) for kind in ("local", "random")]
    monkeypatch.setattr(kernels, "default_shapes", lambda lengths: shapes)
    output = call("bench", "kernels", "--length", 256, "--output", tmp_path).output
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    ours = [row for row in rows if row["impl"] == "ours" and row["op"] == "attention" and row["pass"] == "forward"]
    assert {row["selection"] for row in ours} == {"local", "random"}
    assert all(row["error"] <= row["tolerance"] and row["ms_min"] <= row["ms"] <= row["ms_max"] for row in ours)
    assert "GFLOP/s" in output


def test_rows_that_fit_a_model_are_trained_where_another_does_not(tmp_path: Path) -> None:
    tiny = preset("tiny")
    assert tiny.window < tiny.chunk_size  # what "window left out" refuses
    for name in ("hsa", "no encoder"):
        call("train", "--variant", name, "--steps", 1, "--batch", 2, "--output", tmp_path / name)
    assert read_config(tmp_path / "hsa")[0] == tiny
    assert read_config(tmp_path / "no encoder")[0].encoder == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--preset", "huge"), "unknown preset 'huge'; known: tiny"),
        (("train", "--data", "/nowhere"), "no such file or directory: /nowhere"),
        (("train", "--steps", 0), "steps must be at least 1, got 0"),
        (("train", "--variant", "no brain"), "unknown variant 'no brain'; known: hsa, no encoder"),
        (("train", "--variant", "window left out"), "variant 'window left out' does not fit this model: leave_window"),
        (("build", "tiny", "--target", "gpu:x"), "unknown target 'gpu:x'; known: cpu:native"),
        (("export", "/nowhere"), "/nowhere"),
        (("run", "/nowhere", "--prompt", "x"), "is not a bundle"),
        (("validate", "/nowhere", "/nowhere"), "/nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    output = () if arguments[0] in ("build", "run", "validate") else ("--output", tmp_path / "out")
    result = call(*arguments, *output, code=1)
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.needs_compiler
def test_mistakes_with_a_bundle_are_told_in_a_line(bundle: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in call("run", bundle, "--prompt", "", code=1).output
    assert "top_p" in call("run", bundle, "--prompt", "x", "--top-p", 2, code=1).output
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:-1])
    assert "its SHA-256 differs" in call("run", copy, "--prompt", "x", code=1).output


def test_an_empty_data_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    result = call("train", "--data", tmp_path / "empty.txt", "--output", tmp_path / "out", code=1)
    assert "0 bytes of text" in result.output
    assert not (tmp_path / "out").exists()


def test_doctor_lists_what_is_there() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert "onnxruntime" in result.output
    assert "cpu:native" in result.output
