"""A model on a GPU through either backend: training under autocast, with recomputation, compiled, without waiting;
windows and scans by kernels; decoding from CUDA graphs and with the chunk memory in the host's memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.flash import FlashWindow
from hsa_compile.model.generate import generate
from hsa_compile.model.gradients import GradientGraphs
from hsa_compile.model.graph import GraphDecoder
from hsa_compile.model.layers import SlidingWindow, SwiGlu, rms_norm, rotate, rotations
from hsa_compile.model.mamba import SCAN_CHUNK, fla_scan, has_kernel, scan
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.prefill import prefill

# The kernels are those of the checks "g16-k16" and "dr64".
CONFIG = ModelConfig(
    d_model=128, mlp_dim=256, lower_layers=1, upper_layers=2, n_groups=2, swa_heads=2, swa_kv_heads=2, swa_head_dim=64,
    window=128, chunk_size=64, hsa_heads=16, hsa_kv_heads=1, hsa_head_dim=64, retrieval_heads=1, retrieval_dim=64,
    top_k=16, train_top_k=16,
)  # fmt: skip


@functools.cache
def _model() -> tuple[HsaModel, Tensor]:
    torch.manual_seed(0)  # of so many tokens that the fused passes serve
    return HsaModel(CONFIG).cuda().train(), torch.randint(0, CONFIG.vocab_size, (4, 2049), device="cuda")


def _step(run: torch.nn.Module | None = None, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, all gradients as one vector) of a step in bf16 autocast."""
    model, ids = _model()
    model.recompute = recompute
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        logits = (model if run is None else run)(ids[:, :-1])
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


def check_training_graphs() -> None:
    """Gradients from CUDA graphs, of two lengths in turns, and weights that change in between."""
    model, ids = _model()

    def backward(x: Tensor, y: Tensor, w: Tensor, total: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = sequence_loss(model(x), y, w, total)
        loss.backward()
        return loss.detach()

    def found(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.clone(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    graphs, before = GradientGraphs(model, backward), {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        for L in (2048, 512, 2048, 512):
            x, y = ids[:, :L].contiguous(), ids[:, 1 : L + 1].contiguous()
            w = torch.rand(x.shape, device="cuda")
            got = found(graphs(x, y, w))
            model.zero_grad(set_to_none=True)
            _close(got, found(backward(x, y, w, w.sum())), 1e-2)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * torch.randn_like(p))
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])


def check_compiled_graph() -> None:
    """``torch.compile`` takes the model as one graph."""
    torch._dynamo.reset()
    _close(_step(torch.compile(_model()[0], fullgraph=True)), _step(), 3e-2)


def check_windows() -> None:
    """FlashAttention's windows are the masked ones, with their gradients, wherever segment and ring begin."""
    config, device = dataclasses.replace(CONFIG, swa_heads=4), torch.device("cuda")
    for ring, length in ((0, 1), (0, 130), (127, 1), (127, 500), (50, 128), (127, 9000)):
        q = torch.randn(2, length, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(2, ring + length, 2, 64, device=device, dtype=q.dtype, requires_grad=True) for _ in "kv")
        grad = torch.randn_like(q)
        got = FlashWindow(config, ring, length, device).attend(q, k, v)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = SlidingWindow(config, ring, length, device).attend(*wide)
        pairs = [(got, want)]
        pairs += zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, wide, grad.double()))
        for name, (a, b) in zip("oqkv", pairs):
            off = float((a - b).detach().norm() / (b.detach().norm() + 1e-3))
            assert off <= 1e-2, f"ring {ring}, {length} tokens: {name} off by {off:.2g}"


def _loss_of(logits: Tensor) -> Tensor:
    targets = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return sequence_loss(logits, targets)


def check_fused() -> None:
    """Fused passes are PyTorch's in float64, and repeat to the bit, on strided heads, wide rows, a large vocabulary."""
    norm, wide, mlp = rms_norm(64).cuda(), rms_norm(1000).cuda(), SwiGlu(16, 2304).cuda()
    cos, sin = rotations(2050, 64, 1e4, torch.device("cuda"), torch.float64)
    with torch.no_grad():
        norm.weight.normal_()
    cases: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "norm of heads": ((2, 2050, 20, 64), lambda x: norm(x[:, :, :16])),
        "norm": ((2, 2050, 1000), wide),
        "norm after an addition": ((2, 2050, 1000), lambda x: torch.cat(wide.after(x, 0.5 * x))),
        "rotation": ((2, 2050, 20, 64), lambda x: rotate(x[:, :, 2:18], cos, sin)),
        "gate": ((2, 2050, 16), mlp),
        "loss": ((2, 50, 50_304), _loss_of),
    }
    for name, (shape, run) in cases.items():
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = run(x)
                got, again = ([o, *torch.autograd.grad(o, x, torch.ones_like(o))] for o in (y, run(x)))
            assert all(torch.equal(a, b) for a, b in zip(got, again)), f"{name}, {dtype}: does not repeat"
            double = x.detach().double().requires_grad_()
            for module in (norm, wide, mlp):
                module.double()
            with dispatch.use_backend("eager"):
                y = run(double)
                want = [y, *torch.autograd.grad(y, double, torch.ones_like(y))]
            for module in (norm, wide, mlp):
                module.float()
            for a, b in zip(got, want):
                off = float((a - b).detach().norm() / b.detach().norm())
                assert off <= (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}, {dtype}: off by {off:.2g}"


