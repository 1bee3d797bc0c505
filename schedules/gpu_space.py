"""What the tuner may choose on a GPU: tiles of the TileLang programs and of the Triton programs, in one space."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hsa_compile.ir import ChunkAttention, ChunkSelect, Problem
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.choice import Backend, Tile, backend_of, backends, default_tile
from hsa_compile.schedules.gpu_resources import refusal, wasteful
from hsa_compile.schedules.target import GpuTarget
from hsa_compile.schedules.triton import TritonTile, power_of_two

Choices = dict[str, tuple[Any, ...]]

ALL = 1 << 20  # tiles of landmarks, more than any memory has
FEW = 64  # tokens of a segment from which no token has thread blocks of its own, and landmarks are not shared
_PAIRS = (64, 128, 256, 512)
_ROWS: Choices = {
    "form": ("rows",), "wgmma": (True,), "tokens": (1, 2, 4, 8, 16, 32, 64), "stages": (2, 3, 4),
    "blocks": (1, 2, 3, 4, 5, 6),
}  # fmt: skip
_ROWS_MMA: Choices = {"form": ("rows",), "wgmma": (False,), "tokens": (1, 2, 4, 8, 16, 32, 64)}
_WARPGROUPS: Choices = {
    "form": ("warpgroups",), "wgmma": (True,), "stages": (2, 3, 4, 5, 6, 8, 12), "blocks": (1,), "run": (1, 2, 4, 8),
}  # fmt: skip
_WARPGROUPS_A_BLOCK = (2, 3, 4)
_WARPS: Choices = {"form": ("warps",), "wgmma": (True,), "stages": (2, 3, 4, 5, 6, 8, 12), "blocks": (1, 2, 3, 4)}
_WARPS_A_BLOCK = (3, 5, 7, 9, 11, 15)  # that multiply; one more loads
_TOKEN: Choices = {"form": ("token",), "slots": (1, 2, 4, 8)}
_BACKWARD: Choices = {
    "tokens": (1, 2, 4, 8, 16, 32, 64), "stages": (2, 3), "blocks": (1, 2, 3, 4, 5), "pairs": (*_PAIRS, 1024),
    "memory_stages": (2, 3, 4), "memory_blocks": (1, 2, 3, 4),
}  # fmt: skip
_STREAM: Choices = {
    "wgmma": (True,), "tokens": (64, 128, 192, 256), "stages": (3, 4, 5, 6), "blocks": (1, 2),
    "bound": (0, 1, 4, 16, ALL),
}  # fmt: skip
_SELECT: Choices = {
    "wgmma": (False,), "tokens": (16, 32, 64, 128), "stages": (2, 3, 4), "blocks": (1, 2, 3, 4, 6, 8),
    "bound": (1, 4, 16, ALL),
}  # fmt: skip
_TRITON: dict[tuple[str, str], Choices] = {
    ("chunk_attention", "forward"): {"tokens": (1, 2, 4, 8, 16, 32), "warps": (1, 2, 4, 8), "stages": (1, 2, 3, 4)},
    ("chunk_attention", "backward"): {
        "tokens": (1, 2, 4, 8, 16, 32), "warps": (2, 4, 8), "stages": (1, 2, 3),
        "memory_tokens": (1, 2, 4, 8, 16, 32, 64, 128), "memory_warps": (4, 8), "memory_stages": (1, 2, 3),
        "pairs": (128, 256, 512),
    },
    ("chunk_select", "forward"): {
        "tokens": (16, 32, 64, 128), "warps": (2, 4, 8), "columns": (32, 64, 128, 256), "depth": (32, 64, 128),
    },
    ("chunk_select", "backward"): {"pairs": _PAIRS},
}  # fmt: skip


@dataclass(frozen=True)
class GpuSpace:
    """The tiles to search for a pass of a problem on a GPU; see ``space.Space``, whose interface this has.

    Args:
        length: tokens of a segment; None for any.
    """

    problem: Problem
    pass_name: str
    target: GpuTarget
    length: int | None

    @property
    def base(self) -> Tile:
        """The hand-picked tile of the backend that is taken where nothing is known."""
        return self.first[0]

    @property
    def first(self) -> list[Tile]:
        """The hand-picked tile of each backend: what is tried before all."""
        args = (self.problem, self.pass_name, self.target, self.length)
        return [default_tile(*args, backend) for backend in backends(self.problem, self.target)]

    def tiles(self) -> list[Tile]:
        """All tiles worth building, those that run the same code once; the hand-picked ones are the first."""
        found: dict[tuple[Any, ...], Tile] = {self._code_key(tile): tile for tile in self.first}
        for base in self.first:
            for choices in self._families(backend_of(base)):
                for tile in _product(base, choices):
                    if self._worth_building(tile):
                        found.setdefault(self._code_key(tile), tile)
        return list(found.values())

    def _worth_building(self, tile: Tile) -> bool:
        arguments: tuple[Any, ...] = (self.problem, self.pass_name, tile, self.target)
        return refusal(*arguments) is None and not wasteful(*arguments)

    def in_use(self, tile: Tile) -> dict[str, Any]:
        """The fields that the program of a tile hangs on."""
        return {name: getattr(tile, name) for name in _fields(self.problem.op, self.pass_name, tile)}

    def _code_key(self, tile: Tile) -> tuple[Any, ...]:
        return (backend_of(tile), *self.in_use(tile).items())

    def _families(self, backend: Backend) -> Iterator[Choices]:
        """Sets of values that go together."""
        p, few = self.problem, self.length is not None and self.length < FEW
        if backend == "triton":
            yield _triton_choices(p, self.pass_name)
        elif isinstance(p, ChunkSelect):
            yield from _select_families(p, self.pass_name, self.target, few)
        elif self.pass_name == "backward":
            yield _BACKWARD | ({} if self.target.arch == "sm_90a" else {"stages": (1,)})
        else:
            if few:
                yield _TOKEN | {"slots": tuple(n for n in _TOKEN["slots"] if n <= p.top_k)}
            yield _ROWS_MMA
            if self.target.arch == "sm_90a":
                yield _ROWS
                tokens = {max(1, groups * 64 // p.groups) for groups in _WARPGROUPS_A_BLOCK}
                yield _WARPGROUPS | {"tokens": tuple(sorted(tokens))}
                # A token whose rows pass from one warp to the next is walked by both.
                tokens = {max(1, warps * 16 // p.groups) for warps in _WARPS_A_BLOCK}
                yield _WARPS | {"tokens": tuple(sorted(tokens))}


def _select_families(p: ChunkSelect, pass_name: str, target: GpuTarget, few: bool) -> Iterator[Choices]:
    if pass_name == "backward":
        yield {"pairs": _PAIRS}
        return
    if target.arch == "sm_90a" and not (p.retrieval_dim > 256 and p.top_k > 32):
        yield _STREAM
    yield _SELECT | ({"split": (66, 132, 264, 528, 1056)} if few else {})


def _triton_choices(p: Problem, pass_name: str) -> Choices:
    choices = dict(_TRITON[p.op, pass_name])
    if isinstance(p, ChunkAttention):
        groups = power_of_two(p.groups)  # matrix units take 16 rows, and more than 256 hold no registers
        for name in ("tokens", "memory_tokens"):
            if name in choices:
                choices[name] = tuple(n for n in choices[name] if 16 <= n * groups <= 256) or (max(1, 16 // groups),)
    elif pass_name == "forward":
        width = power_of_two(p.retrieval_dim, 16)
        choices["depth"] = (width,) if width <= 128 else tuple(n for n in choices["depth"] if n <= width)
    return choices


def _product(base: Tile, choices: Choices) -> Iterator[Tile]:
    """Tiles with all combinations of the values; the base's first, so that what makes no difference keeps them."""
    ordered = (
        [value for value in (getattr(base, name),) if value in values] + [v for v in values if v != getattr(base, name)]
        for name, values in choices.items()
    )
    for values in itertools.product(*ordered):
        try:
            yield dataclasses.replace(base, **dict(zip(choices, values)))
        except ValueError:
            continue  # fields that do not fit each other


def _fields(op: str, pass_name: str, tile: Tile) -> tuple[str, ...]:
    """Names of the fields that a program reads, given the others."""
    if isinstance(tile, TritonTile):
        return tuple(_TRITON[op, pass_name])
    assert isinstance(tile, GpuTile)
    if op == "chunk_select":
        return ("tokens", "stages", "blocks", "bound", "split", "wgmma") if pass_name == "forward" else ("pairs",)
    if pass_name == "backward":
        return tuple(name for name in _BACKWARD if tile.wgmma or name != "stages")
    if tile.form == "token":
        return ("form", "slots")
    if tile.form == "rows" and not tile.wgmma:
        return ("form", "wgmma", "tokens")
    run = ("run",) if tile.form == "warpgroups" else ()
    return ("form", "wgmma", "tokens", "stages", "blocks", *run)
