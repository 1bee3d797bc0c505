"""Training a model on a GPU through either backend: under autocast, with recomputation, compiled, without waiting."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel

# The kernels are those of the checks "g16-k16" and "dr64".
CONFIG = ModelConfig(
    d_model=128, mlp_dim=256, lower_layers=1, upper_layers=2, n_groups=2, swa_heads=2, swa_kv_heads=2, swa_head_dim=64,
    window=128, chunk_size=64, hsa_heads=16, hsa_kv_heads=1, hsa_head_dim=64, retrieval_heads=1, retrieval_dim=64,
    top_k=16, train_top_k=16,
)  # fmt: skip


@functools.cache
def _model() -> tuple[HsaModel, Tensor]:
    torch.manual_seed(0)
    return HsaModel(CONFIG).cuda().train(), torch.randint(0, CONFIG.vocab_size, (2, 2049), device="cuda")


def _step(run: torch.nn.Module | None = None, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, all gradients as one vector) of a step in bf16 autocast."""
    model, ids = _model()
    model.recompute = recompute
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        logits = (run or model)(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    model.recompute = False
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float) -> None:
    assert abs(float(got[0] - want[0])) <= 1e-2 * float(want[0]), f"loss {float(got[0])}, not {float(want[0])}"
    assert bool(got[1].isfinite().all())
    off = float((got[1] - want[1]).norm() / want[1].norm())
    assert off <= tolerance, f"gradients off by {off:.2g}"


def check_step() -> None:
    """As the eager path, to what bf16 rounds; and nothing waits for the device."""
    with dispatch.use_backend("eager"):
        want = _step()
    _close(_step(), want, 3e-2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_recomputation() -> None:
    """Checkpointed layers run the operators again and give the same."""
    _close(_step(recompute=True), _step(), 1e-3)


def check_compiled_graph() -> None:
    """``torch.compile`` takes the model as one graph."""
    torch._dynamo.reset()
    _close(_step(torch.compile(_model()[0], fullgraph=True)), _step(), 3e-2)


CHECKS = {"step": check_step, "recomputation": check_recomputation, "torch.compile": check_compiled_graph}
