"""Tile sizes of the sliding window on NVIDIA GPUs."""

from __future__ import annotations

from hsa_compile.ir import SlidingWindow
from hsa_compile.ir.programs import GpuTile


def window_tile(problem: SlidingWindow, arch: str = "sm_90a", length: int | None = None) -> GpuTile:
    """The tile of a sliding window; for segments of about ``length`` tokens, for long ones where it is None."""
    if length is not None and length < 16:
        return GpuTile(form="token", wgmma=arch == "sm_90a")
    return GpuTile(tokens=max(1, 64 // problem.groups), stages=1, wgmma=arch == "sm_90a")
