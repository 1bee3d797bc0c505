"""A model of the CPU programs' time: vector instructions, padding, packing and caches. It ranks tiles, no more.

Counted in cycles of a core that issues two fused multiply-adds and two loads a cycle, with a latency of four; a cycle's
length is taken from the machine's measured rate of matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import CpuTile
from hsa_compile.ir.programs.cpu.layout import QUEUE, AttentionLayout, SelectLayout, layout_for
from hsa_compile.schedules.glue import DTYPE_SIZE

FMA_LATENCY, FMA_UNITS = 4, 2
Selection = Literal["local", "random"]
SHARED_TOKENS, REDRAWN = 16, 0.07  # neighbours of one draw, and slots that differ, in the selections that are timed
BLOCKS_A_THREAD = 8  # as in host/execute.c
# Cycles, fitted by eye to candidates timed on a Zen 4: a packed element that is transposed, a vector of the softmax
# forward and backward, of a copied row; a gathered token.
TRANSPOSED, SOFTMAX, SOFTMAX_BACKWARD, COPIED, GATHERED = 0.4, 14.0, 24.0, 1.5, 20.0
# Of a selection: a vector of scores compared with its lists' last; a slot of these that a queue passes, and that is
# sorted; a dimension of a vector of landmarks times a query.
COMPARED, MERGED, SORTED, SCORED = 4.0, 14.0, 4.0, 1.5


@dataclass(frozen=True)
class Machine:
    """Args:
    threads: that kernels run on.
    flops: fused multiply-adds counted as two, a second, of a large matrix product on all threads.
    l1_bytes, l2_bytes: caches of a core.
    """

    threads: int
    flops: float
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20


@dataclass(frozen=True)
class Workload:
    """B rows of L tokens, over C chunks of memory.

    Args:
        selection: what is timed: neighbours that select much the same ("local", as trained models do), or each for
            itself ("random", the most distinct chunks that there can be).
    """

    B: int
    L: int
    C: int
    selection: Selection = "local"


def seen_chunks(problem: ChunkSelect, load: Workload) -> float:
    """Chunks that a token can select from, on average; the segment ends where the memory does."""
    if load.C * problem.chunk_size >= load.L:
        return load.C - load.L / problem.chunk_size / 2
    return load.C / 2


def union_chunks(tokens: int, top_k: int, seen: float, selection: Selection = "local") -> float:
    """Distinct chunks that neighbours select: local ones share a draw, of which some slots are drawn anew."""
    draws: float = top_k * tokens
    if selection == "local":
        draws = top_k * (math.ceil(tokens / SHARED_TOKENS) + REDRAWN * (tokens - 1))
    return max(1.0, seen * (1 - math.exp(-draws / max(1.0, seen))))


def accumulators_fit(tile: CpuTile, registers: int) -> bool:
    """Accumulators, a row of the right operand and a broadcast element must fit the register file."""
    return tile.row_block * tile.vector_block + tile.vector_block + 1 <= registers


def workspace_bytes(problem: Problem, pass_name: str, tile: CpuTile) -> int:
    """Bytes that a thread works on."""
    return sum(DTYPE_SIZE[r.dtype] * int(r.elements) for r in layout_for(problem, tile).workspace(pass_name))


def split_bytes(problem: Problem, tile: CpuTile) -> int:
    """Bytes of the parts into which a forward pass splits a row, at most."""
    return tile.few * layout_for(problem, tile).part_bytes


def is_split(pass_name: str, tile: CpuTile, length: int) -> bool:
    """Whether segments of that length are split over slots or landmarks instead of into tiles of tokens."""
    return pass_name == "forward" and length <= tile.few


def estimate_ms(problem: Problem, pass_name: str, tile: CpuTile, load: Workload, machine: Machine) -> float:
    """Milliseconds that a pass should take."""
    split = is_split(pass_name, tile, load.L)
    if isinstance(problem, ChunkAttention):
        lay = AttentionLayout(problem, tile)
        cycles = _slot_cycles(lay, load) if split else _attention_cycles(lay, pass_name, load, machine)
    elif pass_name == "forward":
        landmarks = SelectLayout(problem, tile)
        cycles = _part_cycles(landmarks, load) if split else _select_cycles(landmarks, load, machine)
    else:
        cycles = load.B * load.L * problem.kv_heads * problem.top_k * 2 * problem.retrieval_dim / tile.lanes * COPIED
    waiting = waiting_factor(problem, pass_name, tile, load, machine.threads)
    return 1e3 * cycles * _cycle_seconds(tile, machine) / machine.threads * waiting


def waiting_factor(problem: Problem, pass_name: str, tile: CpuTile, load: Workload, threads: int) -> float:
    """How much longer a pass takes because threads wait for the last of the units."""
    split = is_split(pass_name, tile, load.L)
    if isinstance(problem, ChunkAttention):
        units = load.L * problem.top_k if split else math.ceil(load.L / tile.tokens)
        # About half of the backward goes chunk by chunk, whatever the tile.
        share = 0.5 if pass_name == "backward" else 1.0
        return 1 + share * (imbalance(load.B * problem.kv_heads * units, threads) - 1)
    if pass_name == "backward":
        return 1.0
    units = tile.segments if split else math.ceil(load.L / SelectLayout(problem, tile).tokens)
    return imbalance(load.B * problem.retrieval_heads * units, threads)


def _cycle_seconds(tile: CpuTile, machine: Machine) -> float:
    return 2 * FMA_UNITS * tile.lanes / (machine.flops / machine.threads)


def imbalance(units: int, threads: int) -> float:
    """Time against that of units which divide evenly among the threads."""
    block = max(1, units // (threads * BLOCKS_A_THREAD))
    blocks = math.ceil(units / block)
    return math.ceil(blocks / threads) * threads / blocks


def _product_cycles(tile: CpuTile, rows: float, width: int, depth: float) -> float:
    """rows x depth times depth x width; rows count as they are padded."""
    vectors = tile.vectors(width)
    block = tile.row_block * vectors
    # A step of the depth: the block's multiply-adds, its loads and broadcasts, and the chain through each accumulator.
    step = max(block / FMA_UNITS, (vectors + tile.row_block) / 2, FMA_LATENCY)
    spill = 4 * block / depth  # reading and writing the block's results
    return rows / tile.row_block * (width / tile.lanes / vectors) * depth * (step + spill)


def _cache_factor(size: float, machine: Machine) -> float:
    """Slower by what has to come from beyond the level 2 cache."""
    return 1.0 + 0.5 * max(0.0, math.log2(size / (0.75 * machine.l2_bytes)))


def _attention_cycles(lay: AttentionLayout, pass_name: str, load: Workload, machine: Machine) -> float:
    p, tile = lay.problem, lay.tile
    backward = pass_name == "backward"
    width, keys, G = lay.width, lay.keys, p.groups
    tokens = min(tile.tokens, load.L)
    union = union_chunks(tokens, p.top_k, load.C, load.selection)
    pairs = tokens * min(p.top_k, load.C) / union  # tokens that share a chunk
    batch = min(float(lay.pairs), pairs)
    batches = max(1.0, pairs / batch)
    rows = math.ceil(batch * G / tile.row_block) * tile.row_block
    products = (4 if backward else 1) * _product_cycles(tile, rows, keys, p.head_dim)
    products += _product_cycles(tile, rows, width, p.chunk_size)
    if backward:  # both sums over the rows are products with the chunk's tokens as rows
        products += 2 * _product_cycles(tile, keys, width, rows)
    softmax = batch * G * keys / tile.lanes * (SOFTMAX + (SOFTMAX_BACKWARD if backward else 0.0))
    gather = batch * GATHERED + batch * G * width / tile.lanes * COPIED * (4 if backward else 1)
    packing = keys * width * (TRANSPOSED * (4 if backward else 1) + COPIED / tile.lanes)
    tile_cycles = union * (packing + batches * (products + softmax + gather))
    tile_cycles += tokens * G * width * (0.5 + 2 * COPIED / tile.lanes)  # cleared and written
    tiles = load.B * p.kv_heads * load.L / tokens
    return tiles * tile_cycles * _cache_factor(workspace_bytes(p, pass_name, tile), machine)


def _slot_cycles(lay: AttentionLayout, load: Workload) -> float:
    """Few tokens: both products of a slot, heads as lanes in the first, and its part of the sum."""
    p, tile = lay.problem, lay.tile
    block = tile.row_block
    heads, keys = math.ceil(p.groups / block) * block, math.ceil(p.chunk_size / block) * block
    products = _product_cycles(tile, keys, lay.heads, p.head_dim) + _product_cycles(
        tile, heads, lay.width, p.chunk_size
    )
    softmax = p.chunk_size * lay.heads / tile.lanes * SOFTMAX
    packing = lay.width * lay.heads * TRANSPOSED + 2 * p.chunk_size * lay.width / tile.lanes * COPIED
    adding = 2 * p.groups * lay.width / tile.lanes * COPIED
    return load.B * load.L * p.kv_heads * min(p.top_k, load.C) * (products + softmax + packing + adding)


def _select_cycles(lay: SelectLayout, load: Workload, machine: Machine) -> float:
    p, tile, seen = lay.problem, lay.tile, seen_chunks(lay.problem, load)
    tokens, block = min(lay.tokens, load.L), min(lay.block, max(1.0, seen))
    blocks = max(1.0, seen / block)
    panel = tile.vectors(lay.tokens) * tile.lanes
    rows = math.ceil(block / tile.row_block) * tile.row_block
    products = _product_cycles(tile, rows, math.ceil(tokens / panel) * panel, p.retrieval_dim)
    packing = tokens * lay.width * TRANSPOSED + blocks * block * lay.width / tile.lanes * COPIED
    # The queue passes the list when it is full, and at a block's end with room left.
    entering = p.top_k * (math.log(max(1.0, seen / p.top_k)) + 1)
    merges = max(entering / QUEUE, blocks)
    lists = blocks * block * COMPARED + merges * p.top_k * MERGED + p.top_k**2 / 2 * SORTED
    tile_cycles = blocks * products + packing + math.ceil(tokens / tile.lanes) * lists
    tiles = load.B * p.retrieval_heads * load.L / tokens
    return tiles * tile_cycles * _cache_factor(workspace_bytes(p, "forward", tile), machine)


def _part_cycles(lay: SelectLayout, load: Workload) -> float:
    """Few tokens: a vector of landmarks at a time, then lists of all parts merged into one."""
    p, tile = lay.problem, lay.tile
    vectors = tile.segments * math.ceil(seen_chunks(p, load) / tile.segments / tile.lanes)  # parts are rounded up
    packing = lay.width * COPIED
    score = lay.width * SCORED + tile.lanes * COMPARED
    merging = tile.segments * p.top_k * MERGED + p.top_k**2 * SORTED
    return load.B * p.retrieval_heads * (vectors * (packing + load.L * score) + load.L * merging)
