"""Chunk attention on NVIDIA GPUs, backward: two passes, neither of which two blocks ever write the same place in.

dQ goes by tiles of neighbouring tokens that walk the union of their chunk lists; it leaves, a (pair, head), the log2 of
the softmax's denominator folded with the weight, and delta = sum of p*dp, of which ``d_weights`` are sums. dK and dV go
chunk by chunk over the pairs that selected it, as fp32 partials of work items that are added in order: no atomics, so
gradients repeat to the bit. Both passes recompute the logits: seven products in place of five, and nothing of the
forward is kept.
"""

from hsa_compile.ir.operators import ChunkAttention, ProblemError
from hsa_compile.ir.programs import GpuProgram, GpuTile, Launch, Region
from hsa_compile.ir.programs.gpu.backward_memory import memory_pass, sum_items
from hsa_compile.ir.programs.gpu.backward_pieces import query_pass_by_pieces
from hsa_compile.ir.programs.gpu.backward_queries import query_pass, sum_heads
from hsa_compile.ir.programs.gpu.pairs import Pairs
from hsa_compile.ir.programs.gpu.places import grouping_launches

TENSORS = ("grad_o", "q", "k", "v", "indices", "weights", "d_q", "d_k", "d_v", "d_weights")
# Fast math turns exp2 and log2 into single instructions; synchronization is written out.
OPTIONS = {
    "tl.enable_fast_math": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_data_race_check": True,
    "tl.disable_thread_storage_sync": True,
}


def program(problem: ChunkAttention, tile: GpuTile) -> GpuProgram:
    """The backward pass.

    Scratch, in bytes a token and kv head: about ``K*(28 + 8*G)`` for the pairs and ``8*D*(1 + K*S/pairs)`` for partials.

    Raises:
        ProblemError: the problem is float32, S or D is not a multiple of 16 in 16..256, or they are too wide for sm_80.
    """
    if problem.dtype == "float32":
        raise ProblemError("this backward takes float16 and bfloat16; float32 is served by the Triton programs")
    if problem.chunk_size % 16 or not 16 <= problem.chunk_size <= 256:
        raise ProblemError(f"chunk_size must be a multiple of 16 from 16 to 256, got {problem.chunk_size}")
    if problem.head_dim % 16 or not 16 <= problem.head_dim <= 256:
        raise ProblemError(f"head_dim must be a multiple of 16 from 16 to 256, got {problem.head_dim}")
    pairs = Pairs(problem, tile)
    G, D, pieces = problem.groups, problem.head_dim, -(-problem.chunk_size // 64)
    scratch = (
        *pairs.regions(),
        Region("lse", "float32", f"{pairs.places} * {G}"),
        Region("delta", "float32", f"{pairs.places} * {G}"),
        Region("partials", "float32", f"{pairs.items} * {pieces * 2 * 64 * D}"),
    )
    # A row of a tile takes 5/4 S + D/2 registers of each of its two threads' 255.
    by_pieces = problem.chunk_size * 5 // 4 + D // 2 > 224
    if by_pieces and not tile.wgmma:
        raise ProblemError("chunk_size * 5 / 4 + head_dim / 2 must be at most 224 below sm_90a")
    dims = {
        **pairs.dims, "PLACES": pairs.places, "BLOCKS": f"({pairs.places} / {pairs.block_tokens} > 0 ? {pairs.places} / {pairs.block_tokens} : 1)",
        "ITEMS": pairs.items, "ROWS": f"(L > 0 ? B * L : 1) * {problem.kv_heads}", "KEYS": f"(C > 0 ? C : 1) * {problem.chunk_size}",
    }  # fmt: skip

    def launch(function, *arguments: str) -> Launch:
        named = {str(d) for buffer in function.buffer_map.values() for d in buffer.shape}
        used = {name: text for name, text in dims.items() if name in named}
        return Launch(function.attrs["global_symbol"], function, arguments, used, OPTIONS)

    return GpuProgram(
        TENSORS,
        scratch,
        (
            *grouping_launches(pairs),
            launch(
                (query_pass_by_pieces if by_pieces else query_pass)(pairs, tile), "q", "k", "v", "grad_o", "entries", "entry_count", "place_pair", "lse",
                "delta", "d_q",
            ),
            pairs.launch(sum_heads(pairs), "place_of", "delta", "d_weights", PLACES=pairs.places),
            launch(
                memory_pass(pairs, tile), "q", "k", "v", "grad_o", "items", "order", "place_pair", "lse", "delta", "partials",
                "d_k", "d_v",
            ),
            pairs.launch(sum_items(pairs), "chunk_pairs", "chunk_item", "partials", "d_k", "d_v", ITEMS=pairs.items),
        ),
    )  # fmt: skip
