"""Checks and times the forward of chunk attention on a GPU.

python tests/gpu/check_forward.py build DIRECTORY [FILTER]     TileLang and nvcc, no GPU
python tests/gpu/check_forward.py run DIRECTORY [OUTPUT]       PyTorch and a GPU of sm_90
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
from standalone import Standalone, build

from hsa_compile.ir import ChunkAttention
from hsa_compile.ir.programs import GpuTile
from hsa_compile.schedules.gpu_forward import attention_tile

if TYPE_CHECKING:
    import torch

BF16: dict[str, Any] = {"dtype": "bfloat16"}
ODD: dict[str, Any] = {"off_by_one": True, "dtype": "float16"}
# What is checked: group sizes, odd widths, small and large chunks, many slots.
CHECKED = {
    "g16": ChunkAttention(16, 1, 64, 64, 16, **BF16),
    "g16d128": ChunkAttention(32, 2, 128, 64, 16, **BF16),
    "g8": ChunkAttention(16, 2, 64, 64, 16, **BF16),
    "g4": ChunkAttention(16, 4, 64, 64, 16, **BF16),
    "g2": ChunkAttention(16, 8, 64, 64, 16, **BF16),
    "g1": ChunkAttention(16, 16, 64, 64, 16, **BF16),
    "g3d96": ChunkAttention(12, 4, 96, 64, 8, **ODD),
    "g24d80s16": ChunkAttention(24, 1, 80, 16, 64, off_by_one=True, **BF16),
    "g12s32": ChunkAttention(12, 1, 64, 32, 8, **BF16),
    "g2d256": ChunkAttention(4, 2, 256, 64, 8, **BF16),
    "g16s256": ChunkAttention(16, 1, 64, 256, 4, **BF16),
}
SHAPES = ((2, 203, 7), (1, 1, 3), (1, 130, 40), (3, 64, 1))  # B, L, C
EMULATED_SHAPES = ((2, 13, 5), (1, 1, 3))  # and L of no tile, fewer tokens than a tile
TIMED = {  # name: problem, B, L
    "4k": (ChunkAttention(16, 1, 64, 64, 8, **BF16), 8, 4096),
    "64k": (CHECKED["g16"], 1, 65536),
    "32k-d128": (CHECKED["g16d128"], 1, 32768),
    **{f"32k-g{g}": (CHECKED[f"g{g}"], 1, 32768) for g in (1, 2, 4, 8)},
}
D64 = (GpuTile(4, 3, 3), GpuTile(8, 3, 2), GpuTile(4, 2, 4))
D128 = (GpuTile(4, 2, 2), GpuTile(8, 2, 1))
OTHER_TILES = {"4k": D64, "64k": D64, "32k-d128": D128, "32k-g1": (GpuTile(16, 3, 3),), "32k-g2": (GpuTile(16, 3, 3),)}


def programs() -> Iterator[tuple[str, ChunkAttention, GpuTile | None]]:
    """(name, problem, tile) of everything that is built; no tile stands for the decode program."""
    for name, p in CHECKED.items():
        yield f"check-{name}", p, attention_tile(p)
    for name in ("g16", "g3d96", "g24d80s16", "g2d256"):
        yield f"mma-{name}", CHECKED[name], attention_tile(CHECKED[name], "sm_80")
    for name in ("g16", "g1", "g3d96", "g24d80s16"):
        yield f"decode-{name}", CHECKED[name], None
    for name, (p, _, _) in TIMED.items():
        for tile in dict.fromkeys((attention_tile(p), *OTHER_TILES.get(name, ()))):
            yield f"time-{name}-T{tile.tokens}s{tile.stages}b{tile.blocks}", p, tile


def build_all(directory: Path, only: str, emulate: bool = False) -> None:
    from hsa_compile.ir.programs.gpu import attention, decode

    for name, problem, tile in programs():
        if only not in name or (directory / name / "program.json").exists():
            continue
        program = decode.program(problem, GpuTile()) if tile is None else attention.program(problem, tile)
        print(name, build(program, directory / name, "sm_90a", emulate), flush=True)


def inputs(
    p: ChunkAttention, B: int, L: int, C: int, seed: int, skew: float = 1.0, device: str = "cuda"
) -> dict[str, torch.Tensor]:
    """Slots in any order, a fifth empty, some out of range, duplicates; some tokens and whole tiles select nothing."""
    import torch

    g = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, p.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    slots = (B, L, p.kv_heads, p.top_k)
    uniform = torch.rand(slots, generator=g, device=device)
    indices = (uniform**skew * C).int()
    empty = torch.rand(slots, generator=g, device=device) < 0.2
    empty[:, ::7] = True
    empty[:, 64:128] = True
    indices[empty] = -1
    indices[torch.rand(slots, generator=g, device=device) < 0.02] = C + 5
    live = (indices >= 0) & (indices < C)
    weights = torch.rand(slots, generator=g, device=device)
    weights[~live] = torch.nan
    memory = (B, C * p.chunk_size, p.kv_heads, p.head_dim)
    o = torch.full((B, L, p.q_heads, p.head_dim), torch.nan, device=device, dtype=dtype)
    q, k, v = normal(B, L, p.q_heads, p.head_dim), normal(*memory), normal(*memory)
    return {"q": q, "k": k, "v": v, "indices": indices, "weights": weights, "o": o}


def reference(p: ChunkAttention, x: dict[str, torch.Tensor], b: int, tokens: slice, low: bool = False) -> torch.Tensor:
    """Rows of one batch entry in float64, or as an eager path in the problem's precision would: fp32 sums, rounded
    probabilities."""
    import torch

    C, S, G = x["k"].shape[1] // p.chunk_size, p.chunk_size, p.groups
    wide = torch.float32 if low else torch.float64
    out = []
    for h in range(p.kv_heads):
        index = x["indices"][b, tokens, h].long()
        live = (index >= 0) & (index < C)
        w = torch.where(live, x["weights"][b, tokens, h], 0.0).to(wide)
        index = index.clamp(0, C - 1)
        k, v = (x[n][b].view(C, S, p.kv_heads, p.head_dim)[:, :, h][index].to(wide) for n in ("k", "v"))
        s = torch.einsum("tgd,tksd->tkgs", x["q"][b, tokens, h * G : (h + 1) * G].to(wide), k) * p.scale
        if p.off_by_one:
            s = torch.cat((s, torch.zeros_like(s[..., :1])), -1)
        a = s.softmax(-1)[..., :S] * w[..., None, None]
        a = a.to(x["q"].dtype).to(wide) if low else a
        out.append(torch.einsum("tkgs,tksd->tgd", a, v))
    o = torch.cat(out, 1)
    return o.to(x["q"].dtype).double() if low else o


def judge(
    p: ChunkAttention, x: dict[str, torch.Tensor], parts: list[tuple[int, slice]]
) -> tuple[bool, float, float, float]:
    """(passes, largest error, that of the low-precision path, ratio of their root mean squares)."""
    import torch

    got, low, exact = (
        torch.cat([f(b, tokens) for b, tokens in parts])
        for f in (
            lambda b, t: x["o"][b, t].double(),
            lambda b, t: reference(p, x, b, t, low=True),
            lambda b, t: reference(p, x, b, t),
        )
    )
    error, allowed = (got - exact).abs(), (low - exact).abs()
    ratio = float(error.square().mean().sqrt() / allowed.square().mean().sqrt().clamp(min=1e-12))
    passes = bool(torch.isfinite(got).all()) and bool(error.max() <= 2 * allowed.max() + 1e-6) and ratio <= 1.5
    return passes, float(error.max()), float(allowed.max()), ratio


def check(run: Standalone, name: str, p: ChunkAttention, device: str = "cuda") -> list[dict[str, Any]]:
    """Random inputs of several sizes and skews; then NaN in a query row and a chunk's keys, which must stay there."""
    import torch

    rows = []
    shapes = SHAPES if device == "cuda" else EMULATED_SHAPES
    for seed, ((B, L, C), skew) in enumerate(itertools.product(shapes, (1.0, 4.0))):
        x = inputs(p, B, L, C, seed, skew, device)
        run.bind(x, B, L, C)()
        passes, error, allowed, ratio = judge(p, x, [(b, slice(None)) for b in range(B)])
        first, repeated = x["o"].clone(), x["o"].fill_(torch.nan)
        run.bind(x, B, L, C)()
        same = torch.equal(first, repeated)
        x["q"][0, L // 2, 0] = torch.nan
        x["k"][0, : p.chunk_size, 0] = torch.nan
        run.bind(x, B, L, C)()
        touched = torch.zeros(first.shape[:3], dtype=torch.bool, device=device)
        touched[0, L // 2, 0] = True
        touched[0, :, : p.groups] |= (x["indices"][0, :, 0] == 0).any(-1, keepdim=True)
        kept = torch.equal(x["o"][~touched], first[~touched])
        rows.append(
            {"check": name, "B": B, "L": L, "C": C, "skew": skew, "passes": passes and same and kept, "error": error,
             "allowed": allowed, "rms_ratio": ratio, "repeats": same, "isolated": kept}
        )  # fmt: skip
    return rows


def check_offsets(run: Standalone, decode: Standalone, p: ChunkAttention) -> list[dict[str, Any]]:
    """Queries, outputs and memory of more than 2^31 elements each; the last rows are checked."""
    L, C = 2_200_000, 530_000
    x = inputs(p, 1, L, C, 0)
    x["indices"][:, -300:] = x["indices"][:, -300:].clamp(max=C - 1)
    x["weights"].nan_to_num_(0.0)
    rows = []
    for name, program in (("offsets", run), ("offsets-decode", decode)):
        if name == "offsets-decode":
            L, x = 50, {n: t[:, -50:].contiguous() if n not in "kv" else t for n, t in x.items()}
            x["o"].fill_(float("nan"))
        program.bind(x, 1, L, C)()
        passes, error, allowed, ratio = judge(p, x, [(0, slice(max(0, L - 300), L)), (0, slice(0, 50))])
        rows.append(
            {"check": name, "L": L, "C": C, "passes": passes, "error": error, "allowed": allowed, "rms_ratio": ratio}
        )
    return rows


def measure(run: Standalone, name: str, p: ChunkAttention, B: int, L: int, kind: str) -> dict[str, Any]:
    """Median and spread in ms, L2 flushed, of all launches and of the pre-pass, after a check of some rows."""
    import torch
    from triton.testing import do_bench

    from hsa_compile.bench.selections import synthetic_selection, union_ratio

    C = L // p.chunk_size
    x = inputs(p, B, L, C, 1)
    selected = synthetic_selection(B, L, p.kv_heads, p.top_k, p.chunk_size, kind)  # type: ignore[arg-type]
    x["indices"] = selected.cuda()
    x["weights"] = torch.rand(x["weights"].shape, device="cuda")
    call = run.bind(x, B, L, C)
    call()
    passes, error, _, ratio = judge(p, x, [(0, slice(0, 200)), (B - 1, slice(L - 200, L))])
    low, middle, high = do_bench(call, warmup=10, rep=60, quantiles=[0.1, 0.5, 0.9])
    before = do_bench(run.bind(x, B, L, C, only="unite"), warmup=5, rep=20, return_mode="median")
    return {
        "time": name, "selection": kind, "passes": passes, "error": error, "rms_ratio": ratio,
        "ms": middle, "p10": low, "p90": high, "prepass_ms": before, "tflops": p.flops(B, L) / middle / 1e9,
        "union_ratio_8": union_ratio(selected[:, :4096]),
    }  # fmt: skip


def measure_decode(run: Standalone, p: ChunkAttention, B: int) -> dict[str, Any]:
    """One new token a sequence over a memory of 4096 chunks."""
    import torch
    from triton.testing import do_bench

    x = inputs(p, B, 2, 4096 // B, 0)
    x["indices"] = torch.randint(0, 4096 // B, x["indices"].shape, device="cuda", dtype=torch.int32)
    call = run.bind(x, B, 1, 4096 // B)
    call()
    torch.cuda.synchronize()
    ms = do_bench(call, warmup=5, rep=20, return_mode="median")
    bytes_read = B * p.kv_heads * p.top_k * p.chunk_size * p.head_dim * 4
    return {"decode": f"B{B} K{p.top_k}", "us": ms * 1e3, "GB_s": bytes_read / ms / 1e6}


def run_all(directory: Path, output: Path | None) -> bool:
    import torch

    rows: list[dict[str, Any]] = [{"device": torch.cuda.get_device_name()}]

    def keep(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        if output:
            output.write_text("".join(json.dumps(r) + "\n" for r in rows))
        for r in new:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}, flush=True)

    loaded = {n: Standalone(directory / n) for n, _, _ in programs() if (directory / n / "program.json").exists()}
    for name, problem, _ in programs():
        if name in loaded and not name.startswith("time"):
            found = check(loaded[name], name, problem)
            bad = [r for r in found if not r["passes"]]
            rows.extend(found)
            worst = max(found, key=lambda r: r["rms_ratio"])
            keep(
                [{"checked": name, "cases": len(found), "failed": len(bad), "rms_ratio": worst["rms_ratio"]}, *bad[:2]]
            )
    for name, (problem, B, L) in TIMED.items():
        for program_name in (n for n in loaded if n.startswith(f"time-{name}-T")):
            for kind in ("local", "random") if "-g" not in name else ("local",):
                keep([measure(loaded[program_name], program_name, problem, B, L, kind)])
    keep([measure_decode(loaded["decode-g16"], CHECKED["g16"], B) for B in (1, 8, 64)])
    keep(check_offsets(loaded["check-g16"], loaded["decode-g16"], CHECKED["g16"]))
    return all(r.get("passes", True) for r in rows)


def emulate_all(directory: Path, only: str) -> bool:
    build_all(directory, only, emulate=True)
    found = []
    for name, problem, _ in programs():
        if only in name and not name.startswith("time"):
            found += check(Standalone(directory / name), name, problem, "cpu")
            print(name, all(r["passes"] for r in found), max(r["rms_ratio"] for r in found), flush=True)
    return all(r["passes"] for r in found)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build_all(Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
    elif sys.argv[1] == "emulate":
        sys.exit(not emulate_all(Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
    else:
        sys.exit(not run_all(Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None))
