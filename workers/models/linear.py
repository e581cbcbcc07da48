"""Linear layers and embeddings whose stored form is not the dtype of the computation: integers with scales, or half precision.

What they compute is exact up to the rounding of that dtype; none of them is fast on a CPU (`linear_onnxruntime` is). They
stand in a network under the names of the plain layers. Knows nothing about checkpoints.
"""

from __future__ import annotations

from typing import Final, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.models.quantization import Bits, dequantize, integers

_ELEMENTS_AT_ONCE: Final = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Weights that are widened at once: on a CPU they stay in its cache."""


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights and one scale a row, stored as the original stores them (CHATGLM.md C)."""

    weight: torch.Tensor
    """int8 [out, in], or [out, in / 2] with two 4-bit values in a byte."""
    weight_scale: torch.Tensor
    """fp16 [out]"""

    def __init__(self, in_features: int, out_features: int, bits: Bits, *, bias: bool = True) -> None:
        """Raises ValueError for 4 bits and an odd number of inputs."""
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.register_buffer(
            "weight", torch.zeros(stored_shape(out_features, in_features, bits), dtype=torch.int8)
        )
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        out = [
            self._rows(x, start, start + step)
            for step in (_num_rows(x, self.in_features),)
            for start in range(0, self.out_features, step)
        ]
        y = torch.cat(out, dim=-1)
        return y if self.bias is None else y.add_(self.bias)

    def _rows(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        weight, scale = self.weight[start:end], self.weight_scale[start:end]
        if x.dtype == torch.float16:
            # Integers times activations may leave its range before they are scaled.
            return F.linear(x, dequantize(weight, scale, self.bits, x.dtype))
        return F.linear(x, integers(weight, self.bits).to(x.dtype)).mul_(scale.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class QuantizedEmbedding(nn.Module):
    """An embedding with integer weights and one scale a row, which a tied head may share."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: Bits) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.register_buffer(
            "weight", torch.zeros(stored_shape(num_embeddings, embedding_dim, bits), dtype=torch.int8)
        )
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, dtype=torch.float16))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, width] in fp16, as the original widens it."""
        return dequantize(self.weight[token_ids], self.weight_scale[token_ids], self.bits, torch.float16)


class StoredLinear(nn.Linear):
    """A linear layer whose weights stay as they are stored, and are widened piece by piece when they are used.

    A float32 copy of an fp16 head would need more memory than all int4 layers of a real model leave.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        step = _num_rows(x, self.in_features)
        parts = [
            F.linear(x, self.weight[start : start + step].to(x.dtype))
            for start in range(0, self.out_features, step)
        ]
        y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y.add_(self.bias)


def stored_shape(out_features: int, in_features: int, bits: Bits) -> tuple[int, int]:
    """Of the integers in a checkpoint. Raises ValueError when rows cannot be packed."""
    if bits == 4 and in_features % 2:
        raise ValueError(f"4-bit weights need an even number of inputs, not {in_features}")
    return out_features, in_features * bits // 8


def _num_rows(x: torch.Tensor, in_features: int) -> int:
    elements = _ELEMENTS_AT_ONCE.get(x.device.type, _ELEMENTS_AT_ONCE["cuda"])
    return max(1, elements // in_features)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module into the place of the one with this path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def linear_of(model: nn.Module, path: str) -> nn.Linear:
    """The plain linear layer with this path."""
    return cast(nn.Linear, model.get_submodule(path))
