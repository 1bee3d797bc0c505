"""Builds what ``check_select.py`` runs: ``python tests/gpu/build_select.py DIRECTORY``, where TileLang and nvcc are."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from tilelang_build import build

from hsa_compile.ir import ChunkSelect, problem_from_dict
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_select import select_tile

LONG = [1, 131072, 2048]
DECODE = [[1, 1, 524288, "decode"], [8, 1, 65536, "decode"]]
ODD = ChunkSelect(2, 2, 80, 32, 24, window=96, dtype="float16")
SHARED = ChunkSelect(3, 1, 96, 48, 63, dtype="bfloat16")


def narrow(retrieval_dim: int) -> ChunkSelect:
    """One head, 16 chunks of 64 tokens."""
    return ChunkSelect(1, 1, retrieval_dim, 64, 16, dtype="bfloat16")


def plan(arch: str) -> list[dict[str, Any]]:
    """Programs of the schedules' choice, whether to check small cases, and what to time: B, L, C and a kind of data."""
    million, short = [1, 1048576, 16384, "random"], [1, 16384, 256, "random"]
    forward = [
        ("d64", narrow(64), True, [short, [*LONG, "random"], million, [*LONG, "older"], [*LONG, "newer"]]),
        ("d128", narrow(128), True, [short, [*LONG, "random"], million]),
        ("d1024", narrow(1024), True, [short, [*LONG, "random"]]),
        ("odd", ODD, True, []),
        ("shared", SHARED, True, []),
    ]
    decode = [
        ("decode64", narrow(64), True, DECODE), ("decode128", narrow(128), False, DECODE),
        ("decode1024", narrow(1024), False, DECODE[:1]), ("decode_odd", ODD, True, []),
    ]  # fmt: skip
    backward = [("backward64", narrow(64), True, [[*LONG, 1], [*LONG, 3]]), ("backward_odd", ODD, True, [])]
    backward += [("backward_shared", SHARED, True, [])]
    entries = []
    for module, group in (("select", forward), ("select", decode), ("select_backward", backward)):
        for name, problem, check, time in group:
            pass_name = "backward" if module.endswith("backward") else "forward"
            tile = select_tile(problem, arch, pass_name, group is decode)
            entries.append(
                {"name": name, "problem": problem.to_dict(), "tile": vars(tile), "module": module, "check": check}
                | {"time": time}
            )
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--plan", type=Path, help="JSON list to build in place of the schedules' choice")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    entries = json.loads(arguments.plan.read_text()) if arguments.plan else plan(arguments.arch)
    for entry in entries:
        module = importlib.import_module(f"hsa_compile.ir.programs.gpu.{entry['module']}")
        program = module.program(problem_from_dict(entry["problem"]), GpuTile(**entry["tile"]))
        entry |= build(program, arguments.arch, arguments.directory, entry["name"])
        (arguments.directory / "programs.json").write_text(json.dumps(entries))


if __name__ == "__main__":
    main()
