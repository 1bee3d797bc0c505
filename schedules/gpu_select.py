"""The hand-picked GPU schedules of chunk selection."""

from __future__ import annotations

from hsa_compile.ir import ChunkSelect
from hsa_compile.ir.programs import GpuTile

MULTIPROCESSORS = 132  # of an H100; a token's landmarks are divided among all blocks, of one warp, that fit on them
# Shared memory of a multiprocessor that its blocks can use together, and the most of one block, in bytes.
SHARED_MEMORY = {"sm_80": (164 << 10, 163 << 10), "sm_90a": (228 << 10, 227 << 10)}
ALL = 1 << 20  # tiles, more than any memory has
FEW = 256  # tokens of a segment below which a sequence has too few tiles of queries for the multiprocessors


def select_tile(problem: ChunkSelect, arch: str, pass_name: str = "forward", length: int | None = None) -> GpuTile:
    """Sizes for ``arch`` ("sm_80" or "sm_90a").

    Args:
        length: tokens of a segment, about. Few are served by the form that divides the landmarks among blocks; None is
            many.
    """
    if pass_name == "backward":
        return GpuTile(pairs=256)
    together, most = SHARED_MEMORY[arch]
    wide = problem.retrieval_dim > 256
    # Scoring every landmark twice costs less than cutting lists, up to where the scores' products are most of the time.
    bound = 4 if wide else ALL
    sizes: tuple[tuple[int, int], ...] = ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2))
    if length is not None and length < FEW:
        bound = 1
        sizes = ((16, 4),) if length < 64 else sizes
    for tokens, stages in sizes:
        tile = GpuTile(tokens=tokens, stages=stages, blocks=1, bound=bound)
        if shared_bytes(problem, tile) <= most and (wide or shared_bytes(problem, tile) <= together // 3):
            break
    blocks = max(1, min(4, together // (shared_bytes(problem, tile) + 2048)))
    split = MULTIPROCESSORS * blocks if length is not None and length < FEW else 0
    return GpuTile(tokens=tile.tokens, stages=tile.stages, blocks=blocks, bound=bound, split=split)


def shared_bytes(problem: ChunkSelect, tile: GpuTile) -> int:
    """Shared memory of a block of the forward program, with room for alignment."""
    depth = max(d for d in range(16, min(problem.retrieval_dim, 128) + 1, 16) if problem.retrieval_dim % d == 0)
    entries = max(32, -(-(problem.top_k + 16) // 32) * 32)
    loaded = tile.tokens * problem.retrieval_dim + tile.stages * 64 * depth
    return loaded * 2 + tile.tokens * (entries * 8 + 12) + 1024
