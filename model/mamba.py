"""Mamba-2 (Dao & Gu, arXiv 2405.21060): a state space with a scalar decay a head, scanned in chunks.

Shape letters: B batch, L tokens, Q tokens of a chunk of the scan, n such chunks, d model width, H heads, P channels a
head, N state a channel, c = H*P + 2*N channels of the convolution, X tokens that it sees.

The recurrence, a head: ``h_t = exp(dt_t * A) * h_{t-1} + dt_t * x_t ⊗ b_t`` and ``y_t = h_t · c_t + D * x_t``, with
x, b and c from a short causal convolution. Plain PyTorch, O(L), is the reference; where a GPU computes in half
precision and fla-core is installed, its kernels scan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import SwiGlu, rms_norm
from hsa_compile.model.rows import Ragged, take

SCAN_CHUNK = 64


class MambaSpan:
    """What the Mamba layers of one call share.

    Args:
        ragged: where rows take different numbers of tokens.
        starts_BL: where rows are packed documents, each of which starts from an empty state.
    """

    def __init__(self, ragged: Ragged | None = None, starts_BL: Tensor | None = None) -> None:
        self.ragged, self.starts = ragged, starts_BL

    def kept(self, conv_BXc: Tensor, ssm_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        """Both, as they are: the state has one size."""
        return conv_BXc, ssm_BHPN


def scan(
    x_BLHP: Tensor, a_BLH: Tensor, b_BLN: Tensor, c_BLN: Tensor, h_BHPN: Tensor, starts_BL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(a_t) h_{t-1} + x_t ⊗ b_t``, ``y_t = h_t · c_t``: y [B, L, H, P] and the last h [B, H, P, N].

    Chunks of Q tokens are products of matrices; between them one state is passed on.

    Args:
        a_BLH: logarithms of the decays, at most 0.
        h_BHPN: the state before the first token.
        starts_BL: where each token's document starts; the state is emptied there.
    """
    L = x_BLHP.shape[1]
    Q = min(SCAN_CHUNK, L)
    tail = -L % Q  # padding with a = x = 0 leaves the state as it is
    x, a, b, c = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, tail)).unflatten(1, (-1, Q)) for t in (x_BLHP, a_BLH, b_BLN, c_BLN)
    )
    start = None
    if starts_BL is not None:
        start = F.pad(starts_BL[:, :, None], (0, 0, 0, tail), mode="replicate")[..., 0].unflatten(1, (-1, Q))
    total = a.cumsum(2)  # [B, n, Q, H]
    decay = total[:, :, :, None] - total[:, :, None]  # from j to i, [B, n, Q, Q, H]
    seen = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()[:, :, None]
    if start is not None:
        seen = seen & (start[:, :, :, None, None] == start[:, :, None, :, None])
    within = decay.masked_fill(~seen, -torch.inf).exp() * (c @ b.transpose(-1, -2))[..., None]
    y = torch.einsum("bnijh,bnjhp->bnihp", within, x)
    to_end = (total[:, :, -1:] - total).exp()
    from_start = total.exp()
    through = from_start[:, :, -1]
    if start is not None:
        to_end = to_end * (start == start[:, :, -1:])[..., None]
        before = F.pad(start[:, :-1, -1], (1, 0), value=-1)[:, :, None]  # the document that a chunk takes over
        from_start = from_start * (start == before)[..., None]
        through = through * (start[:, :, -1:] == before)
    added = torch.einsum("bnjh,bnjhp,bnjk->bnhpk", to_end, x, b)
    h, outputs = h_BHPN, []
    for n in range(x.shape[1]):
        outputs.append(torch.einsum("bih,bik,bhpk->bihp", from_start[:, n], c[:, n], h))
        h = through[:, n, :, None, None] * h + added[:, n]
    y = y + torch.stack(outputs, dim=1)
    return y.flatten(1, 2)[:, :L], h


