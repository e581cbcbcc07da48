from __future__ import annotations

import pytest

from workers.engine.block_manager import BlockManager
from workers.engine.messages import Sampling
from workers.engine.sequence import Sequence
from workers.models.layout import Layout


def sequence(num_tokens: int) -> Sequence:
    return Sequence(
        sequence_id=1,
        arrival=0,
        token_ids=[7] * num_tokens,
        prompt_len=num_tokens,
        layout=Layout(0, 0),
        sampling=Sampling(max_new_tokens=1, seed=0),
        max_len=100,
    )


def test_a_sequence_gets_as_many_blocks_as_its_tokens_need_and_never_block_0():
    manager = BlockManager(num_blocks=6, block_size=4)
    first, second = sequence(9), sequence(8)
    assert manager.allocate(first)
    assert manager.allocate(second)
    assert (len(first.blocks), len(second.blocks)) == (3, 2)
    assert sorted(first.blocks + second.blocks) == [1, 2, 3, 4, 5]


def test_a_block_is_added_only_when_the_last_one_is_full():
    manager = BlockManager(num_blocks=6, block_size=4)
    growing = sequence(3)
    for num_tokens, num_blocks in [(3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]:
        growing.token_ids = [7] * num_tokens
        assert manager.allocate(growing)
        assert len(growing.blocks) == num_blocks


def test_nothing_is_given_when_not_everything_can_be():
    manager = BlockManager(num_blocks=4, block_size=4)
    big = sequence(13)
    assert not manager.allocate(big)
    assert (big.blocks, manager.num_free_blocks) == ([], 3)


def test_freed_blocks_can_be_given_again():
    manager = BlockManager(num_blocks=4, block_size=4)
    first = sequence(12)
    assert manager.allocate(first)
    manager.free(first)
    assert (first.blocks, manager.num_free_blocks) == ([], 3)
    assert manager.allocate(sequence(12))


def test_a_cache_without_a_usable_block_is_refused():
    with pytest.raises(ValueError, match="num_blocks"):
        BlockManager(num_blocks=1, block_size=4)
