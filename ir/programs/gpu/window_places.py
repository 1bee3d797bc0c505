"""Places of a sliding window's keys on GPUs, which all forms of its program share.

A key is known by its place: its number less that of the segment's first token, so that places are small whatever the
position. Negative places lie in the ring, the key before the segment in slot ``newest = (position - 1) mod W``, none
before place ``oldest``. Tokens from ``count`` on do not count.
"""

import math
from typing import Any

import tilelang.language as T

LOG2E = math.log2(math.e)
LOWEST = -(2.0**100)  # logit of what a row does not see; a power of two, so that times any scale it is exact


def of_row(position: Any, lengths: Any, b: Any, L: Any, window: int) -> tuple[Any, Any, Any]:
    """(newest, oldest, count) of row b, int32 expressions."""
    newest = T.cast((position[b] + (window - 1)) % window, "int32")
    oldest = -T.cast(T.min(position[b], T.cast(window, "int64")), "int32")
    return newest, oldest, T.cast(T.min(lengths[b], L), "int32")
