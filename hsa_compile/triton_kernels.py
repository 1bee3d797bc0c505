"""Launches the Triton programs on torch tensors; same signatures as ``hsa_compile.eager``. Importing it imports Triton.

Tensors are on one CUDA device (or on a CPU under Triton's interpreter) in float32, float16 or bfloat16. Nothing waits
for the device: grids and scratch follow from shapes alone. All results repeat to the bit.

``tile``, the last argument of each, gives the sizes; by default they are the hand-picked ones.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.ir.programs.triton import attention as attention_program
from hsa_compile.ir.programs.triton import attention_backward as attention_backward_program
from hsa_compile.ir.programs.triton import lists as lists_program
from hsa_compile.ir.programs.triton import select as select_program
from hsa_compile.ir.programs.triton import select_backward as select_backward_program
from hsa_compile.schedules.triton import Sizes, TritonTile, power_of_two, precision, select_splits, tile_for

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
__all__ = ["DTYPES", "OutOfResources", "attention", "attention_backward", "interpreted", "select", "select_backward"]
LOG2_E = math.log2(math.e)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream: make that the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def interpreted() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1, which runs programs on CPU tensors, slowly."""
    return not isinstance(lists_program.unite, JITFunction)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


class WorkItems(NamedTuple):
    """The slots that selected each chunk; see ``ir/programs/triton/attention_backward.memory``."""

    pairs: Tensor
    start: Tensor
    first: Tensor
    owner: Tensor
    owners: int


