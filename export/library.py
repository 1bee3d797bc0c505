"""Builds ``libhsa_ops.so``: compiled kernels, the threads' driver and the ONNX Runtime operators, in one library."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

from hsa_compile.ir import AnyProblem, ChunkSelect
from hsa_compile.schedules.builder import compiler

_STATICS = {
    "chunk_select": ("kv_heads", "retrieval_heads", "retrieval_dim", "chunk_size", "top_k", "window"),
    "chunk_attention": ("q_heads", "kv_heads", "head_dim", "chunk_size", "top_k", "off_by_one"),
}
_C_FLAGS = ["-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
_CXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
# The runtime is linked in, so that the library depends on libc alone.
_LINK_FLAGS = ["-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--no-undefined", "-pthread", "-lm"]
# One name is visible: nothing of the linked-in runtime or of the kernels meets those of the process.
_VISIBLE = "{ global: RegisterCustomOps; local: *; };\n"


class KernelObjects(Protocol):
    """A compiled forward kernel, such as ``hsa_compile.schedules.Artifact``: the object files that hold it, the C
    symbol of its ``hsa_kernel`` and the name of the CPU level that it runs on."""

    @property
    def problem(self) -> AnyProblem: ...
    @property
    def objects(self) -> Sequence[Path]: ...
    @property
    def symbol(self) -> str: ...
    @property
    def target(self) -> str: ...


class LibraryError(RuntimeError):
    """The operator library could not be built; the message says what is missing or what the compiler said."""


def build_library(kernels: Sequence[KernelObjects], destination: Path) -> Path:
    """Links the kernels into an ONNX Runtime operator library.

    Args:
        kernels: forward kernels in float32, one a problem.
        destination: path of the library; it appears whole or not at all.

    Returns:
        ``destination``.

    Raises:
        LibraryError: a kernel is not float32, two serve one problem, or linking fails.
        BuildError: there is no C or C++ compiler.
    """
    destination = Path(destination)
    table = kernel_table(kernels)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".hsa_ops-") as scratch:
        built = _compile(Path(scratch), table, [path for kernel in kernels for path in kernel.objects])
        os.replace(built, destination)
    return destination


def kernel_table(kernels: Sequence[KernelObjects]) -> str:
    """C source of the table that tells the library which kernel serves which problem; see ``native/library.h``.

    Raises:
        LibraryError: there is no kernel, one is not float32, or two serve one problem.
    """
    if not kernels:
        raise LibraryError("no kernels given: without any, run the model without the library")
    seen: set[AnyProblem] = set()
    for kernel in kernels:
        if kernel.problem.dtype != "float32":
            raise LibraryError(
                f"{kernel.problem}: the operator library runs float32 only; in other types, run the model without it"
            )
        if kernel.problem in seen:
            raise LibraryError(f"two kernels for {kernel.problem}")
        seen.add(kernel.problem)
    lines = ['#include "library.h"', *(f"extern const hsa_kernel {kernel.symbol};" for kernel in kernels)]
    entries = ",\n".join(f"  {_entry(kernel)}" for kernel in kernels)
    lines += [f"const hsa_entry hsa_entries[] = {{\n{entries}\n}};", f"const int32_t hsa_entry_count = {len(kernels)};"]
    return "\n".join(lines) + "\n"


def _entry(kernel: KernelObjects) -> str:
    op = "HSA_CHUNK_SELECT" if isinstance(kernel.problem, ChunkSelect) else "HSA_CHUNK_ATTENTION"
    statics = ", ".join(str(int(getattr(kernel.problem, name))) for name in _STATICS[kernel.problem.op])
    return f"{{{op}, {{{statics}}}, &{kernel.symbol}}}"


def _compile(scratch: Path, table: str, objects: Sequence[Path]) -> Path:
    cc, cxx = compiler("C"), compiler("C++")
    native, host = (Path(str(resources.files(f"hsa_compile.{name}"))) for name in ("export.native", "schedules.host"))
    include = [f"-I{native}", f"-I{host}"]
    (scratch / "table.c").write_text(table)
    for source in (scratch / "table.c", host / "execute.c"):
        _run([*cc, *_C_FLAGS, *include, "-c", str(source), "-o", str(scratch / f"{source.stem}.o")])
    _run([*cxx, *_CXX_FLAGS, *include, "-c", str(native / "hsa_ops.cc"), "-o", str(scratch / "hsa_ops.o")])
    built, visible = scratch / "library.so", scratch / "visible.map"
    visible.write_text(_VISIBLE)
    own = [str(scratch / f"{name}.o") for name in ("hsa_ops", "execute", "table")]
    _run(
        [
            *cxx,
            *own,
            *map(str, dict.fromkeys(objects)),
            "-o",
            str(built),
            f"-Wl,--version-script={visible}",
            *_LINK_FLAGS,
        ]
    )
    return built


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LibraryError(f"could not start the compiler {command[0]!r}: {error.strerror}") from error
    if done.returncode:
        raise LibraryError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
