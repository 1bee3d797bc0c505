"""The hand-picked CPU schedules: sizes of the tiles for a problem and a target."""

from __future__ import annotations

from hsa_compile.ir import AnyProblem, ChunkAttention, SlidingWindow
from hsa_compile.ir.programs import CpuTile
from hsa_compile.schedules.target import CpuTarget

# Query rows a tile should hold, so that packing a chunk is paid for by the rows that use it, and so that a tile's sums
# (rows x D floats) still fit the L2 cache.
TILE_ROWS = 512
# Rows gathered for one chunk at a time: their queries and logits (two 16 KiB blocks at D = S = 64) sit in L1 and L2.
GATHERED_ROWS = 64
# Up to so many tokens the forward is split, to occupy more threads, where that costs no more work. On one Zen 4 core,
# over 1024 chunks, 8 tokens attend in 0.23 ms either way (G = 16, K = 8); 4 tokens select (K = 16) in 0.044 ms and not
# in 0.049, 8 in 0.079 and not in 0.051. With 4 parts it is 0.031 and 0.054 ms, but for 4 threads at most.
FEW_ATTENDING, FEW_SELECTING, SEGMENTS = 8, 4, 16
# Tokens of a tile of the sliding window at most: each makes every row of the tile meet one key more than its window.
WINDOW_TOKENS = 64


def tile_for(problem: AnyProblem, target: CpuTarget) -> CpuTile:
    """Register blocks of 8 x 2 vectors where there are 32 registers (16 accumulators, 2 operands), 4 x 2 with 16."""
    row_block = 8 if target.registers >= 32 else 4
    if isinstance(problem, ChunkAttention):
        tokens, few = max(8, min(256, TILE_ROWS // problem.groups)), FEW_ATTENDING
    elif isinstance(problem, SlidingWindow):
        tokens, few = max(8, min(WINDOW_TOKENS, TILE_ROWS // problem.groups)), FEW_ATTENDING
    else:
        tokens, few = 128, FEW_SELECTING
    return CpuTile(target.lanes, row_block, 2, tokens, GATHERED_ROWS, landmarks=64, few=few, segments=SEGMENTS)
