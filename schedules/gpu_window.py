"""Tile sizes of the sliding window on NVIDIA GPUs."""

from __future__ import annotations

from hsa_compile.ir import SlidingWindow
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_forward import BLOCK_SHARED, FEW, RESERVED_SHARED, TILE_ROWS

# Keys that warpgroups multiply in the time that a block takes besides: on an H100, 32 768 tokens of 16/2 heads of 64
# with W = 512 take 0.277, 0.250, 0.239 and 0.267 ms by blocks of 64, 96, 112 and 128 keys.
OVERHEAD = 26


def window_tile(problem: SlidingWindow, arch: str = "sm_90a", length: int | None = None) -> GpuTile:
    """The tile of a sliding window; for segments of about ``length`` tokens, for long ones where it is None."""
    if length is not None and length < FEW:
        return GpuTile(form="token", wgmma=arch == "sm_90a")
    tile = _warpgroups_tile(problem) if arch == "sm_90a" else None
    return tile or GpuTile(tokens=max(1, TILE_ROWS // problem.groups), stages=1, wgmma=False)


def _warpgroups_tile(problem: SlidingWindow) -> GpuTile | None:
    """Three warpgroups, or two of wide heads, that fill a multiprocessor's registers; None where they take no token."""
    D, G = problem.head_dim, problem.groups
    other = (
        36 if D % 64 == 0 else 44
    )  # registers besides sums, logits and probabilities; narrower rows take more addresses
    for warpgroups, registers in ((3, 160), (2, 240)):
        rows = warpgroups * TILE_ROWS
        keys = (registers - other - D // 2) * 4 // 3 // 16 * 16
        keys = min(keys, 128, (BLOCK_SHARED - RESERVED_SHARED - 2 * rows * D) // (2 * 4 * D) // 16 * 16)
        if rows >= G and keys >= (64 if warpgroups == 3 else 16):
            keys = min(range(16, keys + 1, 16), key=lambda n: _multiplied(problem, rows, n))
            stages = min(4, (BLOCK_SHARED - RESERVED_SHARED - 2 * rows * D) // (4 * keys * D))
            return GpuTile(form="warpgroups", tokens=rows // G, stages=stages, blocks=1, slots=keys)
    return None


def _multiplied(problem: SlidingWindow, rows: int, keys: int) -> int:
    """Keys that a tile's warpgroups multiply, and what their blocks take besides."""
    tokens = rows // problem.groups
    blocks = 0
    for row in range(0, rows, TILE_ROWS):
        eldest, youngest = row // problem.groups, min(tokens, (row + TILE_ROWS - 1) // problem.groups + 1) - 1
        blocks += -(-(tokens - eldest + problem.window - 1) // keys) - (tokens - 1 - youngest) // keys
    return blocks * (keys + OVERHEAD)
