"""Linear layers and embeddings whose stored form is not the dtype of the computation: integers with scales, or half precision.

What they compute is exact up to the rounding of that dtype; none of them is fast on a CPU (`linear_onnxruntime` is). They
stand in a network under the names of the plain layers. Knows nothing about checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import torch
from torch import nn

from workers.models.quantization import Bits, dequantize

_ELEMENTS_AT_ONCE: Final = {"cpu": 1 << 21, "cuda": 1 << 26}
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
        if x.dtype == torch.float16:
            # Integers times activations may leave its range before they are scaled.
            y = _by_rows(self.out_features, x, self._widen)
        elif self.bits == 8:
            y = _by_rows(self.out_features, x, lambda rows, out: out.copy_(self.weight[rows]))
            y *= self.weight_scale.to(x.dtype)
        else:
            # The two halves of a byte meet the columns that they belong to: cheaper than putting them side by side.
            even, odd = x[..., 0::2].contiguous(), x[..., 1::2].contiguous()
            y = _by_rows(self.out_features, even, lambda rows, out: out.copy_(self.weight[rows] >> 4))
            y += _by_rows(self.out_features, odd, lambda rows, out: out.copy_(self.weight[rows] << 4 >> 4))
            y *= self.weight_scale.to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def _widen(self, rows: slice, out: torch.Tensor) -> None:
        out.copy_(dequantize(self.weight[rows], self.weight_scale[rows], self.bits, out.dtype))

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
        y = _by_rows(self.out_features, x, lambda rows, out: out.copy_(self.weight[rows]))
        return y if self.bias is None else y.add_(self.bias)


def stored_shape(out_features: int, in_features: int, bits: Bits) -> tuple[int, int]:
    """Of the integers in a checkpoint. Raises ValueError when rows cannot be packed."""
    if bits == 4 and in_features % 2:
        raise ValueError(f"4-bit weights need an even number of inputs, not {in_features}")
    return out_features, in_features * bits // 8


def _by_rows(num_rows: int, x: torch.Tensor, widen: Callable[[slice, torch.Tensor], object]) -> torch.Tensor:
    """x [..., in] times a weight [num_rows, in]. `widen` puts some rows of it into what it is given, in the dtype of x."""
    tokens, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    step = max(1, _ELEMENTS_AT_ONCE.get(x.device.type, _ELEMENTS_AT_ONCE["cuda"]) // x.shape[-1])
    # Kept from piece to piece: fresh memory costs more than what is computed with it.
    wide = x.new_empty(min(step, num_rows), x.shape[-1])
    # Weights first, tokens second: for few tokens up to three times as fast on a CPU as the other way round.
    y = x.new_empty(num_rows, len(tokens))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        some = wide[: end - start]
        widen(slice(start, end), some)
        torch.mm(some, tokens.T, out=y[start:end])
    return y.T.contiguous().view(*shape, num_rows)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module into the place of the one with this path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def linear_of(model: nn.Module, path: str) -> nn.Linear:
    """The plain linear layer with this path."""
    return cast(nn.Linear, model.get_submodule(path))
