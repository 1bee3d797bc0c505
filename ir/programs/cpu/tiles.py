"""What the chunk-attention programs share: packing rows, and walking the chunks that a tile of tokens selected.

A tile is T neighbouring tokens of one kv head. The union of their chunk lists is walked once; for each chunk, the rows
(query heads of tokens) that selected it are gathered, ``pairs`` tokens at a time, and worked on together.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.programs.cpu.blocks import LOG2E, clear, copy_row, store_row
from hsa_compile.ir.programs.cpu.layout import AttentionLayout


def group_by_chunk(lay: AttentionLayout) -> Any:
    """Groups the filled slots of a tile's tokens by chunk, in the order of first appearance.

    A pair is ``token_in_tile * K + slot``. ``chunk[s]`` is the chunk in place s of a hash table (-1: free), ``head[s]``
    its last pair, ``next`` chains pairs, ``found[0 : count[0]]`` are the places in use.
    """
    K, stride, table = lay.problem.top_k, lay.problem.kv_heads * lay.problem.top_k, lay.table
    empty = clear(lay.tile, -1, "int32")

    @T.inline
    def group(m, slots0, tokens, count):
        place = T.alloc_buffer((2,), "int32", scope="local")
        empty(m.chunk, table)
        count[0] = 0
        for pair in T.serial(tokens * K):
            place[0] = m.indices[slots0 + T.cast(pair // K, "int64") * stride + pair % K]
            if place[0] >= 0:
                place[1] = place[0] & (table - 1)
                while m.chunk[place[1]] != -1 and m.chunk[place[1]] != place[0]:
                    place[1] = (place[1] + 1) & (table - 1)
                if m.chunk[place[1]] == -1:
                    m.chunk[place[1]] = place[0]
                    m.head[place[1]] = -1
                    m.found[count[0]] = place[1]
                    count[0] = count[0] + 1
                m.next[pair] = m.head[place[1]]
                m.head[place[1]] = pair

    return group


def gather_heads(lay: AttentionLayout, gradients: bool) -> Any:
    """Packs the query heads of a token as rows ``rows`` ... ``rows + G - 1``, each with the weight of a slot, and with
    their gradients where asked for. Queries carry the logits' factor, for powers of two."""
    Hq, D, G = lay.problem.q_heads, lay.problem.head_dim, lay.problem.groups
    WIDTH, logit_scale = lay.width, lay.problem.scale * LOG2E
    pack_row = copy_row(lay.tile, D)

    @T.inline
    def gather(m, rows, token, h, slot):
        for g in T.serial(G):
            head_row = (token * Hq + h * G + g) * D
            pack_row(m.queries, (rows + g) * WIDTH, m.q, head_row, T.float32(logit_scale))
            if gradients:
                pack_row(m.grads, (rows + g) * WIDTH, m.grad_o, head_row, T.float32(1))
            m.weight[rows + g] = m.weights[slot]

    return gather


def pack_rows(lay: AttentionLayout) -> Any:
    """dst[S, width] = a chunk's rows of k or v, which begin at ``first``."""
    Hkv, D, S, WIDTH = lay.problem.kv_heads, lay.problem.head_dim, lay.problem.chunk_size, lay.width
    pack_row = copy_row(lay.tile, D)

    @T.inline
    def pack(dst, src, first):
        for s in T.serial(S):
            pack_row(dst, s * WIDTH, src, first + s * (Hkv * D), T.float32(1))

    return pack


def walk_chunks(lay: AttentionLayout, load, attend, gradients: bool) -> Any:
    """Walks the chunks that a tile selected and adds up rows of results in ``sums``, token by token and head by head.

    ``load(m, first)`` packs the chunk whose rows of k and v begin there; ``attend(m, rows, slots0)`` adds what the
    gathered rows get from it, row r to row ``target[r]`` of ``sums``. With ``gradients``, ``slot[r]`` is where the row's
    slot lies after ``slots0``, the tile's first.
    """
    p = lay.problem
    Hkv, D, S, K, G = p.kv_heads, p.head_dim, p.chunk_size, p.top_k, p.groups
    MR = lay.tile.row_block
    group = group_by_chunk(lay)
    zero = clear(lay.tile, 0.0)
    gather = gather_heads(lay, gradients)

    @T.inline
    def walk(m, b, h, t0, tokens):
        slots0 = ((b * m.L + t0) * Hkv + h) * K
        count = T.alloc_buffer((1,), "int32", scope="local")
        zero(m.sums, tokens * (G * lay.width))
        group(m, slots0, tokens, count)
        for entry in T.serial(count[0]):
            load(m, ((b * m.C + m.chunk[m.found[entry]]) * S * Hkv + h) * D)
            pair: T.int32 = m.head[m.found[entry]]
            while pair >= 0:
                rows: T.int32 = 0
                while pair >= 0 and rows < lay.pairs * G:
                    slot = pair // K * (Hkv * K) + pair % K
                    gather(m, rows, b * m.L + t0 + pair // K, h, slots0 + slot)
                    for g in T.serial(G):
                        m.target[rows + g] = pair // K * G + g
                        if gradients:
                            m.slot[rows + g] = slot
                    rows = rows + G
                    pair = m.next[pair]
                for r in T.serial((rows + MR - 1) // MR * MR - rows):
                    m.target[rows + r] = lay.out_rows
                attend(m, rows, slots0)

    return walk


def write_sums(lay: AttentionLayout) -> Any:
    """Writes a tile's ``sums`` to a tensor in the shape of q."""
    Hq, D, G, WIDTH = lay.problem.q_heads, lay.problem.head_dim, lay.problem.groups, lay.width
    store = store_row(lay.tile, D)

    @T.inline
    def write(m, out, b, h, t0, tokens):
        for t in T.serial(tokens):
            for g in T.serial(G):
                store(out, ((b * m.L + t0 + t) * Hq + h * G + g) * D, m.sums, (t * G + g) * WIDTH)

    return write
