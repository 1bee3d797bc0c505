"""The hand-picked tiles of the Triton programs: plain functions of the problem, all in this one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hsa_compile.ir.operators import DTYPE_BYTES, ChunkAttention, ChunkSelect, Problem

ITEM_PAIRS = 256
MANY = 1 << 20  # tokens, of long segments
# Programs a multiprocessor should have before a selection of few rows is no longer split over the landmarks.
SPLIT_PROGRAMS = 2
# Most partial results of a row that one program merges in registers.
MERGE_CANDIDATES = 4096


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << max(0, n - 1).bit_length())


class Sizes(NamedTuple):
    """Of one kernel: tokens of a tile (or pairs of one chunk), warps, chunks (or blocks of pairs) in flight."""

    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TritonTile:
    """Sizes that a schedule chooses for a pass of the Triton programs. What a pass has no use for is left as it is.

    Args:
        tokens: neighbouring tokens of a tile, each as many rows as a group has heads; of a selection, its rows. A power
            of two.
        warps: of a program.
        stages: chunks in flight.
        memory_tokens, memory_warps, memory_stages: as these, of the backward's pass that goes chunk by chunk.
        pairs: most (token, slot) pairs of a chunk that one program adds up before partial sums go through memory. More
            make the partial sums smaller, fewer spread a popular chunk over more multiprocessors.
        columns: landmarks that a selection scores at a time.
        depth: elements of the width that it multiplies at a time.
    """

    tokens: int = 4
    warps: int = 4
    stages: int = 2
    memory_tokens: int = 4
    memory_warps: int = 4
    memory_stages: int = 2
    pairs: int = 256
    columns: int = 64
    depth: int = 64

    def __post_init__(self) -> None:
        for name in ("tokens", "warps", "memory_tokens", "memory_warps", "pairs", "columns", "depth"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        for name in ("stages", "memory_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pairs % self.memory_tokens:
            raise ValueError(f"pairs ({self.pairs}) must be a multiple of memory_tokens ({self.memory_tokens})")

    @property
    def queries(self) -> Sizes:
        """Of the kernel that goes by tiles of tokens."""
        return Sizes(self.tokens, self.warps, self.stages)

    @property
    def memory(self) -> Sizes:
        """Of the kernel that goes chunk by chunk."""
        return Sizes(self.memory_tokens, self.memory_warps, self.memory_stages)


def precision(dtype: str) -> str:
    """tf32x3, three products of 11-bit halves, keeps float32's accuracy on the matrix units, which "ieee" leaves:
    root-mean-square errors of 4e-7 (o) to 7e-7 (gradients) of the reference, on an H100."""
    return "tf32x3" if dtype == "float32" else "ieee"


def tile_for(problem: Problem, pass_name: str, length: int | None = None) -> TritonTile:
    """The hand-picked tile of a problem's pass, for segments of about ``length`` tokens; for long ones where None."""
    if isinstance(problem, ChunkSelect):
        return select_tile(problem, MANY if length is None else length) if pass_name == "forward" else TritonTile()
    if pass_name == "forward":
        return TritonTile(*_query_sizes(problem, "forward"))
    memory = _memory_sizes(problem)
    return TritonTile(*_query_sizes(problem, "backward"), *memory, pairs=ITEM_PAIRS)


def _query_sizes(problem: ChunkAttention, pass_name: str) -> Sizes:
    """Of the forward, or of the backward's dQ.

    64 rows are what a warpgroup's matrix instruction takes. With few query heads a group they would need so many tokens
    that the union of their lists grows faster than the rows that use it (G = 1 on an H100: 16 tokens take 1.95 ms, 64
    take 2.7, 32 take 3.4): 16 tokens at most there.
    """
    groups, chunk = power_of_two(problem.groups), chunk_bytes(problem)
    tokens = max(1, min(16, 64 // groups))
    warps = max(1, min(4, tokens * groups // 16))
    if chunk > 8 << 10:  # the accumulators of a wider or longer chunk want the registers of more warps
        more = chunk > 16 << 10 or (problem.dtype == "float32" and pass_name == "backward")
        warps = max(4, warps * 2 if more else warps)
    return Sizes(tokens, warps, _stages(problem, 2 * chunk))


def chunk_bytes(problem: ChunkAttention) -> int:
    """Of a chunk's keys, as padded."""
    return power_of_two(problem.chunk_size, 16) * power_of_two(problem.head_dim, 16) * DTYPE_BYTES[problem.dtype]


def _memory_sizes(problem: ChunkAttention) -> Sizes:
    """Pairs of one chunk share nothing but the chunk, so that rows are limited by registers and shared memory alone.

    Half precision, 8 heads a group and more: 128 rows (H100, G = 16: 3.6 ms in place of 4.0 at D = 64, 9.8 in place of
    12.4 at D = 128, whole backward); with one head they lose (5.7 for 5.1).
    """
    groups, chunk = power_of_two(problem.groups), chunk_bytes(problem)
    row = power_of_two(problem.head_dim, 16) * DTYPE_BYTES[problem.dtype]
    rows = 64
    if problem.dtype != "float32" and groups >= 8 and chunk <= 16 << 10:
        rows = 128
    if problem.dtype == "float32" and chunk > 16 << 10:
        # The chunk and four matrices of rows x S or D lie in shared memory in halves of tf32: 64 rows do not fit.
        rows = 16
    tokens = max(1, rows // groups)
    warps = 8 if chunk > 8 << 10 and tokens * groups >= 64 else 4
    return Sizes(tokens, warps, _stages(problem, 2 * tokens * groups * row))


def _stages(problem: ChunkAttention, loaded: int) -> int:
    """Steps in flight, from the bytes that each loads, so that several programs fit a multiprocessor."""
    if problem.dtype == "float32":
        loaded *= 2  # shared memory also holds the halves of what is multiplied
    return 3 if loaded <= 16 << 10 else 2 if loaded <= 64 << 10 else 1


def select_tile(problem: ChunkSelect, L: int) -> TritonTile:
    """Tiles of the forward; ``L`` tokens, so that a decoded token does not pay for 64."""
    width = power_of_two(problem.retrieval_dim, 16)
    rows = 16 if L <= 16 else 64
    if width <= 128:
        # Narrow tiles waste less on rows that have nothing to insert: 0.49 ms for 0.53 with 64 (H100, 128K tokens).
        return TritonTile(rows, 4, columns=32 if L > 16 else 64, depth=width)
    # A width that does not fit at once is read again for every tile of landmarks: larger tiles read it less often.
    wide = 128 if L > 64 and problem.top_k <= 32 else rows
    return TritonTile(wide, 8 if wide == 128 else 4, columns=128, depth=64)


def select_splits(problem: ChunkSelect, tile: TritonTile, B: int, L: int, C: int, processors: int) -> int:
    """Into how many spans the landmarks are cut so that the programs fill ``processors`` multiprocessors; 1 leaves them
    whole."""
    programs = -(-L // tile.tokens) * B * problem.retrieval_heads
    if programs * 2 > processors:
        return 1
    wanted = SPLIT_PROGRAMS * processors // programs
    return max(1, min(wanted, -(-C // tile.columns), MERGE_CANDIDATES // problem.top_k))
