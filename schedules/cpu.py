"""The hand-picked CPU schedules: sizes of the tiles for a problem and a target."""

from __future__ import annotations

from hsa_compile.ir import ChunkAttention, Problem
from hsa_compile.ir.programs import CpuTile
from hsa_compile.schedules.target import CpuTarget

# Query rows a tile should hold, so that packing a chunk is paid for by the rows that use it, and so that a tile's sums
# (rows x D floats) still fit the L2 cache.
TILE_ROWS = 512
# Rows gathered for one chunk at a time: their queries and logits (two 16 KiB blocks at D = S = 64) sit in L1 and L2.
GATHERED_ROWS = 64


def tile_for(problem: Problem, target: CpuTarget) -> CpuTile:
    """Register blocks of 8 x 2 vectors where there are 32 registers (16 accumulators, 2 operands), 4 x 2 with 16."""
    row_block = 8 if target.registers >= 32 else 4
    tokens = max(8, min(256, TILE_ROWS // problem.groups)) if isinstance(problem, ChunkAttention) else 128
    return CpuTile(target.lanes, row_block, 2, tokens, GATHERED_ROWS, landmarks=64)
