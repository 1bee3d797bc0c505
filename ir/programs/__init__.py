"""Tile programs: how an operator is computed on a class of machines, with the sizes of its tiles left open.

A ``Program`` is a list of stages over raw pointers for CPUs, a ``GpuProgram`` a list of kernel launches. Their
functions are TVMScript (the package ``cpu``) and TileLang (``gpu``), which only a compiler's process imports; this
module and ``cpu/layout.py`` are plain data and import no compiler.

Why TVMScript for CPUs and not the tile language of the GPU programs: that one reaches CPUs through C source, serial and
fp32 only, at 9-12 GFLOP/s a thread; these reach 70 and more, because register blocks, vector width and the fused
multiply-add are written out and LLVM keeps the accumulators in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _require_least(tile: object, **least: int) -> None:
    for name, bound in least.items():
        if getattr(tile, name) < bound:
            raise ValueError(f"{name} must be at least {bound}, got {getattr(tile, name)}")


@dataclass(frozen=True)
class CpuTile:
    """Sizes that a schedule chooses.

    Args:
        lanes: float32 lanes of a vector register.
        row_block: rows of a register block, a power of two.
        vector_block: vectors of a register block; ``row_block * vector_block`` accumulators stay in registers.
        tokens: T, tokens whose chunk lists are walked together.
        rows: query rows gathered for one chunk at a time.
        landmarks: landmark rows scored at a time.
        few: most tokens of a row for which the forward is split over slots or landmarks, not into tiles of tokens; 0
            for never.
        segments: into how many parts the landmarks are split then.
    """

    lanes: int
    row_block: int
    vector_block: int
    tokens: int
    rows: int
    landmarks: int
    few: int
    segments: int

    def __post_init__(self) -> None:
        _require_least(self, few=0, vector_block=1, tokens=1, rows=1, landmarks=1, segments=1)
        for name in ("lanes", "row_block"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.rows % self.row_block:
            raise ValueError(f"rows ({self.rows}) must be a multiple of row_block ({self.row_block})")

    def pad(self, n: int) -> int:
        """n rounded up so that both vectors and row blocks divide it."""
        unit = max(self.lanes, self.row_block)
        return -(-n // unit) * unit

    def vectors(self, n: int) -> int:
        """The most vectors of a register block that divide a padded width."""
        return max(v for v in range(1, self.vector_block + 1) if (n // self.lanes) % v == 0)


@dataclass(frozen=True)
class Region:
    """A flat array: a tensor, or memory that a program needs besides. ``elements`` is a C expression in B, L and C."""

    name: str
    dtype: str
    elements: str


@dataclass(frozen=True)
class Stage:
    """One parallel step. ``units`` is a C expression in B, L and C; ``arguments`` name regions in the order of the
    function's pointers, after which it takes B, L, C, begin and end as int64."""

    symbol: str
    function: Any
    units: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A pass of an operator as stages with barriers between them.

    Args:
        tensors: names of the arguments, inputs first, in the order of the C interface.
        scratch: regions that all threads share and that live through all stages.
        workspace: regions that every thread has for itself.
    """

    tensors: tuple[str, ...]
    scratch: tuple[Region, ...]
    workspace: tuple[Region, ...]
    stages: tuple[Stage, ...]


FORMS = ("rows", "warpgroups", "warps", "token")


@dataclass(frozen=True)
class GpuTile:
    """Sizes that a schedule chooses for a GPU.

    Args:
        tokens: T, neighbouring tokens whose chunk lists are walked together.
        stages: chunks (or blocks of tokens) that are loaded ahead.
        blocks: thread blocks that should fit on one multiprocessor.
        pairs: most (token, slot) pairs of one work item of a chunk.
        slots: slots of one token that a thread block takes where tokens are few; of a sliding window, keys of a
            block, which are slots of its ring or tokens.
        memory_stages: as ``stages``, of the pass that goes chunk by chunk.
        memory_blocks: as ``blocks``, of that pass.
        bound: tiles of landmarks that a selection scores twice: first for a bound of the K-th best score.
        split: blocks that share a selection's landmarks where tiles of queries are fewer; 0 for a block a tile always.
        wgmma: use the matrix instructions and bulk copies of sm_90a instead of those of sm_80.
        run: neighbouring tiles that a thread block of the form "warpgroups" walks one after the other.
        form: of the forward of chunk attention and of sliding windows: "rows" where all rows of a tile meet its chunks,
            "warpgroups" where every 64 rows meet their own, "warps" where every 16 do, "token" for few tokens, one a
            thread block.
    """

    tokens: int = 8
    stages: int = 3
    blocks: int = 2
    pairs: int = 256
    slots: int = 1
    memory_stages: int = 3
    memory_blocks: int = 3
    bound: int = 1
    split: int = 0
    wgmma: bool = True
    run: int = 1
    form: str = "rows"

    def __post_init__(self) -> None:
        _require_least(self, tokens=1, stages=1, blocks=1, pairs=1, slots=1, memory_stages=1, memory_blocks=1, run=1)
        _require_least(self, bound=0, split=0)
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a GPU program; the next one on the stream sees all that it wrote.

    Args:
        symbol: its name within the program.
        function: a TileLang prim_func over buffers, with one ``T.Kernel``.
        arguments: tensors and regions of the program, in the order of the function's buffers.
        dims: the function's dynamic symbols, each a C expression in B, L and C.
        options: pass options of its lowering.
    """

    symbol: str
    function: Any
    arguments: tuple[str, ...]
    dims: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuProgram:
    """A pass of an operator as kernel launches, one after the other on one stream.

    Args:
        tensors: names of the arguments, inputs first, in the order of the C interface.
        scratch: regions of device memory that live through all launches; nothing is in them at first.
        launches: a launch whose grid is empty is left out.
    """

    tensors: tuple[str, ...]
    scratch: tuple[Region, ...]
    launches: tuple[Launch, ...]
