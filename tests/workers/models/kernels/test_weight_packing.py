"""The order in which packed weights lie, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from workers.models.kernels.weight_packing import can_pack, pack, unpack


def random_values(out_features: int, in_features: int, bits: int) -> torch.Tensor:
    limit = 2 ** (bits - 1)
    return torch.randint(-limit, limit, (out_features, in_features)).to(torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 64), (48, 192)])
def test_unpacking_gives_back_what_was_packed(bits, shape):
    values = random_values(*shape, bits)
    packed = pack(values, bits)
    assert packed.numel() == values.numel() * bits // 8
    assert torch.equal(unpack(packed, bits, *shape), values)


def test_a_lanes_word_holds_the_nibbles_of_its_operands():
    values = random_values(32, 128, 4)
    words = pack(values, 4).view(torch.int32).view(2, 2, 32, 4)
    for tile, chunk, lane, product, operand, pair in torch.cartesian_prod(
        *(torch.arange(n) for n in (2, 2, 32, 4, 4, 2))
    ).tolist():
        g, t = divmod(lane, 4)
        row = tile * 16 + g + 8 * (operand % 2)
        column = chunk * 64 + 16 * product + 2 * t + 8 * (operand // 2) + pair
        nibble = int(words[tile, chunk, lane, product]) >> (4 * operand + 16 * pair) & 15
        assert nibble - 8 == int(values[row, column])


def test_a_lanes_bytes_are_those_of_its_operands():
    values = random_values(32, 128, 8)
    packed = pack(values, 8).view(2, 2, 2, 32, 2, 2, 4)
    for tile, chunk, lane, product, operand, pair in torch.cartesian_prod(
        *(torch.arange(n) for n in (2, 2, 32, 4, 4, 2))
    ).tolist():
        g, t = divmod(lane, 4)
        row = tile * 16 + g + 8 * (operand % 2)
        column = chunk * 64 + 16 * product + 2 * t + 8 * (operand // 2) + pair
        byte = packed[tile, chunk, product // 2, lane, product % 2, operand // 2, operand % 2 * 2 + pair]
        assert int(byte) - 128 == int(values[row, column])


def test_a_matrix_that_is_not_made_of_tiles_is_refused():
    assert can_pack(130528, 4096)
    assert not can_pack(40, 64)
    with pytest.raises(ValueError, match="24 x 64 matrix"):
        pack(random_values(24, 64, 4), 4)
