"""The backward of chunk attention on a GPU, checked and timed, as ``build_backward.py`` built it.

    python tests/gpu/check_backward.py check DIR [CASE ...]
    python tests/gpu/check_backward.py edges DIR [CASE ...]   # NaN stays where it belongs; offsets past 2^31
    python tests/gpu/check_backward.py time DIR [CASE[@VARIANT] ...]

Errors are judged against float64 gradients, beside a path that rounds probabilities and logit gradients to the
problem's type before their products, as any half-precision attention does.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from build_backward import BENCH, CASES

from hsa_compile.bench.selections import synthetic_selection
from hsa_compile.ir.operators import ChunkAttention

DEVICE = "cuda"
NAMES = ("grad_o", "q", "k", "v", "indices", "weights", "d_q", "d_k", "d_v", "d_weights")


class Built:
    """A built backward on the current device."""

    def __init__(self, folder: Path, name: str) -> None:
        self.problem = CASES[name.partition("@")[0]].problem
        data = json.loads((folder / f"{name}.json").read_text())
        self.launches, self.scratch, self.tile = data["launches"], data["scratch"], data["tile"]
        self.library = ctypes.CDLL(str(folder / f"{name}.so"))
        self.library.elements.restype = ctypes.c_int64
        self.library.elements.argtypes = [ctypes.c_int] + [ctypes.c_int64] * 3
        self.library.step.argtypes = [ctypes.c_int, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
        for f in ("setup", "message"):
            getattr(self.library, f).restype = ctypes.c_char_p
        error = self.library.setup()
        if error:
            raise RuntimeError(error.decode())

    def prepare(
        self, grad_o: Any, q: Any, k: Any, v: Any, indices: Any, weights: Any
    ) -> tuple[Any, Callable[[int], None]]:
        """(outputs, run one launch); outputs and scratch are poisoned."""
        B, L, C = q.shape[0], q.shape[1], k.shape[1] // self.problem.chunk_size
        outputs = [torch.full_like(x, math.nan) for x in (q, k, v, weights)]
        scratch = []
        for i, (_, dtype) in enumerate(self.scratch):
            n = max(16, self.library.elements(i, B, L, C))
            scratch.append(
                torch.full(
                    (n,), math.nan if dtype == "float32" else 2**30, device=q.device, dtype=getattr(torch, dtype)
                )
            )
        tensors = [grad_o, q, k, v, indices, weights, *outputs, *scratch]
        keep = torch.empty(64, device=q.device)  # empty tensors have no address
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() or keep.data_ptr() for x in tensors))
        stream = torch.cuda.current_stream().cuda_stream

        def step(i: int) -> None:
            if self.library.step(i, pointers, B, L, C, stream):
                raise RuntimeError(f"{self.launches[i]}: {self.library.message().decode()}")

        step.keep = (tensors, keep)  # type: ignore[attr-defined]
        step.bytes = sum(x.numel() * 4 for x in scratch)  # type: ignore[attr-defined]
        return outputs, step

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        outputs, step = self.prepare(*inputs)
        for i in range(len(self.launches)):
            step(i)
        return tuple(outputs)


def gradients(p: ChunkAttention, inputs: tuple[Any, ...], dtype: Any, rounded: Any = None) -> tuple[Any, ...]:
    """Gradients in plain torch in ``dtype``; with ``rounded``, p and ds go through that type, and so do the results."""
    grad_o, q, k, v, indices, weights = inputs
    (B, L, Hq, D), Hkv, S, K = q.shape, p.kv_heads, p.chunk_size, p.top_k
    C, G = k.shape[1] // S, p.groups
    low = (lambda x: x.to(rounded).to(dtype)) if rounded else (lambda x: x)
    d_q = torch.zeros(B, L, Hkv, G, D, dtype=dtype, device=q.device)
    d_k, d_v = torch.zeros(2, B, Hkv, max(C, 1), S, D, dtype=dtype, device=q.device)
    d_w = torch.zeros(B, L, Hkv, K, dtype=dtype, device=q.device)
    live_all = (indices >= 0) & (indices < C)
    step = max(1, (1 << 26) // (K * S * max(D, G)))
    for b in range(B):
        for h in range(Hkv):
            chunks = [x[b, :, h].view(C, S, D) for x in (k, v)]
            for t in range(0, L if C else 0, step):
                rows = slice(t, t + step)
                live = live_all[b, rows, h]
                if not bool(live.any()):
                    continue
                i = indices[b, rows, h].clamp(0, C - 1).long()
                w = torch.where(live, weights[b, rows, h], 0.0).to(dtype)[..., None, None]
                kk, vv = (x[i].to(dtype) for x in chunks)
                qq, oo = (x[b, rows].view(-1, Hkv, G, D)[:, h].to(dtype) for x in (q, grad_o))
                s = torch.einsum("lgd,lksd->lkgs", qq, kk) * p.scale
                peak = s.amax(-1, keepdim=True).clamp(min=0 if p.off_by_one else -math.inf)
                e = (s - peak).exp()
                P = e / (e.sum(-1, keepdim=True) + ((-peak).exp() if p.off_by_one else 0))
                dp = torch.einsum("lgd,lksd->lkgs", oo, vv)
                delta = (P * dp).sum(-1, keepdim=True)
                ds = torch.where(live[..., None, None], w * P * (dp - delta) * p.scale, 0.0)
                d_w[b, rows, h] = torch.where(live, delta.sum((-1, -2)), 0.0)
                d_q[b, rows, h] = torch.einsum("lkgs,lksd->lgd", low(ds), kk)
                add = torch.einsum("lkgs,lgd->lksd", low(ds), qq)
                d_k[b, h].index_add_(0, i.flatten(), add.flatten(0, 1))
                add = torch.einsum("lkgs,lgd->lksd", low(torch.where(live[..., None, None], w * P, 0.0)), oo)
                d_v[b, h].index_add_(0, i.flatten(), add.flatten(0, 1))
    d_k, d_v = (x[:, :, :C].permute(0, 2, 3, 1, 4).reshape(B, C * S, Hkv, D) for x in (d_k, d_v))
    out = (d_q.view(B, L, Hq, D), d_k, d_v)
    return (*((x.to(rounded).to(dtype) if rounded else x) for x in out), d_w)


def inputs_for(p: ChunkAttention, B: int, L: int, C: int, skew: float, seed: int) -> tuple[Any, ...]:
    """Random inputs with a fifth of the slots empty, duplicates, weights of both signs and NaN in empty slots."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, device=DEVICE).to(getattr(torch, p.dtype))  # noqa: E731
    slots = (B, L, p.kv_heads, p.top_k)
    indices = (torch.rand(slots, generator=g, device=DEVICE) ** skew * C).to(torch.int32).clamp(max=C - 1)
    indices[torch.rand(slots, generator=g, device=DEVICE) < 0.2] = -1
    if L > 20:
        indices[:, 3:17] = -1
        indices[:, 20:30, :, 1::2] = indices[:, 20:30, :, : p.top_k // 2 * 2 : 2]
    weights = torch.randn(slots, generator=g, device=DEVICE)
    weights[:, : L // 2] = weights[:, : L // 2].abs()
    weights[indices < 0] = math.nan
    rows, memory = (B, L, p.q_heads, p.head_dim), (B, C * p.chunk_size, p.kv_heads, p.head_dim)
    return make(*rows), make(*rows), make(*memory), make(*memory), indices, weights


def judge(got: tuple[Any, ...], low: tuple[Any, ...], exact: tuple[Any, ...]) -> tuple[bool, str]:
    """Whether every error is at most twice that of the rounding path plus a floor, as a maximum and as an RMS."""
    fine, text = True, []
    for name, x, y, z in zip(NAMES[6:], got, low, exact):
        if not x.numel():
            continue
        if not bool(x.isfinite().all()):
            fine, x = False, x.nan_to_num(1e3)
            text.append("NaN")
        error, allowed = (x.double() - z).abs(), (y.double() - z).abs()
        scale = max(1.0, float(z.abs().max()))
        rms, rms_low = float(error.square().mean().sqrt()), float(allowed.square().mean().sqrt())
        ok = float(error.max()) <= 2 * float(allowed.max()) + 1e-5 * scale and rms <= 2 * rms_low + 2.5e-6 * scale
        fine &= ok
        relative = rms / max(1e-30, float(z.double().square().mean().sqrt()))
        bad = "" if ok else f" BAD {float(error.max()):.3g}/{float(allowed.max()):.3g}"
        text.append(f"{name} {relative:.1e} ({rms / max(rms_low, 1e-30):.2f}){bad}")
    return fine, "  ".join(text)


def check(folder: Path, names: list[str]) -> bool:
    every = True
    for name in names:
        built, case = Built(folder, name), CASES[name.partition("@")[0]]
        for B, L, C in case.sizes:
            inputs = inputs_for(case.problem, B, L, C, case.skew, seed=B * L + C)
            got, again = built(*inputs), built(*inputs)
            torch.cuda.synchronize()
            exact = gradients(case.problem, inputs, torch.float64)
            low = gradients(case.problem, inputs, torch.float32, getattr(torch, case.problem.dtype))
            fine, text = judge(got, low, exact)
            same = all(bool(torch.equal(a, b)) for a, b in zip(got, again))
            every &= fine and same
            print(
                f"{'ok  ' if fine and same else 'FAIL'} {name} B{B} L{L} C{C} {text} {'' if same else 'NOT REPEATED'}",
                flush=True,
            )
    return every


def far_offsets(folder: Path) -> bool:
    """Tokens and chunks beyond 2^31 elements, beside the same ones alone."""
    built, near, tokens = Built(folder, "g16-k8"), 16, 96
    p = built.problem
    L, C = 2**31 // (p.q_heads * p.head_dim) + 2048, 2**31 // (p.chunk_size * p.head_dim) + 64
    small = inputs_for(p, 1, tokens, near, 1.0, 7)
    q = torch.empty(1, L, p.q_heads, p.head_dim, device=DEVICE, dtype=small[1].dtype).fill_(1)
    grad_o = q.clone()
    q[:, -tokens:], grad_o[:, -tokens:] = small[1], small[0]
    k = torch.empty(1, C * p.chunk_size, 1, p.head_dim, device=DEVICE, dtype=q.dtype).fill_(1)
    v = k.clone()
    k[:, -near * p.chunk_size :], v[:, -near * p.chunk_size :] = small[2], small[3]
    indices = torch.full((1, L, 1, p.top_k), -1, device=DEVICE, dtype=torch.int32)
    indices[:, -tokens:] = torch.where(small[4] >= 0, small[4] + (C - near), -1)
    weights = torch.zeros(1, L, 1, p.top_k, device=DEVICE)
    weights[:, -tokens:] = small[5]
    got, want = built(grad_o, q, k, v, indices, weights), built(*small)
    tails = (
        got[0][:, -tokens:],
        got[1][:, -near * p.chunk_size :],
        got[2][:, -near * p.chunk_size :],
        got[3][:, -tokens:],
    )
    # The order of a tile's chunks and of a chunk's tokens is the same, but tiles may begin elsewhere.
    fine = all(torch.allclose(a.float(), b.float(), atol=2e-2, rtol=2e-2) for a, b in zip(tails, want))
    zero = all(
        not bool(x[:, :-n].any()) for x, n in zip(got, (tokens, near * p.chunk_size, near * p.chunk_size, tokens))
    )
    print(
        f"{'ok  ' if fine and zero else 'FAIL'} offsets past 2^31: L {L}, C {C}, tails equal {fine}, rest zero {zero}",
        flush=True,
    )
    return fine and zero


def strangers(folder: Path, name: str) -> bool:
    """NaN and infinity in rows and chunks must not change what has nothing to do with them, to the bit."""
    built, case = Built(folder, name), CASES[name]
    inputs = inputs_for(case.problem, 1, 500, 40, 1.0, 3)
    clean = built(*inputs)
    grad_o, q, k, v, indices, weights = (x.clone() for x in inputs)
    S, C, bad_tokens, bad_chunks = case.problem.chunk_size, 40, [77, 301], [4, 5, 6]
    q[:, 77], grad_o[:, 301, :, 3] = math.nan, math.inf
    k[:, 4 * S + 1, :, 2], k[:, 5 * S + 7, :, 1], v[:, 6 * S + 3, :, 0] = math.nan, -math.inf, math.nan
    dirty = built(grad_o, q, k, v, indices, weights)
    touched = torch.isin(indices, torch.tensor(bad_chunks, device=DEVICE, dtype=torch.int32))  # [1, L, Hkv, K]
    tokens = touched.any(-1)
    tokens[:, bad_tokens] = True
    slots = touched.clone()
    slots[:, bad_tokens] = True
    chunks = torch.zeros(1, C, indices.shape[2], dtype=torch.bool, device=DEVICE)
    chunks[:, bad_chunks] = True
    for h in range(indices.shape[2]):
        chosen = indices[0, bad_tokens, h].flatten()
        chunks[0, chosen[chosen >= 0].long(), h] = True
    masks = (
        tokens.repeat_interleave(case.problem.groups, 2)[..., None].expand_as(q),
        *[chunks.repeat_interleave(S, 1)[..., None].expand_as(k)] * 2,
        slots,
    )
    same = [bool(torch.equal(a[~m], b[~m])) for a, b, m in zip(clean, dirty, masks)]
    marked = not bool(dirty[1][:, 4 * S : 6 * S].isfinite().any()) and not bool(dirty[3][touched].isfinite().all())
    fine = all(same) and marked
    print(f"{'ok  ' if fine else 'FAIL'} {name} NaN stays with what it belongs to: {same} {marked}", flush=True)
    return fine


def bench(folder: Path, names: list[str], limit: int = 12) -> list[dict[str, Any]]:
    rows = []
    flush = torch.empty(1 << 26, device=DEVICE)
    for name in names:
        base = name.split("@")[0]
        built = Built(folder, name)
        p, (B, L) = built.problem, BENCH[base]
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
        rows_, memory = (B, L, p.q_heads, p.head_dim), (B, L, p.kv_heads, p.head_dim)
        grad_o, q, k, v = make(*rows_), make(*rows_), make(*memory), make(*memory)
        for kind in ("local", "random") if base.startswith("g16") else ("local",):
            indices = synthetic_selection(B, L, p.kv_heads, p.top_k, p.chunk_size, kind).cuda()
            weights = torch.randn(indices.shape, device=DEVICE).masked_fill(indices < 0, -1e9).softmax(-1)
            outputs, step = built.prepare(grad_o, q, k, v, indices, weights)
            steps = range(len(built.launches))
            whole, parts = [], [[] for _ in steps]
            for repeat in range(limit + 3):
                flush.zero_()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                for i in steps:
                    step(i)
                events[1].record()
                torch.cuda.synchronize()
                if repeat >= 3:
                    whole.append(events[0].elapsed_time(events[1]))
            for _ in range(4):
                flush.zero_()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
                events[0].record()
                for i in steps:
                    step(i)
                    events[i + 1].record()
                torch.cuda.synchronize()
                for i in steps:
                    parts[i].append(events[i].elapsed_time(events[i + 1]))
            ms = statistics.median(whole)
            row = {
                "case": name, "B": B, "L": L, "selection": kind, "ms": ms, "ms_min": min(whole), "ms_max": max(whole),
                "tflops": p.backward_flops(B, L) / ms / 1e9, "tile": built.tile,
                "parts": {n: statistics.median(x) for n, x in zip(built.launches, parts)}, "scratch": step.bytes,
            }  # fmt: skip
            rows.append(row)
            parts_text = " ".join(f"{n} {t * 1e3:.0f}" for n, t in row["parts"].items())
            print(
                f"{name} {kind} {ms:.3f} ms [{min(whole):.3f} {max(whole):.3f}] {row['tflops']:.0f} TFLOP/s,"
                f" {step.bytes / B / L / p.kv_heads:.0f} B a token and kv head; us: {parts_text}",
                flush=True,
            )
            del outputs, step
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    command, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if command == "check":
        fine = check(folder, names or list(CASES))
        print("ALL CHECKED" if fine else "FAILED", flush=True)
    elif command == "edges":
        for name in names or ("g16-k8", "g4", "g1"):
            strangers(folder, name)
        far_offsets(folder)
    else:
        rows = bench(folder, names or list(BENCH))
        if "OUT" in os.environ:
            Path(os.environ["OUT"], "backward.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
