"""Checks and times the GPU programs of chunk selection.

python tests/gpu/build_select.py DIRECTORY   # where TileLang and nvcc are; needs no GPU
python tests/gpu/check_select.py DIRECTORY   # where PyTorch and a GPU are; needs no compiler
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path
from typing import Any


class Program:
    """A built program: call it with tensors in the order of the C interface."""

    def __init__(self, directory: Path, description: dict[str, Any]) -> None:
        import torch

        self.torch, self.description = torch, description
        self.libraries = [ctypes.CDLL(str(directory / launch["so"])) for launch in description["launches"]]
        for library in self.libraries:
            assert library.init() == 0

    def number(self, library: ctypes.CDLL, name: str, shape: tuple[int, int, int]) -> int:
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_longlong, [ctypes.c_longlong] * 3
        return function(*shape)

    def scratch(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Poisoned scratch."""
        regions = {}
        for region in self.description["scratch"]:
            n = self.number(self.libraries[0], f"elements_{region['name']}", shape)
            regions[region["name"]] = self.torch.full(
                (n,), -7, dtype=getattr(self.torch, region["dtype"]), device="cuda"
            )
        return regions

    def __call__(
        self, tensors: tuple[Any, ...], shape: tuple[int, int, int], scratch: dict[str, Any], only: int = -1
    ) -> None:
        named = dict(zip(self.description["tensors"], tensors)) | scratch
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        for number, (library, launch) in enumerate(zip(self.libraries, self.description["launches"])):
            if only not in (-1, number) or (shape[2] == 0 and number > 0 and "d_landmark" in named):
                continue
            pointers = [ctypes.c_void_p(named[name].data_ptr()) for name in launch["arguments"]]
            dims = [ctypes.c_int(self.number(library, f"dim_{name}", shape)) for name in launch["dims"]]
            assert library.call(*pointers, *dims, stream) == 0


def select(program: Program, problem: Any, q_r: Any, landmark: Any, position: Any, chunks: Any) -> tuple[Any, Any]:
    """(indices, scores) by the program, on poisoned memory."""
    import torch

    B, L, C = *q_r.shape[:2], landmark.shape[1]
    indices = torch.full((B, L, problem.kv_heads, problem.top_k), -77, dtype=torch.int32, device="cuda")
    scores = torch.full(indices.shape, torch.nan, device="cuda")
    program((q_r, landmark, position, chunks, indices, scores), (B, L, C), program.scratch((B, L, C)))
    torch.cuda.synchronize()
    return indices, scores


