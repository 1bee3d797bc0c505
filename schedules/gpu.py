"""The hand-picked GPU schedules: sizes of the tiles for a problem, a pass and a target."""

from __future__ import annotations

from hsa_compile.ir import AnyProblem, ChunkAttention, SlidingWindow
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_backward import attention_backward_tile
from hsa_compile.schedules.gpu_forward import attention_tile
from hsa_compile.schedules.gpu_select import select_tile
from hsa_compile.schedules.gpu_window import window_tile
from hsa_compile.schedules.target import GpuTarget


def tile_for(problem: AnyProblem, pass_name: str, target: GpuTarget, length: int | None = None) -> GpuTile:
    """Tiles of a problem's pass, for segments of about ``length`` tokens; for long ones where it is None."""
    if isinstance(problem, SlidingWindow):
        return window_tile(problem, target.arch, length)
    if isinstance(problem, ChunkAttention):
        if pass_name == "backward":
            return attention_backward_tile(problem, target.arch)
        return attention_tile(problem, target.arch, length)
    return select_tile(problem, target.arch, pass_name, length)
