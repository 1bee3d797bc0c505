"""The sizes of the CPU program of the sliding window and the flat arrays that it works on; imports no compiler."""

from hsa_compile.ir.operators import SlidingWindow
from hsa_compile.ir.programs import CpuTile, Region
from hsa_compile.ir.programs.cpu.layout import STORAGE, few_tokens, regions

PART_KEYS = 32  # least keys of a part, into which the window of a decoding step is split


class WindowLayout:
    """A tile of tokens of one kv head and a block of keys, or a token and a part of its window.

    Attributes:
        width: D, padded.
        keys: of a block, padded.
        heads: G, padded: query heads as lanes.
        rows: query rows of a tile, padded to row blocks.
        parts: of the window of each of a few tokens.
        part_keys: most keys of a part, padded to row blocks.
    """

    def __init__(self, problem: SlidingWindow, tile: CpuTile) -> None:
        p, MR = problem, tile.row_block
        self.problem, self.tile = problem, tile
        self.width, self.keys, self.heads = tile.pad(p.head_dim), tile.pad(tile.landmarks), tile.pad(p.groups)
        self.rows = -(-tile.tokens * p.groups // MR) * MR
        self.parts = max(1, min(tile.segments, p.window // PART_KEYS))
        self.part_keys = -(-(-(-p.window // self.parts)) // MR) * MR
        self._regions = self._tensors() | self._workspace() | self._scratch()

    def regions(self, *names: str) -> tuple[Region, ...]:
        """The regions of those names, in their order."""
        return tuple(self._regions[name] for name in names)

    def _tensors(self) -> dict[str, Region]:
        p, stored = self.problem, STORAGE[self.problem.dtype]
        queries, keys = f"B * L * {p.q_heads * p.head_dim}", f"B * L * {p.kv_heads * p.head_dim}"
        ring = f"B * {p.window * p.kv_heads * p.head_dim}"
        return (
            regions(stored, q=queries, o=queries, k=keys, v=keys)
            | regions(stored, past_k=ring, past_v=ring, present_k=ring, present_v=ring)
            | regions("int64", position="B", lengths="B")
        )

    def _workspace(self) -> dict[str, Region]:
        width, rows, heads = self.width, max(self.rows, self.heads), self.heads
        return (
            regions("float32", queries=max(rows, heads) * width, sums=max(rows, heads) * width)
            | regions("float32", keys_t=self.keys * width, values=max(self.keys, self.part_keys) * width)
            | regions("float32", logits=max(rows * self.keys, self.part_keys * heads), peak=rows, total=rows)
            | regions("float32", keys=self.part_keys * width)
            | regions("int32", target=self.rows)
        )

    def _scratch(self) -> dict[str, Region]:
        units = self.problem.kv_heads * self.parts

        def few(elements: int) -> str:
            return few_tokens(self.tile.few, f"B * L * {units * elements}")

        sums = self.problem.groups * self.width
        return regions("float32", parts=few(sums), part_peak=few(self.heads), part_total=few(self.heads))
