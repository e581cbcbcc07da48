from __future__ import annotations

from itertools import count

import pytest

from workers.engine.block_manager import BlockManager
from workers.engine.messages import Sampling
from workers.engine.scheduler import Schedule, Scheduler
from workers.engine.sequence import Sequence
from workers.models.layout import Layout

arrivals = count()


def sequence(num_tokens: int) -> Sequence:
    arrival = next(arrivals)
    return Sequence(
        sequence_id=arrival,
        arrival=arrival,
        token_ids=[7] * num_tokens,
        prompt_len=num_tokens,
        layout=Layout(0, 0),
        sampling=Sampling(max_new_tokens=100, seed=0),
        max_len=1000,
    )


def scheduler(num_blocks: int = 100, **limits: int) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size=4), **{"max_num_seqs": 8, "max_prefill_tokens": 20, **limits}
    )


def step(scheduler: Scheduler) -> Schedule:
    """Schedules, and gives every scheduled sequence a token, as an engine does."""
    schedule = scheduler.schedule()
    for scheduled in schedule.sequences:
        assert len(scheduled.blocks) * 4 >= len(scheduled)
        scheduled.token_ids.append(7)
    return schedule


def test_prompts_are_packed_up_to_the_prefill_limit_in_their_order():
    queue = scheduler()
    sequences = [sequence(8) for _ in range(5)]
    for one in sequences:
        queue.add(one)
    assert step(queue) == Schedule(sequences[:2], is_prefill=True)
    assert list(queue.waiting) == sequences[2:]


def test_a_prompt_above_the_limit_goes_alone():
    queue = scheduler()
    small, big, other = sequence(3), sequence(50), sequence(3)
    for one in (small, big, other):
        queue.add(one)
    prefills = [schedule.sequences for schedule in (step(queue) for _ in range(5)) if schedule.is_prefill]
    assert prefills == [[small], [big], [other]]


def test_a_prefill_is_followed_by_a_decode_while_others_run():
    queue = scheduler()
    for _ in range(6):
        queue.add(sequence(18))
    kinds = [step(queue).is_prefill for _ in range(8)]
    assert kinds == [True, False, True, False, True, False, True, False]


def test_no_more_sequences_run_than_are_allowed():
    queue = scheduler(max_num_seqs=2, max_prefill_tokens=1000)
    sequences = [sequence(2) for _ in range(3)]
    for one in sequences:
        queue.add(one)
    step(queue)
    assert queue.running == sequences[:2]
    assert sorted(one.row for one in queue.running) == [0, 1]
    step(queue)
    queue.remove(sequences[0])
    assert step(queue).sequences == [sequences[2]]


def test_an_older_prompt_that_does_not_fit_is_not_overtaken():
    queue = scheduler(num_blocks=11, max_prefill_tokens=100)
    running, big, small = sequence(20), sequence(24), sequence(2)
    for one in (running, big, small):
        queue.add(one)
    assert step(queue).sequences == [running]
    assert [step(queue).sequences for _ in range(3)] == [[running]] * 3
    queue.remove(running)
    assert step(queue).sequences == [big, small]


def test_a_new_sequence_leaves_room_for_those_that_run():
    queue = scheduler(num_blocks=10, max_prefill_tokens=100)
    for _ in range(3):
        queue.add(sequence(12))
    assert len(step(queue).sequences) == 2


def test_the_youngest_is_preempted_and_comes_back_with_its_answer():
    queue = scheduler(num_blocks=7, max_prefill_tokens=100)
    old, young = sequence(11), sequence(7)
    queue.add(old)
    queue.add(young)
    assert step(queue).sequences == [old, young]
    while queue.num_preemptions == 0:
        schedule = step(queue)
    assert schedule.sequences == [old]
    assert (young.blocks, young.row, list(queue.waiting)) == ([], -1, [young])
    length = len(young)
    assert length > 7
    queue.remove(old)
    schedule = step(queue)
    assert schedule == Schedule([young], is_prefill=True)
    assert len(young.blocks) == -(-length // 4)


def test_preempted_sequences_keep_their_order_before_those_that_never_ran():
    queue = scheduler(num_blocks=14, max_prefill_tokens=1000, max_num_seqs=3)
    first, second, third, late = (sequence(15) for _ in range(4))
    for one in (first, second, third, late):
        queue.add(one)
    step(queue)
    assert queue.running == [first, second, third]
    while queue.num_preemptions < 2:
        step(queue)
    assert list(queue.waiting) == [second, third, late]


def test_a_single_sequence_that_fits_is_never_preempted():
    queue = scheduler(num_blocks=6)
    only = sequence(3)
    queue.add(only)
    while len(only) < 20:
        assert step(queue).sequences == [only]
    assert queue.num_preemptions == 0


@pytest.mark.parametrize("is_running", [True, False])
def test_a_removed_sequence_leaves_nothing_behind(is_running):
    queue = scheduler(max_num_seqs=1)
    one, other = sequence(9), sequence(9)
    queue.add(one)
    queue.add(other)
    step(queue)
    queue.remove(one if is_running else other)
    queue.remove(other if is_running else one)
    assert not queue.has_work
    assert queue.block_manager.num_free_blocks == queue.block_manager.num_usable_blocks
