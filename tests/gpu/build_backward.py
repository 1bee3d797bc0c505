"""Programs of the backward of chunk attention: the cases they are checked on, and their build with a small host.

    python tests/gpu/build_backward.py DIR [CASE[@VARIANT] ...]   # needs tilelang and nvcc, no GPU

writes DIR/CASE.so and DIR/CASE.json for ``check_backward.py``, and prints every kernel's registers and spills.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_backward import attention_backward_tile


@dataclass(frozen=True)
class Case:
    """A program, and the sizes and selection it is checked on: ``skew`` makes low chunks popular."""

    problem: ChunkAttention
    sizes: tuple[tuple[int, int, int], ...] = ((2, 333, 9),)
    skew: float = 1.0
    tile: GpuTile | None = None


def problem(*sizes: int, off_by_one: bool = False, dtype: Any = "bfloat16") -> ChunkAttention:
    return ChunkAttention(*sizes, off_by_one=off_by_one, dtype=dtype)


EDGES = ((2, 333, 9), (1, 5, 0), (1, 1, 1), (3, 1000, 40), (1, 0, 3))
CASES = {
    "g16-k8": Case(problem(16, 1, 64, 64, 8), EDGES),
    "g16-k16": Case(problem(16, 1, 64, 64, 16), ((1, 2000, 31),), skew=6.0),
    "g16-d128": Case(problem(32, 2, 128, 64, 16), ((2, 333, 9), (1, 900, 100))),
    "g1": Case(problem(16, 16, 64, 64, 16), ((2, 333, 9), (1, 2000, 31))),
    "g2": Case(problem(16, 8, 64, 64, 16), ((2, 333, 9), (1, 2000, 31))),
    "g4": Case(problem(16, 4, 64, 64, 16), ((2, 333, 9), (1, 2000, 31)), skew=4.0),
    "g8": Case(problem(16, 2, 64, 64, 16), ((2, 333, 9), (1, 2000, 31))),
    "g3-d96-s48": Case(problem(6, 2, 96, 48, 5, off_by_one=True, dtype="float16"), ((2, 333, 9), (1, 2000, 31))),
    "g12-d80-s32": Case(problem(24, 2, 80, 32, 8, off_by_one=True), skew=3.0),
    "g24-s16": Case(problem(24, 1, 64, 16, 20, dtype="float16"), ((2, 333, 9), (1, 70, 3))),
    "g5-d32-s80": Case(problem(10, 2, 32, 80, 4), ((2, 333, 9), (1, 100, 70001))),
    "s256": Case(problem(16, 2, 64, 256, 4, off_by_one=True)),
    "s128-d128": Case(problem(16, 1, 128, 128, 4)),
    "d256": Case(problem(8, 1, 256, 64, 4)),
    "g1-k64": Case(problem(2, 2, 64, 64, 64), ((1, 400, 200),)),
}
VARIANTS = {  # tiles beside the default
    "t8": {"tokens": 8, "stages": 3, "blocks": 2},
    "t8s2": {"tokens": 8, "stages": 2, "blocks": 2},
    "s3": {"stages": 3, "blocks": 3},
    "p512": {"pairs": 512},
    "m2": {"memory_stages": 4, "memory_blocks": 2},
}
BENCH = {"g16-k8": (8, 4096), "g16-k16": (1, 65536), "g16-d128": (1, 32768)} | {
    f"g{g}": (1, 32768) for g in (1, 2, 4, 8)
}


def lower(launch: Any, arch: str) -> str:
    """CUDA source of a launch: its kernel and a host function ``call_<symbol>``."""
    from tilelang import tvm
    from tilelang.backend.module import create_backend_context
    from tilelang.engine.lower import lower_with_context
    from tilelang.jit.adapter.wrapper import TLCUDASourceWrapper

    context = create_backend_context({"kind": "cuda", "arch": arch}, None, "cython")
    with tvm.transform.PassContext(opt_level=3, config=launch.options), context.target:
        lowered = lower_with_context(launch.function, context)
    module = tvm.IRModule({launch.function.attrs["global_symbol"]: launch.function})
    text = TLCUDASourceWrapper(
        module, lowered.kernel_source, context.target, device_mod=lowered.device_mod, host_mod=lowered.host_mod,
        pass_configs=launch.options,
    ).lib_code  # fmt: skip
    head, _, tail = text.partition('extern "C" TL_EXPORT const char* get_last_error() {')
    head = re.sub(r"static char error_buf\[ERROR_BUF_SIZE\];", "", head)
    tail = tail.partition('extern "C" TL_EXPORT int init()')[2]
    tail = (
        "static int init_"
        + launch.symbol
        + "()"
        + tail.replace('extern "C" TL_EXPORT int call(', f"static int call_{launch.symbol}(")
    )
    # No launch may begin before the last has ended.
    return head + tail.replace("config.numAttrs = 1;", "config.numAttrs = 0;")


def host_source(program: Any, launches: list[str]) -> str:
    """One C interface over all launches: sizes of the scratch regions, and run one launch."""
    places = {name: i for i, name in enumerate([*program.tensors, *(r.name for r in program.scratch)])}
    steps, inits = [], []
    for i, (launch, text) in enumerate(zip(program.launches, launches)):
        signature = re.search(rf"static int call_{launch.symbol}\((.*?)\) ?{{", text).group(1)
        parameters = [re.sub(r"=.*", "", p).split()[-1].strip("*") for p in signature.split(",")]
        types = [re.sub(r"=.*", "", p).replace("__restrict__", "").rsplit(None, 1)[0] for p in signature.split(",")]
        pointers = list(launch.arguments)
        values = []
        for name, kind in zip(parameters, types):
            if "*" in kind:
                values.append(f"({kind})regions[{places[pointers.pop(0)]}]")
            elif name == "stream":
                values.append("(cudaStream_t)stream")
            else:
                values.append(f"({kind})({launch.dims[name]})")
        steps.append(f"case {i}: return call_{launch.symbol}({', '.join(values)});")
        inits.append(f"if (init_{launch.symbol}()) return error_buf;")
    sizes = [f"case {i}: return {r.elements};" for i, r in enumerate(program.scratch)]
    body = "".join(launches)
    return f"""#include <cstdint>
