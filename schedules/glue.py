"""The C source between a program's functions and the interface of ``host/kernel.h``."""

from __future__ import annotations

import json

from hsa_compile.ir import AnyProblem
from hsa_compile.ir.programs import Program, Region

DTYPE_SIZE = {"float32": 4, "float16": 2, "uint16": 2, "int32": 4, "int64": 8}
DIMS = "const int64_t B = dims[0], L = dims[1], C = dims[2]; (void)B, (void)L, (void)C;"


def glue_source(program: Program, problem: AnyProblem, pass_name: str, prefix: str) -> tuple[str, str]:
    """Returns the kernel's C symbol and the source that defines it."""
    symbol = f"hsa_kernel_{problem.digest}_{pass_name}"
    text = json.dumps(json.dumps(problem.to_dict(), sort_keys=True))
    lines = [
        '#include "kernel.h"',
        "static int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }",
        *(_declaration(prefix, stage.symbol, len(stage.arguments)) for stage in program.stages),
        f"static int64_t units(int32_t stage, const int64_t* dims) {{ {DIMS}",
        *(f"  if (stage == {i}) return {stage.units};" for i, stage in enumerate(program.stages)),
        "  return 0;\n}",
        _bytes("scratch_bytes", program.scratch),
        _bytes("workspace_bytes", program.workspace),
        *_run(program, prefix),
        f'const hsa_kernel {symbol} = {{HSA_KERNEL_ABI, {text}, "{pass_name}", {len(program.tensors)}, '
        f"{len(program.stages)}, units, scratch_bytes, workspace_bytes, run}};",
    ]
    return symbol, "\n".join(lines) + "\n"


def _declaration(prefix: str, name: str, pointers: int) -> str:
    arguments = ", ".join(["void*"] * pointers + ["int64_t"] * 5)
    return f"extern int32_t {prefix}_{name}({arguments});"


def _region_bytes(region: Region) -> str:
    return f"up({DTYPE_SIZE[region.dtype]} * ({region.elements}))"


def _bytes(name: str, regions: tuple[Region, ...]) -> str:
    total = " + ".join(["INT64_C(0)", *map(_region_bytes, regions)])
    return f"static int64_t {name}(const int64_t* dims) {{ {DIMS}\n  return {total};\n}}"


def _run(program: Program, prefix: str) -> list[str]:
    lines = [
        "static void run(int32_t stage, void* const* tensors, const int64_t* dims, void* scratch, void* workspace,",
        f"                int64_t begin, int64_t end) {{ {DIMS}",
        "  (void)scratch, (void)workspace, (void)up;",
    ]
    for base, regions in (("scratch", program.scratch), ("workspace", program.workspace)):
        previous, size = f"(char*){base}", "0"
        for region in regions:
            lines.append(f"  void* {region.name}_ = {previous} + {size};")
            previous, size = f"(char*){region.name}_", _region_bytes(region)
    where = {name: f"tensors[{i}]" for i, name in enumerate(program.tensors)}
    where |= {region.name: f"{region.name}_" for region in program.scratch + program.workspace}
    for i, stage in enumerate(program.stages):
        arguments = ", ".join([where[name] for name in stage.arguments] + ["B", "L", "C", "begin", "end"])
        lines.append(f"  if (stage == {i}) {prefix}_{stage.symbol}({arguments});")
    return [*lines, *(f"  (void){r.name}_;" for r in program.scratch + program.workspace), "}"]
