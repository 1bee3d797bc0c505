"""Tile sizes of the backward of chunk attention on NVIDIA GPUs."""

from __future__ import annotations

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import GpuTile

SHARED_BYTES = {"sm_90a": 227 * 1024, "sm_80": 163 * 1024}  # that a block may have


def attention_backward_tile(problem: ChunkAttention, arch: str = "sm_90a") -> GpuTile:
    """Sizes for ``problem`` on ``arch``; below sm_90a they are as for it, in less memory.

    64 query rows a tile, in few registers, so that several blocks share a multiprocessor; small groups need more tokens
    for that. Tiles of two and four warpgroups load a chunk once for more tokens, but wait on each other: 0.78 and 0.79
    instead of 0.74 ms for 8 times 4096 tokens on an H100, and 12 % more with random selections.

    A work item is about 4096 query rows, of wide heads 8192: few enough to spread popular chunks, enough to load a
    chunk once. A third stage that keeps two blocks from sharing a multiprocessor costs more than it hides: 5.21 instead
    of 4.40 ms at (1, 32768, 32, 2, 128, K 16) on an H100.
    """
    D, S, G = problem.head_dim, problem.chunk_size, problem.groups
    most = SHARED_BYTES[arch]
    tokens = max(1, min(64, 64 // G))
    rows = -(-tokens * G // 64) * 64
    width = -(-D // 16) * 16
    registers = S * 5 // 4 + D // 2 + 16  # of a thread, where it holds a chunk's logits; else they go in pieces
    chunk_bytes = 4 * width * min(S, 64 if registers > 240 and arch == "sm_90a" else 128)
    row_bytes = 4 * width * rows
    fits = (most - 2048 - row_bytes) // chunk_bytes
    stages = max(1, min(2, fits))
    # The matrix instructions of sm_80 read both operands from registers.
    memory_blocks = max(1, (3 if D <= 64 else 2 if D <= 128 else 1) - (arch != "sm_90a"))
    stage_bytes = 4 * width * -(-max(G, 64 // G * G) // 16) * 16 + 1024
    room = most - 4 * width * 64 - 2048  # for pairs and at least two stages
    pairs = max(64, min((4096 if D <= 64 else 8192) // G, (room - 2 * stage_bytes) // 8))
    fitting = [(most // n - 4 * width * 64 - 8 * pairs - 2048) // stage_bytes for n in range(memory_blocks, 0, -1)]
    memory_fits = next((stages for stages in fitting if stages >= 2), 2)
    return GpuTile(
        tokens=tokens,
        stages=stages,
        blocks=max(
            1, min(4, 65536 // 128 // registers * 64 // rows, most // (row_bytes + stages * chunk_bytes + 2048))
        ),
        pairs=pairs,
        memory_stages=min(3, memory_fits),
        memory_blocks=memory_blocks,
        wgmma=arch == "sm_90a",
    )
