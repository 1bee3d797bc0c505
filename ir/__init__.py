"""The operators: what they compute (``operators``, ``reference``) and tile programs that compute it (``programs``)."""

from hsa_compile.ir.operators import (
    AnyProblem,
    ChunkAttention,
    ChunkSelect,
    Dtype,
    Problem,
    ProblemError,
    SlidingWindow,
    any_problem_from_dict,
    problem_from_dict,
)

__all__ = [
    "AnyProblem",
    "ChunkAttention",
    "ChunkSelect",
    "Dtype",
    "Problem",
    "ProblemError",
    "SlidingWindow",
    "any_problem_from_dict",
    "problem_from_dict",
]