def fla_scan(
    x_BLHP: Tensor, a_BLH: Tensor, b_BLN: Tensor, c_BLN: Tensor, h_BHPN: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``scan`` by fla-core: linear attention with a scalar decay a head, whose products are of ``dtype``; the decays
    and the state that is passed on are float32."""
    chunk_simple_gla = _simple_gla()
    assert chunk_simple_gla is not None

    def of_heads(t_BLN: Tensor) -> Tensor:
        return t_BLN.to(dtype).unsqueeze(2).expand(-1, -1, x_BLHP.shape[2], -1)

    y, h_BHNP = chunk_simple_gla(
        of_heads(c_BLN), of_heads(b_BLN), x_BLHP.to(dtype), a_BLH.float(), scale=1.0,
        initial_state=h_BHPN.float().transpose(-1, -2).contiguous(), output_final_state=True,
    )  # fmt: skip
    return y.to(x_BLHP.dtype), h_BHNP.transpose(-1, -2).to(h_BHPN.dtype)


@functools.cache
def _simple_gla() -> Callable[..., Any] | None:
    """fla-core's linear attention with a scalar decay, where it is installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    return chunk_simple_gla


def has_kernel(x: Tensor, length: int) -> bool:
    """Whether fla's kernels scan what was projected to ``x``: half precision on a GPU, a chunk of tokens or more."""
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return half and length >= SCAN_CHUNK and _simple_gla() is not None and _compiles_rightly(x.device)


@functools.cache
def _compiles_rightly(device: torch.device) -> bool:
    """On Hopper Triton 3.4 to 3.7.0 miscompiles the gradient, so fla-core refuses it (fla-org, issue 640)."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return torch.cuda.get_device_capability(device)[0] != 9 or not (3, 4) <= version < (3, 7, 1)


class Mamba2(nn.Module):
    """The mixer: projections, convolution, scan, gated norm, projection back. Decays are float32 at least."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.H, self.P, self.N = config.ssm_heads, config.ssm_head_dim, config.ssm_state
        inner = self.H * self.P
        self.widths = (inner, inner + 2 * self.N, self.H)
        self.project = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.conv = nn.Parameter(torch.empty(inner + 2 * self.N, config.ssm_conv))
        self.conv_bias = nn.Parameter(torch.zeros(inner + 2 * self.N))
        # Decays from 1 to 16 and steps from 0.001 to 0.1, as the authors draw them, here spread evenly.
        self.log_decay = nn.Parameter(torch.linspace(1, 16, self.H).log())
        step = torch.logspace(-3, -1, self.H)
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of this is the step
        self.skip = nn.Parameter(torch.ones(self.H))
        self.norm = rms_norm(inner)
        self.out = nn.Linear(inner, config.d_model, bias=False)

    def forward(
        self, x_BLd: Tensor, span: MambaSpan, conv_BXc: Tensor, ssm_BHPN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, L, d], the convolution's last inputs [B, X - 1, c] and the state [B, H, P, N]."""
        L, wide = x_BLd.shape[1], ssm_BHPN.dtype
        z, xbc, step = self.project(x_BLd).split(self.widths, dim=-1)
        xbc, conv = self._convolve(xbc, span, conv_BXc)
        x, b, c = xbc.to(wide).split((self.H * self.P, self.N, self.N), dim=-1)
        x = x.unflatten(-1, (self.H, self.P))
        step = F.softplus(step.to(wide) + self.step_bias.to(wide))
        if span.ragged is not None:
            step = step.masked_fill(span.ragged.padding(L, step.device)[..., None], 0.0)
        a = -step * self.log_decay.to(wide).exp()
        if span.starts is None and has_kernel(z, L):
            y, ssm = fla_scan(x * step[..., None], a, b, c, ssm_BHPN, z.dtype)
        else:
            y, ssm = scan(x * step[..., None], a, b, c, ssm_BHPN, span.starts)
        y = (y + self.skip.to(wide)[:, None] * x).flatten(2).to(x_BLd.dtype)
        return self.out(self.norm(y * F.silu(z))), conv, ssm

    def _convolve(self, x_BLc: Tensor, span: MambaSpan, before_BXc: Tensor) -> tuple[Tensor, Tensor]:
        """The causal convolution, [B, L, c], and its inputs that the next token needs."""
        L, X = x_BLc.shape[1], self.conv.shape[1]
        joined = torch.cat((before_BXc.to(x_BLc.dtype), x_BLc), dim=1)
        ragged = span.ragged
        kept = joined[:, L:] if ragged is None else take(joined, ragged.lengths, X - 1)
        if span.starts is None:
            y = F.conv1d(joined.transpose(1, 2), self.conv[:, None], self.conv_bias, groups=joined.shape[2])
            return F.silu(y.transpose(1, 2)), kept
        y = self.conv_bias.expand_as(x_BLc)
        place = torch.arange(L, device=x_BLc.device)
        for lag in range(X):
            own = (place - lag >= span.starts)[..., None]
            y = y + self.conv[:, X - 1 - lag] * joined[:, X - 1 - lag : X - 1 - lag + L].masked_fill(~own, 0.0)
        return F.silu(y), kept


class MambaLayer(nn.Module):
    """Pre-norm layer with Mamba-2 in place of attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = rms_norm(config.d_model)
        self.mamba = Mamba2(config)
        self.mlp_norm = rms_norm(config.d_model)
        self.mlp = SwiGlu(config.d_model, config.mlp_dim)

    def forward(
        self, x_BLd: Tensor, span: MambaSpan, conv_BXc: Tensor | None = None, ssm_BHPN: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output [B, L, d] and its state after the segment; by default from the first token on."""
        if conv_BXc is None or ssm_BHPN is None:
            conv_BXc, ssm_BHPN = empty_state(self.config, x_BLd.shape[0], x_BLd.dtype, x_BLd.device)
        o, conv, ssm = self.mamba(self.norm(x_BLd), span, conv_BXc, ssm_BHPN)
        x, normed = self.mlp_norm.after(x_BLd, o)
        return x + self.mlp(normed), conv, ssm


def empty_state(
    config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """A layer's state before the first token; the scan's is float32 at least."""
    channels = config.ssm_heads * config.ssm_head_dim + 2 * config.ssm_state
    conv = torch.zeros(batch, config.ssm_conv - 1, channels, dtype=dtype, device=device)
    shape = (batch, config.ssm_heads, config.ssm_head_dim, config.ssm_state)
    wide = torch.promote_types(dtype, torch.float32)
    return conv, torch.zeros(shape, dtype=wide, device=device)
