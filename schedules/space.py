"""What the tuner may choose: the values of every field of a tile, by operator and pass, and which tiles make sense.

A new field of a tile becomes searchable by a line in the tables here.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from hsa_compile.ir import ChunkAttention, Problem
from hsa_compile.ir.programs import CpuTile, GpuTile
from hsa_compile.schedules.choice import Tile, default_tile
from hsa_compile.schedules.costs import accumulators_fit, workspace_bytes
from hsa_compile.schedules.target import CpuTarget, GpuTarget, resolve_any

Choices = dict[str, tuple[Any, ...]]

_BLOCKS: Choices = {"row_block": (2, 4, 8, 16), "vector_block": (1, 2, 3, 4)}
_CPU: dict[tuple[str, str], Choices] = {
    ("chunk_attention", "forward"): _BLOCKS
    | {"tokens": (4, 8, 16, 32, 64, 128, 256, 512), "rows": (16, 32, 64, 128, 256)},
    ("chunk_attention", "backward"): _BLOCKS | {"tokens": (8, 16, 32, 64, 128, 256), "rows": (16, 32, 64, 128, 256)},
    ("chunk_select", "forward"): _BLOCKS
    | {"tokens": (8, 16, 32, 64, 128, 256, 512), "landmarks": (16, 32, 64, 128, 256)},
    ("chunk_select", "backward"): {},  # row by row: nothing in it hangs on the tile but its lanes
}
_GPU_FORWARD: Choices = {"tokens": (2, 4, 8, 16, 32), "stages": (1, 2, 3, 4), "blocks": (1, 2, 3, 4)}
_GPU: dict[str, Choices] = {"forward": _GPU_FORWARD, "backward": _GPU_FORWARD | {"pairs": (64, 128, 256, 512)}}
# A thread's buffers beyond this are no tile but a slip of the pen: the hand-picked ones take 0.2 to 0.7 MiB.
WORKSPACE_LIMIT = 64 << 20


@dataclass(frozen=True)
class Space:
    """The tiles to search for a pass of a problem on a target.

    Args:
        base: the hand-picked tile, which also gives the fields that are not searched.
        choices: values of the others.
    """

    problem: Problem
    pass_name: str
    target: CpuTarget | GpuTarget
    base: Tile
    choices: Choices

    def tiles(self) -> list[Tile]:
        """All sensible tiles, those that lead to the same code once; the hand-picked one is the first."""
        found: dict[tuple[Any, ...], Tile] = {self._code_key(self.base): self.base}
        for values in itertools.product(*self.choices.values()):
            try:
                tile = dataclasses.replace(self.base, **dict(zip(self.choices, values)))
            except ValueError:
                continue  # fields that do not fit each other
            if refusal(self.problem, self.pass_name, tile, self.target) is None:
                found.setdefault(self._code_key(tile), tile)
        return list(found.values())

    def _code_key(self, tile: Tile) -> tuple[Any, ...]:
        """Equal for tiles that a program turns into the same code."""
        fields = {field: getattr(tile, field) for field in self.choices}
        if isinstance(tile, CpuTile):
            p = self.problem
            widths = (p.head_dim, p.chunk_size) if isinstance(p, ChunkAttention) else (tile.landmarks,)
            if "vector_block" in fields:
                fields["vector_block"] = tuple(tile.vectors(tile.pad(n)) for n in widths)
            if "rows" in fields and isinstance(p, ChunkAttention):
                fields["rows"] = max(1, tile.rows // p.groups)  # tokens gathered at a time
        return tuple(fields.values())


def space_for(problem: Problem, pass_name: str, target: str) -> Space:
    """The search space; a single tile where a program has nothing to choose.

    Raises:
        TargetError: the target is unknown.
    """
    level = resolve_any(target)
    gpu = isinstance(level, GpuTarget)
    choices = _GPU[pass_name] if gpu else _CPU[problem.op, pass_name]
    return Space(problem, pass_name, level, default_tile(problem, pass_name, level), choices)


def refusal(problem: Problem, pass_name: str, tile: Tile, target: CpuTarget | GpuTarget) -> str | None:
    """Why a tile is not to be built for a target, or None."""
    if isinstance(tile, GpuTile) or isinstance(target, GpuTarget):
        return None  # what a GPU refuses, its compiler does
    if tile.lanes > target.lanes:
        return f"{tile.lanes} lanes are more than a vector register of {target.name} has ({target.lanes})"
    if not accumulators_fit(tile, target.registers):
        return f"{tile.row_block} x {tile.vector_block} accumulators do not fit {target.registers} registers"
    if (size := workspace_bytes(problem, pass_name, tile)) > WORKSPACE_LIMIT:
        return f"a thread's buffers would take {size >> 20} MiB, more than {WORKSPACE_LIMIT >> 20}"
    return None
