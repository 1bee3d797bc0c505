"""What all stages share: pointers become flat buffers, a range of units of work becomes a loop over macros.

A macro that computes a unit takes ``m``, which has the sizes B, L and C and a buffer for each region, by its name.
"""

from types import SimpleNamespace
from typing import Any

from tvm.script import from_source
from tvm.script import tirx as T

from hsa_compile.ir.programs import Region, Stage

_FUNCTION = """
@T.prim_func(s_tir=True)
def {symbol}({pointers}, B: T.int64, L: T.int64, C: T.int64, begin: T.int64, end: T.int64):
    T.func_attr({{"tirx.noalias": True}})
    {buffers}
    for unit in T.serial(end - begin):
        compute(begin + unit, memory(B=B, L=L, C=C, {names}))
"""


def stage(symbol: str, units: str, compute: Any, regions: tuple[Region, ...]) -> Stage:
    """A stage that computes its units one by one.

    Args:
        symbol: name of its function.
        units: how many there are, a C expression in B, L and C.
        compute: macro of ``(unit, m)``.
        regions: what the function takes pointers to.
    """
    text = _FUNCTION.format(
        symbol=symbol,
        pointers=", ".join(f'{r.name}_: T.handle("{r.dtype}")' for r in regions),
        buffers="; ".join(f'{r.name} = T.decl_buffer(({_extent(r)},), "{r.dtype}", data={r.name}_)' for r in regions),
        names=", ".join(f"{r.name}={r.name}" for r in regions),
    )
    function = from_source(text, {"T": T, "compute": compute, "memory": SimpleNamespace}, s_tir=True)
    return Stage(symbol, function, units, tuple(r.name for r in regions))


def _extent(region: Region) -> str:
    """Only its type counts, which offsets take over: what grows with the inputs needs 64 bits."""
    return region.elements if region.elements.isdigit() else "T.int64(1 << 40)"


def token_tiles(heads: int, tokens: int) -> str:
    """Units of a stage over tiles of ``tokens`` neighbouring tokens of each head."""
    return f"B * {heads} * ((L + {tokens - 1}) / {tokens})"


def each_token_tile(heads, tokens, compute) -> Any:
    """Computes such a unit by ``compute(m, b, h, t0, count)``: tokens t0 ... t0 + count - 1 of row b, head h."""

    @T.inline
    def locate(unit, m):
        tiles = (m.L + tokens - 1) // tokens
        h = unit % heads
        b = unit // heads // tiles
        t0 = unit // heads % tiles * tokens
        count = T.cast(T.min(m.L - t0, T.int64(tokens)), "int32")
        compute(m, b, h, t0, count)

    return locate
