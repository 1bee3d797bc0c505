"""The operators as PyTorch custom ops, ``torch.ops.hsa.chunk_select`` and ``torch.ops.hsa.chunk_attention``.

This module owns what every path shares: the checks of the arguments, shapes under fake tensors, and autograd.
Which path computes (a compiled kernel or eager PyTorch) is decided in ``hsa_compile.dispatch``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsa_compile import dispatch
from hsa_compile.ir import ChunkAttention, ChunkSelect

_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float32"}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _check_floating(name: str, x: Tensor) -> None:
    _check(x.dtype in _FLOATS, f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def _check_one_device(**tensors: Tensor) -> None:
    devices = {name: str(x.device) for name, x in tensors.items()}
    _check(len(set(devices.values())) == 1, f"all tensors must be on one device, got {devices}")


def _select_problem(
    q_r: Tensor,
    landmark: Tensor,
    position: Tensor,
    chunks: Tensor,
    kv_heads: int,
    chunk_size: int,
    top_k: int,
    window: int = 0,
) -> ChunkSelect:
    _check(q_r.dim() == 4, f"q_r must be [B, L, Hr, Dr], got {_shape(q_r)}")
    B, _, Hr, Dr = q_r.shape
    _check_floating("q_r", q_r)
    _check(
        landmark.dim() == 4 and landmark.shape[0] == B and landmark.shape[2:] == q_r.shape[2:],
        f"landmark must be [B={B}, C, Hr={Hr}, Dr={Dr}] like q_r, got {_shape(landmark)}",
    )
    _check(landmark.dtype == q_r.dtype, f"landmark must have q_r's dtype {q_r.dtype}, got {landmark.dtype}")
    for name, x in (("position", position), ("chunks", chunks)):
        _check(x.dtype == torch.int64 and _shape(x) == [B], f"{name} must be int64 [B={B}], got {x.dtype} {_shape(x)}")
    _check_one_device(q_r=q_r, landmark=landmark, position=position, chunks=chunks)
    return ChunkSelect(kv_heads, int(Hr), int(Dr), chunk_size, top_k, window, _FLOATS[q_r.dtype])  # type: ignore[arg-type]


def _attention_problem(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int, off_by_one: bool = False
) -> ChunkAttention:
    for name, x in (("q", q), ("k", k), ("v", v), ("indices", indices), ("weights", weights)):
        _check(x.dim() == 4, f"{name} must have 4 dimensions, got {_shape(x)}")
    B, L, Hq, D = q.shape
    Hkv, K = k.shape[2], indices.shape[3]
    dtype: Any = _FLOATS.get(q.dtype, str(q.dtype))
    problem = ChunkAttention(int(Hq), int(Hkv), int(D), chunk_size, int(K), off_by_one, dtype)
    _check(k.shape[0] == B and k.shape[3] == D, f"k must be [B={B}, C*S, Hkv, D={D}], got {_shape(k)}")
    _check(v.shape == k.shape, f"v must have k's shape {_shape(k)}, got {_shape(v)}")
    _check(k.dtype == q.dtype == v.dtype, f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    _check(k.shape[1] % chunk_size == 0, f"k has {k.shape[1]} tokens, not a multiple of chunk_size {chunk_size}")
    for name, x in (("indices", indices), ("weights", weights)):
        expected = f"[B={B}, L={L}, Hkv={Hkv}, K={K}]"
        _check(x.shape[:3] == (B, L, Hkv) and x.shape[3] == K, f"{name} must be {expected}, got {_shape(x)}")
    _check(indices.dtype == torch.int32, f"indices must be int32, got {indices.dtype}; use indices.to(torch.int32)")
    wide = weights.dtype == torch.float32 or weights.dtype == q.dtype == torch.float64
    _check(wide, f"weights must be torch.float32, got {weights.dtype}; use weights.float()")
    _check_one_device(q=q, k=k, v=v, indices=indices, weights=weights)
    return problem


def _check_range(name: str, x: Tensor, least: int, most: int) -> None:
    """On CPU only: on a GPU the look would stop the stream."""
    if x.device.type == "cpu" and x.numel():
        low, high = (int(end) for end in x.aminmax())
        _check(least <= low and high <= most, f"{name} must lie in {least} … {most}, found {low} … {high}")


@torch.library.custom_op("hsa::chunk_select", mutates_args=())
def chunk_select(
    q_r: Tensor,
    landmark: Tensor,
    position: Tensor,
    chunks: Tensor,
    kv_heads: int,
    chunk_size: int,
    top_k: int,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Selects the K best visible chunks of every token and kv head, newest first; exact ties go to the newer chunk.

    Args:
        q_r: [B, L, Hr, Dr] retrieval queries.
        landmark: [B, C, Hr, Dr], rows from ``chunks[b]`` on are not looked at.
        position: int64 [B], absolute index of each row's first token.
        chunks: int64 [B], how many landmark rows are filled.
        kv_heads: Hkv; Hr is Hkv or 1.
        chunk_size: S.
        top_k: K.
        window: 0, or W to leave to a sliding window what it covers.

    Returns:
        ``indices`` int32 [B, L, Hkv, K], -1 where fewer than K chunks are visible, and ``scores`` fp32 of that shape,
        ``q_r·landmark/sqrt(Dr)``, 0 in empty slots. Scores are differentiable in ``q_r`` and ``landmark``.

    Raises:
        ValueError: a shape, dtype, device or size does not fit; the message says which.
    """
    problem = _select_problem(q_r, landmark, position, chunks, kv_heads, chunk_size, top_k, window)
    _check_range("chunks", chunks, 0, landmark.shape[1])
    return dispatch.select(problem, q_r, landmark, position, chunks)


