"""How far implementations may be apart: what is compared, the rule, and the one table of tolerances.

A leg's largest error and the root mean square of its errors are each at most twice those of eager PyTorch in the same
type, plus a floor; eager PyTorch itself is held to bounds of its own. The mean square tells a path that is less exact
everywhere from one that lost a single near tie: where the scores of two chunks round to the other order, another one is
selected, and logits there are off by percents in any half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TIMES_EAGER = 2.0
_BLOCK = 1 << 24  # elements compared at once: logits of thousands of tokens are gigabytes in float64


@dataclass
class Errors:
    """Largest error and root mean square of the errors so far, over a scale; infinite where something is not finite."""

    largest: float = 0.0
    squares: float = field(default=0.0, repr=False)
    count: int = field(default=0, repr=False)

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def add(self, got: Any, want: Any, scale: float = 1.0) -> None:
        """Compares two arrays or tensors of one shape."""
        got, want = _array(got), _array(want)
        if got.shape != want.shape:
            self.largest = self.squares = math.inf
            self.count += 1
            return
        got, want = got.reshape(-1), want.reshape(-1)
        for start in range(0, got.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            error = np.abs(got[part].astype(np.float64) - want[part]) / scale
            error[~np.isfinite(error)] = math.inf
            self.largest = max(self.largest, float(error.max()))
            self.squares += float(np.square(error).sum())
            self.count += error.size


def _array(x: Any) -> Any:
    """A NumPy array; of a tensor of any type, on any device."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        return (x if x.dtype.is_floating_point is False or x.element_size() == 8 else x.float()).numpy()
    return np.asarray(x)


@dataclass(frozen=True)
class Tolerance:
    """Bounds of a kind of quantity in a type.

    Args:
        largest, rms: the floor: what is allowed beside ``TIMES_EAGER`` times eager PyTorch's own.
        eager_largest, eager_rms: what eager PyTorch may be off by.
        relative: to the largest element of what is compared, else absolute.
    """

    largest: float
    rms: float
    eager_largest: float
    eager_rms: float
    relative: bool
    reason: str

    def allowed(self, scale: float, eager: Errors | None) -> tuple[float, float]:
        """Largest error and root mean square that pass; ``eager`` is None for eager PyTorch itself.

        Args:
            scale: the largest element, which errors are in units of unless they were divided by it.
        """
        unit = scale if self.relative else 1.0
        if eager is None:
            return self.eager_largest * unit, self.eager_rms * unit
        return TIMES_EAGER * eager.largest + self.largest * unit, TIMES_EAGER * eager.rms + self.rms * unit


_SWAP = (
    "; where the scores of two chunks round to the other order, another one is selected: seen to move a logit by 4 % "
    "of the largest, in eager PyTorch as well"
)
_LOGITS = {
    "float32": Tolerance(
        1e-4, 1e-5, 1e-4, 1e-5, False, "logits within 1e-4 however a text is cut; other orders of summation give 1e-6 "
        "to 1e-5, ONNX Runtime's CUDA kernels 6e-5 with an rms of 6e-6, of logits up to 5",
    ),
    "float16": Tolerance(
        6e-2, 1e-3, 1e-1, 4e-3, True, "11 bits, rounded at every layer: the rms is 2 units of the largest logit's last "
        "place" + _SWAP,
    ),
    "bfloat16": Tolerance(1e-1, 4e-3, 2.5e-1, 2e-2, True, "8 bits: the rms is 1 unit of its last place" + _SWAP),
}  # fmt: skip
_OPERATORS = {
    "float32": Tolerance(2e-5, 4e-6, 2e-5, 4e-6, True, "one product and one sum, where a model has tens of them"),
    "float16": Tolerance(
        4e-3, 5e-4, 4e-3, 5e-4, True, "kernels round weights of the softmax, and gradients of scores, to 11 bits for "
        "the second product: 4 and half a unit of the largest element's last place; eager rounds results alone",
    ),
    "bfloat16": Tolerance(3.2e-2, 4e-3, 3.2e-2, 4e-3, True, "as float16, with 8 bits"),
}  # fmt: skip
_GRADIENTS = {
    "float32": Tolerance(1e-4, 2e-5, 1e-4, 2e-5, True, "of a parameter's largest gradient: as of logits"),
}
TABLE = {"logits": _LOGITS, "operators": _OPERATORS, "gradients": _GRADIENTS}


@dataclass(frozen=True)
class Check:
    """One comparison; both errors are held against their tolerances.

    Attributes:
        note: shown in place of the error, where that says more.
    """

    leg: str
    quantity: str
    error: float
    rms: float
    tolerance: float
    rms_tolerance: float
    dtype: str
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance and self.rms <= self.rms_tolerance


@dataclass(frozen=True)
class Absent:
    """A way to run the model that is not compared here, and why."""

    leg: str
    reason: str


class Judge:
    """Holds legs to the table, eager PyTorch first: it is what the others are measured by.

    Args:
        kind: of ``TABLE``.
        dtype: that everything but the reference computes in.
    """

    def __init__(self, kind: str, dtype: str) -> None:
        self.rule, self.dtype = TABLE[kind][dtype], dtype
        self._eager: dict[str, Errors] = {}

    def held(self, leg: str, quantity: str, errors: Errors, scale: float) -> Check:
        """The verdict on a leg; ``errors`` are in the unit of ``scale``."""
        if leg == "eager":
            self._eager[quantity] = errors
        allowed = self.rule.allowed(scale, None if leg == "eager" else self._eager.get(quantity, Errors()))
        return Check(leg, quantity, errors.largest, errors.rms, *allowed, self.dtype)

    def compared(self, leg: str, quantity: str, pairs: Iterable[tuple[Any, Any]]) -> Check:
        """The verdict on arrays and what they should be, each relative to its own largest element."""
        errors = Errors()
        for got, want in pairs:
            errors.add(got, want, max(float(np.abs(_array(want)).max(initial=0.0)), 1e-30))
        return self.held(leg, quantity, errors, 1.0)
