"""Tile sizes of the forward of chunk attention on NVIDIA GPUs."""

from __future__ import annotations

from hsa_compile.ir import ChunkAttention
from hsa_compile.ir.programs import GpuTile

# Shared memory of a thread block and of a multiprocessor on sm_90, less what the system takes of each block.
BLOCK_SHARED = 227 * 1024
MULTIPROCESSOR_SHARED = 228 * 1024
RESERVED_SHARED = 2048  # a kilobyte of the system's, and the barriers, padded to the alignment of swizzled buffers
MOST_SHARED = {"sm_90a": BLOCK_SHARED - RESERVED_SHARED, "sm_80": 160 * 1024}  # of one block
TILE_ROWS = 64  # of a wgmma tile: one warpgroup
LISTED_SLOTS = 4096
REGISTERS = 65536  # of a multiprocessor
# Tokens of a segment below which every token has thread blocks of its own: 5 to 20 us instead of 11 to 110 at B = 1; as
# fast as or faster than tiles up to B = 64, but for up to a quarter more time where B * L * kv_heads exceeds about 500.
FEW = 16


def attention_tile(problem: ChunkAttention, arch: str = "sm_90a", length: int | None = None) -> GpuTile:
    """The forward tile of chunk attention.

    Args:
        length: tokens of a segment, about. Few are served one by one; None is many.
    """
    D, S = problem.head_dim, problem.chunk_size
    chunk = 4 * S * D  # bytes of its keys and values
    rows = -(-problem.groups // 16) * 16  # of a token, which keeps queries and probabilities beside one chunk
    if length is not None and length < FEW and chunk + 2 * rows * (D + S) <= MOST_SHARED[arch]:
        return GpuTile(form="token", wgmma=arch == "sm_90a")
    if arch != "sm_90a" or 2 * chunk > BLOCK_SHARED - RESERVED_SHARED:
        return _rows_tile(problem, False)
    # Groups of 8 fill wgmma's 64 rows with 8 neighbouring tokens, whose selections overlap: on an H100 0.63 ms at
    # (1, 32768, 16, 2, 64, K 16) and 0.24 at (8, 4096, 16, 1, 64, K 8), but 0.70 and 0.28 with a warp for 16 rows. In
    # smaller groups most of 64 rows are of tokens that did not select the chunk: 1.35 ms at G = 2 instead of 1.15.
    G = problem.groups
    if D == 128 and S <= 64 and G >= 16 and TILE_ROWS % G == 0:
        return _warpgroups_tile(problem)
    return _rows_tile(problem, True) if G >= TILE_ROWS or (G >= 8 and TILE_ROWS % G == 0) else _warps_tile(problem)


def _rows_tile(problem: ChunkAttention, wgmma: bool) -> GpuTile:
    """T*G = 64 rows: the smallest wgmma tile. A larger one meets more chunks that only some of its tokens selected. Two
    stages hold the next chunk's keys and this chunk's values in flight, more only where no block is lost for it."""
    D, S = problem.head_dim, problem.chunk_size
    tokens = max(1, min(TILE_ROWS // problem.groups, LISTED_SLOTS // problem.top_k, 64))
    rows = -(-tokens * problem.groups // TILE_ROWS) * TILE_ROWS
    shared = {stages: 2 * D * (rows + 2 * stages * S) for stages in (2, 3)}
    # A thread keeps a row's quarter of logits (fp32 and, rounded, half) and sums, and about 48 registers of the rest.
    registers = -(-(S // 2 + S // 4 + D // 2 + 48) // 8) * 8
    if not wgmma or shared[2] > BLOCK_SHARED or registers > 255:
        return GpuTile(tokens=tokens, blocks=1, wgmma=False)
    blocks = max(1, min(4, REGISTERS // (registers * 2 * rows), MULTIPROCESSOR_SHARED // (shared[2] + RESERVED_SHARED)))
    stages = 3 if blocks * (shared[3] + RESERVED_SHARED) <= MULTIPROCESSOR_SHARED else 2
    return GpuTile(tokens=tokens, stages=stages, blocks=blocks)


def _warpgroups_tile(problem: ChunkAttention) -> GpuTile:
    """Three warpgroups and the warp that loads for them fill a multiprocessor's registers.

    On an H100 at (1, 32768, 32, 2, 128, K 16) 1.43 ms on local selections and 3.90 on random ones, by rows 1.62 and
    3.72. At D = 64 four warpgroups take 0.99 ms at (1, 65536, 16, 1, 64, K 16) and 8.7 at a million tokens, four small
    blocks 0.91 and 8.9.
    """
    D, S = problem.head_dim, problem.chunk_size
    rows = 3 * TILE_ROWS
    tokens = max(1, min(rows // problem.groups, LISTED_SLOTS // problem.top_k))
    stages = min(12, (BLOCK_SHARED - RESERVED_SHARED - 2 * rows * D) // (4 * S * D))
    return GpuTile(tokens=tokens, stages=stages, blocks=1, run=2, form="warpgroups")


def _warps_tile(problem: ChunkAttention) -> GpuTile:
    """All the warps that the registers allow, one of a block loads, and all the chunks that fit. Two blocks of 8 are a
    tenth faster than one of 16: their warps wait less for one another, though every chunk is loaded more often."""
    D, S = problem.head_dim, problem.chunk_size
    registers = 3 * (S + D) // 4 + 32  # of a thread: queries, logits, probabilities, sums and the rest
    warps, blocks = (8, 2) if registers <= 136 else (12, 1) if registers <= 176 else (8, 1)
    tokens = max(1, min((warps - 1) * 16 // problem.groups, LISTED_SLOTS // problem.top_k))
    stages = min(12, (BLOCK_SHARED // blocks - RESERVED_SHARED) // (4 * S * D))
    return GpuTile(tokens=tokens, stages=max(2, stages), blocks=blocks, form="warps")
