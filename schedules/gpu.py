"""The hand-picked GPU schedules: sizes of the tiles for a problem and a target."""

from __future__ import annotations

from hsa_compile.ir import Problem
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.target import GpuTarget


def tile_for(problem: Problem, pass_name: str, target: GpuTarget) -> GpuTile:
    """Tiles of a problem's pass."""
    return GpuTile()
