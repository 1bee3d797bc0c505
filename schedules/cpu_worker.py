"""The compiler's process: ``python -m hsa_compile.schedules.cpu_worker`` answers requests of ``schedules/worker.py``.

A request names a directory and a build request; the answer is the kernel's C symbol. program.o (LLVM), glue.c and
glue.o (the C interface) and kernel.so are written there.
"""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from hsa_compile.ir import AnyProblem, any_problem_from_dict
from hsa_compile.ir.programs import CpuTile, Program
from hsa_compile.schedules.builder import compiler
from hsa_compile.schedules.glue import glue_source
from hsa_compile.schedules.target import CpuTarget, resolve
from hsa_compile.schedules.worker import serve

HOST = Path(__file__).parent / "host"
# The code is C functions over raw pointers: no packed calls and no device code, so of TVM's pipeline only what lowers
# loops, vectors and intrinsics is needed. Index types stay 64-bit as written: offsets pass 2^31.
PASSES = [
    tirx.transform.StmtSimplify(),
    tirx.transform.FlattenBuffer(),
    tirx.transform.VectorizeLoop(),
    tirx.transform.UnrollLoop(),
    tirx.transform.StmtSimplify(),
    tirx.transform.CommonSubexprElim(),
    tirx.transform.LowerIntrin(),
]
# Loops over scattered elements stay scalar: gather and scatter instructions take longer, on AMD by two to three times.
MATTR = {"x86_64": ["+prefer-no-gather", "+prefer-no-scatter"], "aarch64": []}


def program_for(problem: AnyProblem, pass_name: str, tile: CpuTile) -> Program:
    """The CPU program of an operator's pass."""
    module = {
        ("chunk_attention", "forward"): "attention",
        ("chunk_attention", "backward"): "attention_backward",
        ("chunk_select", "forward"): "select",
        ("chunk_select", "backward"): "select_backward",
        ("sliding_window", "forward"): "window",
    }[problem.op, pass_name]
    return importlib.import_module(f"hsa_compile.ir.programs.cpu.{module}").program(problem, tile)


def lower(program: Program, prefix: str, target: CpuTarget) -> Any:
    """The program's functions, named ``<prefix>_<symbol>``, as an LLVM module."""
    functions = {
        f"{prefix}_{stage.symbol}": stage.function.with_attr("global_symbol", f"{prefix}_{stage.symbol}")
        for stage in program.stages
    }
    llvm = tvm.target.Target(
        {"kind": "llvm", "mcpu": target.mcpu, "mattr": MATTR[target.machine], "mtriple": f"{target.machine}-linux-gnu"}
    )
    module = tirx.transform.BindTarget(llvm)(tvm.IRModule(functions))
    module = tvm.ir.transform.Sequential(PASSES)(module)
    return tvm.get_global_func("target.build.llvm")(module, llvm)


def main(directory: Path, request: dict[str, Any]) -> str:
    problem = any_problem_from_dict(request["problem"])
    program = program_for(problem, request["pass"], CpuTile(**request["tile"]))
    prefix = f"hsa_{problem.digest}_{request['pass']}"
    lower(program, prefix, resolve(request["target"])).write_to_file(str(directory / "program.o"), "o")
    symbol, source = glue_source(program, problem, request["pass"], prefix)
    (directory / "glue.c").write_text(source)
    compile_c = [*compiler("C"), "-O2", "-fPIC", "-std=c11", f"-I{HOST}"]
    commands = [
        [*compile_c, "-c", "glue.c", "-o", "glue.o"],
        [*compile_c, "-shared", "program.o", "glue.o", str(HOST / "execute.c"), "-o", "kernel.so", "-lm"],
    ]
    for command in commands:
        subprocess.run(command, cwd=directory, check=True)
    return symbol


if __name__ == "__main__":
    serve(lambda message: {"symbol": main(Path(message["directory"]), message["request"])})