#include <cstdio>
static char error_buf[1024];
{body}
extern "C" const char *setup() {{ {" ".join(inits)} return nullptr; }}
extern "C" int64_t elements(int i, int64_t B, int64_t L, int64_t C) {{ switch (i) {{ {" ".join(sizes)} }} return -1; }}
extern "C" int step(int i, void **regions, int64_t B, int64_t L, int64_t C, void *stream) {{
  switch (i) {{ {" ".join(steps)} }} return -1; }}
extern "C" const char *message() {{ return error_buf; }}
"""


def build(name: str, folder: Path, arch: str = "sm_90a") -> str:
    """Lowers and compiles a case to ``folder/name.so`` and ``.json``; returns the report of registers and spills."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    from hsa_compile.ir.programs.gpu import attention_backward

    base, _, variant = name.partition("@")
    case = CASES[base]
    tile = replace(case.tile or attention_backward_tile(case.problem), **VARIANTS.get(variant, {}))
    program = attention_backward.program(case.problem, tile)
    source = folder / f"{name}.cu"
    source.write_text(host_source(program, [lower(launch, arch) for launch in program.launches]))
    command = [
        "nvcc", "-std=c++20", "-O3", "-w", "-gencode", f"arch=compute_{arch[3:]},code={arch}", "--use_fast_math",
        f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}", "-Xptxas", "-v", "-shared", "-Xcompiler", "-fPIC",
        "-cudart", "static", str(source), "-o", str(folder / f"{name}.so"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    data = {
        "tile": asdict(tile),
        "launches": [launch.symbol for launch in program.launches],
        "scratch": [[r.name, r.dtype] for r in program.scratch],
    }
    (folder / f"{name}.json").write_text(json.dumps(data))
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.S
    )
    return ", ".join(f"{k.removesuffix('_kernel')} {r}" + (f" SPILLS {s}" if s != "0" else "") for k, s, r in report)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for case_name in sys.argv[2:] or CASES:
        print(case_name, build(case_name, Path(sys.argv[1])), flush=True)
