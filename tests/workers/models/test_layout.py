from __future__ import annotations

import pytest

from workers.models.layout import Layout

BOS, GMASK, MASK = 51, 50, 49


def layout_of(ids: list[int]) -> Layout:
    return Layout.of_prompt(ids, bos_id=BOS, gmask_id=GMASK, mask_id=MASK)


def test_bos_and_the_answer_stand_at_the_masks_position_and_count_blocks():
    assert layout_of([211, GMASK, BOS]).positions(0, 5) == ([0, 1, 1, 1, 1], [0, 0, 1, 2, 3])


def test_positions_from_the_middle_are_those_of_the_whole():
    layout = layout_of([1, 2, GMASK, BOS, 3])
    first, block = layout.positions(0, 9)
    for begin in range(9):
        assert layout.positions(begin, 9) == (first[begin:], block[begin:])
        assert layout.position(begin) == (first[begin], block[begin])


def test_the_first_bos_ends_the_context_and_gmask_goes_before_mask():
    layout = layout_of([1, MASK, BOS, GMASK, 4, BOS])
    assert layout == Layout(context_len=2, mask_position=3)
    assert layout_of([1, MASK, 7, BOS]).mask_position == 1


@pytest.mark.parametrize(("ids", "missing"), [([1, GMASK], "<sop>"), ([1, BOS], "gMASK"), ([], "<sop>")])
def test_a_prompt_without_its_special_tokens_is_refused(ids, missing):
    with pytest.raises(ValueError, match=missing):
        layout_of(ids)
