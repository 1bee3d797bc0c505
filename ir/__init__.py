"""The operators: what they compute (``operators``, ``reference``) and tile programs that compute it (``programs``)."""

from hsa_compile.ir.operators import ChunkAttention, ChunkSelect, Dtype, Problem, ProblemError, problem_from_dict

__all__ = ["ChunkAttention", "ChunkSelect", "Dtype", "Problem", "ProblemError", "problem_from_dict"]
