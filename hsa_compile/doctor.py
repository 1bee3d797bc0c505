"""What this installation can do, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Iterator
from typing import Literal

from rich.markup import escape
from rich.table import Table

from hsa_compile import __version__
from hsa_compile.model.config import preset
from hsa_compile.schedules import (
    BuildError,
    ScheduleError,
    TargetError,
    cache_directory,
    choose,
    gpu_target,
    resolve,
)
from hsa_compile.schedules.builder import compiler, cuda_compiler

# Package, what it is for, the extra that brings it (none: always installed).
PACKAGES = (
    ("numpy", "arrays", ""),
    ("onnxruntime", "running bundles", ""),
    ("torch", "training, eager models", "train"),
    ("safetensors", "checkpoints", "train"),
    ("matplotlib", "plots", "train"),
    ("onnx", "export", "export"),
    ("onnxscript", "export", "export"),
    ("apache-tvm", "CPU kernels", "compile"),
    ("pydantic", "tuning records", "compile"),
    ("tokenizers", "vocabularies other than bytes", "tokenizers"),
    ("starlette", "bundles over HTTP", "serve"),
    ("tilelang", "GPU kernels", "cuda"),
    ("triton", "GPU kernels without a build", "cuda"),
)


def report() -> tuple[Table, bool]:
    """The table, and whether all that a CPU needs is there (GPU parts are optional)."""
    table = Table(title=f"hsa-compile {__version__}, Python {platform.python_version()}")
    for name in ("what", "found", "for", "if it is missing"):
        table.add_column(name)
    complete = True
    for package, use, extra in PACKAGES:
        try:
            found = importlib.metadata.version(package)
            hint = ""
        except importlib.metadata.PackageNotFoundError:
            found, hint = "–", f"pip install 'hsa-compile[{extra}]'"
            complete &= extra in ("cuda", "tokenizers", "serve")
        table.add_row(package, found, use, escape(hint))
    compilers = _compiler("C", "CPU kernels"), _compiler("C++", "export with custom ops")
    for what, found, use, hint in (*compilers, _target(), _cache()):
        table.add_row(what, found or "–", use, "" if found else escape(hint))
        complete &= bool(found)
    for what, found, use, hint in (_cuda_compiler(), *_gpus(), _records(), *_gpu_records()):
        table.add_row(what, found or "–", use, "" if found else escape(hint))
    return table, complete


def _compiler(language: Literal["C", "C++"], use: str) -> tuple[str, str, str, str]:
    try:
        return f"{language} compiler", " ".join(compiler(language)), use, ""
    except BuildError as error:
        return f"{language} compiler", "", use, str(error)


def _cuda_compiler() -> tuple[str, str, str, str]:
    try:
        return "CUDA compiler", cuda_compiler(), "GPU kernels", ""
    except BuildError as error:
        return "CUDA compiler", "", "GPU kernels", str(error)


def _gpus() -> Iterator[tuple[str, str, str, str]]:
    """Every GPU with the target whose kernels it runs."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        target = gpu_target((major, minor))
        hint = f"compute capability {major}.{minor} has no compiled kernels; Triton programs need 8.0"
        name = torch.cuda.get_device_name(number)
        yield f"GPU {number}", f"{name}, {target.name}" if target else "", "GPU kernels", f"{name}: {hint}"


def _target() -> tuple[str, str, str, str]:
    try:
        target = resolve("cpu:native")
    except TargetError as error:
        return "cpu:native", "", "CPU kernels", str(error)
    return "cpu:native", f"{target.name}, {target.lanes} lanes, {os.cpu_count()} cores", "CPU kernels", ""


def _records() -> tuple[str, str, str, str]:
    """How many tuning records fit this machine, and what the tiny model's attention takes."""
    hint = "nothing was tuned on this machine, tiles are the hand-picked ones; hsa-compile tune makes records"
    try:
        from hsa_compile.schedules import records

        target = resolve("cpu:native")
        mine = [stored.record for stored in records.of_device(target)]
        choice = choose(preset("tiny").problems()[1])
    except (ModuleNotFoundError, TargetError, ScheduleError) as error:
        return "tuning records", "", "faster tiles", str(error)
    current = sum(records.current(record, target.name) for record in mine)
    stale = f", {len(mine) - current} stale" if len(mine) > current else ""
    found = f"{current} for this machine{stale}; tiny's attention: {choice.origin}, {choice.reason}" if mine else ""
    return "tuning records", found, "faster tiles", hint


def _gpu_records() -> Iterator[tuple[str, str, str, str]]:
    """How many tuning records fit the GPU, where there is one."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("pydantic") is None:
        return
    import torch

    from hsa_compile.schedules import records

    level = gpu_target(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if level is None:
        return
    mine = [stored.record for stored in records.of_device(level)]
    current = [record for record in mine if records.current(record, level.name)]
    kinds = ", ".join(f"{sum(one.backend == name for one in current)} of {name}" for name in ("tilelang", "triton"))
    stale = f", {len(mine) - len(current)} stale" if len(mine) > len(current) else ""
    found = f"{len(current)} for this GPU ({kinds}){stale}" if mine else ""
    hint = "nothing was tuned on this GPU, tiles are the hand-picked ones; hsa-compile tune --target cuda makes records"
    yield "GPU tuning records", found, "faster tiles", hint


def _cache() -> tuple[str, str, str, str]:
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return "kernel cache", str(directory), "kernels built once", ""
    except OSError as error:
        return "kernel cache", "", "kernels built once", f"{error}; set HSA_COMPILE_CACHE to a writable directory"