@chunk_select.register_fake
def _(q_r: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    problem = _select_problem(q_r, *others)
    shape = (*q_r.shape[:2], problem.kv_heads, problem.top_k)
    return q_r.new_empty(shape, dtype=torch.int32), q_r.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("hsa::chunk_select_backward", mutates_args=())
def chunk_select_backward(
    grad_scores: Tensor, q_r: Tensor, landmark: Tensor, indices: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``chunk_select`` to ``q_r`` and ``landmark``, through the scores of the selected chunks only."""
    Hr, Dr = int(q_r.shape[2]), int(q_r.shape[3])
    problem = ChunkSelect(int(indices.shape[2]), Hr, Dr, chunk_size, int(indices.shape[3]), 0, _FLOATS[q_r.dtype])  # type: ignore[arg-type]
    _check_range("indices", indices, -1, landmark.shape[1] - 1)
    return dispatch.select_backward(problem, grad_scores, q_r, landmark, indices)


@chunk_select_backward.register_fake
def _(grad_scores: Tensor, q_r: Tensor, landmark: Tensor, indices: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    return q_r.new_empty(q_r.shape), landmark.new_empty(landmark.shape)


def _select_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_r, landmark, _, _, _, ctx.chunk_size, *_ = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(q_r, landmark, output[0])


def _select_gradient(ctx: Any, _: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_landmark = chunk_select_backward(grad_scores, *ctx.saved_tensors, ctx.chunk_size)
    return d_q, d_landmark, None, None, None, None, None, None


chunk_select.register_autograd(_select_gradient, setup_context=_select_context)


@torch.library.custom_op("hsa::chunk_attention", mutates_args=())
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, chunk_size: int, off_by_one: bool = False
) -> Tensor:
    """Attends to each selected chunk with its own softmax and adds the outputs with the given weights.

    ``o[t,h] = Σ_k weights[t,g,k] · softmax_j(q[t,h]·k[c,j] / sqrt(D)) · v[c,j]`` with ``c = indices[t,g,k]``, g the kv
    head of h. There is no mask inside a chunk and there are no positions. Empty slots (index -1) contribute nothing,
    whatever their weight; duplicate indices each contribute.

    Args:
        q: [B, L, Hq, D].
        k, v: [B, C*S, Hkv, D].
        indices: int32 [B, L, Hkv, K], -1 … C-1, in any order.
        weights: fp32 [B, L, Hkv, K].
        chunk_size: S.
        off_by_one: add 1 to the softmax denominators.

    Returns:
        [B, L, Hq, D] in q's dtype, differentiable in q, k, v and weights.

    Raises:
        ValueError: a shape, dtype or device does not fit, or (on CPU) an index is out of range.
    """
    problem = _attention_problem(q, k, v, indices, weights, chunk_size, off_by_one)
    _check_range("indices", indices, -1, k.shape[1] // chunk_size - 1)
    return dispatch.attention(problem, q, k, v, indices, weights)


@chunk_attention.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    _attention_problem(q, *others)
    return q.new_empty(q.shape)


@torch.library.custom_op("hsa::chunk_attention_backward", mutates_args=())
def chunk_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    chunk_size: int,
    off_by_one: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``chunk_attention`` to q, k, v and weights."""
    problem = _attention_problem(q, k, v, indices, weights, chunk_size, off_by_one)
    _check_range("indices", indices, -1, k.shape[1] // chunk_size - 1)
    return dispatch.attention_backward(problem, grad_o, q, k, v, indices, weights)


@chunk_attention_backward.register_fake
def _(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), weights.new_empty(weights.shape)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk_size, ctx.off_by_one = inputs
    ctx.save_for_backward(*tensors)


def _attention_gradient(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_k, d_v, d_w = chunk_attention_backward(grad_o, *ctx.saved_tensors, ctx.chunk_size, ctx.off_by_one)
    return d_q, d_k, d_v, None, d_w, None, None


chunk_attention.register_autograd(_attention_gradient, setup_context=_attention_context)


def _register_autocast(device: str, op: Any, narrowed: tuple[int, ...], widened: tuple[int, ...] = ()) -> None:
    """Under ``torch.autocast`` an op takes the arguments ``narrowed`` in the autocast dtype, as matrix products do, and
    ``widened`` in float32, whatever half-precision layers made of them; what it runs inside is not cast again.

    Above autograd, so that gradients come back in the dtypes that were given. float64 stays, as everywhere in autocast.
    """

    def run(*arguments: Any) -> Any:
        given = list(arguments)
        dtypes = {**dict.fromkeys(narrowed, torch.get_autocast_dtype(device)), **dict.fromkeys(widened, torch.float32)}
        for place, dtype in dtypes.items():
            if given[place].is_floating_point() and given[place].dtype != torch.float64:
                given[place] = given[place].to(dtype)
        with torch.autocast(device, enabled=False):
            return op(*given)

    _autocast.impl(op._name, run, f"Autocast{device.upper()}")


_autocast = torch.library.Library("hsa", "IMPL")
for _device in ("cpu", "cuda"):
    _register_autocast(_device, chunk_select, narrowed=(0, 1))
    _register_autocast(_device, chunk_attention, narrowed=(0, 1, 2), widened=(4,))
