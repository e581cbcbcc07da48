"""The order in which the tensor cores take a linear layer's integer weights.

Plain tensor shuffling on any device. Knows nothing about kernels or layers.

The packed order: tiles of 16 output rows x 64 inputs, in each tile the 32 lanes of a warp, for each lane the operands of four
products of 16 x 16. With g = lane // 4 and t = lane % 4, operand i of product s holds row g + 8 (i % 2) and inputs
16 s + 2 t + 8 (i // 2) + {0, 1}.
"""

from __future__ import annotations

from typing import Final

import torch

from workers.models.quantization import Bits

TILE_ROWS: Final = 16
TILE_INPUTS: Final = 64


def can_pack(out_features: int, in_features: int) -> bool:
    """Whether a matrix of this shape is made of whole tiles."""
    return out_features % TILE_ROWS == 0 and in_features % TILE_INPUTS == 0


def pack(values: torch.Tensor, bits: Bits) -> torch.Tensor:
    """int8 [out, in] -> uint8 [out * in * bits / 8], each value with its offset (8 or 128) added."""
    out_features, in_features = values.shape
    if not can_pack(out_features, in_features):
        raise ValueError(f"a {out_features} x {in_features} matrix is not made of 16 x 64 tiles")
    # tile, row half, g, chunk, product, input half, t, pair
    tiles = values.view(out_features // 16, 2, 8, in_features // 64, 4, 2, 4, 2).to(torch.int16)
    if bits == 4:
        # [tile, chunk, g, t, product, (pair, input half, row half)]: eight nibbles of a word, the lowest first
        nibbles = (tiles + 8).permute(0, 3, 2, 6, 4, 7, 5, 1).reshape(-1, 2)
        return (nibbles[:, 0] | nibbles[:, 1] << 4).to(torch.uint8)
    # [tile, chunk, product // 2, g, t, product % 2, input half, row half, pair]
    bytes_ = (tiles + 128).unflatten(4, (2, 2)).permute(0, 3, 4, 2, 7, 5, 6, 1, 8)
    return bytes_.reshape(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: Bits, out_features: int, in_features: int) -> torch.Tensor:
    """The inverse of `pack`: int8 [out, in]."""
    num_tiles, num_chunks = out_features // 16, in_features // 64
    data = packed.to(torch.int16)
    if bits == 4:
        nibbles = torch.stack((data & 15, data >> 4), dim=1) - 8
        tiles = nibbles.view(num_tiles, num_chunks, 8, 4, 4, 2, 2, 2).permute(0, 7, 2, 1, 4, 6, 3, 5)
    else:
        bytes_ = (data - 128).view(num_tiles, num_chunks, 2, 8, 4, 2, 2, 2, 2)
        tiles = bytes_.permute(0, 7, 3, 1, 2, 5, 6, 4, 8)
    return tiles.reshape(out_features, in_features).to(torch.int8)
