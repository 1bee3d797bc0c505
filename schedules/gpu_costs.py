"""A model of the GPU programs' time: matrix products, exponentials, what waits for memory, and bytes. It ranks tiles,
no more.

Seconds of a kernel are those of its slowest resource plus a share of the others. Rates are the machine's measured ones,
constants fitted by eye to what an H100 took: the forward 0.24 ms on local selections at (B, L, heads, D, K) =
(8, 4096, 16/1, 64, 8), 1.6 at (1, 32768, 32/2, 128, 16), 1.75 at (1, 32768, 16/16, 64, 16); the backward 0.72, 5.2 and
3.6; selecting 16 of 128 K tokens' chunks 0.21 ms at a width of 64, 0.95 at 1024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.operators import DTYPE_BYTES
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.costs import Workload, seen_chunks, union_chunks
from hsa_compile.schedules.gpu_resources import Block, blocks_of, memory_columns, tile_rows
from hsa_compile.schedules.target import GpuTarget
from hsa_compile.schedules.triton import TritonTile, power_of_two

LAUNCH = 4e-6  # seconds that a kernel takes at least
LANES, CLOCK = 128, 1.7e9  # instructions a cycle of a multiprocessor, cycles a second
# Instructions an element of a softmax, of its backward, and of the pass over the memory.
SOFTMAX, SOFTMAX_BACKWARD, WEIGHED = 8.0, 13.0, 6.0
# Of a selection: of comparing a score with the bar, of making the bar, and seconds to put an entry on a list.
COMPARED, BARRED, ENTERED = 3.0, 3.0, 6e-9
MMA = 0.6  # rate of the matrix instructions of sm_80 beside wgmma
TRITON = 1.1  # what the same sizes take in Triton, which multiplies rows that did not select a chunk
WALKED = 1e-6  # seconds of a block's visit of a chunk, alone on the machine
WIDER = 0.08  # more time for twice the rows: warpgroups wait for one another
WAITING = 0.3e-6  # of a visit of a chunk that other blocks on the multiprocessor do not cover
L2 = 2.2  # bandwidth of the level 2 cache over the memory's
SLOT = 6e-11  # seconds to list a selected slot
SHARE = 0.3  # of the resources that are not the slowest


@dataclass(frozen=True)
class GpuMachine:
    """Args:
    threads: multiprocessors.
    flops: fused multiply-adds counted as two, a second, of a large matrix product in half precision.
    bandwidth: bytes of memory a second, read and written.
    """

    threads: int
    flops: float
    bandwidth: float


def estimate_ms(
    problem: Problem, pass_name: str, tile: GpuTile | TritonTile, load: Workload, machine: GpuMachine, target: GpuTarget
) -> float:
    """Milliseconds that a pass should take."""
    blocks = blocks_of(problem, pass_name, tile)
    if isinstance(problem, ChunkSelect):
        if pass_name == "backward":
            seconds = _gradients(problem, tile, load, machine)
        else:
            seconds = _selection(problem, tile, blocks[0], load, machine, target)
    elif isinstance(tile, GpuTile) and tile.form == "token" and pass_name == "forward":
        seconds = _by_token(problem, tile, blocks[0], load, machine, target)
    else:
        seconds = _walk(problem, pass_name, tile, blocks[0], load, machine, target)
        if pass_name == "backward":
            seconds += _memory_pass(problem, tile, blocks[1], load, machine, target)
    return 1e3 * (seconds + LAUNCH)


def _slowest(*seconds: float) -> float:
    return max(seconds) + SHARE * (sum(seconds) - max(seconds))


def _instructions(machine: GpuMachine) -> float:
    """A second, on all multiprocessors."""
    return machine.threads * LANES * CLOCK


def _walk(
    p: ChunkAttention, pass_name: str, tile: GpuTile | TritonTile, block: Block, load: Workload, machine: GpuMachine,
    target: GpuTarget,
) -> float:  # fmt: skip
    """Tiles of tokens that meet the union of their chunks."""
    K, D, S, G = min(p.top_k, load.C), p.head_dim, p.chunk_size, p.groups
    backward, seen = pass_name == "backward", max(1.0, load.C / 2)
    tokens = min(tile.tokens, load.L)
    union = union_chunks(tokens, K, seen, load.selection)
    tiles = load.B * p.kv_heads * math.ceil(load.L / tokens)
    visits = tiles * union
    if isinstance(tile, TritonTile):
        rows, rate, warps = power_of_two(G) * tile.tokens, 1.0, tile.warps
        active, products = float(rows), float(rows)
    else:
        rows, rate = tile_rows(p, tile), 1.0 if tile.wgmma and tile.form != "warps" else MMA
        warps = max(1, rows // 16)
        # 16 rows whose tokens did not select a chunk skip its softmax, and by warps its products.
        active = rows * union_chunks(min(tokens, max(1, 16 // G)), K, seen, load.selection) / union
        # By warpgroups 64 rows skip together.
        products = active if tile.form == "warps" else float(rows)
        if tile.form == "warpgroups":
            products = rows * union_chunks(min(tokens, max(1, 64 // G)), K, seen, load.selection) / union
    flops = (6 if backward else 4) * visits * products * S * D
    fitting = max(1, block.fitting(target))
    # Few rows a warp, or few blocks: less is in flight while a chunk is on its way.
    ahead = 1 + 1 / tile.stages
    waiting = visits / machine.threads * WAITING * ahead * (2 if backward else 1) / fitting
    waves = _waves(tiles, fitting, machine)
    size = DTYPE_BYTES[p.dtype]
    moved = load.B * load.L * p.q_heads * D * size * (4 if backward else 2)
    seconds = _slowest(
        flops / (machine.flops * rate) + waiting * waves,
        visits * active * S * (SOFTMAX_BACKWARD if backward else SOFTMAX) / _instructions(machine),
        visits * 2 * S * D * size / (L2 * machine.bandwidth),
        moved / machine.bandwidth,
    )
    seconds *= _spilling(block) * (1 + 0.05 * max(0, rows // (16 * warps) - 2))
    seconds = max(seconds * (1 + WIDER * max(0.0, math.log2(rows / 64))), union * WALKED)
    return seconds * (TRITON if isinstance(tile, TritonTile) else 1.0) + SLOT * load.B * load.L * p.kv_heads * K


def _waves(blocks: float, fitting: int, machine: GpuMachine) -> float:
    """Time against that of blocks which divide evenly among the multiprocessors."""
    room = machine.threads * fitting
    return math.ceil(blocks / room) * room / blocks if blocks < 8 * room else 1.0


def _spilling(block: Block) -> float:
    """Slower by registers that do not fit."""
    room = 65536 // (max(1, block.resident) * block.threads)
    return 1 + max(0.0, block.registers / min(room, 255) - 1)


def _memory_pass(
    p: ChunkAttention, tile: GpuTile | TritonTile, block: Block, load: Workload, machine: GpuMachine, target: GpuTarget
) -> float:
    """Work items of a chunk's pairs: four products, and partial sums of those chunks that have several items."""
    D, S, G, size = p.head_dim, p.chunk_size, p.groups, DTYPE_BYTES[p.dtype]
    pairs = load.B * load.L * p.kv_heads * min(p.top_k, load.C)
    items = pairs / tile.pairs + load.B * p.kv_heads * load.C
    if isinstance(tile, TritonTile):
        columns = tile.memory_tokens * power_of_two(G)
        padding, steps, factor = power_of_two(G) / G, pairs / tile.memory_tokens, TRITON
    else:
        columns = memory_columns(p)
        padding, steps, factor = columns / max(G, 64 // G * G), pairs / max(1, 64 // G), 1.0
    fitting = max(1, block.fitting(target))
    rate = MMA if isinstance(tile, GpuTile) and not tile.wgmma else 1.0
    waiting = WAITING * (2 + 2 / tile.memory_stages) * steps / machine.threads / fitting
    partials = 2 * items * 2 * S * D * 4 / machine.bandwidth
    beginnings = items * 2e-6 / machine.threads / fitting
    seconds = _slowest(
        8 * pairs * G * padding * S * D / (machine.flops * rate) + waiting + beginnings,
        pairs * G * padding * S * WEIGHED / _instructions(machine),
        pairs * 2 * G * D * size / (L2 * machine.bandwidth),
    )
    return factor * seconds * _spilling(block) * (1 + 8 / columns) + partials + 4 * LAUNCH


def _by_token(
    p: ChunkAttention, tile: GpuTile, block: Block, load: Workload, machine: GpuMachine, target: GpuTarget
) -> float:
    """A block for some slots of a token, then a sum."""
    splits = math.ceil(p.top_k / tile.slots)
    blocks = load.B * load.L * p.kv_heads * splits
    waves = math.ceil(blocks / (machine.threads * max(1, block.fitting(target))))
    chunks = load.B * load.L * p.kv_heads * min(p.top_k, load.C) * 2 * p.chunk_size * p.head_dim * 2
    partials = 2 * blocks * p.groups * p.head_dim * 4
    return waves * (1e-6 + 1.5e-6 * tile.slots) + (chunks / L2 + partials) / machine.bandwidth + LAUNCH


def _selection(
    p: ChunkSelect, tile: GpuTile | TritonTile, block: Block, load: Workload, machine: GpuMachine, target: GpuTarget
) -> float:
    """Scores of all visible chunks, their comparison with a bar, and lists."""
    seen, rows = seen_chunks(p, load), load.B * load.L * p.retrieval_heads
    triton = isinstance(tile, TritonTile)
    if isinstance(tile, TritonTile):
        columns, twice, wanted = tile.columns, 1.0, 2 * machine.threads
    else:
        columns = 64 if not tile.wgmma else 256 if p.retrieval_dim > 256 else 128
        twice, wanted = 1 + min(1.0, tile.bound * columns / max(seen, 1)), tile.split
    padded = math.ceil(load.L / tile.tokens) * tile.tokens / load.L * rows
    entering = p.top_k * (1 + math.log(max(1.0, seen / p.top_k))) * (2 - twice if twice < 2 else 0.3)
    rate = 0.8 if isinstance(tile, GpuTile) and tile.wgmma else MMA
    tiles = max(1.0, padded / tile.tokens)
    blocks = tiles * max(1.0, min(seen / columns, wanted / tiles))
    fitting = max(1, block.fitting(target))
    steps = padded / tile.tokens * seen / columns * math.ceil(p.retrieval_dim / 128) * twice
    waiting = steps * WAITING * (1 + (0 if triton else 1 / tile.stages)) / machine.threads / fitting
    loaded = padded / tile.tokens * seen * p.retrieval_dim * DTYPE_BYTES[p.dtype] * twice
    seconds = _slowest(
        2 * padded * seen * p.retrieval_dim * twice / (machine.flops * rate) + waiting,
        padded * seen * (COMPARED + BARRED * (twice - 1)) / _instructions(machine),
        loaded / (L2 * machine.bandwidth),
    )
    lists = rows * entering * ENTERED / machine.threads / fitting * (4 if triton else 1)
    return (seconds + lists) * _waves(blocks, fitting, machine) * _spilling(block)


def _gradients(p: ChunkSelect, tile: GpuTile | TritonTile, load: Workload, machine: GpuMachine) -> float:
    """Rows gathered with weights; work items of a chunk's pairs."""
    pairs = load.B * load.L * p.retrieval_heads * min(p.top_k, load.C)
    row = p.retrieval_dim * DTYPE_BYTES[p.dtype]
    items = pairs / tile.pairs + load.B * p.retrieval_heads * load.C
    spread = tile.pairs * max(1.0, math.log2(max(2.0, load.C))) * 2e-8  # the longest item
    partials = items * p.retrieval_dim * 8 / machine.bandwidth
    return 2 * pairs * row / (L2 * machine.bandwidth) + partials + spread + SLOT * pairs + 3 * LAUNCH
