"""What the forms of chunk attention's forward on GPUs share: which problems they serve, and a tile's walk over its list."""

import math
from typing import Any

import tilelang.language as T

from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs.gpu.union import EMPTY, ROW_GROUP, UnionLists, ballot

LOG2E = math.log2(math.e)
TENSORS = ("q", "k", "v", "indices", "weights", "o")
# Every exchange through shared memory has its barrier written out; the compiler would add one to every iteration.
OPTIONS = {
    "tl.enable_fast_math": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_warp_specialized": True,
}


def require_supported(problem: ChunkAttention) -> None:
    """Says which problems the GPU programs of chunk attention compute.

    Raises:
        ProblemError: fp32, a head width that is not a multiple of 16 up to 256, or such a chunk size.
    """
    if problem.dtype == "float32":
        raise ProblemError("compiled GPU kernels are float16 or bfloat16; float32 runs on the Triton backend")
    for name, value, least in (("head_dim", problem.head_dim, 16), ("chunk_size", problem.chunk_size, 16)):
        if value % 16 or not least <= value <= 256:
            raise ProblemError(f"compiled GPU kernels need {name} to be a multiple of 16 up to 256, got {value}")


class Walk:
    """What a tile's rows do at every entry of its list, as macros that all kinds of matrix instructions share.

    Row t*G + g is query head g of token t, and a warp owns 16 rows in a row. Where those always belong to one token
    (``whole``), lane j of the warp holds the token's slots j, j+32, ... , and the weight at an entry is found by a vote.
    Else ``following`` is every row's next entry, ``following_weight`` the weight there, and ``slot`` its place among the
    token's slots. ``weight`` is that at the current entry.
    """

    def __init__(self, lists: UnionLists, rows: int) -> None:
        p, TOKENS = lists.problem, lists.tile.tokens
        S, G, K = p.chunk_size, p.groups, p.top_k
        scale = p.scale * LOG2E
        # If a warp's rows belong to one token, its weight is zero for all of them or for none: skipping the chunks that
        # the token did not select is then all the masking there is to do.
        self.whole = WHOLE = G % ROW_GROUP == 0
        self.alloc = T.alloc_local if WHOLE else T.alloc_fragment
        HELD = -(-K // 32)
        self.state_shape = (HELD,) if WHOLE else (rows,)
        self.weight_shape = (1,) if WHOLE else (rows,)

        @T.macro
        def start(n, tx, following, following_weight, slot, slot_entry, slot_weight):
            if WHOLE:
                token = tx // (2 * G)
                for j in T.unroll(HELD):
                    following[j] = EMPTY
                    following_weight[j] = 0.0
                    if token < TOKENS and j * 32 + tx % 32 < K:
                        following[j] = slot_entry[n, token, j * 32 + tx % 32]
                        following_weight[j] = slot_weight[n, token, j * 32 + tx % 32]
            else:
                for r in T.Parallel(rows):
                    slot[r] = 0
                    following[r] = T.if_then_else(r // G < TOKENS, slot_entry[n, T.min(r // G, TOKENS - 1), 0], EMPTY)

        @T.macro
        def advance(i, n, following, following_weight, slot, weight, slot_entry, slot_weight):
            """Sets the weights at entry i; rows whose token selected it step to the token's next slot."""
            if WHOLE:
                votes = T.alloc_var("int32")
                weight[0] = 0.0
                for j in T.unroll(HELD):
                    votes = ballot(following[j] == i)
                    if votes != 0:
                        weight[0] = T.shfl_sync(following_weight[j], T.call_extern("int32", "__ffs", votes) - 1)
            else:
                for r in T.Parallel(rows):
                    weight[r] = 0.0
                    if following[r] == i:
                        weight[r] = slot_weight[n, T.min(r // G, TOKENS - 1), slot[r]]
                        slot[r] = slot[r] + 1
                        following[r] = slot_entry[n, T.min(r // G, TOKENS - 1), slot[r]]

        @T.macro
        def softmax(logits, peak, factor, weight):
            """Leaves the exponentials in ``logits`` and weight / denominator in ``factor``."""
            T.reduce_max(logits, peak, dim=1, clear=True)
            for r in T.Parallel(rows):
                peak[r] = (T.max(peak[r], 0.0) if p.off_by_one else peak[r]) * scale
            for r, j in T.Parallel(rows, S):
                logits[r, j] = T.exp2(logits[r, j] * scale - peak[r])
            T.reduce_sum(logits, factor, dim=1)
            for r in T.Parallel(rows):
                factor[r] = weight[0 if WHOLE else r] / (factor[r] + (T.exp2(-peak[r]) if p.off_by_one else 0.0))

        @T.macro
        def weigh(tx, bits, logits, peak, factor, weight):
            """The softmax, in the warps of which a row has a weight; ``bits`` says which, 16 rows a bit."""
            if WHOLE:
                if weight[0] != 0.0:
                    softmax(logits, peak, factor, weight)
            else:
                if ((bits >> (tx // 32)) & 1) != 0:
                    softmax(logits, peak, factor, weight)

        @T.macro
        def probabilities(P, logits, factor, weight):
            """Weighted probabilities: exactly zero where the weight is, whatever the logits are."""
            if WHOLE:
                if weight[0] != 0.0:
                    for r, j in T.Parallel(rows, S):
                        P[r, j] = logits[r, j] * factor[r]
                else:
                    T.fill(P, 0.0)
            else:
                for r, j in T.Parallel(rows, S):
                    P[r, j] = T.if_then_else(weight[r] == 0.0, 0.0, logits[r, j] * factor[r])

        self.start, self.advance, self.softmax = start, advance, softmax
        self.weigh, self.probabilities = weigh, probabilities


def tile_copies(problem: ChunkAttention, tokens: int, rows: int) -> Any:
    """Macros that bring a tile's query rows to shared memory (zeros in the rows of no token) and its sums to ``o``."""
    G = problem.groups

    @T.macro
    def load(q, queries, b, bh, t0, L):
        for r, d in T.Parallel(rows, problem.head_dim):
            token = T.min(t0 + T.min(r // G, tokens - 1), L - 1)
            queries[r, d] = q[b, token, bh * G + r % G, d]

    @T.macro
    def store(o, sums, b, bh, t0, L):
        for r, d in T.Parallel(rows, problem.head_dim):
            if r < tokens * G and t0 + r // G < L:
                o[b, t0 + r // G, bh * G + r % G, d] = sums[r, d]

    return load, store
