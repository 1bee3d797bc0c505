"""The operators between a model's matrix products: inputs, what comes out by definition, and how far off is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inputs import DEVICE, Tensors

EPSILON = 1e-3  # large enough that forgetting it shows
# Of a rounding to the type, relative to the value: half a unit in the last place. And of float32 sums.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
FLOAT_SUMS = 3e-6

_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AddNorm": (("x", "added", "weight"), ("sum", "normed")),
    "RmsNorm": (("x", "weight"), ("normed",)),
    "RotaryHeads": (("qkv", "q_weight", "k_weight", "cos", "sin"), ("q", "k", "v")),
    "SwiGlu": (("gate_up",), ("o",)),
    "TakeRows": (("x", "index"), ("taken",)),
}


@dataclass(frozen=True)
class Pass:
    """A call of an operator.

    Attributes:
        op: its name in ONNX.
        shape: of its first output but for RotaryHeads, whose is [B, L, D], and for TakeRows, whose is the table's.
        taken: shape of TakeRows' index.
        heads: Hq, Hkv of RotaryHeads.
        normalize: of RotaryHeads.
        shared: whether all rows of the batch have the same angles.
    """

    op: str
    shape: tuple[int, ...]
    heads: tuple[int, int] = (1, 1)
    normalize: bool = True
    shared: bool = False
    taken: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return _NAMES[self.op][0]

    @property
    def outputs(self) -> tuple[str, ...]:
        return _NAMES[self.op][1]

    @property
    def attributes(self) -> dict[str, Any]:
        if self.op in ("SwiGlu", "TakeRows"):
            return {}
        if self.op != "RotaryHeads":
            return {"epsilon": EPSILON}
        sizes = {"num_heads": self.heads[0], "kv_num_heads": self.heads[1]}
        return {**sizes, "normalize": int(self.normalize), "epsilon": EPSILON}

    def make(self, dtype: torch.dtype, seed: int = 0) -> Tensors:
        """Random inputs; weights that are not looked at are NaN."""
        g = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g, device=DEVICE) * scale).to(dtype)

        *rows, width = self.shape
        weight = 1 + normal(width, scale=0.3)
        if self.op == "SwiGlu":
            return (normal(*rows, 2 * width, scale=4.0),)
        if self.op == "RmsNorm":
            return normal(*rows, width), weight
        if self.op == "TakeRows":
            return normal(*rows, width), torch.randint(0, max(1, rows[-1]), self.taken, generator=g, device=DEVICE)
        if self.op == "AddNorm":
            return normal(*rows, width), normal(*rows, width, scale=2.0), weight
        qkv = normal(*rows, (self.heads[0] + 2 * self.heads[1]) * width)
        B, L = rows
        angles = torch.randn(1 if self.shared else B, L, width // 2, generator=g, device=DEVICE) * 9
        weights = weight, 1 + normal(width, scale=0.3)
        if not self.normalize:
            weights = torch.full_like(weight, torch.nan), torch.full_like(weight, torch.nan)
        return qkv, *weights, angles.cos(), angles.sin()

    def by_definition(self, inputs: Tensors) -> Tensors:
        """In float64; a sum that is handed on is rounded first, as what follows reads it so."""
        x, *rest = inputs
        if self.op == "SwiGlu":
            gate, up = x.double().chunk(2, dim=-1)
            return (gate / (1 + (-gate).exp()) * up,)
        if self.op == "RmsNorm":
            return (_normed(x, rest[0]),)
        if self.op == "TakeRows":
            return (x.double()[..., rest[0], :],)
        if self.op == "AddNorm":
            total = (x.float() + rest[0].float()).to(x.dtype)
            return total.double(), _normed(total, rest[1])
        q_weight, k_weight, cos, sin = rest
        (Hq, Hkv), D = self.heads, self.shape[-1]
        q, k, v = x.unflatten(2, (-1, D)).split((Hq, Hkv, Hkv), dim=2)
        turned = []
        for part, weight in ((q, q_weight), (k, k_weight)):
            a, b = (_normed(part, weight) if self.normalize else part.double()).chunk(2, dim=-1)
            c, s = (f.double()[:, :, None] for f in (cos, sin))
            turned.append(torch.cat((a * c - b * s, b * c + a * s), dim=-1))
        return turned[0], turned[1], v.double()

    def check(self, inputs: Tensors, got: Tensors, roundings: int = 1) -> None:
        """
        Args:
            roundings: to the type that may be between inputs and results, or be left out.

        Raises:
            AssertionError: a result is further off than that takes it.
        """
        dtype = inputs[0].dtype
        for name, y, exact in zip(self.outputs, got, self.by_definition(inputs), strict=True):
            assert y.dtype == dtype, (name, y.dtype)
            if name in ("sum", "v", "taken"):
                assert torch.equal(y.double(), exact), name
            scale = float(exact.abs().max()) if exact.numel() else 0.0
            close = {"rtol": roundings * ROUNDING[dtype] * 1.01, "atol": FLOAT_SUMS * max(scale, 1.0)}
            torch.testing.assert_close(y.double(), exact, **close, msg=lambda m, n=name: f"{n}: {m}")

    def empty(self, inputs: Tensors) -> Tensors:
        """Results before they are there, NaN."""
        exact = self.by_definition(inputs)
        return tuple(torch.full(y.shape, torch.nan, dtype=inputs[0].dtype, device=DEVICE) for y in exact)

    def bytes(self, inputs: Tensors) -> int:
        """That a call reads and writes at the least."""
        return sum(x.numel() * x.element_size() for x in (*inputs, *self.empty(inputs)))


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


# Whole vectors and not, one token and many, rows that a thread has and rows that no warp holds, heads that pad a warp.
CASES: tuple[Pass, ...] = (
    *(Pass("AddNorm", shape) for shape in ((2, 3, 64), (1, 1, 1024), (5, 200), (3, 4, 2048), (1, 2, 5), (2, 2, 4104))),
    *(Pass("RmsNorm", shape) for shape in ((2, 5, 3, 64), (7, 512), (1, 1, 2, 128), (1, 3), (2, 1, 96), (1, 2, 9000))),
    Pass("RotaryHeads", (2, 7, 64), (16, 2)),
    Pass("RotaryHeads", (1, 1, 64), (16, 2)),
    Pass("RotaryHeads", (2, 5, 128), (4, 4), shared=True),
    Pass("RotaryHeads", (2, 3, 64), (2, 1), normalize=False),
    Pass("RotaryHeads", (3, 5, 6), (3, 1), shared=True),
    Pass("RotaryHeads", (1, 9, 80), (5, 5)),
    Pass("RotaryHeads", (2, 2, 2), (1, 1), normalize=False),
    Pass("RotaryHeads", (1, 3, 256), (40, 4)),
    Pass("RotaryHeads", (1, 2, 142), (1, 1)),
    *(Pass("SwiGlu", shape) for shape in ((2, 3, 128), (1, 1, 2304), (4, 5), (2, 2, 4100), (1, 3, 8200))),
    Pass("TakeRows", (7, 64), taken=(2, 9)),
    Pass("TakeRows", (3, 5, 1024), taken=(6,)),
    Pass("TakeRows", (3, 5, 9), taken=()),
    Pass("TakeRows", (1, 4, 4100), taken=(1,)),
)