def work_items(indices_BLHK: Tensor, C: int, most_pairs: int) -> WorkItems:
    """Sorts the filled slots by (row of the batch, head, chunk), stably, and cuts every chunk's list into items of at
    most ``most_pairs``."""
    B, _, H, _ = indices_BLHK.shape
    owners, slots = B * H * C, indices_BLHK.numel()
    wide = torch.int64 if owners >= 2**31 - 1 else torch.int32
    device = indices_BLHK.device
    row = torch.arange(B * H, dtype=wide, device=device).view(B, 1, H, 1) * C
    listed = (indices_BLHK >= 0) & (indices_BLHK < C)
    key, pairs = torch.where(listed, indices_BLHK + row, owners).flatten().sort(stable=True)
    start = torch.searchsorted(key, torch.arange(owners + 1, dtype=wide, device=device))
    first = torch.zeros_like(start)
    torch.cumsum((start.diff() + (most_pairs - 1)).div(most_pairs, rounding_mode="floor"), 0, out=first[1:])
    most = min(slots, slots // most_pairs + owners)
    owner = torch.searchsorted(first[1:], torch.arange(most, device=device), right=True)
    return WorkItems(pairs, start, first, owner, owners)


def select(
    q_r_BLHrDr: Tensor,
    landmark_BCHrDr: Tensor,
    position_B: Tensor,
    chunks_B: Tensor,
    kv_heads: int,
    chunk_size: int,
    top_k: int,
    visible_lag: int,
    tile: TritonTile | None = None,
) -> tuple[Tensor, Tensor]:
    """The K best visible chunks, newest first; a score of NaN is never among them."""
    q_r, landmark = q_r_BLHrDr.contiguous(), landmark_BCHrDr.contiguous()
    B, L, Hr, Dr = q_r.shape
    C = landmark.shape[1]
    problem = ChunkSelect(kv_heads, Hr, Dr, chunk_size, top_k, 0, DTYPES[q_r.dtype])  # type: ignore[arg-type]
    indices = torch.empty((B, L, kv_heads, top_k), dtype=torch.int32, device=q_r.device)
    scores = torch.empty((B, L, kv_heads, top_k), dtype=torch.float32, device=q_r.device)
    if not indices.numel():
        return indices, scores
    tile = tile or tile_for(problem, "forward", L)
    splits = select_splits(problem, tile, B, L, C, _processors(q_r.device))
    span = -(-max(C, 1) // (tile.columns * splits))
    partial = (indices, scores)
    if splits > 1:
        shape = (splits, B, L, Hr, top_k)
        partial = (torch.empty(shape, dtype=torch.int32, device=q_r.device), torch.empty(shape, device=q_r.device))
    shared = {"HEADS": kv_heads // Hr, "TOP_K": top_k, "K_P": power_of_two(top_k)}
    with _on(q_r):
        select_program.forward[(triton.cdiv(L, tile.tokens) * B * Hr, splits)](
            q_r, landmark, position_B.contiguous(), chunks_B.contiguous(), *partial, L, C, visible_lag, span,
            problem.scale, HR=Hr, **shared, D=Dr, BLOCK_D=tile.depth, S=chunk_size, ROWS=tile.tokens,
            COLUMNS=tile.columns, SPLIT=splits > 1, PRECISION=precision(problem.dtype), num_warps=tile.warps,
        )  # fmt: skip
        if splits > 1:
            select_program.merge[(B * L * Hr,)](
                *partial, indices, scores, splits, problem.scale, **shared, CANDIDATES=power_of_two(splits * top_k)
            )
    return indices, scores


def select_backward(
    grad_scores_BLHkvK: Tensor,
    q_r_BLHrDr: Tensor,
    landmark_BCHrDr: Tensor,
    indices_BLHkvK: Tensor,
    tile: TritonTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the selected scores to ``q_r`` and ``landmark``."""
    q_r, landmark = q_r_BLHrDr.contiguous(), landmark_BCHrDr.contiguous()
    B, L, Hr, Dr = q_r.shape
    C, K = landmark.shape[1], indices_BLHkvK.shape[3]
    if not q_r.numel() or not C:
        return torch.zeros_like(q_r), torch.zeros_like(landmark)
    grad = grad_scores_BLHkvK.float()
    if grad.shape[2] != Hr:  # one selection shared by all kv heads
        grad = torch.where(indices_BLHkvK >= 0, grad, 0.0).sum(2, keepdim=True)
    grad, indices = grad.contiguous(), indices_BLHkvK[:, :, :Hr].contiguous()
    d_q, d_landmark = torch.empty_like(q_r), torch.empty_like(landmark)
    scale, block_d = 1.0 / math.sqrt(Dr), min(128, power_of_two(Dr, 16))
    parts = triton.cdiv(Dr, block_d)
    with _on(q_r):
        rows = B * L * Hr
        select_backward_program.queries[(triton.cdiv(rows, 16), parts)](
            grad, landmark, indices, d_q, L, C, rows, scale, HR=Hr, D=Dr, TOP_K=K, ROWS=16, BLOCK_D=block_d
        )
        pairs = (tile or TritonTile()).pairs
        items = work_items(indices, C, pairs)
        part = torch.empty((items.owner.numel(), Dr), device=q_r.device)
        select_backward_program.landmarks[(items.owner.numel(), parts)](
            grad, q_r, *items[:4], part, items.owners, scale, D=Dr, TOP_K=K, ITEM=pairs, PAIRS_BLOCK=16,
            BLOCK_D=block_d,
        )  # fmt: skip
        _add_items(part, items, d_landmark, C, 1)
    return d_q, d_landmark


def _add_items(part: Tensor, items: WorkItems, out_BTHD: Tensor, C: int, S: int) -> None:
    H, D = out_BTHD.shape[2:]
    block = min(2048, power_of_two(S * D))
    attention_backward_program.add_items[(items.owners * triton.cdiv(S * D, block),)](
        part, items.first, out_BTHD, C, H=H, S=S, D=D, BLOCK=block
    )


class _Call:
    """What the passes of chunk attention share: sizes, constants of the kernels, union lists."""

    def __init__(self, q: Tensor, k: Tensor, indices: Tensor, S: int, off_by_one: bool) -> None:
        self.B, self.L, Hq, D = q.shape
        self.H, self.K, self.C = k.shape[2], indices.shape[3], k.shape[1] // S
        dtype: Any = DTYPES[q.dtype]
        self.problem = ChunkAttention(Hq, self.H, D, S, self.K, off_by_one, dtype)
        self.scales = (self.problem.scale, self.problem.scale * LOG2_E)
        self.empty = not q.numel() or not k.numel()
        self.sizes = {
            "H": self.H, "G": self.problem.groups, "G_P": power_of_two(self.problem.groups), "D": D,
            "D_P": power_of_two(D, 16), "S": S, "S_P": power_of_two(S, 16), "TOP_K": self.K, "OFF_BY_ONE": off_by_one,
        }  # fmt: skip

    def options(self, sizes: Sizes) -> dict[str, Any]:
        return {
            **self.sizes, "TOKENS": sizes.tokens, "PRECISION": precision(self.problem.dtype), "STAGES": sizes.stages,
            "num_warps": sizes.warps, "num_stages": sizes.stages,
        }  # fmt: skip

    def programs(self, tile: TritonTile) -> int:
        return self.B * self.H * triton.cdiv(self.L, tile.tokens)

    def lists(self, indices: Tensor, tile: TritonTile) -> tuple[Tensor, Tensor]:
        """The chunks of every tile of tokens, and how many they are."""
        n = self.programs(tile)
        lists = torch.empty((n, tile.tokens * self.K), dtype=torch.int32, device=indices.device)
        counts = torch.empty(n, dtype=torch.int32, device=indices.device)
        K_P = power_of_two(self.K)
        lists_program.unite[(n,)](
            indices, lists, counts, self.L, self.C, H=self.H, TOP_K=self.K, K_P=K_P, TOKENS=tile.tokens,
            num_warps=max(1, min(4, tile.tokens * K_P // 128)),
        )  # fmt: skip
        return lists, counts


def attention(
    q_BLHqD: Tensor,
    k_BTHkvD: Tensor,
    v_BTHkvD: Tensor,
    indices_BLHkvK: Tensor,
    weights_BLHkvK: Tensor,
    chunk_size: int,
    off_by_one: bool,
    tile: TritonTile | None = None,
) -> Tensor:
    """``hsa_compile.ops.chunk_attention``. A slot of weight 0 adds exactly nothing."""
    call = _Call(q_BLHqD, k_BTHkvD, indices_BLHkvK, chunk_size, off_by_one)
    if call.empty:
        return torch.zeros_like(q_BLHqD, memory_format=torch.contiguous_format)
    q, k, v, indices, weights = (x.contiguous() for x in (q_BLHqD, k_BTHkvD, v_BTHkvD, indices_BLHkvK, weights_BLHkvK))
    o = torch.empty_like(q)
    tile = tile or tile_for(call.problem, "forward", call.L)
    with _on(q):
        lists = call.lists(indices, tile)
        attention_program.forward[(call.programs(tile),)](
            q, k, v, indices, weights, *lists, o, call.L, call.C, call.scales[1], K_P=power_of_two(call.K),
            **call.options(tile.queries),
        )  # fmt: skip
    return o


def attention_backward(
    grad_o_BLHqD: Tensor,
    q_BLHqD: Tensor,
    k_BTHkvD: Tensor,
    v_BTHkvD: Tensor,
    indices_BLHkvK: Tensor,
    weights_BLHkvK: Tensor,
    chunk_size: int,
    off_by_one: bool,
    tile: TritonTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and the weights."""
    inputs = (grad_o_BLHqD, q_BLHqD, k_BTHkvD, v_BTHkvD, indices_BLHkvK, weights_BLHkvK)
    grad_o, q, k, v, indices, weights = (x.contiguous() for x in inputs)
    call = _Call(q, k, indices, chunk_size, off_by_one)
    if call.empty:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(weights)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_w = torch.zeros_like(weights)  # empty slots are never visited
    tile = tile or tile_for(call.problem, "backward", call.L)
    with _on(q):
        attention_backward_program.queries[(call.programs(tile),)](
            grad_o, q, k, v, indices, weights, *call.lists(indices, tile), d_q, call.L, call.C, *call.scales,
            K_P=power_of_two(call.K), **call.options(tile.queries),
        )  # fmt: skip
        items = work_items(indices, call.C, tile.pairs)
        parts = torch.empty((2, items.owner.numel(), chunk_size, q.shape[3]), device=q.device)
        attention_backward_program.memory[(items.owner.numel(),)](
            grad_o, q, k, v, weights, *items[:4], *parts, d_w, call.C, items.owners, *call.scales, ITEM=tile.pairs,
            **call.options(tile.memory),
        )  # fmt: skip
        _add_items(parts[0], items, d_k, call.C, chunk_size)
        _add_items(parts[1], items, d_v, call.C, chunk_size)
    return d_q, d_k, d_v, d_w
