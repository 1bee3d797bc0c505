"""What the tuner may choose: the values of every field of a tile, by operator and pass, and which tiles make sense.

A new field of a tile becomes searchable by a line in the tables here, or, for GPUs, in ``gpu_space.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from hsa_compile.ir import ChunkAttention, Problem
from hsa_compile.ir.programs import CpuTile
from hsa_compile.ir.programs.cpu.layout import AttentionLayout, SelectLayout
from hsa_compile.schedules import gpu_resources
from hsa_compile.schedules.choice import Tile, backend_of, default_tile
from hsa_compile.schedules.costs import accumulators_fit, is_split, split_bytes, workspace_bytes
from hsa_compile.schedules.gpu_space import GpuSpace
from hsa_compile.schedules.target import CpuTarget, GpuTarget, resolve_any

Choices = dict[str, tuple[Any, ...]]

_BLOCKS: Choices = {"row_block": (2, 4, 8, 16), "vector_block": (1, 2, 3, 4)}
_FEW: Choices = {"few": (0, 4, 8, 64)}
_CPU: dict[tuple[str, str], Choices] = {
    ("chunk_attention", "forward"): _BLOCKS
    | _FEW
    | {"tokens": (4, 8, 16, 32, 64, 128, 256, 512), "rows": (16, 32, 64, 128, 256)},
    ("chunk_attention", "backward"): _BLOCKS | {"tokens": (8, 16, 32, 64, 128, 256), "rows": (16, 32, 64, 128, 256)},
    ("chunk_select", "forward"): _BLOCKS
    | _FEW
    | {"tokens": (8, 16, 32, 64, 128, 256, 512), "landmarks": (16, 32, 64, 128, 256), "segments": (1, 4, 16, 64, 256)},
    ("chunk_select", "backward"): {},  # row by row: nothing in it hangs on the tile but its lanes
}
_UNUSED_WHEN_SPLIT = {
    "chunk_attention": ("tokens", "rows"),
    "chunk_select": ("row_block", "vector_block", "tokens", "landmarks"),
}
# Beyond these, a tile is a slip of the pen: buffers of a thread, of which the hand-picked ones have 0.2 to 0.7 MiB, and
# parts of a few tokens, 0.02 to 2 MiB.
WORKSPACE_LIMIT, PARTS_LIMIT = 64 << 20, 256 << 20


@dataclass(frozen=True)
class Space:
    """The tiles to search for a pass of a problem on a target.

    Args:
        length: tokens of a segment; None for the fields that any length hangs on.
        base: the hand-picked tile, which also gives the fields that are not searched.
        choices: values of the others.
    """

    problem: Problem
    pass_name: str
    target: CpuTarget
    length: int | None
    base: Tile
    choices: Choices

    @property
    def first(self) -> list[Tile]:
        """What is tried before all."""
        return [self.base]

    def tiles(self) -> list[Tile]:
        """All sensible tiles, those that run the same code once; the hand-picked one is the first."""
        found: dict[tuple[Any, ...], Tile] = {self._code_key(self.base): self.base}
        # Its values come first, so that fields which make no difference here keep them.
        choices = ({getattr(self.base, field): None} | dict.fromkeys(values) for field, values in self.choices.items())
        for values in itertools.product(*choices):
            try:
                tile = dataclasses.replace(self.base, **dict(zip(self.choices, values)))
            except ValueError:
                continue  # fields that do not fit each other
            key = self._code_key(tile)
            if key not in found and refusal(self.problem, self.pass_name, tile, self.target) is None:
                found[key] = tile
        return list(found.values())

    def in_use(self, tile: Tile) -> dict[str, Any]:
        """The searched fields of a tile that segments of the length hang on."""
        unused: tuple[str, ...] = ()
        if isinstance(tile, CpuTile) and self.length is not None:
            split = is_split(self.pass_name, tile, self.length)
            unused = _UNUSED_WHEN_SPLIT[self.problem.op] if split else ("segments",)
        return {field: getattr(tile, field) for field in self.choices if field not in unused}

    def _code_key(self, tile: Tile) -> tuple[Any, ...]:
        """Equal for tiles that run the same code."""
        fields = self.in_use(tile)
        if isinstance(tile, CpuTile):
            split = self.length is not None and is_split(self.pass_name, tile, self.length)
            made = _made_of(self.problem, tile, split)
            if self.length is not None:
                made["few"] = split
            fields |= {name: value for name, value in made.items() if name in fields}
        return tuple(fields.items())


def _made_of(problem: Problem, tile: CpuTile, split: bool) -> dict[str, Any]:
    """What a program makes of fields that it rounds."""
    if isinstance(problem, ChunkAttention):
        lay = AttentionLayout(problem, tile)
        widths = (lay.heads if split else lay.keys, lay.width)
        return {"rows": lay.pairs, "vector_block": tuple(map(tile.vectors, widths))}
    tiles = SelectLayout(problem, tile)
    return {"tokens": tiles.tokens, "landmarks": tiles.block, "vector_block": tile.vectors(tiles.tokens)}


def space_for(problem: Problem, pass_name: str, target: str, length: int | None = None) -> Space | GpuSpace:
    """The search space; a single tile where a program has nothing to choose.

    Args:
        length: tokens of the segments to search for. None: of any length.

    Raises:
        TargetError: the target is unknown.
    """
    level = resolve_any(target)
    if isinstance(level, GpuTarget):
        return GpuSpace(problem, pass_name, level, length)
    base = default_tile(problem, pass_name, level, length)
    return Space(problem, pass_name, level, length, base, _CPU[problem.op, pass_name])


def refusal(problem: Problem, pass_name: str, tile: Tile, target: CpuTarget | GpuTarget) -> str | None:
    """Why a tile is not to be built for a target, or None."""
    if isinstance(target, GpuTarget):
        return gpu_resources.refusal(problem, pass_name, tile, target)  # type: ignore[arg-type]
    assert isinstance(tile, CpuTile)
    if tile.lanes > target.lanes:
        return f"{tile.lanes} lanes are more than a vector register of {target.name} has ({target.lanes})"
    if not accumulators_fit(tile, target.registers):
        return f"{tile.row_block} x {tile.vector_block} accumulators do not fit {target.registers} registers"
    if (size := workspace_bytes(problem, pass_name, tile)) > WORKSPACE_LIMIT:
        return f"a thread's buffers would take {size >> 20} MiB, more than {WORKSPACE_LIMIT >> 20}"
    if (size := split_bytes(problem, tile)) > PARTS_LIMIT:
        return f"the parts of {tile.few} tokens would take {size >> 20} MiB, more than {PARTS_LIMIT >> 20}"
    return None


def searched(tile: Tile, problem: Problem, pass_name: str, target: str, length: int | None) -> str:
    """A tile's fields that a program hangs on for segments of a length, None for any, in a few words."""
    fields = space_for(problem, pass_name, target, length).in_use(tile) or {"lanes": getattr(tile, "lanes", 0)}
    backend = f"{backend_of(tile)}: " if target.startswith("cuda") else ""
    return backend + ", ".join(f"{name} {value}" for name, value in fields.items())
