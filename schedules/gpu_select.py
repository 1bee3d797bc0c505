"""The hand-picked GPU schedules of chunk selection."""

from __future__ import annotations

from hsa_compile.ir import ChunkSelect
from hsa_compile.ir.programs import GpuTile

MULTIPROCESSORS = 132  # of an H100; a token's landmarks are divided among all blocks, of one warp, that fit on them
# Shared memory of a multiprocessor that its blocks can use together, and the most of one block, in bytes.
SHARED_MEMORY = {"sm_80": (164 << 10, 163 << 10), "sm_90a": (228 << 10, 227 << 10)}
ALL = 1 << 20  # tiles, more than any memory has
FEW = 64  # tokens of a segment below which small tiles waste less


def select_tile(problem: ChunkSelect, arch: str, pass_name: str = "forward", length: int | None = None) -> GpuTile:
    """Sizes for ``arch`` ("sm_80" or "sm_90a").

    Args:
        length: tokens of a segment, about. Few are served by the form that divides the landmarks among blocks; None is
            many.
    """
    if pass_name == "backward":
        return GpuTile(pairs=512)  # on an H100 up to 1.09 times as fast as 256 from 128 K tokens on, before that alike
    together, most = SHARED_MEMORY[arch]
    wide, few = problem.retrieval_dim > 256, length is not None and length < FEW
    if arch == "sm_90a" and not few and not (wide and problem.top_k > 32):
        return streaming_tile(problem)
    # Scoring every landmark twice costs less than cutting lists, up to where the scores' products are most of the time.
    bound = 4 if wide else ALL
    sizes: tuple[tuple[int, int], ...] = ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2))
    if few:
        bound, sizes = 1, ((16, 3),)
    for tokens, stages in sizes:
        tile = GpuTile(tokens=tokens, stages=stages, blocks=1, bound=bound, wgmma=False)
        if shared_bytes(problem, tile) <= most and (wide or shared_bytes(problem, tile) <= together // 3):
            break
    blocks = max(1, min(8 if few else 4, together // (shared_bytes(problem, tile) + 2048)))
    split = MULTIPROCESSORS * blocks
    return GpuTile(tokens=tile.tokens, stages=tile.stages, blocks=blocks, bound=bound, split=split, wgmma=False)


def streaming_tile(problem: ChunkSelect) -> GpuTile:
    """Sizes of the form that streams landmarks by bulk copies: two blocks on a multiprocessor where they fit."""
    together, most = SHARED_MEMORY["sm_90a"]
    found, bound = [], 0 if problem.retrieval_dim > 256 else ALL
    # A thread holds 64 scores of a tile, or 128 where queries do not stay: registers for one block of those.
    for blocks, room in ((2, together // 2 - 1024 if problem.retrieval_dim <= 256 else 0), (1, most)):
        for stages in range(6, 2, -1):
            tile = GpuTile(tokens=128, stages=stages, blocks=blocks, bound=bound, split=MULTIPROCESSORS * blocks)
            if shared_bytes(problem, tile) <= room:
                found.append(tile)
    return found[0]


def shared_bytes(problem: ChunkSelect, tile: GpuTile) -> int:
    """Shared memory of a block of the forward program, with room for alignment."""
    Dr = problem.retrieval_dim
    depth = max(d for d in range(16, min(Dr, 128) + 1, 16) if Dr % d == 0)
    entries = max(32, -(-(problem.top_k + 16) // 32) * 32)
    loaded = tile.tokens * Dr + tile.stages * 64 * depth
    if not tile.wgmma:
        return loaded * 2 + tile.tokens * (entries * 8 + 12) + 1024
    depth = next(d for d in (64, 32, 16) if Dr % d == 0 and (d < 64 or Dr == 64 or Dr > 256))
    loaded = tile.stages * depth * (256 if Dr > 256 else 128) + tile.tokens * (tile.stages * depth if Dr > 256 else Dr)
    return loaded * 2 + tile.tokens * entries * 8 + 3072
