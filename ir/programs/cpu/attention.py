"""Chunk attention on CPUs, forward.

A unit of work is a tile of T neighbouring tokens of one kv head. The union of their chunk lists is walked once: a chunk
is packed, the rows of the tokens that selected it are gathered, and two register-blocked products with a softmax between
them run on exactly those rows. So no flop is spent on tokens that did not select a chunk, a chunk is packed once a tile,
and the same program serves prefill, training and decode.
"""

from typing import Any

from tvm.script import tirx as T

from hsa_compile.ir.operators import ChunkAttention
from hsa_compile.ir.programs import CpuTile, Program, Region, Stage
from hsa_compile.ir.programs.cpu.blocks import LOG2E, clear, copy_row, product, softmax_row, transpose


class Layout:
    """The sizes that the attention programs share."""

    def __init__(self, problem: ChunkAttention, tile: CpuTile) -> None:
        self.width = tile.pad(problem.head_dim)
        self.keys = tile.pad(problem.chunk_size)
        self.pairs = max(1, tile.rows // problem.groups)  # (token, slot) pairs gathered at a time
        self.rows = -(-self.pairs * problem.groups // tile.row_block) * tile.row_block
        self.out_rows = tile.tokens * problem.groups
        self.slots = tile.tokens * problem.top_k
        self.table = max(tile.lanes, 1 << (2 * self.slots - 1).bit_length())  # hash table, at most half full

    def workspace(self) -> tuple[Region, ...]:
        """What a thread needs to walk a tile's chunks and gather rows for one of them."""
        floats = {
            "keys_t": self.width * self.keys,
            "values": self.keys * self.width,
            "queries": self.rows * self.width,
            "logits": self.rows * self.keys,
            "weight": self.rows,
            "sums": (self.out_rows + 1) * self.width,  # the last row swallows the padding of row blocks
        }
        integers = {
            "target": self.rows,
            "chunk": self.table,
            "head": self.table,
            "next": self.slots,
            "found": self.slots,
        }
        return tuple(Region(n, "float32", str(c)) for n, c in floats.items()) + tuple(
            Region(n, "int32", str(c)) for n, c in integers.items()
        )


def group_by_chunk(tile, table, K) -> Any:
    """Groups the filled slots of a tile's tokens by chunk, in the order of first appearance.

    A pair is ``token_in_tile * K + slot``. ``chunk[s]`` is the chunk in place s of a hash table (-1: free), ``head[s]``
    its last pair, ``next`` chains pairs, ``found[0 : count[0]]`` are the places in use.
    """
    empty = clear(tile, -1, "int32")

    @T.inline
    def group(indices, i0, stride, tokens, chunk, head, next, found, count):
        place = T.alloc_buffer((2,), "int32", scope="local")
        empty(chunk, table)
        count[0] = 0
        for pair in T.serial(tokens * K):
            place[0] = indices[i0 + T.cast(pair // K, "int64") * stride + pair % K]
            if place[0] >= 0:
                place[1] = place[0] & (table - 1)
                while chunk[place[1]] != -1 and chunk[place[1]] != place[0]:
                    place[1] = (place[1] + 1) & (table - 1)
                if chunk[place[1]] == -1:
                    chunk[place[1]] = place[0]
                    head[place[1]] = -1
                    found[count[0]] = place[1]
                    count[0] = count[0] + 1
                next[pair] = head[place[1]]
                head[place[1]] = pair

    return group


def program(problem: ChunkAttention, tile: CpuTile) -> Program:
    """The forward pass: one stage, a unit for every kv head of every tile of tokens."""
    lay = Layout(problem, tile)
    Hq, Hkv, D, S, K, G = (
        problem.q_heads, problem.kv_heads, problem.head_dim, problem.chunk_size, problem.top_k, problem.groups,
    )  # fmt: skip
    MR, TOKENS, WIDTH, KEYS = tile.row_block, tile.tokens, lay.width, lay.keys
    group = group_by_chunk(tile, lay.table, K)
    zero = clear(tile, 0.0)
    pack_keys = transpose(tile, D, KEYS)
    pack_row = copy_row(tile, D)
    score = product(tile, KEYS, WIDTH)
    softmax = softmax_row(tile, S, KEYS, problem.off_by_one)
    add_values = product(tile, WIDTH, KEYS, target="scatter")
    logit_scale = problem.scale * LOG2E

    @T.prim_func(s_tir=True)
    def attend(
        q_ptr: T.handle("float32"), k_ptr: T.handle("float32"), v_ptr: T.handle("float32"),
        indices_ptr: T.handle("int32"), weights_ptr: T.handle("float32"), o_ptr: T.handle("float32"),
        keys_t_ptr: T.handle("float32"), values_ptr: T.handle("float32"), queries_ptr: T.handle("float32"),
        logits_ptr: T.handle("float32"), weight_ptr: T.handle("float32"), sums_ptr: T.handle("float32"),
        target_ptr: T.handle("int32"), chunk_ptr: T.handle("int32"), head_ptr: T.handle("int32"),
        next_ptr: T.handle("int32"), found_ptr: T.handle("int32"),
        B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        q = T.decl_buffer((B * L * Hq * D,), "float32", data=q_ptr)
        k = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=k_ptr)
        v = T.decl_buffer((B * C * S * Hkv * D,), "float32", data=v_ptr)
        indices = T.decl_buffer((B * L * Hkv * K,), "int32", data=indices_ptr)
        weights = T.decl_buffer((B * L * Hkv * K,), "float32", data=weights_ptr)
        o = T.decl_buffer((B * L * Hq * D,), "float32", data=o_ptr)
        keys_t = T.decl_buffer((WIDTH * KEYS,), "float32", data=keys_t_ptr)
        values = T.decl_buffer((KEYS * WIDTH,), "float32", data=values_ptr)
        queries = T.decl_buffer((lay.rows * WIDTH,), "float32", data=queries_ptr)
        logits = T.decl_buffer((lay.rows * KEYS,), "float32", data=logits_ptr)
        weight = T.decl_buffer((lay.rows,), "float32", data=weight_ptr)
        sums = T.decl_buffer(((lay.out_rows + 1) * WIDTH,), "float32", data=sums_ptr)
        target = T.decl_buffer((lay.rows,), "int32", data=target_ptr)
        chunk = T.decl_buffer((lay.table,), "int32", data=chunk_ptr)
        head = T.decl_buffer((lay.table,), "int32", data=head_ptr)
        next = T.decl_buffer((lay.slots,), "int32", data=next_ptr)
        found = T.decl_buffer((lay.slots,), "int32", data=found_ptr)
        for unit in T.serial(end - begin):
            tiles = (L + TOKENS - 1) // TOKENS
            h = (begin + unit) % Hkv
            b = (begin + unit) // Hkv // tiles
            t0 = (begin + unit) // Hkv % tiles * TOKENS
            tokens = T.cast(T.min(L - t0, T.int64(TOKENS)), "int32")
            count = T.alloc_buffer((1,), "int32", scope="local")
            zero(sums, lay.out_rows * WIDTH)
            group(indices, ((b * L + t0) * Hkv + h) * K, Hkv * K, tokens, chunk, head, next, found, count)
            for entry in T.serial(count[0]):
                memory = ((b * C + chunk[found[entry]]) * S * Hkv + h) * D
                pack_keys(keys_t, k, memory, Hkv * D, S)
                for s in T.serial(S):
                    pack_row(values, s * WIDTH, v, memory + s * (Hkv * D), T.float32(1))
                pair: T.int32 = head[found[entry]]
                while pair >= 0:
                    rows: T.int32 = 0
                    while pair >= 0 and rows < lay.pairs * G:
                        token = b * L + t0 + pair // K
                        for g in T.serial(G):
                            row = rows + g
                            pack_row(queries, row * WIDTH, q, (token * Hq + h * G + g) * D, T.float32(logit_scale))
                            target[row] = pair // K * G + g
                            weight[row] = weights[(token * Hkv + h) * K + pair % K]
                        rows = rows + G
                        pair = next[pair]
                    blocks = (rows + MR - 1) // MR
                    for r in T.serial(blocks * MR - rows):
                        target[rows + r] = lay.out_rows
                    score(logits, target, queries, keys_t, blocks, D)
                    for r in T.serial(rows):
                        softmax(logits, r * KEYS, weight[r])
                    add_values(sums, target, logits, values, blocks, S)
            for t in T.serial(tokens):
                for g in T.serial(G):
                    for d in T.serial(D):
                        o[((b * L + t0 + t) * Hq + h * G + g) * D + d] = sums[(t * G + g) * WIDTH + d]

    tensors = ("q", "k", "v", "indices", "weights", "o")
    workspace = lay.workspace()
    units = f"B * {Hkv} * ((L + {TOKENS - 1}) / {TOKENS})"
    stage = Stage("attend", attend, units, tensors + tuple(r.name for r in workspace))
    return Program(tensors, (), workspace, (stage,))
