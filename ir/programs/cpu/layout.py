"""The sizes of the CPU programs and the flat arrays that they work on: plain data, which imports no compiler, so that the
tuner counts the bytes that kernels reserve.
"""

from hsa_compile.ir.operators import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import CpuTile, Region

# How values lie in memory: bfloat16 as integers, which every target loads and stores (blocks.widen, blocks.narrow).
STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}

QUEUE = 4  # candidates that a lane of selection holds back, so that they pass its list together

_WORKSPACE = {
    ("chunk_attention", "forward"): (
        "queries", "keys", "values", "logits", "sums", "target", "keys_t", "weight", "chunk", "head", "next", "found",
    ),
    ("chunk_attention", "backward"): (
        "keys_t", "queries", "logits", "weight", "sums", "target", "chunk", "head", "next", "found", "keys",
        "values_t", "d_keys", "d_values", "grads", "dp", "slot",
    ),
    ("chunk_select", "forward"): ("queries_t", "queries", "landmarks", "products", "best", "best_index", "seen"),
    ("chunk_select", "backward"): ("sums",),
}  # fmt: skip


def regions(dtype: str, **elements: object) -> dict[str, Region]:
    """Regions of one dtype by their names."""
    return {name: Region(name, dtype, str(n)) for name, n in elements.items()}


def few_tokens(few: int, count: str) -> str:
    """A count of units or elements, none when rows have more than ``few`` tokens."""
    return f"(L <= {few} ? {count} : 0)"


def many_tokens(few: int, count: str) -> str:
    """A count of units or elements, none when rows have at most ``few`` tokens."""
    return f"(L <= {few} ? 0 : {count})"


class Layout:
    """What the layouts of both operators share.

    Attributes:
        width: of a packed row of the heads' width, whole vectors and row blocks.
        part_bytes: of scratch that each of a few tokens needs.
    """

    problem: Problem
    part_bytes: int

    def __init__(self, tile: CpuTile, head_dim: int) -> None:
        self.tile, self.width = tile, tile.pad(head_dim)
        self._regions: dict[str, Region] = {}

    def regions(self, *names: str) -> tuple[Region, ...]:
        """The regions of those names, in their order."""
        return tuple(self._regions[name] for name in names)

    def workspace(self, pass_name: str) -> tuple[Region, ...]:
        """What every thread of a pass has for itself; the elements are plain numbers."""
        return self.regions(*_WORKSPACE[self.problem.op, pass_name])


class AttentionLayout(Layout):
    """Chunk attention: a tile of tokens of one kv head, and rows (query heads of tokens) gathered for one chunk.

    Attributes:
        keys: S, padded.
        pairs: (token, slot) pairs gathered at a time.
        rows: of these, padded to row blocks.
        out_rows: rows of a tile's sums.
        heads: G, padded: query heads as lanes.
        slots: of a tile.
        table: places of a hash table of a tile's chunks, at most half full.
    """

    problem: ChunkAttention

    def __init__(self, problem: ChunkAttention, tile: CpuTile) -> None:
        super().__init__(tile, problem.head_dim)
        G, K = problem.groups, problem.top_k
        self.problem = problem
        self.keys, self.heads = tile.pad(problem.chunk_size), tile.pad(G)
        self.pairs = max(1, tile.rows // G)
        self.rows = -(-self.pairs * G // tile.row_block) * tile.row_block
        self.out_rows, self.slots = tile.tokens * G, tile.tokens * K
        self.table = max(tile.lanes, 1 << (2 * self.slots - 1).bit_length())
        part = problem.kv_heads * K * G * self.width
        self.part_bytes = 4 * part
        parts = regions("float32", parts=few_tokens(tile.few, f"B * L * {part}"))
        self._regions = self._tensors() | self._workspace() | parts

    def _tensors(self) -> dict[str, Region]:
        p = self.problem
        tokens = f"B * L * {p.q_heads * p.head_dim}"
        memory = f"B * C * {p.chunk_size * p.kv_heads * p.head_dim}"
        slots = f"B * L * {p.kv_heads * p.top_k}"
        return (
            regions(STORAGE[p.dtype], q=tokens, k=memory, v=memory, o=tokens)
            | regions(STORAGE[p.dtype], d_q=tokens, d_k=memory, d_v=memory, grad_o=tokens)
            | regions("float32", weights=slots, d_weights=slots)
            | regions("int32", indices=slots)
        )

    def _workspace(self) -> dict[str, Region]:
        rows = max(self.rows, self.heads)
        block, gathered, logits = self.keys * self.width, rows * self.width, rows * self.keys
        sums = max(self.out_rows + 1, self.heads) * self.width  # the last row swallows the padding of row blocks
        return (
            regions("float32", keys_t=block, keys=block, values_t=block, values=block, d_keys=block, d_values=block)
            | regions("float32", queries=gathered, grads=gathered, logits=logits, dp=logits)
            | regions("float32", weight=self.rows, sums=sums)
            | regions("int32", target=self.rows, slot=self.rows)
            | regions("int32", chunk=self.table, head=self.table, next=self.slots, found=self.slots)
        )


class SelectLayout(Layout):
    """Chunk selection: a tile of tokens of one retrieval head, and a block of landmarks.

    Attributes:
        tokens: of a tile, which are lanes.
        block: landmarks scored at a time.
    """

    problem: ChunkSelect

    def __init__(self, problem: ChunkSelect, tile: CpuTile) -> None:
        super().__init__(tile, problem.retrieval_dim)
        self.problem = problem
        self.tokens, self.block = tile.pad(tile.tokens), tile.pad(tile.landmarks)
        part = problem.retrieval_heads * tile.segments * problem.top_k
        self.part_bytes = 2 * 4 * part
        parts = few_tokens(tile.few, f"B * L * {part}")
        self._regions = self._tensors() | self._workspace() | regions("int32", part_best=parts, part_index=parts)

    def _tensors(self) -> dict[str, Region]:
        p = self.problem
        row = p.retrieval_heads * p.retrieval_dim
        queries, landmarks = f"B * L * {row}", f"B * C * {row}"
        slots = f"B * L * {p.kv_heads * p.top_k}"
        return (
            regions(STORAGE[p.dtype], q_r=queries, landmark=landmarks, d_q_r=queries, d_landmark=landmarks)
            | regions("float32", scores=slots, grad_scores=slots)
            | regions("int32", indices=slots)
            | regions("int64", position="B", chunks="B")
        )

    def _workspace(self) -> dict[str, Region]:
        width, tokens, block = self.width, self.tokens, self.block
        lists = tokens * self.problem.top_k
        return (
            regions("float32", queries_t=width * tokens, landmarks=block * width, products=block * tokens)
            | regions("float32", queries=width * max(1, self.tile.few), sums=width)
            | regions("int32", best=lists, best_index=lists, seen=tokens)
        )


def layout_for(problem: Problem, tile: CpuTile) -> Layout:
    """The layout of a problem's programs."""
    if isinstance(problem, ChunkAttention):
        return AttentionLayout(problem, tile)
    return SelectLayout(problem, tile)
