"""Building blocks that the networks share: norms' parameters and rotary tables."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

ROTARY_BASE: Final = 10000.0


class LayerNorm(nn.Module):
    """The parameters of a layer normalisation; the operators in `kernels` apply it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps


class TokenEmbedding(nn.Embedding):
    """torch's, without random values where there is nothing to put them into."""

    def reset_parameters(self) -> None:
        # On the meta device torch imports its whole compiler for them: 1.7 s of the 3.6 s that an engine took to start.
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """The parameters of a root-mean-square normalisation; the operators in `kernels` apply it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


def rotary_tables(
    num_positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of ChatGLM-6B's angles, each [num_positions, head_dim / 4] float32 (CHATGLM.md A4).

    The frequencies are rounded to fp16, whatever the model's dtype. A float16 model computes the whole table in fp16; its
    values are widened here. Other dtypes compute it in float32.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32) / half
    frequencies = (1.0 / ROTARY_BASE**exponents).half()
    angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    positions = torch.arange(num_positions, dtype=torch.float32).to(angle_dtype)
    angles = positions.unsqueeze(1) * frequencies.to(angle_dtype)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def pair_rotary_tables(
    num_positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of ChatGLM2-6B's angles, each [num_positions, head_dim / 4] float32 (CHATGLM.md B4).

    A float16 model computes frequencies and angles in fp16, cosines and sines of those in float32, and rounds them to fp16.
    Other dtypes compute all of it in float32: the original's bfloat16 has no integers above 256.
    """
    angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    half = head_dim // 2
    frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, half, 2, dtype=angle_dtype) / half)
    positions = torch.arange(num_positions, dtype=angle_dtype)
    angles = torch.outer(positions, frequencies).float()
    cos, sin = (table.to(angle_dtype).float().to(device) for table in (angles.cos(), angles.sin()))
    return cos, sin