def judge(problem: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...], rows: Any, exact: bool) -> str:
    """ "" or what is wrong with the tokens ``rows``, by the definition, scores in float64."""
    import torch

    q_r, landmark, position, chunks = inputs
    indices, scores = outputs
    C, K, S = landmark.shape[1], problem.top_k, problem.chunk_size
    for b in range(q_r.shape[0]):
        for h in range(problem.kv_heads):
            r = h if problem.retrieval_heads == problem.kv_heads else 0
            s = q_r[b, rows, r].double() @ landmark[b, :, r].double().T * problem.scale
            bound = ((position[b] + rows - problem.visible_lag).clamp(min=0) // S).clamp(max=int(chunks[b]))
            seen = torch.arange(C, device=s.device)[None] < bound[:, None]
            s = s.masked_fill(~seen, -torch.inf).nan_to_num(-torch.inf, neginf=-torch.inf)
            s = torch.nn.functional.pad(s, (0, max(0, K - C)), value=-torch.inf)
            order = torch.sort(s.flip(1), dim=1, descending=True, stable=True)
            best, where = order.values[:, :K], s.shape[1] - 1 - order.indices[:, :K]
            where = torch.where(best > -torch.inf, where, -1).sort(1, descending=True).values
            got, value = indices[b, rows, h].long(), scores[b, rows, h].double()
            filled = got >= 0
            if not torch.equal(filled.sum(1), (best > -torch.inf).sum(1)):
                return "slots filled"
            if bool(((got[:, 1:] >= got[:, :-1]) & filled[:, 1:]).any() | (got >= bound[:, None]).any()):
                return "order or range"
            if bool((value[~filled] != 0).any()) or bool((got[~filled] != -1).any()):
                return "empty slots"
            if exact and not torch.equal(got, where):
                return f"{int((got != where).sum())} of {got.numel()} indices on exact ties"
            theirs = torch.gather(s, 1, got.clamp(min=0)).masked_fill(~filled, -torch.inf)
            gap = (theirs.sort(1, descending=True).values - best).abs()[best > -torch.inf]
            size = best.abs()[best > -torch.inf]
            if bool((gap > 1e-5 * size + 1e-9).any()):
                return f"gap {float((gap / size).max()):.1e}"
            error = ((value - theirs).abs() / theirs.abs().clamp(min=0.5))[filled]
            if error.numel() and not float(error.max()) < 2e-5:
                return f"score error {float(error.max()):.1e}"
    return ""


def check_backward(program: Program, problem: Any) -> list[tuple[str, str]]:
    """(case, what is wrong): empty slots with NaN gradients, duplicates, popular chunks, repeated runs."""
    wrong = []
    for B, L, C, skew in (
        (1, 1000, 37, 1),
        (2, 777, 300, 4),
        (1, 5000, 3, 1),
        (3, 1, 50, 1),
        (1, 40, 2000, 1),
        (1, 64, 0, 1),
    ):
        bad = judge_backward(program, problem, B, L, C, skew)
        if bad:
            wrong.append((f"B={B} L={L} C={C} skew={skew}", bad))
    return wrong


def judge_backward(program: Program, problem: Any, B: int, L: int, C: int, skew: int) -> str:
    """ "" or what is wrong with one random case."""
    import torch

    Hkv, H, Dr, K = problem.kv_heads, problem.retrieval_heads, problem.retrieval_dim, problem.top_k
    inputs = backward_inputs(problem, B, L, C, skew)
    grad, q_r, landmark, indices = inputs
    outputs = []
    for _ in range(2):
        results = tuple(torch.full_like(x, torch.nan) for x in (q_r, landmark))
        program((*inputs, *results), (B, L, C), program.scratch((B, L, C)))
        torch.cuda.synchronize()
        outputs.append(results)
    if not all(torch.equal(x, y) for x, y in zip(*outputs)):
        return "not repeatable"
    g = grad.double().masked_fill(indices < 0, 0).view(B, L, H, Hkv // H, K).sum(3) * problem.scale
    where = indices[:, :, :: Hkv // H].long()
    for b in range(B):
        for h in range(H):
            flat, weight = where[b, :, h].clamp(min=0).flatten(), g[b, :, h].flatten()
            d_q = torch.zeros(L, Dr, dtype=torch.float64, device="cuda")
            d_l = torch.zeros(C, Dr, dtype=torch.float64, device="cuda")
            if C:
                d_q = (g[b, :, h, :, None] * landmark[b, :, h].double()[where[b, :, h].clamp(min=0)]).sum(1)
                d_l.index_add_(0, flat, weight[:, None] * q_r[b, :, h].double().repeat_interleave(K, 0))
            for name, got, expected in (
                ("d_q_r", outputs[0][0][b, :, h], d_q),
                ("d_landmark", outputs[0][1][b, :, h], d_l),
            ):
                if not expected.numel():
                    continue
                error = (got.double() - expected).abs()
                rounding = (expected.to(got.dtype).double() - expected).abs()
                if not bool((error <= 2 * rounding.max() + 1e-5 * expected.abs().max()).all()):
                    return f"{name} off by {float(error.max()):.1e}, rounding {float(rounding.max()):.1e}"
    return ""


def backward_inputs(problem: Any, B: int, L: int, C: int, skew: int) -> tuple[Any, ...]:
    """(grad_scores, q_r, landmark, indices): a fifth of the slots empty, with NaN gradients; low chunks popular."""
    import torch

    g = torch.Generator(device="cuda").manual_seed(L)
    dtype, Hkv, H, Dr, K = (
        getattr(torch, problem.dtype), problem.kv_heads, problem.retrieval_heads, problem.retrieval_dim, problem.top_k,
    )  # fmt: skip
    q_r = torch.randn(B, L, H, Dr, generator=g, device="cuda").to(dtype)
    landmark = torch.randn(B, C, H, Dr, generator=g, device="cuda").to(dtype)
    indices = (torch.rand(B, L, H, K, generator=g, device="cuda") ** skew * C).to(torch.int32)
    indices[torch.rand(indices.shape, generator=g, device="cuda") < 0.2] = -1
    if C == 0:
        indices[:] = -1
    indices = indices.repeat_interleave(Hkv // H, 2)
    grad = torch.randn(indices.shape, generator=g, device="cuda")
    grad[indices < 0] = torch.nan
    return grad, q_r, landmark, indices


def time_backward(program: Program, problem: Any, B: int, L: int, C: int, skew: int) -> dict[str, Any]:
    import torch

    inputs = backward_inputs(problem, B, L, C, skew)
    outputs = tuple(torch.empty_like(x) for x in inputs[1:3])
    scratch = program.scratch((B, L, C))
    median, spread = milliseconds(lambda: program((*inputs, *outputs), (B, L, C), scratch))
    steps = {}
    for number, launch in enumerate(program.description["launches"]):
        one, _ = milliseconds(lambda n=number: program((*inputs, *outputs), (B, L, C), scratch, only=n), 5)  # type: ignore[misc]
        steps[launch["so"]] = round(one, 4)
    return {
        "ms": round(median, 4),
        "spread": round(spread, 4),
        "scratch_mb": sum(x.nbytes for x in scratch.values()) >> 20,
        "steps": steps,
    }


def inputs_for(problem: Any, B: int, L: int, C: int, mode: str) -> tuple[Any, ...]:
    """Inputs of a kind: random, ties, older or newer (scores rise that way), nan, ragged, past the memory."""
    import torch

    g = torch.Generator(device="cuda").manual_seed(L + C)
    dtype, Hr, Dr, S = getattr(torch, problem.dtype), problem.retrieval_heads, problem.retrieval_dim, problem.chunk_size

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.float32).to(dtype)

    q_r, landmark = normal(B, L, Hr, Dr), normal(B, C, Hr, Dr)
    position = torch.zeros(B, dtype=torch.int64, device="cuda")
    chunks = torch.full((B,), C, dtype=torch.int64, device="cuda")
    if mode.startswith("ties"):
        q_r, landmark = q_r.round().clamp(-1, 1), landmark.round().clamp(-1, 1)
    if mode == "zero":
        landmark = torch.zeros_like(landmark)
    if mode in ("older", "newer"):
        rise = torch.linspace(0, 8, max(C, 1), device="cuda").to(dtype)
        landmark *= 0.05
        landmark[..., 0] = (rise if mode == "newer" else 8 - rise)[None, :C, None]
        q_r[..., 0] = 8
    if mode == "nan":
        landmark[:, C // 3] = torch.nan
        q_r[:, L // 2] = torch.nan
    if mode in ("ragged", "ties ragged", "decode"):
        position = torch.randint(0, C * S + 1, (B,), generator=g, device="cuda")
        chunks = torch.randint(C // 2, C + 1, (B,), generator=g, device="cuda")
        for b in range(B):
            landmark[b, chunks[b] :] = torch.nan
    if mode == "decode":
        position[:] = C * S
    return q_r, landmark, position, chunks


def check(program: Program, problem: Any, split: bool) -> list[tuple[str, str]]:
    """(case, what is wrong) of small cases."""
    import torch

    S = problem.chunk_size
    cases = [
        ("random", 1, 3000, 3000 // S), ("ties", 1, 4096, 4096 // S), ("ties", 2, 555, 300), ("ragged", 3, 333, 700),
        ("ties ragged", 3, 77, 515), ("older", 1, 12000, 12000 // S), ("newer", 1, 12000, 12000 // S),
        ("nan", 2, 1500, 1500 // S), ("zero", 1, 2100, 2100 // S), ("random", 1, 100, 0), ("ragged", 2, 1, 999),
        ("decode", 3, 1, 9999), ("decode", 1, 5, 20000), ("ties ragged", 2, 17, 3), ("random", 1, 64, 1),
    ]  # fmt: skip
    wrong = []
    for mode, B, length, C in cases:
        L = min(length, 600) if split else length
        inputs = inputs_for(problem, B, L, C, mode)
        if split and L == 600:
            inputs[2][:] = C * S // 2
        outputs = select(program, problem, *inputs)
        rows = torch.arange(L, device="cuda")
        bad = judge(problem, inputs, outputs, rows, mode.startswith("ties") or mode == "zero")
        again = select(program, problem, *inputs)
        if not bad and not all(torch.equal(x, y) for x, y in zip(outputs, again)):
            bad = "not repeatable"
        if bad:
            wrong.append((f"{mode} B={B} L={L} C={C}", bad))
    return wrong


def milliseconds(run: Any, calls: int = 20) -> tuple[float, float]:
    """(median, spread) of single calls between events, a 256 MB write before each to empty the L2 cache."""
    import torch

    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(calls + 2):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    times = sorted(times[2:])
    return times[len(times) // 2], times[-3] - times[2]


def time_select(program: Program, problem: Any, B: int, L: int, C: int, mode: str) -> dict[str, Any]:
    """Checks some tokens of a large case, then times it."""
    import torch

    inputs = inputs_for(problem, B, L, C, mode)
    if mode == "decode":
        inputs[3][:] = C
        inputs[1].nan_to_num_(0.5)
    outputs = select(program, problem, *inputs)
    step = max(1, L // 100)
    bad = judge(problem, inputs, outputs, torch.arange(L - 1, -1, -step, device="cuda"), mode.startswith("ties"))
    scratch = program.scratch((B, L, C))
    median, spread = milliseconds(lambda: program((*inputs, *outputs), (B, L, C), scratch), 6 if L > 500_000 else 20)
    flops = problem.flops(B, L, C) / (2 if L > 1 else 1)
    moved = inputs[1].numel() * 2
    return {
        "wrong": bad, "ms": round(median, 4), "spread": round(spread, 4), "tflops": round(flops / median / 1e9, 1),
        "landmark_tb_s": round(moved / median / 1e9, 2), "scratch_mb": sum(x.nbytes for x in scratch.values()) >> 20,
    }  # fmt: skip


def run(directory: Path, only: str) -> None:
    """Small cases of every program, then times; one JSON line each, also in $OUT."""
    import torch

    from hsa_compile.ir import problem_from_dict

    torch.backends.cuda.matmul.allow_tf32 = False
    log = open(Path(os.environ.get("OUT", directory)) / "check_select.jsonl", "a")  # noqa: SIM115

    def say(**line: Any) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        print(text, file=log, flush=True)

    entries = json.loads((directory / "programs.json").read_text())
    for entry in entries:
        if only and only not in entry["name"]:
            continue
        problem = problem_from_dict(entry["problem"])
        try:
            program = Program(directory, entry)
            if "grad_scores" in entry["tensors"]:
                say(name=entry["name"], wrong=check_backward(program, problem))
                for B, L, C, skew in entry["time"]:
                    say(
                        name=entry["name"], shape=[B, L, C], skew=skew, **time_backward(program, problem, B, L, C, skew)
                    )
                continue
            if entry["check"]:
                say(name=entry["name"], wrong=check(program, problem, bool(entry["tile"].get("split"))))
            for B, L, C, mode in entry["time"]:
                say(name=entry["name"], shape=[B, L, C], mode=mode, **time_select(program, problem, B, L, C, mode))
        except Exception as error:
            say(name=entry["name"], error=repr(error)[:300])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="part of a program's name")
    arguments = parser.parse_args()
    run(arguments.directory, arguments.only)


if __name__ == "__main__":
    main()
