"""Chunk memory in the host's memory: keys and values stay there, landmarks and what is selected come to the device.

Host memory is pinned and mapped: a CUDA tensor lies over it, which kernels read and write across the bus. Chunks are so
written and fetched in the stream's own order, nothing waits for the device, and a CUDA graph can hold a step. On a CPU
the same code runs on ordinary tensors.

Shape letters: B batch, L tokens, C chunks, S tokens a chunk, K chunks selected a token, Hkv key/value heads, D head
width, N chunks fetched a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsa_compile.model.encoder import Memory


class _Mapped:
    """Pinned bytes, as CUDA's array interface describes memory to other libraries; they live as long as this does."""

    def __init__(self, size: int) -> None:
        self.host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        # The allocator gives freed memory out again once the streams that copied from it have come so far. Kernels
        # that read it are not counted: this copy makes it know their stream.
        torch.empty(1, dtype=torch.uint8, device="cuda").copy_(self.host[:1], non_blocking=True)
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (self.host.data_ptr(), False), "version": 3, "strides": None,
        }  # fmt: skip


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros in host memory, as a tensor of ``device``, a GPU or the CPU.

    Not every operation of PyTorch knows that a CUDA tensor may lie there: write it by ``index_copy_``.

    Raises:
        RuntimeError: so much memory cannot be pinned, or the GPU cannot address it.
    """
    device, size = torch.device(device), torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cuda" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    with torch.cuda.device(device):
        mapped = _Mapped(size)
        view = torch.as_tensor(mapped, device=device)
    if view.data_ptr() != mapped.host.data_ptr():
        raise RuntimeError(f"{device} cannot address the host's memory: keep the chunk memory on the device")
    return view.view(dtype).view(shape)


def put_rows(target_BT: Tensor, first: int | Tensor, update_Bn: Tensor) -> None:
    """Writes rows ``first`` … ``first + n - 1`` of ``target_BT`` [B, T, ...]; waits for nothing, wherever they lie."""
    rows = first + torch.arange(update_Bn.shape[1], device=target_BT.device)
    target_BT.index_copy_(1, rows, update_Bn.to(target_BT.dtype))


class HostMemory(Memory):
    """A memory whose ``k`` and ``v`` are ``host_zeros``; ``landmark`` is on the device."""

    def chosen(self, indices_BLHK: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the selected chunks alone, on the device, and the indices into them.

        A chunk comes once a head, however many tokens selected it, in the order of all chunks: what is computed from
        them is the same to the bit.
        """
        if not self.k.shape[1]:
            return self.k, self.v, indices_BLHK
        chunks_BHN, indices = _one_token(indices_BLHK) if indices_BLHK.shape[1] == 1 else _unite(indices_BLHK)
        k, v = (_fetch(x, chunks_BHN, chunk_size) for x in (self.k, self.v))
        return k, v, indices


def _one_token(indices_B1HK: Tensor) -> tuple[Tensor, Tensor]:
    """A slot, a chunk: no table has to be made, and the number is known beforehand. Empty slots fetch the first."""
    slot = torch.arange(indices_B1HK.shape[-1], dtype=torch.int32, device=indices_B1HK.device)
    return indices_B1HK[:, 0].clamp(min=0).long(), torch.where(indices_B1HK >= 0, slot, -1)


def _unite(indices_BLHK: Tensor) -> tuple[Tensor, Tensor]:
    """The different chunks of each head, int64 [B, Hkv, N] in order, and their places there in place of the indices.

    N is that of the head with the most of them: the look at it waits for the device.
    """
    B, L, H, K = indices_BLHK.shape
    chunk, where = indices_BLHK.transpose(1, 2).flatten(2).long().sort(dim=-1)
    first = torch.ones_like(chunk, dtype=torch.bool)
    first[..., 1:] = chunk[..., 1:] != chunk[..., :-1]
    first &= chunk >= 0
    place = first.cumsum(-1) - 1  # that of empty slots, which come first, is -1
    N = int(place[..., -1].max()) + 1
    chunks = chunk.new_zeros(B, H, N + 1).scatter_(-1, place + 1, chunk.clamp(min=0))[..., 1:]
    places = torch.empty_like(place).scatter_(-1, where, place)
    return chunks, places.view(B, H, L, K).transpose(1, 2).to(indices_BLHK.dtype)


def _fetch(x_BTHD: Tensor, chunks_BHN: Tensor, S: int) -> Tensor:
    """[B, N*S, Hkv, D] on the device: chunk ``chunks_BHN[b, h, n]`` of each head."""
    B, H, _ = chunks_BHN.shape
    # Words of eight bytes make fewer and longer reads across the bus.
    words = x_BTHD.view(torch.int64) if x_BTHD.shape[-1] * x_BTHD.element_size() % 8 == 0 else x_BTHD
    row = torch.arange(B, device=chunks_BHN.device)[:, None, None]
    head = torch.arange(H, device=chunks_BHN.device)
    fetched = words.unflatten(1, (-1, S))[row, chunks_BHN.transpose(1, 2), :, head]  # [B, N, Hkv, S, words]
    return fetched.transpose(2, 3).flatten(1, 2).contiguous().view(x_BTHD.dtype)
