"""Which tile a kernel is built with, and why: an argument, the environment, this machine's tuning record, or the
hand-picked default. Imports no more than building needs; records are read on demand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from hsa_compile.ir import AnyProblem, SlidingWindow
from hsa_compile.ir.programs import CpuTile, GpuTile
from hsa_compile.schedules import cpu, gpu, triton
from hsa_compile.schedules.target import CpuTarget, GpuTarget, resolve_any
from hsa_compile.schedules.triton import TritonTile

if TYPE_CHECKING:
    from hsa_compile.schedules.records import Stored

log = logging.getLogger("hsa_compile")

Tile = CpuTile | GpuTile | TritonTile
Backend = Literal["tvm", "tilelang", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
TILES: dict[Backend, type[Tile]] = {"tvm": CpuTile, "tilelang": GpuTile, "triton": TritonTile}
COMPILED_DTYPES = ("float16", "bfloat16")  # of the TileLang programs; Triton serves float32 too
VARIABLE = "HSA_COMPILE_SCHEDULE"


class ScheduleError(ValueError):
    """A schedule was asked for that makes no sense; the message says which and what would do."""


@dataclass(frozen=True)
class Choice:
    """A tile and where it is from.

    Args:
        tile: the sizes.
        origin: "record", "default" (hand-picked) or "environment".
        reason: one line.
        record: the record in use.
        passed_over: records that were looked at, each with the reason it is not used.
    """

    tile: Tile
    origin: Literal["record", "default", "environment"]
    reason: str
    record: Stored | None = None
    passed_over: tuple[tuple[Stored, str], ...] = ()


def bucket(length: int) -> int:
    """The bucket of a segment's length, named by its least: 0, 1, 4, 16, 64, 256, 1024, ..."""
    return 1 << (length.bit_length() - 1) // 2 * 2 if length > 0 else 0


def backend_of(tile: Tile) -> Backend:
    """Whose programs a tile is for."""
    return next(name for name, kind in TILES.items() if isinstance(tile, kind))


def backends(problem: AnyProblem, level: CpuTarget | GpuTarget) -> tuple[Backend, ...]:
    """Those that have a program of a problem on a target, the one that is taken where nothing is known first."""
    if isinstance(level, CpuTarget):
        return ("tvm",)
    if isinstance(problem, SlidingWindow):
        return ("tilelang",)
    return ("tilelang", "triton") if problem.dtype in COMPILED_DTYPES else ("triton",)


def default_tile(
    problem: AnyProblem,
    pass_name: str,
    level: CpuTarget | GpuTarget,
    length: int | None = None,
    backend: Backend | None = None,
) -> Tile:
    """The hand-picked tile; on GPUs for segments of about ``length`` tokens, for long ones where it is None.

    Args:
        backend: whose program; the first of ``backends`` where it is None.
    """
    if isinstance(level, CpuTarget):
        return cpu.tile_for(problem, level)
    if not isinstance(problem, SlidingWindow) and (backend or backends(problem, level)[0]) == "triton":
        return triton.tile_for(problem, pass_name, length)
    return gpu.tile_for(problem, pass_name, level, length)


def tile_from_dict(fields: dict[str, Any], target: CpuTarget | GpuTarget, backend: str | None = None) -> Tile:
    """A target's tile from plain data.

    Args:
        backend: "triton" for a tile of those programs, "" or None for one of the programs that are compiled ahead.

    Raises:
        ValueError: a field is missing, unknown, or has a value that no tile can have; the target has no such backend.
    """
    compiled: Backend = "tilelang" if isinstance(target, GpuTarget) else "tvm"
    if (backend or compiled) not in (compiled, *(["triton"] if compiled == "tilelang" else [])):
        raise ValueError(f"{target.name} has no programs in {backend}")
    kind = TILES[backend or compiled]  # type: ignore[index]
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"a tile has no field {', '.join(unknown)}; known: {', '.join(known)}")
    for name, value in fields.items():
        if known[name].type == "int" and (type(value) is not int or not 0 <= value < 2**31):
            raise ValueError(f"{name} of a tile must be an integer and not negative, got {value!r}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"tile: {error}") from None


def choose(
    problem: AnyProblem,
    pass_name: str = "forward",
    target: str = "cpu:native",
    length: int | None = None,
    backend: Backend | None = None,
) -> Choice:
    """The tile that ``build`` takes where none is given.

    ``$HSA_COMPILE_SCHEDULE`` is "tuned" (the default), "default" for the hand-picked tiles alone, so that one kernel
    serves all lengths, or a JSON object with fields of the tile that replace the hand-picked ones.

    Args:
        length: tokens of a segment; the record of its bucket is taken, else of the nearest smaller bucket, else the
            default. None: the record of the longest bucket, for kernels that serve every length.
        backend: choose among this one's tiles; None: the fastest of all, by the records.

    Raises:
        ScheduleError: the variable makes no sense.
        TargetError: the target is unknown.
    """
    level = resolve_any(target)
    asked = os.environ.get(VARIABLE) or "tuned"
    default = default_tile(problem, pass_name, level, None if asked == "default" else length, backend)
    if asked == "default":
        return Choice(default, "default", f"{VARIABLE}=default asks for the hand-picked tile")
    if asked != "tuned":
        return Choice(_overridden(default, asked, level), "environment", f"fields from {VARIABLE}")
    if isinstance(problem, SlidingWindow):
        return Choice(default, "default", "sliding windows are not tuned")
    try:
        from hsa_compile.schedules import records
    except ModuleNotFoundError as error:
        if error.name != "pydantic":
            raise
        _say(logging.INFO, "pydantic is not installed: tuning records are not read, tiles are the hand-picked ones")
        return Choice(default, "default", "records can't be read without pydantic (the extra hsa-compile[compile])")
    found, passed_over = records.find(problem, pass_name, level, length, backend)
    if found:
        record = found.record
        return Choice(record.tile_for(level), "record", records.describe(found), found, tuple(passed_over))
    reason, tuned_here = records.why_none(passed_over, level)
    line = f"{problem.op} {pass_name}: hand-picked tile, {reason}"
    _say(logging.WARNING if tuned_here else logging.INFO, line)
    return Choice(default, "default", reason, None, tuple(passed_over))


def _overridden(default: Tile, text: str, level: CpuTarget | GpuTarget) -> Tile:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        return tile_from_dict({**dataclasses.asdict(default), **fields}, level, backend_of(default))
    except ValueError as error:
        known = ", ".join(field.name for field in dataclasses.fields(default))
        raise ScheduleError(
            f'{VARIABLE} must be "tuned", "default" or a JSON object with some of {known}; got {text!r} ({error})'
        ) from None


@functools.cache
def _say(level: int, line: str) -> None:
    """Once a process."""
    log.log(level, line)
