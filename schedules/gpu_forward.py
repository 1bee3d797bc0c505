"""Tile sizes of the forward of chunk attention on NVIDIA GPUs."""

from __future__ import annotations

from hsa_compile.ir import ChunkAttention
from hsa_compile.ir.programs import GpuTile

# Shared memory of a thread block and of a multiprocessor on sm_90, less what the system takes of each block.
BLOCK_SHARED = 227 * 1024
MULTIPROCESSOR_SHARED = 228 * 1024
RESERVED_SHARED = 2048  # a kilobyte of the system's, and the barriers, padded to the alignment of swizzled buffers
# Rows of a tile: one warpgroup. Two load a chunk less often and multiply more rows that did not select it.
TILE_ROWS = 64
SORTED_SLOTS = 4096
REGISTERS = 65536


def attention_tile(problem: ChunkAttention, arch: str = "sm_90a") -> GpuTile:
    """The forward tile of chunk attention.

    T*G = 64 rows: the smallest wgmma tile. A larger one meets more chunks that only some of its tokens selected. Two
    stages hold the next chunk's keys and this chunk's values in flight, more only where no block is lost for it.
    """
    D, S, element = problem.head_dim, problem.chunk_size, 2
    tokens = max(1, min(TILE_ROWS // problem.groups, SORTED_SLOTS // problem.top_k, 64))
    rows = -(-tokens * problem.groups // TILE_ROWS) * TILE_ROWS
    chunk = 2 * S * D * element
    shared = {stages: rows * D * element + stages * chunk for stages in (2, 3)}
    # A thread keeps a row's quarter of logits (fp32 and, rounded, half) and sums, and about 48 registers of the rest.
    registers = -(-(S // 2 + S // 4 + D // 2 + 48) // 8) * 8
    if arch != "sm_90a" or shared[2] > BLOCK_SHARED or registers > 255:
        return GpuTile(tokens=tokens, blocks=1, wgmma=False)
    blocks = max(1, min(4, REGISTERS // (registers * 2 * rows), MULTIPROCESSOR_SHARED // (shared[2] + RESERVED_SHARED)))
    stages = 3 if blocks * (shared[3] + RESERVED_SHARED) <= MULTIPROCESSOR_SHARED else 2
    return GpuTile(tokens=tokens, stages=stages, blocks=blocks)