@contextlib.contextmanager
def _one_tile_each(package: str) -> Iterator[None]:
    """Triton's autotuned programs of a package take one tile: to try all of them is minutes of compiling."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    before: list[tuple[Any, Any]] = []
    for name, module in list(sys.modules.items()):
        for program in vars(module).values() if name.startswith(package) else ():
            while isinstance(program, KernelInterface):
                if isinstance(program, Autotuner):
                    before.append((program, program.configs))
                    program.configs = [
                        min(program.configs, key=lambda tile: (abs(tile.num_warps - 4), tile.num_stages))
                    ]
                program = getattr(program, "fn", None)
    try:
        yield
    finally:
        for program, configs in reversed(before):
            program.configs = configs


def check_mamba_scan() -> str:
    """fla-core's scan is the plain one, with its gradients; said where it does not serve."""
    x = torch.empty(1, dtype=torch.bfloat16, device="cuda")
    if not has_kernel(x, SCAN_CHUNK):
        return "(fla-core is not installed, or Triton miscompiles it here)"
    B, L, H, P, N = 2, 300, 4, 32, 64
    x, b, c = (torch.randn(B, L, *rest, device="cuda") for rest in ((H, P), (N,), (N,)))
    a, h = -torch.rand(B, L, H, device="cuda"), torch.randn(B, H, P, N, device="cuda")
    ours, theirs = ([t.clone().requires_grad_() for t in (x, a, b, c, h)] for _ in range(2))
    with _one_tile_each("fla."):
        want, got = scan(*ours), fla_scan(*theirs, torch.bfloat16)
        for (y, last), inputs in ((want, ours), (got, theirs)):
            (y.float().square().sum() + last.square().sum()).backward()
            assert all(t.grad is not None for t in inputs)
    for name, p, q in (("y", got[0], want[0]), ("h", got[1], want[1])):
        off = float((p - q).norm() / q.norm())
        assert off <= 2e-2, f"{name} off by {off:.2g}"
    for name, p, q in zip("xabch", theirs, ours):
        off = float((p.grad - q.grad).norm() / q.grad.norm())
        assert off <= 4e-2, f"gradient of {name} off by {off:.2g}"
    return ""


@functools.cache
def _reader() -> tuple[HsaModel, Tensor]:
    torch.manual_seed(1)
    model = HsaModel(CONFIG).cuda().bfloat16().eval()
    return model, torch.randint(0, CONFIG.vocab_size, (2, 3000), device="cuda")


def _tokens(count: int, **options: bool) -> Tensor:
    model, ids = _reader()
    return torch.stack(list(generate(model, ids, count, segment=512, **options)))


def check_host_memory() -> None:
    """A chunk memory in the host's gives the tokens of one on the device, and fetching waits for nothing."""
    assert torch.equal(_tokens(80, offload=True), _tokens(80))
    model, ids = _reader()
    _, state = prefill(model, ids, 512, offload=True)
    before = torch.cuda.memory_allocated()
    larger = state.with_room(8 * state.capacity)
    grown = torch.cuda.memory_allocated() - before
    assert grown <= 2 * larger.landmark.nbytes, f"{grown} bytes of the GPU for a memory of {larger.mem_k.nbytes}"
    one = ids[:, :1].contiguous()
    model.step(one, larger)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.step(one, larger)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graphs() -> None:
    """Decoding from CUDA graphs gives the same tokens, over several chunks and a memory that grows."""
    want = _tokens(150)
    for offload in (False, True):
        assert torch.equal(_tokens(150, graphs=True, offload=offload), want), f"offload {offload}"
    model, ids = _reader()
    decoder = GraphDecoder(model, prefill(model, ids, 512)[1])
    for _ in range(3 * CONFIG.chunk_size):  # the memory grows once, which drops the graphs before
        decoder.step(ids[:, :1])
    assert len(decoder.graphs) == CONFIG.chunk_size


CHECKS = {
    "step": check_step, "recomputation": check_recomputation, "torch.compile": check_compiled_graph,
    "windows": check_windows, "fused": check_fused, "mamba scan": check_mamba_scan, "host memory": check_host_memory,
    "graphs": check_graphs, "training graphs": check_training_graphs,
}  # fmt: skip
