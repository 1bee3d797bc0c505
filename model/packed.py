"""The chunk memory of packed documents.

Chunks are counted from each document's start, and each document is read against its own memory, one call after the
other: the operators see plain sequences, whichever path computes them, and no work is spent on other documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsa_compile.model.baselines import MeanPooledMemory
from hsa_compile.model.encoder import ChunkEncoder, Memory
from hsa_compile.model.hsa import MemoryReader
from hsa_compile.model.rows import documents


class PackedMemory:
    """The memories of all documents of a batch.

    Args:
        encoder: of chunks.
        x_BLd: hidden states of the packed rows.
        chunk_size: S.
        starts_BL: where each token's document starts.

    Raises:
        ValueError: the document starts are not that.
    """

    def __init__(
        self, encoder: ChunkEncoder | MeanPooledMemory, x_BLd: Tensor, chunk_size: int, starts_BL: Tensor
    ) -> None:
        self.documents = documents(starts_BL)
        self.memories: list[Memory] = []
        for row, first, end in self.documents:
            C = (end - first) // chunk_size
            chunks = x_BLd[row, first : first + C * chunk_size].unflatten(0, (C, chunk_size))
            self.memories.append(encoder(chunks[None]))

    def read(self, hsa: MemoryReader, x_BLd: Tensor) -> Tensor:
        """[B, L, d]: the sub-layer on every document with the document's memory."""
        zero = torch.zeros(1, dtype=torch.int64, device=x_BLd.device)
        parts = []
        for (row, first, end), memory in zip(self.documents, self.memories):
            chunks = zero + memory.landmark.shape[1]
            parts.append(hsa(x_BLd[row : row + 1, first:end], memory, zero, chunks))
        return torch.cat(parts, dim=1).view(x_BLd.shape)
