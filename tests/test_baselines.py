"""The baselines against definitions of a few lines, and their cached steps against one forward pass."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_compile.export import export_bundle
from hsa_compile.model.baselines import FullAttention, MeanPooledMemory, NsaLayer, joint_attention
from hsa_compile.model.checkpoint import load_checkpoint, save_checkpoint
from hsa_compile.model.config import Architecture, ConfigError, ModelConfig
from hsa_compile.model.landmark import LandmarkAttention
from hsa_compile.model.layers import rotate, rotations
from hsa_compile.model.mamba import Mamba2, MambaSpan, empty_state, scan
from hsa_compile.model.model import HsaModel
from hsa_compile.model.rows import starts_of
from kit import lively

pytestmark = pytest.mark.usefixtures("light")

SMALL = ModelConfig(
    vocab_size=50, d_model=32, mlp_dim=48, lower_layers=1, upper_layers=1, n_groups=1, swa_heads=4, swa_kv_heads=2,
    swa_head_dim=8, window=7, chunk_size=4, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_heads=2,
    retrieval_dim=8, top_k=3, train_top_k=2, ssm_state=6, ssm_head_dim=16,
)  # fmt: skip
CPU = torch.device("cpu")
BASELINES = [name for name in get_args(Architecture) if name != "hsa"]


def of(architecture: str, **change: object) -> ModelConfig:
    return dataclasses.replace(SMALL, architecture=architecture, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("carried", [0, 5])
def test_full_attention_is_its_definition(carried: int) -> None:
    L, T = 9, carried + 9
    q, k, v = torch.randn(2, L, 4, 8), torch.randn(2, T, 2, 8), torch.randn(2, T, 2, 8)
    got = FullAttention(SMALL, carried, L, CPU).attend(q, k, v)
    cos, sin = rotations(T, 8, SMALL.rope_base, CPU)
    q, k = rotate(q, cos[carried:], sin[carried:]), rotate(k, cos, sin)
    for t in range(L):
        for h in range(4):
            p = (torch.einsum("bd,bjd->bj", q[:, t, h], k[:, : carried + t + 1, h // 2]) / math.sqrt(8)).softmax(-1)
            torch.testing.assert_close(got[:, t, h], torch.einsum("bj,bjd->bd", p, v[:, : carried + t + 1, h // 2]))


def test_window_sees_nothing_beyond_it_and_costs_a_window_a_token() -> None:
    """The gradient of a token's logits reaches as far as the layers' windows do, no further."""
    model = lively(HsaModel(of("swa")))
    x = torch.randn(1, 40, 32, requires_grad=True)
    span = model.span(0, 40)
    y, _, _ = model.lower[0](x, span)
    y[0, 30].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == list(range(24, 31))
    assert span.mask.numel() == 7 * 14  # type: ignore[union-attr]


def test_nsa_is_its_definition() -> None:
    layer, pool = lively(NsaLayer(of("nsa"))), lively(MeanPooledMemory(of("nsa")))
    x, hidden = torch.randn(1, 20, 32), torch.randn(1, 5, 4, 32)
    memory = pool(hidden)
    got = layer.retrieve(x, memory, torch.zeros(1, dtype=torch.int64), torch.tensor([5]))
    q = layer.q_norm(layer.to_q(x).view(20, 4, 8))
    k, v = pool.to_kv(pool.norm(hidden)).view(20, 4, 8).split(2, dim=1)
    k, o = pool.k_norm(k), torch.zeros(20, 4, 8)
    for t in range(20):
        for g in range(2):
            logits = q[t, 2 * g : 2 * g + 2] @ k[:, g].T / math.sqrt(8)
            score = {i: logits[:, 4 * i : 4 * i + 4].mean().item() for i in range(t // 4)}
            chosen = sorted(score, key=lambda i: -score[i])[:3]
            tokens = [4 * i + j for i in chosen for j in range(4)]
            if tokens:
                o[t, 2 * g : 2 * g + 2] = logits[:, tokens].softmax(-1) @ v[tokens, g]
    torch.testing.assert_close(got[0], layer.out(o.flatten(1)), rtol=1e-4, atol=1e-5)


def test_joint_attention_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    indices = torch.randint(-1, 3, (2, 9, 2, 3), dtype=torch.int32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    whole = joint_attention(*inputs, indices, 4)
    want = torch.autograd.grad(whole.square().sum(), inputs)
    monkeypatch.setattr("hsa_compile.model.baselines.BLOCK_ELEMENTS", 2 * 2 * 3 * 4 * 8 * 2)
    blocks = joint_attention(*inputs, indices, 4)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks.square().sum(), inputs), want)


@pytest.mark.parametrize("top_k", [None, 2])
def test_landmark_attention_is_its_definition(top_k: int | None) -> None:
    """Tokens and landmarks in a row, as in the paper: groups of keys, a softmax in each, gates multiplied."""
    c = of("landmark", top_k=top_k or 9)
    span = LandmarkAttention(c, 0, 18, CPU, training=top_k is None)
    M = span.M
    assert M == 18 + 4
    q, k, v = torch.randn(1, M, 4, 8), torch.randn(1, M, 2, 8), torch.randn(1, M, 2, 8)
    got = span.attend(q, k, v)
    cos, sin = rotations(M, 8, c.rope_base, CPU)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    for i in range(M):
        for h in range(4):
            e = torch.exp(k[0, : i + 1, h // 2] @ q[0, i, h] / math.sqrt(8))
            mine = [j for j in range(i + 1) if j // 5 == i // 5 and j % 5 != 4]
            landmarks = sorted((5 * n + 4 for n in range(i // 5)), key=lambda j: -e[j].item())[:top_k]
            total = sum(e[j] for j in mine + landmarks)
            o = sum(e[j] / total * v[0, j, h // 2] for j in mine)
            for m in landmarks:
                chunk = range(m - 4, m)
                o = o + e[m] / total * sum(e[j] * v[0, j, h // 2] for j in chunk) / sum(e[j] for j in chunk)
            torch.testing.assert_close(got[0, i, h], o, rtol=1e-4, atol=1e-5)


def naive_scan(x: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(a[:, t])[:, :, None, None] * h + x[:, t, :, :, None] * b[:, t, None, None, :]
        outputs.append(torch.einsum("bhpn,bn->bhp", h, c[:, t]))
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize("length", [1, 8, 21])
def test_scan_is_the_recurrence(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa_compile.model.mamba.SCAN_CHUNK", 8)
    x, b, c = (torch.randn(2, length, *s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5,), (5,)))
    a = (-torch.rand(2, length, 3, dtype=torch.float64) * 3).requires_grad_()
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, a, b, c, h)
    got, want = scan(*inputs), naive_scan(*inputs)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum() + last.sum(), inputs) for y, last in (got, want)]
    torch.testing.assert_close(*grads)


def test_mamba_is_its_definition() -> None:
    c = of("mamba")
    mixer = lively(Mamba2(c))
    x_Ld = torch.randn(11, 32)
    got, _, _ = mixer(x_Ld[None], MambaSpan(), *empty_state(c, 1, x_Ld.dtype, CPU))
    z, xbc, dt = mixer.project(x_Ld).split((64, 76, 4), dim=-1)
    padded = F.pad(xbc, (0, 0, 3, 0))
    xbc = F.silu(sum(mixer.conv[:, i] * padded[i : i + 11] for i in range(4)) + mixer.conv_bias)
    x, b, g = xbc.split((64, 6, 6), dim=-1)
    dt, h, rows = F.softplus(dt + mixer.step_bias), torch.zeros(4, 16, 6), []
    for t in range(11):
        x_t = x[t].view(4, 16)
        decay = torch.exp(-dt[t] * mixer.log_decay.exp())
        h = decay[:, None, None] * h + dt[t][:, None, None] * x_t[:, :, None] * b[t]
        rows.append((h @ g[t] + mixer.skip[:, None] * x_t).flatten())
    want = mixer.out(mixer.norm(torch.stack(rows) * F.silu(z)))
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", BASELINES)
def test_step_equals_forward(architecture: str) -> None:
    model = lively(HsaModel(of(architecture, lower_layers=2)))
    ids = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    for sizes in ([37], [1] * 37, [3, 1, 5, 20, 8], [4, 4, 29]):
        state, parts, at = model.start(batch=2, capacity=1), [], 0
        for size in sizes:
            logits, state = model.step(ids[:, at : at + size], state)
            parts.append(logits)
            at += size
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        assert state.position.tolist() == [37, 37]


@pytest.mark.parametrize("architecture", BASELINES)
def test_a_token_changes_nothing_before_it(architecture: str) -> None:
    model = lively(HsaModel(of(architecture)))
    ids = torch.randint(0, 50, (1, 40))
    changed = ids.clone()
    changed[0, 25] = (ids[0, 25] + 1) % 50
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:25].max() < 1e-5  # landmarks and scans sum in an order of their own
    assert (difference[25:31] > 1e-4).all()


@pytest.mark.parametrize("architecture", BASELINES)
def test_checkpoints_keep_the_architecture(architecture: str, tmp_path: Path) -> None:
    model = HsaModel(of(architecture)).eval()
    ids = torch.arange(20)[None]
    again = load_checkpoint(save_checkpoint(model, tmp_path))
    assert again.config.architecture == architecture
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("architecture", BASELINES)
def test_what_cannot_be_exported_says_so(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"exporting needs the architecture hsa; {architecture} runs"):
        export_bundle(HsaModel(of(architecture)), tmp_path)
    if architecture != "mamba-hsa":
        with pytest.raises(ConfigError, match="building kernels needs the architecture hsa or mamba-hsa"):
            of(architecture).problems()


def test_landmark_attention_refuses_rows_that_differ() -> None:
    model = HsaModel(of("landmark"))
    with pytest.raises(ConfigError, match="one length"):
        model.step(torch.zeros(2, 3, dtype=torch.int64), model.start(2), [3, 2])
    with pytest.raises(ConfigError, match="packed"):
        model(torch.zeros(1, 3, dtype=torch.int64), starts_of([[1, 2]]))
