"""How contexts are read: what an evaluation does, and what looks into it."""

from __future__ import annotations

from torch import Tensor

from hsa_compile.evaluation.plan import Plan
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel
from hsa_compile.model.prefill import WINDOWED, Ids, prefill, short_prefill
from hsa_compile.model.state import State

ANSWER_TOKENS = 256  # that fit into a memory without a copy of it


def shares_haystacks(config: ModelConfig, plan: Plan, length: int) -> bool:
    """Whether questions of this length are written over one haystack that is read once."""
    return length >= plan.patch_from and config.architecture in WINDOWED


def read(model: HsaModel, ids_BL: Ids, plan: Plan) -> tuple[Tensor, State]:
    """Logits [B, V] after contexts, and the state: by a short prefill, where the layers see windows."""
    segment = max(1, plan.segment // ids_BL.shape[0])
    if model.config.architecture not in WINDOWED:
        return prefill(model, ids_BL, segment, offload=plan.offload)
    room = 2 + ANSWER_TOKENS // model.config.chunk_size
    return short_prefill(model, ids_BL, segment, plan.offload, room)
