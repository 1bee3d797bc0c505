"""Sliding windows on a GPU: the FlashAttention kernels that PyTorch brings, which skip what a window hides.

Shape letters: B batch, L tokens of the segment, R tokens of the ring before it, T = R + L, W window, H query heads,
Hkv key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsa_compile.model.config import ModelConfig
from hsa_compile.model.layers import last_tokens, rotate, rotations


def fits(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels take this model's windows: half precision, heads of a multiple of 8 up to 256 wide, a GPU of
    compute capability 8.0."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or torch.compiler.is_exporting():
        return False
    if config.swa_head_dim % 8 or config.swa_head_dim > 256:
        return False
    # torch.compile cannot trace the look at the device.
    return torch.compiler.is_compiling() or torch.cuda.get_device_capability(device) >= (8, 0)


def attend_window(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    """[B, L, H, D] of the last L of T tokens, each seeing itself and the ``window`` - 1 tokens before it.

    This is the operator behind ``scaled_dot_product_attention``, which does not show its window; public since
    torch 2.11 is only ``varlen_attn``, which wants batch rows told apart by tables.
    """
    L, T = q_BLHD.shape[1], k_BTHD.shape[1]
    # A single token sees all it is given; without a window the kernel shares keys among the heads of a group.
    left, right = (-1, -1) if L == 1 and window >= T else (window - 1, 0)
    return torch.ops.aten._flash_attention_forward(
        q_BLHD, k_BTHD, v_BTHD, None, None, L, T, 0.0, False, False, window_size_left=left, window_size_right=right
    )[0]


class FlashWindow:
    """``layers.SlidingWindow`` on a GPU in half precision: the same numbers up to rounding, without masks.

    Arguments are those of ``SlidingWindow``; rows of one length, each one document.
    """

    def __init__(self, config: ModelConfig, ring: int, length: int, device: torch.device) -> None:
        self.W, self.R = config.window, ring
        # Angles in float32 would be off by 1e-3 after 16 K tokens.
        sizes = (ring + length, config.swa_head_dim, config.rope_base)
        self.cos, self.sin = rotations(*sizes, device, torch.float64)

    def attend(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """[B, L, H, D] from unrotated queries and unrotated keys of the ring and the segment."""
        # Under autocast a ring of float32 widens the keys that are joined to it.
        k_BTHD, v_BTHD = k_BTHD.to(q_BLHD.dtype), v_BTHD.to(q_BLHD.dtype)
        q = rotate(q_BLHD, self.cos[self.R :], self.sin[self.R :])
        return attend_window(q, rotate(k_BTHD, self.cos, self.sin), v_BTHD, self.W)

    def kept(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """The last W - 1 tokens."""
        return last_tokens(k_BTHD, self.W - 1), last_tokens(v_BTHD, self.W - 1)
