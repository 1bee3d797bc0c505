"""The operators of hierarchical sparse attention, as data: what a kernel is built for, what varies at run time.

Shape letters, used throughout the project:

    B batch   L tokens of the segment   C chunks of the memory   S tokens a chunk   K chunks selected a token
    Hq query heads   Hkv key/value heads   G = Hq / Hkv   D head width   Hr retrieval heads   Dr retrieval width
    W tokens of a sliding window
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class ProblemError(ValueError):
    """An operator was described with values that no kernel can serve; the message says which and what would do."""


def _require_positive(problem: object, *names: str) -> None:
    for name in names:
        value = getattr(problem, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ProblemError(f"{name} must be a positive integer, got {value!r}")


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise ProblemError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")


class _Problem:
    """What the operators share: a name, a plain-data form and a hash of it."""

    op: ClassVar[str]

    def to_dict(self) -> dict[str, object]:
        """Plain data that identifies the problem; ``problem_from_dict`` is its inverse."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"op": self.op, **{name: value for name, value in fields.items() if value is not None}}

    @property
    def digest(self) -> str:
        """Twelve hex digits that name the problem in symbols, files and logs."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ChunkSelect(_Problem):
    """Selection of the K best visible chunks of every token and kv head (retrieval).

    ``(q_r [B,L,Hr,Dr], landmark [B,C,Hr,Dr], position [B], chunks [B])
    -> indices int32 [B,L,Hkv,K], scores fp32 [B,L,Hkv,K]``

    Args:
        kv_heads: Hkv. Every kv head selects for itself when ``retrieval_heads == kv_heads``.
        retrieval_heads: Hr, either Hkv or 1 (then all kv heads share one selection).
        retrieval_dim: Dr.
        chunk_size: S.
        top_k: K.
        window: 0, or W to leave to the sliding window what it covers: chunk i is then visible to token t only
            if ``(i+1)*S <= t - W + S`` instead of ``(i+1)*S <= t``.
        dtype: of ``q_r`` and ``landmark``; scores are accumulated in fp32.

    Raises:
        ProblemError: a size is not positive, Hr is neither Hkv nor 1, or the window is shorter than a chunk.
    """

    op: ClassVar[str] = "chunk_select"
    kv_heads: int
    retrieval_heads: int
    retrieval_dim: int
    chunk_size: int
    top_k: int
    window: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        _require_positive(self, "kv_heads", "retrieval_heads", "retrieval_dim", "chunk_size", "top_k")
        _require_dtype(self.dtype)
        if self.retrieval_heads not in (1, self.kv_heads):
            raise ProblemError(f"retrieval_heads must be 1 or kv_heads ({self.kv_heads}), got {self.retrieval_heads}")
        if self.window != 0 and self.window < self.chunk_size:
            raise ProblemError(f"window must be 0 or at least chunk_size ({self.chunk_size}), got {self.window}")

    @property
    def scale(self) -> float:
        """Factor of the scores, 1/sqrt(Dr)."""
        return 1.0 / math.sqrt(self.retrieval_dim)

    @property
    def visible_lag(self) -> int:
        """Chunk i is visible to token t iff ``(i+1)*S <= t - visible_lag``."""
        return self.window - self.chunk_size if self.window else 0

    def flops(self, B: int, L: int, C: int) -> int:
        """Multiply-adds counted as two, for all L x C scores (causality halves them when L = C*S)."""
        return 2 * B * L * C * self.retrieval_heads * self.retrieval_dim

    def bytes(self, B: int, L: int, C: int) -> int:
        """Bytes read and written once each."""
        element = DTYPE_BYTES[self.dtype]
        read = B * (L + C) * self.retrieval_heads * self.retrieval_dim * element
        return read + B * L * self.kv_heads * self.top_k * 8


@dataclass(frozen=True)
class ChunkAttention(_Problem):
    """Attention of every token to its selected chunks: a softmax inside each, their outputs added with given weights.

    ``(q [B,L,Hq,D], k, v [B,C*S,Hkv,D], indices int32 [B,L,Hkv,K], weights fp32 [B,L,Hkv,K]) -> o [B,L,Hq,D]``

    Args:
        q_heads: Hq, a multiple of Hkv.
        kv_heads: Hkv.
        head_dim: D.
        chunk_size: S.
        top_k: K.
        off_by_one: add 1 to every softmax denominator, so that a head may attend to nothing in a chunk.
        dtype: of ``q``, ``k``, ``v`` and ``o``; sums are accumulated in fp32.
        logit_scale: factor of the logits; None for 1/sqrt(D).

    Raises:
        ProblemError: a size is not positive, the heads do not divide, or the factor is not positive.
    """

    op: ClassVar[str] = "chunk_attention"
    q_heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    top_k: int
    off_by_one: bool = False
    dtype: Dtype = "float32"
    logit_scale: float | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        _require_positive(self, "q_heads", "kv_heads", "head_dim", "chunk_size", "top_k")
        _require_dtype(self.dtype)
        if self.logit_scale is not None and not 0 < self.logit_scale < math.inf:
            raise ProblemError(f"logit_scale must be positive and finite, got {self.logit_scale!r}")
        if self.q_heads % self.kv_heads:
            raise ProblemError(f"q_heads ({self.q_heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def groups(self) -> int:
        """G, the query heads that share a kv head."""
        return self.q_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.logit_scale or 1.0 / math.sqrt(self.head_dim)

    def flops(self, B: int, L: int) -> int:
        """Forward, every slot filled: ``4*B*L*K*S*Hq*D``."""
        return 4 * B * L * self.top_k * self.chunk_size * self.q_heads * self.head_dim

    def backward_flops(self, B: int, L: int) -> int:
        """The five matrix products of the backward against the forward's two."""
        return self.flops(B, L) * 5 // 2

    def bytes(self, B: int, L: int, C: int) -> int:
        """Bytes of the forward's arguments and result, each moved once."""
        element = DTYPE_BYTES[self.dtype]
        tokens = 2 * B * L * self.q_heads * self.head_dim * element
        memory = 2 * B * C * self.chunk_size * self.kv_heads * self.head_dim * element
        return tokens + memory + B * L * self.kv_heads * self.top_k * 8


