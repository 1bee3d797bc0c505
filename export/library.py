"""Builds ``libhsa_ops.so``: compiled kernels, the threads' driver and the ONNX Runtime operators, in one library."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

from hsa_compile.ir import AnyProblem, ChunkAttention
from hsa_compile.schedules.builder import cache_directory, compiler, cuda_compiler
from hsa_compile.schedules.target import CPU_TARGETS, GPU_TARGETS, CpuTarget, GpuTarget, resolve_any

_STATICS = {
    "chunk_select": ("kv_heads", "retrieval_heads", "retrieval_dim", "chunk_size", "top_k", "window"),
    "chunk_attention": ("q_heads", "kv_heads", "head_dim", "chunk_size", "top_k", "off_by_one"),
    "sliding_window": ("q_heads", "kv_heads", "head_dim", "window"),
}
_NATIVE = Path(str(resources.files("hsa_compile.export.native")))
_HOST = Path(str(resources.files("hsa_compile.schedules.host")))
_C_FLAGS = ["-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
_CXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
# Rows by vector instructions: no value is looked at for what it raises, only for what it is.
_FUSED_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", *_CXX_FLAGS[2:]]
_NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The runtimes are linked in, so that the library depends on libc alone; CUDA's looks for the driver when it is used.
_LINK_FLAGS = ["-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--no-undefined", "-pthread"]
# nvcc knows where CUDA's runtime is.
_CUDA_LINK_FLAGS = [
    *("-shared", "-cudart", "static", "-Xlinker", "--no-undefined"),
    *("-Xcompiler", "-static-libstdc++,-static-libgcc,-pthread"),
]
# One name is visible: nothing of the linked-in runtime or of the kernels meets those of the process.
_VISIBLE = "{ global: RegisterCustomOps; local: *; };\n"


class KernelObjects(Protocol):
    """A compiled forward kernel, such as ``hsa_compile.schedules.Artifact``: the object files that hold it, the C
    symbol of its ``hsa_kernel`` or ``hsa_cuda_kernel`` and the name of the target that it runs on."""

    @property
    def problem(self) -> AnyProblem: ...
    @property
    def objects(self) -> Sequence[Path]: ...
    @property
    def symbol(self) -> str: ...
    @property
    def target(self) -> str: ...


@dataclass(frozen=True)
class Served:
    """A kernel for segments of ``length`` tokens or more, where a problem has several by length.

    Of the kernels that fit a call the one with the greatest length serves.
    """

    kernel: KernelObjects
    length: int = 0


class LibraryError(RuntimeError):
    """The operator library could not be built; the message says what is missing or what the compiler said."""


def build_library(kernels: Sequence[KernelObjects | Served], destination: Path) -> Path:
    """Links the kernels into an ONNX Runtime operator library.

    The library has ONNX Runtime's CPU provider run the operators and types that it has CPU kernels of, and those that
    need none compiled (``fuse``). For several levels of CPU the best that the machine has is picked when a session
    runs. With GPU kernels, the CUDA provider runs all operators, in float32, float16 and bfloat16: by the compiled
    kernel of the problem, by plain kernels where there is none.

    Args:
        kernels: forward kernels, one for each problem, target and length.
        destination: path of the library; it appears whole or not at all.

    Returns:
        ``destination``.

    Raises:
        LibraryError: two kernels serve the same, or linking fails.
        BuildError: there is no C or C++ compiler, or with GPU kernels, no nvcc.
    """
    destination = Path(destination)
    served = _in_order(kernels)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".hsa_ops-") as scratch:
        os.replace(_compile(Path(scratch), served), destination)
    return destination


def kernel_table(kernels: Sequence[KernelObjects | Served]) -> str:
    """C source of the table that tells the library which kernel serves what; see ``native/library.h``.

    Raises:
        LibraryError: there is no kernel, or two serve the same.
    """
    served = _in_order(kernels)
    targets = [target for target in (*CPU_TARGETS, *GPU_TARGETS) if any(target == _target(one) for one in served)]
    symbols = _symbols(served)
    unique = dict(zip(symbols, served))
    lines = ['#include "library.h"']
    lines += [f"extern const {_kind(one)} {symbol};" for symbol, one in unique.items()]
    lines += _table("hsa_target", "targets", [_target_entry(target) for target in targets])
    lines += _table("hsa_entry", "entries", [_entry(one, s, targets) for s, one in zip(symbols, served)])
    return "\n".join(lines) + "\n"


def _in_order(kernels: Sequence[KernelObjects | Served]) -> list[Served]:
    """The best target first, of one target the longest segments first: the library takes the first that fits."""
    if not kernels:
        raise LibraryError("no kernels given: without any, run the model without the library")
    served = [one if isinstance(one, Served) else Served(one) for one in kernels]
    seen = set()
    for one in served:
        key = (one.kernel.problem, _target(one), one.length)
        if key in seen:
            raise LibraryError(f"two kernels for {one.kernel.problem} on {one.kernel.target}")
        seen.add(key)
    ranks = {target: rank for rank, target in enumerate((*CPU_TARGETS, *GPU_TARGETS))}
    return sorted(served, key=lambda one: (ranks[_target(one)], -one.length))


def _target(one: Served) -> CpuTarget | GpuTarget:
    return resolve_any(one.kernel.target)


def _on_gpu(one: Served) -> bool:
    return isinstance(_target(one), GpuTarget)


def _kind(one: Served) -> str:
    return "hsa_cuda_kernel" if _on_gpu(one) else "hsa_kernel"


def _symbols(served: Sequence[Served]) -> list[str]:
    """A name for each kernel, the same where one kernel serves several lengths. Targets and tiles share the kernels'
    own names."""
    names: dict[tuple[Path, ...], str] = {}
    return [names.setdefault(tuple(one.kernel.objects), f"hsa_served_{len(names)}") for one in served]


def _table(kind: str, name: str, entries: Sequence[str]) -> list[str]:
    body = ",\n".join(f"  {entry}" for entry in entries)
    count = f"hsa_{'entry' if name == 'entries' else 'target'}_count"
    return [f"const {kind} hsa_{name}[] = {{\n{body}\n}};", f"const int32_t {count} = {len(entries)};"]


def _target_entry(target: CpuTarget | GpuTarget) -> str:
    if isinstance(target, GpuTarget):
        major, minor = target.capability
        return f'{{"{target.name}", 1, 0, {10 * major + minor}, {int(target.arch.endswith("a"))}}}'
    level = int(target.mcpu[-1]) if target.mcpu.startswith("x86-64-v") else 0
    return f'{{"{target.name}", 0, {level}, 0, 0}}'


def _entry(one: Served, symbol: str, targets: Sequence[CpuTarget | GpuTarget]) -> str:
    problem, target = one.kernel.problem, _target(one)
    scale = (problem.logit_scale or 0.0) if isinstance(problem, ChunkAttention) else 0.0
    names = _STATICS[problem.op]
    statics = ", ".join(str(int(getattr(problem, name))) for name in names)
    kernel = f"0, &{symbol}" if isinstance(target, GpuTarget) else f"&{symbol}, 0"
    return (
        f"{{HSA_{problem.op.upper()}, HSA_{problem.dtype.upper()}, {{{statics}}}, {scale!r}f, {targets.index(target)}, "
        f"{one.length}, {kernel}}}"
    )


def _compile(scratch: Path, served: Sequence[Served]) -> Path:
    cc, cxx = compiler("C"), compiler("C++")
    native, host = _NATIVE, _HOST
    include = [f"-I{native}", f"-I{host}"]
    gpu = sorted({target.arch for one in served if isinstance(target := _target(one), GpuTarget)})
    (scratch / "table.c").write_text(kernel_table(served))
    _run([*cc, *_C_FLAGS, *include, "-c", str(scratch / "table.c"), "-o", str(scratch / "table.o")])
    define = ["-DHSA_CUDA"] if gpu else []
    jobs = [([*cc, *_C_FLAGS, *include], host / "execute.c")]
    jobs += [([*cxx, *_CXX_FLAGS, *define, *include], native / name) for name in ("hsa_ops.cc", "cpu.cc")]
    jobs += [([*cxx, *_FUSED_FLAGS, *include], native / "fused.cc")]
    link = [*cxx, *_LINK_FLAGS]
    if gpu:
        nvcc = cuda_compiler()
        code = [f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}" for arch in gpu]
        jobs += [([*cxx, *_CXX_FLAGS, *include], native / "cuda.cc")]
        sources = ("plain.cu", "sample.cu", "fused.cu")
        jobs += [([nvcc, *_NVCC_FLAGS, *code, *include], native / name) for name in sources]
        link = [nvcc, *_CUDA_LINK_FLAGS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        own = list(pool.map(_object, *zip(*jobs)))
    kernels = [_relocatable(scratch, one, symbol) for symbol, one in zip(_symbols(served), served)]
    visible, built = scratch / "visible.map", scratch / "library.so"
    visible.write_text(_VISIBLE)
    objects = [str(path) for path in (*own, scratch / "table.o", *dict.fromkeys(kernels))]
    script = ["-Xlinker", f"--version-script={visible}"]
    _run([*link, *script, *objects, "-lm", "-o", str(built)])
    return built


def _object(command: Sequence[str], source: Path) -> Path:
    """A compiled source of the package; kept in the cache by what it depends on, as most libraries differ in kernels
    alone."""
    digest = hashlib.sha256("\0".join([*command, source.name, _version(command[0])]).encode())
    for path in (source, *sorted(source.parent.glob("*.h")), *sorted(_HOST.glob("*.h"))):
        digest.update(path.read_bytes())
    kept = cache_directory() / "objects" / digest.hexdigest()[:24] / f"{source.stem}.o"
    if kept.exists():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            built = Path(temporary) / "object.o"
            _run([*command, "-c", str(source), "-o", str(built)])
            os.replace(built, kept)
    except OSError as error:
        raise LibraryError(f"cannot write to the cache {kept.parent}: {error}; set HSA_COMPILE_CACHE") from error
    return kept


@functools.cache
def _version(compiler: str) -> str:
    """What a compiler says of itself."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise LibraryError(f"could not start the compiler {compiler!r}: {error.strerror}") from error


def _relocatable(scratch: Path, one: Served, symbol: str) -> Path:
    """A kernel's objects as one, of which only ``symbol`` is visible: kernels of a problem for other targets and tiles
    use the same names within."""
    whole, renamed, alone = (scratch / f"{symbol}.{step}.o" for step in ("whole", "renamed", "alone"))
    if alone.exists():
        return alone
    objects = [str(path) for path in one.kernel.objects]
    if not objects:
        raise LibraryError(f"the kernel of {one.kernel.problem} has no objects; build it anew")
    # Sections that the linker would share by name stay this kernel's.
    _run(["ld", "-r", "--force-group-allocation", *objects, "-o", str(whole)])
    _run(["objcopy", "--redefine-sym", f"{one.kernel.symbol}={symbol}", str(whole), str(renamed)])
    _run(["objcopy", f"--keep-global-symbol={symbol}", str(renamed), str(alone)])
    return alone


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LibraryError(f"could not start the compiler {command[0]!r}: {error.strerror}") from error
    if done.returncode:
        raise LibraryError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
