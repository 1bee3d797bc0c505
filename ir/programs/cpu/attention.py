"""Chunk attention on CPUs, forward.

A unit of work is a tile of T neighbouring tokens of one kv head. The union of their chunk lists is walked once: a chunk
is packed, the rows of the tokens that selected it are gathered, and two register-blocked products with a softmax between
them run on exactly those rows. So no flop is spent on tokens that did not select a chunk, and a chunk is packed once a
tile. A few tokens, of a decoding step, go slot by slot instead (``token_attention``).
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import CpuTile, Program
from hsa_compile.ir.programs.cpu.blocks import product, softmax_row, transpose
from hsa_compile.ir.programs.cpu.layout import AttentionLayout, many_tokens
from hsa_compile.ir.programs.cpu.stages import each_token_tile, stage, token_tiles
from hsa_compile.ir.programs.cpu.tiles import pack_rows, walk_chunks, write_sums
from hsa_compile.ir.programs.cpu.token_attention import slot_stage, sum_stage

TENSORS = ("q", "k", "v", "indices", "weights", "o")


def load_chunk(lay: AttentionLayout) -> Any:
    """Packs a chunk's keys, transposed, and its values."""
    Hkv, D, S = lay.problem.kv_heads, lay.problem.head_dim, lay.problem.chunk_size
    pack_keys = transpose(lay.tile, D, lay.keys)
    pack_values = pack_rows(lay)

    @T.inline
    def load(m, first):
        pack_keys(m.keys_t, m.k, first, Hkv * D, S)
        pack_values(m.values, m.v, first)

    return load


def attend_rows(lay: AttentionLayout) -> Any:
    """sums[target] += weight * softmax(queries · keys_t) · values, for gathered rows."""
    D, S, KEYS, MR = lay.problem.head_dim, lay.problem.chunk_size, lay.keys, lay.tile.row_block
    score = product(lay.tile, KEYS, lay.width)
    softmax = softmax_row(lay.tile, S, KEYS, lay.problem.off_by_one)
    add_values = product(lay.tile, lay.width, KEYS, target="scatter")

    @T.inline
    def attend(m, rows, slots0):
        blocks = (rows + MR - 1) // MR
        score(m.logits, m.target, m.queries, m.keys_t, blocks, D)
        for r in T.serial(rows):
            softmax(m.logits, r * KEYS, m.weight[r])
        add_values(m.sums, m.target, m.logits, m.values, blocks, S)

    return attend


def program(problem: ChunkAttention, tile: CpuTile) -> Program:
    """The forward pass: a unit for every kv head of every tile of tokens, or for every slot of a few tokens."""
    lay = AttentionLayout(problem, tile)
    walk = walk_chunks(lay, load_chunk(lay), attend_rows(lay), gradients=False)
    write = write_sums(lay)

    @T.inline
    def attend(m, b, h, t0, tokens):
        walk(m, b, h, t0, tokens)
        write(m, m.o, b, h, t0, tokens)

    heads = problem.kv_heads
    compute = each_token_tile(heads, tile.tokens, attend)
    workspace = lay.workspace("forward")
    units = many_tokens(tile.few, token_tiles(heads, tile.tokens))
    tiles = stage("tiles", units, compute, lay.regions(*TENSORS) + workspace)
    return Program(TENSORS, lay.regions("parts"), workspace, (tiles, slot_stage(lay), sum_stage(lay)))