@dataclass(frozen=True)
class SlidingWindow(_Problem):
    """Attention of every token to the last W tokens, its own among them; a ring of W slots carries keys and values
    from call to call.

    ``(q [B,L,Hq,D], k, v [B,L,Hkv,D], past_k, past_v [B,W,Hkv,D], position int64 [B], lengths int64 [B])
    -> o [B,L,Hq,D], present_k, present_v [B,W,Hkv,D]``

    Token i of row b has position ``p = position[b] + i`` and sees keys j with ``p - W < j <= p`` and ``j >= 0``. Those
    before ``position[b]`` lie in slot ``j mod W`` of the ring, the others in k and v. Only the first ``lengths[b]``
    tokens of a row count. Queries and keys come rotated.

    Args:
        q_heads: Hq, a multiple of Hkv.
        kv_heads: Hkv.
        head_dim: D.
        window: W.
        dtype: of all tensors but ``position`` and ``lengths``; sums are accumulated in fp32.

    Raises:
        ProblemError: a size is not positive, or the heads do not divide.
    """

    op: ClassVar[str] = "sliding_window"
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        _require_positive(self, "q_heads", "kv_heads", "head_dim", "window")
        _require_dtype(self.dtype)
        if self.q_heads % self.kv_heads:
            raise ProblemError(f"q_heads ({self.q_heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def groups(self) -> int:
        """G, the query heads that share a kv head."""
        return self.q_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor of the logits, 1/sqrt(D)."""
        return 1.0 / math.sqrt(self.head_dim)

    def flops(self, B: int, L: int) -> int:
        """Forward, every token's window full: ``4*B*L*W*Hq*D``."""
        return 4 * B * L * self.window * self.q_heads * self.head_dim


# What the tuner searches for, and what kernels are built for.
Problem = ChunkSelect | ChunkAttention
AnyProblem = Problem | SlidingWindow
_PROBLEMS: dict[str, type[Problem]] = {cls.op: cls for cls in (ChunkSelect, ChunkAttention)}


def problem_from_dict(data: dict[str, object]) -> Problem:
    """Inverse of ``to_dict`` of what is tuned.

    Raises:
        ProblemError: the operator or a field is unknown, or a value is invalid.
    """
    op, fields = _taken_apart(data)
    if op not in _PROBLEMS:
        raise ProblemError(f"unknown operator {op!r}; known: {', '.join(_PROBLEMS)}")
    try:
        return _PROBLEMS[op](**fields)
    except TypeError as error:
        raise ProblemError(f"{op}: {error}") from None


def any_problem_from_dict(data: dict[str, object]) -> AnyProblem:
    """Inverse of ``to_dict`` of every operator; raises as ``problem_from_dict``."""
    op, fields = _taken_apart(data)
    if op != SlidingWindow.op:
        return problem_from_dict(data)
    try:
        return SlidingWindow(**fields)
    except TypeError as error:
        raise ProblemError(f"{op}: {error}") from None


def _taken_apart(data: dict[str, object]) -> tuple[str, dict[str, Any]]:
    fields = dict(data)
    return str(fields.pop("op", None)), fields
