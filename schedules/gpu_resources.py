"""What the kernels of a GPU tile take of a multiprocessor, as far as it can be told without compiling them, and which
tiles cannot run."""

from __future__ import annotations

from dataclasses import dataclass

from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules import gpu_select
from hsa_compile.schedules.target import GpuTarget
from hsa_compile.schedules.triton import Sizes, TritonTile, chunk_bytes, power_of_two

# Shared memory of a multiprocessor and the most of one block, by compute capability's architecture; what the system
# takes of each block, and barriers with the padding that swizzled buffers need.
SHARED = {"sm_90a": (228 << 10, 227 << 10), "sm_80": (164 << 10, 163 << 10)}
RESERVED, PADDING = 1024, 1024
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
MOST_REGISTERS, MOST_THREADS = 255, 1024  # of a thread, of a block
LISTED_SLOTS, LISTED_ROWS, MASKED_TOKENS = 4096, 512, 64  # of a tile, in ``ir/programs/gpu``: union.py and pairs.py
TRITON_ELEMENTS = 1 << 20  # of a block of values, at most
Tile = GpuTile | TritonTile


@dataclass(frozen=True)
class Block:
    """A thread block of a kernel with matrix products.

    Args:
        threads: of it.
        shared: bytes of shared memory.
        registers: that a thread needs, about.
        resident: blocks that the tile asks to fit on a multiprocessor; 0 where it does not say.
    """

    threads: int
    shared: int
    registers: int
    resident: int = 0

    def fitting(self, target: GpuTarget) -> int:
        """Blocks that are on a multiprocessor at once; 0 where none fits. Where a tile asks for more than the registers
        hold, some are spilled."""
        together, most = SHARED[target.arch]
        if self.shared > most or self.threads > MOST_THREADS:
            return 0
        registers = min(self.registers, MOST_REGISTERS)
        if self.resident:
            registers = min(registers, REGISTERS // (self.resident * self.threads))
        limits = together // (self.shared + RESERVED), THREADS // self.threads, REGISTERS // (registers * self.threads)
        return min(limits)


def pad(n: int, unit: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // unit) * unit


def tile_rows(problem: ChunkAttention, tile: GpuTile) -> int:
    """Rows of a tile, as padded: whole warps by ``warps``, else whole warpgroups."""
    return pad(tile.tokens * problem.groups, 16 if tile.form == "warps" else 64)


def blocks_of(problem: Problem, pass_name: str, tile: Tile) -> list[Block]:
    """The kernels of a pass whose sizes the tile gives; none for a backward of selection."""
    if isinstance(problem, ChunkSelect):
        return _select_blocks(problem, tile) if pass_name == "forward" else []
    if isinstance(tile, TritonTile):
        parts = [("queries", tile.queries)] + ([("memory", tile.memory)] if pass_name == "backward" else [])
        return [_triton_block(problem, pass_name, part, sizes) for part, sizes in parts]
    if pass_name == "backward":
        return [_query_block(problem, tile), _memory_block(problem, tile)]
    return [_forward_block(problem, tile)]


def _forward_block(p: ChunkAttention, tile: GpuTile) -> Block:
    D, S = p.head_dim, p.chunk_size
    if tile.form == "token":
        rows = pad(p.groups, 16)
        return Block(128, 2 * (rows * D + 2 * S * D + rows * S) + PADDING, 64 + rows * (S + D) // 128)
    rows = tile_rows(p, tile)
    if tile.form == "warps":
        shared = 4 * S * D * tile.stages + PADDING
        return Block(2 * rows + 32, shared, 3 * (S + D) // 4 + 32, tile.blocks)
    registers = S // 2 + S // 4 + D // 2 + 48
    if tile.form == "warpgroups":
        shared, threads = 2 * D * (rows + 2 * tile.stages * S) + PADDING, 2 * rows + 128
        # Warpgroups take over the registers that the loader's warps do not need.
        start = REGISTERS // (tile.blocks * threads) // 8 * 8
        each = start + (start - 24) * 128 // (2 * rows) // 8 * 8
        return Block(threads, shared, start if registers - 16 <= each else 2 * start, tile.blocks)
    if not tile.wgmma:
        both = 2 * D * (rows + 2 * S)
        return Block(2 * rows, (both if both <= 160 << 10 else 2 * D * (rows + S)) + PADDING, registers)
    return Block(2 * rows, 2 * D * (rows + 2 * tile.stages * S) + PADDING, registers, tile.blocks)


def _query_block(p: ChunkAttention, tile: GpuTile) -> Block:
    rows, stages = tile_rows(p, tile), tile.stages if tile.wgmma else 1
    width, keys = pad(p.head_dim, 16), min(p.chunk_size, 128)
    registers = p.chunk_size * 5 // 4 + p.head_dim // 2 + 16
    if registers > 240:  # a chunk goes in pieces of 64 keys
        keys, registers = 64, 64 * 5 // 4 + p.head_dim // 2 + 16
    return Block(2 * rows, 4 * width * (rows + stages * keys) + PADDING, registers, tile.blocks)


def memory_columns(p: ChunkAttention) -> int:
    """(Token, head) pairs that the pass over the memory multiplies at once."""
    return pad(max(p.groups, 64 // p.groups * p.groups), 16)


def _memory_block(p: ChunkAttention, tile: GpuTile) -> Block:
    width, columns = pad(p.head_dim, 16), memory_columns(p)
    shared = 4 * width * 64 + tile.memory_stages * (4 * width * columns + 8 * pad(columns, 32)) + 8 * tile.pairs
    return Block(128, shared + PADDING, columns * 5 // 4 + min(p.head_dim, 128) + 24, tile.memory_blocks)


def _select_blocks(p: ChunkSelect, tile: Tile) -> list[Block]:
    if isinstance(tile, TritonTile):
        held = tile.tokens * tile.columns // (32 * tile.warps)
        shared = 2 * (tile.tokens + 2 * tile.columns) * tile.depth + PADDING
        return [
            Block(32 * tile.warps, shared, 2 * held + tile.tokens * power_of_two(p.top_k) // (16 * tile.warps) + 40)
        ]
    columns = 64 if not tile.wgmma else 256 if p.retrieval_dim > 256 else 128
    threads = pad(tile.tokens, 16) // 16 * 32
    return [Block(threads, gpu_select.shared_bytes(p, tile), tile.tokens * columns // threads + 60, tile.blocks)]


def _triton_block(p: ChunkAttention, pass_name: str, part: str, sizes: Sizes) -> Block:
    """Loads are staged in shared memory; float32 takes twice its room, for the halves of what is multiplied."""
    rows, S, D = sizes.tokens * power_of_two(p.groups), power_of_two(p.chunk_size, 16), power_of_two(p.head_dim, 16)
    chunk, row = 2 * chunk_bytes(p), chunk_bytes(p) // S
    backward, threads = pass_name == "backward", 32 * sizes.warps
    if part == "memory":
        shared = chunk + sizes.stages * 2 * rows * row
        held = 2 * rows * S + 2 * S * D
    else:
        shared = (2 if backward else 1) * rows * row + sizes.stages * chunk
        held = (2 if backward else 1) * rows * S + rows * D
    return Block(threads, shared * (2 if p.dtype == "float32" else 1), 40 + held // threads)


def refusal(problem: Problem, pass_name: str, tile: Tile, target: GpuTarget) -> str | None:
    """Why a tile can't run on a target, or None; what else does not, its compiler says."""
    if isinstance(tile, TritonTile):
        return _triton_refusal(problem, tile)
    if tile.wgmma and target.arch != "sm_90a" and (problem.op, pass_name) != ("chunk_select", "backward"):
        return f"{target.name} has no wgmma"
    if isinstance(problem, ChunkSelect):
        return _select_refusal(problem, pass_name, tile)
    if tile.form != "token" or pass_name == "backward":
        if tile.tokens * problem.top_k > LISTED_SLOTS:
            return f"tokens * top_k must be at most {LISTED_SLOTS}, got {tile.tokens * problem.top_k}"
        if tile.form == "warpgroups" and pass_name == "forward" and tile.tokens * problem.groups > 448:
            return f"warpgroups share at most 448 rows, got {tile.tokens * problem.groups}"
        if tile.tokens * problem.groups > LISTED_ROWS and tile.tokens > 1:
            return f"a tile has at most {LISTED_ROWS} rows, got {tile.tokens * problem.groups}"
    if pass_name == "backward" and tile.tokens > MASKED_TOKENS:
        return f"a tile of the backward has at most {MASKED_TOKENS} tokens, got {tile.tokens}"
    if tile.wgmma and (tile.form != "token" or pass_name == "backward") and tile.stages < 2:
        return "chunks are loaded ahead: at least 2 stages"
    return _too_large(problem, pass_name, tile, target)


def _too_large(problem: Problem, pass_name: str, tile: Tile, target: GpuTarget) -> str | None:
    for block in blocks_of(problem, pass_name, tile):
        if block.shared > SHARED[target.arch][1]:
            return f"a block would take {block.shared >> 10} KiB of shared memory, more than {target.name} has"
        if block.threads > MOST_THREADS:
            return f"a block would have {block.threads} threads, more than {MOST_THREADS}"
    return None


def _select_refusal(p: ChunkSelect, pass_name: str, tile: GpuTile) -> str | None:
    if pass_name == "backward":
        return None
    if tile.wgmma and (tile.tokens % 64 or tile.blocks > 2):
        return f"streaming takes whole 64 tokens and at most 2 blocks, got {tile.tokens} and {tile.blocks}"
    if tile.tokens % 16 or tile.tokens > 256 or tile.stages < 2:
        return f"a selection takes 16 to 256 tokens and 2 stages or more, got {tile.tokens} and {tile.stages}"
    return None


def _triton_refusal(problem: Problem, tile: TritonTile) -> str | None:
    if max(tile.warps, tile.memory_warps) > 16:
        return "a program has at most 16 warps"
    if isinstance(problem, ChunkSelect):
        return "blocks are too large" if tile.tokens * tile.columns > TRITON_ELEMENTS else None
    rows = max(tile.tokens, tile.memory_tokens) * power_of_two(problem.groups)
    width = max(power_of_two(problem.chunk_size), power_of_two(problem.head_dim))
    return "blocks are too large" if rows * width > TRITON_ELEMENTS else None


def wasteful(problem: Problem, pass_name: str, tile: Tile, target: GpuTarget) -> bool:
    """Whether a tile is not worth building: it asks for blocks that do not fit together, spills much, or does not fill
    its rows although more tokens would."""
    for block in blocks_of(problem, pass_name, tile):
        fitting = block.fitting(target)
        if not fitting or fitting < block.resident:
            return True
        room = REGISTERS // (max(1, block.resident) * block.threads)
        if block.registers > 1.25 * min(room, MOST_REGISTERS):
            return True
    if isinstance(problem, ChunkSelect) or isinstance(tile, TritonTile) or tile.form == "token":
        return False
    return tile_rows(problem, tile) >= 2 * tile.tokens * problem.groups > 0
