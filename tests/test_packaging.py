"""The package as it is installed: a wheel in an empty environment, every part importable, light without its extras."""

import importlib.util
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import hsa_compile
from export_kit import shared_bundle
from hsa_compile.export import Session

ROOT = Path(__file__).parent.parent
PARTS = ["hsa_compile", *(f"hsa_compile.{name}" for name in ("ir", "schedules", "model", "export", "bench", "serve"))]
MODULES = [
    "model.train",
    "export.session",
    "schedules.builder",
    "ops",
    "cli",
    "demo",
    "validate",
    "doctor",
    "kernels",
    "serve.server",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # From a copy: test processes side by side would build in the same folder.
    source = out / "source"
    others = shutil.ignore_patterns(".*", "build", "runs", "benchmarks", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=others)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but the wheel; third-party packages are borrowed through a .pth file."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=True, symlinks=True)
    found = directory / "bin" / "python"
    command = [str(found), "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", str(wheel)]
    subprocess.run(command, check=True)
    import numpy

    site = next((directory / "lib").glob("python3*/site-packages"))
    (site / "borrowed.pth").write_text(str(Path(numpy.__file__).parent.parent) + "\n")
    return found


def test_the_wheel_holds_one_namespace_and_the_sources_it_compiles(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hsa_compile", f"hsa_compile-{hsa_compile.__version__}.dist-info"}
    for name in (
        "py.typed",
        "schedules/host/kernel.h",
        "schedules/host/execute.c",
        "export/native/hsa_ops.cc",
        "export/native/ort_abi.h",
        "ir/programs/cpu/attention.py",
    ):
        assert f"hsa_compile/{name}" in names
    assert any(name.endswith("LICENSE") for name in names)


def test_every_part_imports_from_the_wheel(python: Path, tmp_path: Path) -> None:
    modules = PARTS + [f"hsa_compile.{name}" for name in MODULES]
    code = f"import importlib, sys\nfor m in {modules}: print(importlib.import_module(m).__file__)"
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = python.parent.parent.resolve()
    assert all(Path(line).resolve().is_relative_to(site) for line in done.stdout.splitlines())


def test_the_command_starts_without_torch_or_a_compiler(python: Path, tmp_path: Path) -> None:
    code = "import sys\nfor m in ('torch', 'tvm', 'tilelang', 'onnx'): sys.modules[m] = None\n"
    code += "from hsa_compile.cli import app\napp()"
    for arguments, expected in (
        (["--help"], "Stream text from a bundle"),
        (["train", "--help"], "Updates"),
        (["bench", "--help"], "kernels"),
        (["doctor"], "C compiler"),
    ):
        done = subprocess.run(
            [str(python), "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert expected in done.stdout, done.stderr
    done = subprocess.run([str(python), "-c", code, "train"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'hsa-compile[train]'" in done.stderr


def test_a_bundle_runs_with_numpy_and_onnxruntime_alone(
    wheel: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In an environment that holds the wheel, these two, and nothing else."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python3*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    for name in ("numpy", "onnxruntime"):
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        for part in Path(found.origin).parent.parent.glob(f"{name}*"):  # with the libraries beside them
            (site / part.name).symlink_to(part)
    bundle = shared_bundle(tmp_path_factory)
    code = (
        "import sys; from hsa_compile.export import Session; session = Session(sys.argv[1], fused=sys.argv[2] == '1')"
    )
    code += "; print(list(session.generate([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 8)))"
    for fused in (True, False):
        command = [str(tmp_path / "venv" / "bin" / "python"), "-I", "-c", code, str(bundle), str(int(fused))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == f"{list(Session(bundle).generate(range(1, 11), 8))}\n", done.stderr
