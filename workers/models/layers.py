"""Building blocks that the networks share: linear layers through one factory, norms' parameters, rotary tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

LinearFactory = Callable[[str, int, int], nn.Module]
"""(the layer's full name, inputs, outputs) -> a module with a bias that maps [T, inputs] to [T, outputs]. Every large
linear layer is built through it, so that quantized ones and ones with adapters can take its place."""

ROTARY_BASE: Final = 10000.0


def plain_linear(name: str, in_features: int, out_features: int) -> nn.Module:
    """A linear layer in the dtype of the model."""
    return nn.Linear(in_features, out_features)


class LayerNorm(nn.Module):
    """The parameters of a layer normalisation; the operators in `kernels` apply it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
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
