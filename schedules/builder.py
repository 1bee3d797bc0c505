"""Builds kernels: a worker process lowers the program and links it; the result lies in a cache named by its content.

Nothing in this process imports a compiler. What a kernel is (problem, pass, tile sizes, target, sources) is hashed into
its name; which compilers made it stands beside it. A library of other sources can't be found, one of another compiler
than is installed, or a damaged one, is built anew; where no compiler is installed, any compiler's serves.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import platformdirs

import hsa_compile
from hsa_compile.ir import AnyProblem, any_problem_from_dict
from hsa_compile.schedules.choice import COMPILED_DTYPES, Backend, Tile, choose
from hsa_compile.schedules.target import resolve_any
from hsa_compile.schedules.worker import Worker, WorkerError

log = logging.getLogger("hsa_compile")

PASSES = ("forward", "backward")
MANIFEST = "manifest.json"
NOT_INSTALLED = "not installed"
WORKER_SECONDS = 600


class BuildError(RuntimeError):
    """A kernel could not be built; the message says why and what to do."""


@dataclass(frozen=True)
class Artifact:
    """A built kernel.

    Args:
        directory: of the manifest and the files.
        problem: the operator it computes.
        pass_name: "forward" or "backward".
        target: name of the CPU level or GPU architecture it runs on.
        symbol: C name of its ``const hsa_kernel`` or ``const hsa_cuda_kernel``.
    """

    directory: Path
    problem: AnyProblem
    pass_name: str
    target: str
    symbol: str

    @property
    def library(self) -> Path:
        """Shared library with the kernel (and ``hsa_execute`` on a CPU), for a process that loads it."""
        return self.directory / "kernel.so"

    @property
    def objects(self) -> list[Path]:
        """Relocatable objects of the kernel alone, to link into another library (with CUDA's runtime, for GPUs)."""
        return sorted(self.directory.glob("*.o"))


def cache_directory() -> Path:
    """``$HSA_COMPILE_CACHE``, or the user's cache directory."""
    override = os.environ.get("HSA_COMPILE_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("hsa-compile"))


def compiler(language: Literal["C", "C++"]) -> list[str]:
    """The compiler's command: ``$CC`` or ``$CXX``, else the first that is installed.

    Raises:
        BuildError: there is none.
    """
    variable, package, names = {
        "C": ("CC", "gcc", ("cc", "gcc", "clang")),
        "C++": ("CXX", "g++", ("c++", "g++", "clang++")),
    }[language]
    if os.environ.get(variable):
        return shlex.split(os.environ[variable])
    for name in names:
        if path := shutil.which(name):
            return [path]
    raise BuildError(
        f"no {language} compiler found (looked for {', '.join(names)}); "
        f"install one (Debian: apt install {package}) or point the {variable} variable at it"
    )


def cuda_compiler() -> str:
    """Path of nvcc: ``$NVCC``, on the path, or of ``$CUDA_HOME``.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc"):
        if candidate and (path := shutil.which(candidate)):
            return path
    raise BuildError(
        "no CUDA compiler found (looked for nvcc on the path and in $CUDA_HOME/bin); install the CUDA toolkit, version "
        "12.4 or newer, or point the NVCC variable at its nvcc. Without one, GPUs run the Triton programs"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler_versions(target: str, backend: str = "") -> dict[str, str]:
    """Versions of what decides how fast a target's code is, by package; ``backend`` is "triton" or one that is compiled
    ahead."""
    if backend == "triton":
        return {"triton": _version("triton") or NOT_INSTALLED}
    if target.startswith("cuda:"):
        return {"tilelang": gpu_compiler_version() or NOT_INSTALLED}
    return {"apache-tvm": compiler_version() or NOT_INSTALLED}


def compiler_version() -> str | None:
    """Version of Apache TVM, which compiles for CPUs, or None where it is not installed."""
    return _version("apache-tvm")


def gpu_compiler_version() -> str | None:
    """Version of TileLang, which compiles for GPUs, or None where it is not installed."""
    return _version("tilelang")


@functools.cache
def _sources_digest() -> str:
    """Hash of all that turns a problem into code, so that a changed program is never served from the cache."""
    import hsa_compile.ir
    import hsa_compile.schedules

    digest = hashlib.sha256()
    for package in (hsa_compile.ir, hsa_compile.schedules):
        root = Path(str(package.__file__)).parent
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c", ".h")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_request(
    problem: AnyProblem, pass_name: str, target: str, tile: Tile | None = None, length: int | None = None
) -> dict[str, object]:
    """All that a build depends on; ``tile`` and ``length`` as in ``build``.

    Raises:
        BuildError: the target has no kernels of this dtype.
        ScheduleError: ``$HSA_COMPILE_SCHEDULE`` makes no sense.
        TargetError: the target is unknown.
    """
    if target.startswith("cuda:") and problem.dtype not in COMPILED_DTYPES:
        raise BuildError(f"GPU kernels are {' or '.join(COMPILED_DTYPES)}; {problem.dtype} runs on the Triton path")
    if pass_name not in PASSES:
        raise ValueError(f"pass must be one of {PASSES}, got {pass_name!r}")
    level = resolve_any(target)
    backend: Backend = "tilelang" if target.startswith("cuda:") else "tvm"
    return {
        "problem": problem.to_dict(),
        "pass": pass_name,
        "target": level.name,
        "tile": dataclasses.asdict(tile or choose(problem, pass_name, level.name, length, backend).tile),
        "sources": _sources_digest(),
        "versions": {"hsa-compile": hsa_compile.__version__, **compiler_versions(level.name)},
    }


def require_compilers(target: str) -> None:
    """Raises BuildError where a target's compilers are not installed."""
    if target.startswith("cuda:"):
        if gpu_compiler_version() is None:
            raise BuildError("TileLang is not installed; install it with: pip install 'hsa-compile[cuda]'")
        cuda_compiler()
        return
    if compiler_version() is None:
        raise BuildError("Apache TVM is not installed; install it with: pip install 'hsa-compile[compile]'")
    compiler("C")


def build(
    problem: AnyProblem,
    pass_name: str = "forward",
    target: str = "cpu:native",
    tile: Tile | None = None,
    length: int | None = None,
) -> Artifact:
    """Returns the kernel of a problem's pass, from the cache or newly built (a few seconds on a CPU, tens for a GPU).

    Safe to call from several threads and processes: the first builds, the others wait.

    Args:
        tile: sizes to build with. Default: those of the machine's tuning record, else the hand-picked ones.
        length: tokens of the segments that the kernel is for, which picks among records; see ``choose``.

    Raises:
        BuildError: a dtype that is not compiled for the target, no compiler, a cache directory that can't be
            written, or a failed compilation.
        ScheduleError: ``$HSA_COMPILE_SCHEDULE`` makes no sense.
        TargetError: the target is unknown.
    """
    request = build_request(problem, pass_name, target, tile, length)
    directory = _directory(request)
    artifact = _load(directory, request)
    if artifact:
        return artifact
    require_compilers(target)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory.with_suffix(".lock")):
            return _load(directory, request) or _build_into(directory, request)
    except OSError as error:
        raise BuildError(
            f"cannot write to the kernel cache {directory.parent}: {error}; "
            "make it writable or set HSA_COMPILE_CACHE to a directory that is"
        ) from error


def find(
    problem: AnyProblem, pass_name: str, target: str, tile: Tile | None = None, length: int | None = None
) -> Artifact | None:
    """The kernel that ``build`` would return, if it is built already; nothing is compiled.

    Raises:
        BuildError, ScheduleError, TargetError: as ``build``, of what it is asked for.
    """
    request = build_request(problem, pass_name, target, tile, length)
    return _load(_directory(request), request)


def _directory(request: dict[str, object]) -> Path:
    """Where a kernel lies: whichever compilers made it, so that a machine without any finds it."""
    what = {name: value for name, value in request.items() if name != "versions"}
    return cache_directory() / "kernels" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _load(directory: Path, request: dict[str, object]) -> Artifact | None:
    """The artifact in a directory, or None if there is none that is whole and made by the compilers installed here."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} has changed since it was built")
        made = manifest["request"]
        for name, version in request["versions"].items():  # type: ignore[attr-defined]
            if version not in (NOT_INSTALLED, made["versions"][name]):
                log.info("building anew what %s %s made: %s is installed", name, made["versions"][name], version)
                return None
        problem = any_problem_from_dict(made["problem"])
        return Artifact(directory, problem, made["pass"], made["target"], manifest["symbol"])
    except (FileNotFoundError, NotADirectoryError):
        if directory.is_dir():
            log.warning("cached kernel %s is incomplete; building it anew", directory.name)
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("cached kernel %s is damaged (%s); building it anew", directory.name, error)
        return None


def _build_into(directory: Path, request: dict[str, object]) -> Artifact:
    problem, pass_name = request["problem"], request["pass"]
    log.info("building %s %s", problem["op"], pass_name)  # type: ignore[index]
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=directory.name + ".") as temporary:
        building = Path(temporary) / "kernel"
        building.mkdir()
        symbol = _run_worker(request, building)
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(building.iterdir())}
        manifest = {"request": request, "symbol": symbol, "files": files}
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(building, directory)
    artifact = _load(directory, request)
    if artifact is None:
        raise BuildError(f"the kernel built in {directory} does not verify; is the disk full?")
    return artifact


def compiler_module(target: str) -> str:
    """Module of the worker process that compiles for a target."""
    return f"hsa_compile.schedules.{'cuda' if target.startswith('cuda:') else 'cpu'}_worker"


def _run_worker(request: dict[str, object], directory: Path) -> str:
    """Runs the compiler in a process of its own: two TVMs (TileLang brings one) can't share one, nor should a crash."""
    with Worker(compiler_module(str(request["target"]))) as worker:
        try:
            return str(worker.ask({"directory": str(directory), "request": request}, WORKER_SECONDS)["symbol"])
        except WorkerError as error:
            what = f"{request['problem']} ({request['pass']})"
            if error.kind == "hang":
                raise BuildError(f"compiling {what} took over {WORKER_SECONDS} s and was stopped") from None
            raise BuildError(f"compiling {what} failed:\n{worker.errors()[-1500:]}\n{error}") from None
