"""Integer weights with one scale a row: quantizing, packing two 4-bit values into a byte, and back (CHATGLM.md C).

Plain arithmetic on tensors, the original's bit for bit. Knows nothing about layers or files.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import torch

Bits = Literal[4, 8]

SMALLEST_SCALE: Final = 2.0**-24
"""fp16's smallest number. Every fp16 value is a multiple of it, so weights that need a smaller scale are exact with this one."""

_ELEMENTS_AT_ONCE: Final = 1 << 24
"""Bounds the memory for intermediate values: the head of a real model has half a billion."""


class Quantized(NamedTuple):
    """weight ≈ values * scales, row by row."""

    values: torch.Tensor
    """int8 [out, in], in -8..7 for 4 bits."""
    scales: torch.Tensor
    """fp16 [out]"""
    num_clamped_rows: int
    """Rows of tiny weights, where the original divides by zero or leaves the range of its integers."""


def quantize(weight: torch.Tensor, bits: Bits) -> Quantized:
    """Symmetric, one scale a row: max|w| / (2^(bits - 1) - 1), rounded to fp16; halves round to even.

    weight: [out, in] of any floating dtype, which is the dtype of the division for fp16 and float32 otherwise. Bit-equal to
    the original, but for the rows that `num_clamped_rows` counts: it has no clamp, and no guard against a scale of zero.
    """
    num_rows, width = weight.shape
    step = max(1, _ELEMENTS_AT_ONCE // width)
    parts = [_quantize_rows(weight[start : start + step], bits) for start in range(0, num_rows, step)]
    return Quantized(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        sum(part.num_clamped_rows for part in parts),
    )


def _quantize_rows(weight: torch.Tensor, bits: Bits) -> Quantized:
    largest = 2 ** (bits - 1) - 1
    row_max = weight.abs().amax(dim=1)
    scales = (row_max / largest).half()
    underflows = (scales == 0) & (row_max > 0)
    scales = scales.masked_fill(underflows, SMALLEST_SCALE)
    is_zero = scales == 0
    # A row of zeros would be divided by zero; whatever else it is divided by, it stays zero.
    values = torch.round(weight / scales.masked_fill(is_zero, 1).unsqueeze(1))
    overflows = (values.abs().amax(dim=1) > largest) & ~underflows
    clamped = values.clamp_(-largest - 1, largest).to(torch.int8)
    return Quantized(clamped, scales, int((underflows | overflows).sum()))


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 [..., in] with values in -8..7 -> int8 [..., in / 2]: column 2j in the high four bits, 2j + 1 in the low ones.

    Raises ValueError when `in` is odd.
    """
    if values.shape[-1] % 2:
        raise ValueError(f"a row of {values.shape[-1]} values cannot be packed in pairs")
    return values[..., 0::2] << 4 | values[..., 1::2] & 15


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`."""
    # Shifts of int8 are arithmetic: they keep the sign.
    return torch.stack((packed >> 4, packed << 4 >> 4), dim=-1).flatten(-2)


def stored_values(quantized: Quantized, bits: Bits) -> torch.Tensor:
    """The values as checkpoints have them: packed for 4 bits."""
    return pack_int4(quantized.values) if bits == 4 else quantized.values


def integers(stored: torch.Tensor, bits: Bits) -> torch.Tensor:
    """int8 [out, in] of what a checkpoint has."""
    return unpack_int4(stored) if bits == 4 else stored


def dequantize(stored: torch.Tensor, scales: torch.Tensor, bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] in this dtype. In fp16 the product is rounded once, as the original's GPU kernels do; in wider dtypes, not."""
    return integers(stored, bits).to(dtype) * scales.to(dtype).unsqueeze(1)
