"""A model of the CPU programs' time: vector instructions, padding, packing and caches. It ranks tiles, no more.

Counted in cycles of a core that issues two fused multiply-adds and two loads a cycle, with a latency of four; a cycle's
length is taken from the machine's measured rate of matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import CpuTile

FMA_LATENCY, FMA_UNITS = 4, 2
SHARED_TOKENS, REDRAWN = 16, 0.07  # neighbours of one draw, and slots that differ, in the selections that are timed
BLOCKS_A_THREAD = 8  # as in host/execute.c
# Cycles, fitted by eye to candidates timed on a Zen 4: a packed element that is transposed, a vector of the softmax
# forward and backward, of a copied row, of the running top K; a gathered token.
TRANSPOSED, SOFTMAX, SOFTMAX_BACKWARD, COPIED, UPDATED, GATHERED = 0.8, 14.0, 24.0, 1.5, 3.0, 20.0


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
    """B rows of L tokens, over C chunks of memory."""

    B: int
    L: int
    C: int


def accumulators_fit(tile: CpuTile, registers: int) -> bool:
    """Accumulators, a row of the right operand and a broadcast element must fit the register file."""
    return tile.row_block * tile.vector_block + tile.vector_block + 1 <= registers


def workspace_bytes(problem: Problem, pass_name: str, tile: CpuTile) -> int:
    """Bytes that a thread works on."""
    if isinstance(problem, ChunkSelect):
        if pass_name == "backward":
            return 0
        width, block = tile.pad(problem.retrieval_dim), tile.pad(tile.landmarks)
        return 4 * (tile.tokens * (width + block + 2 * problem.top_k) + width * block)
    width, keys = tile.pad(problem.head_dim), tile.pad(problem.chunk_size)
    rows = max(1, tile.rows // problem.groups) * problem.groups + tile.row_block
    backward = pass_name == "backward"
    packed = keys * width * (6 if backward else 2)
    gathered = rows * (width + keys) * (2 if backward else 1)
    lists = 6 * tile.tokens * problem.top_k
    return 4 * (packed + gathered + lists + tile.tokens * problem.groups * width)


def estimate_ms(problem: Problem, pass_name: str, tile: CpuTile, load: Workload, machine: Machine) -> float:
    """Milliseconds that a pass should take."""
    if isinstance(problem, ChunkAttention):
        cycles = _attention_cycles(problem, pass_name, tile, load, machine)
    elif pass_name == "forward":
        cycles = _select_cycles(problem, tile, load, machine)
    else:
        cycles = load.B * load.L * problem.kv_heads * problem.top_k * 2 * problem.retrieval_dim / tile.lanes * COPIED
    waiting = waiting_factor(problem, pass_name, tile, load, machine.threads)
    return 1e3 * cycles * _cycle_seconds(tile, machine) / machine.threads * waiting


def waiting_factor(problem: Problem, pass_name: str, tile: CpuTile, load: Workload, threads: int) -> float:
    """How much longer a pass takes because threads wait for the last of the tiles."""
    if isinstance(problem, ChunkAttention):
        units = load.B * problem.kv_heads * math.ceil(load.L / tile.tokens)
        # About half of the backward goes chunk by chunk, whatever the tile.
        share = 0.5 if pass_name == "backward" else 1.0
        return 1 + share * (imbalance(units, threads) - 1)
    if pass_name == "backward":
        return 1.0
    return imbalance(load.B * problem.retrieval_heads * math.ceil(load.L / tile.tokens), threads)


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


def _attention_cycles(p: ChunkAttention, pass_name: str, tile: CpuTile, load: Workload, machine: Machine) -> float:
    backward = pass_name == "backward"
    width, keys, G = tile.pad(p.head_dim), tile.pad(p.chunk_size), p.groups
    tokens = min(tile.tokens, load.L)
    # Distinct chunks of a tile: neighbours share a draw, some slots are drawn anew.
    draws = p.top_k * (math.ceil(tokens / SHARED_TOKENS) + REDRAWN * tokens)
    union = max(1.0, load.C * (1 - math.exp(-draws / max(1, load.C))))
    pairs = tokens * min(p.top_k, load.C) / union  # tokens that share a chunk
    batch = min(float(max(1, tile.rows // G)), pairs)
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


def _select_cycles(p: ChunkSelect, tile: CpuTile, load: Workload, machine: Machine) -> float:
    width, block = tile.pad(p.retrieval_dim), tile.pad(tile.landmarks)
    tokens = min(tile.tokens, load.L)
    rows = math.ceil(tokens / tile.row_block) * tile.row_block
    blocks = max(1.0, load.C / 2 / block) if load.L > 1 else math.ceil(load.C / block)
    one = block * width * TRANSPOSED + _product_cycles(tile, rows, block, p.retrieval_dim)
    one += tokens * (GATHERED / 2 + block / tile.lanes * UPDATED)
    insertions = tokens * p.top_k * (math.log(max(1.0, load.C / p.top_k)) + 1) * p.top_k
    tile_cycles = blocks * one + insertions + tokens * (width / tile.lanes * COPIED + p.top_k**2 / 2)
    tiles = load.B * p.retrieval_heads * load.L / tokens
    return tiles * tile_cycles * _cache_factor(workspace_bytes(p, "forward", tile), machine)
