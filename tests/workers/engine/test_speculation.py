"""Drafts: what is guessed when, and that an answer is the same with them as without."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.engine.messages import Sampling
from workers.engine.model_runner import Launched, ModelRunner
from workers.engine.scheduler import Schedule
from workers.engine.sequence import Sequence
from workers.engine.speculation import (
    MAX_DRAFT,
    MAX_LONG_DRAFT,
    MAX_SEQUENCES,
    MOST_STREAK,
    NUM_EQUAL,
    PromptLookup,
    Speculation,
    accepted,
)
from workers.models.batch import Batch
from workers.models.layout import Layout

TEXT = list(range(100, 160))


def lookup_of(token_ids: list[int]) -> PromptLookup:
    lookup = PromptLookup()
    lookup.follow(token_ids)
    return lookup


def sequence_of(token_ids: list[int], prompt_len: int, **sampling: Any) -> Sequence:
    fields = {"max_new_tokens": 1000, "seed": 1, **sampling}
    return Sequence(1, 1, token_ids, prompt_len, Layout(0, 0), Sampling(**fields), 1000)


def test_after_three_tokens_of_the_prompt_the_next_ones_are_guessed() -> None:
    said = [*TEXT, 1, 2, 110, 111]
    lookup = lookup_of(said)
    assert lookup.guess(said, 5) == []
    said.append(112)
    lookup.follow(said)
    assert lookup.guess(said, 5) == [113, 114, 115, 116, 117]


def test_another_token_ends_the_copying() -> None:
    said = [*TEXT, 1, 2, 110, 111, 112, 113, 7]
    lookup = lookup_of(said)
    assert lookup.streak == 0
    assert lookup.guess(said, 5) == []


def test_the_latest_of_several_places_is_copied_from() -> None:
    said = [1, 2, 3, 4, 50, 1, 2, 3, 4, 60, 9, 1, 2, 3, 4]
    assert lookup_of(said).guess(said, 3) == [60, 9, 1]


def test_a_guess_ends_where_the_known_tokens_end() -> None:
    said = [5, 6, 7, 8] * 3
    assert lookup_of(said).guess(said, 9) == [5, 6, 7, 8]


def test_told_at_once_or_token_by_token_there_is_a_guess_at_the_same_places() -> None:
    rng = random.Random(3)
    said = [rng.randrange(6) for _ in range(400)]
    slowly = PromptLookup()
    num_guesses = 0
    for length in range(1, len(said) + 1):
        slowly.follow(said[:length])
        at_once = lookup_of(said[:length])
        assert bool(at_once.guess(said[:length], 1)) == bool(slowly.guess(said[:length], 1))
        # Who is told at once has not seen for how long it goes on already.
        assert at_once.streak <= slowly.streak
        num_guesses += bool(at_once.streak)
    assert num_guesses > 100


def test_drafts_that_fail_make_a_sequence_copy_for_longer_first() -> None:
    lookup = PromptLookup()
    for _ in range(9):
        lookup.judge(7, 0)
    assert lookup.needed == MOST_STREAK
    lookup.judge(7, 1)
    assert lookup.needed == MOST_STREAK
    for _ in range(9):
        lookup.judge(7, 6)
    assert lookup.needed == NUM_EQUAL


def test_what_was_drawn_counts_up_to_the_first_difference() -> None:
    assert list(accepted([], [4])) == [4]
    assert list(accepted([4, 5], [4, 5, 6])) == [4, 5, 6]
    assert list(accepted([4, 5], [4, 9, 6])) == [4, 9]
    assert list(accepted([4, 5], [8, 5, 6])) == [8]


def test_drafts_share_the_rows_and_end_before_the_longest_answer() -> None:
    said = [*TEXT, 1, 2, 110, 111, 112, 113]
    speculation = Speculation(max_rows=32)
    one = sequence_of(said, len(TEXT))
    speculation.follow(one)
    assert len(speculation.drafts([one])[0]) == MAX_DRAFT
    assert [len(draft) for draft in speculation.drafts([one] * 8)] == [3] * 8
    assert speculation.drafts([one] * 32) == [[]] * 32
    one.max_len = len(said) + 3
    assert len(speculation.drafts([one])[0]) == 2
    one.max_len = len(said) + 1
    assert speculation.drafts([one]) == [[]]


def test_a_long_copy_gets_long_drafts() -> None:
    said = [*TEXT, 1, 2, *TEXT[:4]]
    speculation = Speculation(max_rows=32)
    one = sequence_of(said, len(TEXT))
    for token_id in TEXT[4:20]:
        speculation.follow(one)
        said.append(token_id)
    speculation.follow(one)
    assert len(speculation.drafts([one])[0]) == MAX_LONG_DRAFT


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}])
def test_draws_that_depend_on_each_other_get_no_drafts(sampling: dict[str, Any]) -> None:
    one = sequence_of([*TEXT, 1, 2, 110, 111, 112, 113], len(TEXT), **sampling)
    speculation = Speculation(max_rows=32)
    speculation.follow(one)
    assert not speculation.is_likely([one])
    assert speculation.drafts([one]) == [[]]


def test_many_running_sequences_get_none() -> None:
    one = sequence_of([*TEXT, 1, 2, 110, 111, 112, 113], len(TEXT))
    speculation = Speculation(max_rows=32)
    speculation.follow(one)
    assert speculation.is_likely([one] * MAX_SEQUENCES)
    assert not speculation.is_likely([one] * (MAX_SEQUENCES + 1))
    assert not Speculation(max_rows=0).is_likely([one])


def test_drafts_pause_where_they_do_not_pay_and_longer_each_time() -> None:
    said = [*TEXT, 1, 2, 110, 111, 112, 113]
    one = sequence_of(said, len(TEXT))
    speculation = Speculation(max_rows=8)
    speculation.follow(one)
    lengths = []
    for _ in range(2):
        for _ in range(10):
            speculation.time(0.001, 1, 1, has_drafts=False)
        while speculation.is_likely([one]):
            # Four tokens in the time of five.
            speculation.time(0.005, 1, 4, has_drafts=True)
        length = 0
        while not speculation.is_likely([one]):
            speculation.time(0.001, 1, 1, has_drafts=False)
            length += 1
        lengths.append(length)
    assert lengths == [64, 128]
    for _ in range(40):
        speculation.time(0.002, 1, 4, has_drafts=True)
    assert speculation.is_likely([one])


# --- in an engine -----------------------------------------------------------------------------------------------------

COPYING = "深蹲的时候膝盖不要超过脚尖，背部要保持挺直，核心要收紧。" * 3
SEEDED = {"temperature": 0.4, "top_p": 0.7, "top_k": 50}


class AheadRunner(ModelRunner):
    """Launches before tokens are read, and keeps last tokens where the host does not see them, as a GPU does."""

    runs_ahead = True

    def launch(self, schedule: Schedule) -> Launched:
        if not hasattr(self, "_last"):
            self._last: dict[int, int] = {}
        self._schedule = schedule
        launched = super().launch(schedule)
        tokens = launched.token_ids()
        if schedule.drafts is None:
            for sequence, token_id in zip(schedule.sequences, tokens, strict=True):
                self._last[sequence.sequence_id] = token_id
        else:
            for sequence in schedule.sequences:
                assert sequence.num_pending == 0
                self._last.pop(sequence.sequence_id, None)
        return SimpleNamespace(sequences=schedule.sequences, token_ids=lambda: tokens)

    def _decode_batch(self, sequences: list, drafts: list | None = None) -> Batch:
        batch = super()._decode_batch(sequences, drafts)
        if drafts is None:
            known = [self._last.get(one.sequence_id, one.token_ids[-1]) for one in sequences]
            batch.token_ids = torch.tensor(known)
        return batch


@pytest.fixture
def new_ahead(new_engine, monkeypatch) -> Callable:
    def new(**config: Any):
        with monkeypatch.context() as patch:
            patch.setattr("workers.engine.engine.ModelRunner", AheadRunner)
            return new_engine(**config)

    return new


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SEEDED, {**SEEDED, "min_new_tokens": 30}])
def test_answers_are_the_same_with_drafts_and_take_fewer_steps(
    new_engine, new_ahead, sampling: dict[str, Any], is_ahead: bool
) -> None:
    new = new_ahead if is_ahead else new_engine
    plain, drafting = new(speculation="off"), new()
    num_steps = []
    for engine in (plain, drafting):
        steps = 0
        for index in range(6):
            engine.add(index, COPYING[index:], max_new_tokens=10 + 12 * index, **sampling)
            # Some run alone, some together.
            for _ in range(index * 3):
                if engine.engine.has_work:
                    engine.step()
                    steps += 1
        while engine.engine.has_work:
            engine.step()
            steps += 1
        num_steps.append(steps)
    assert drafting.answers == plain.answers
    assert drafting.finish_reasons == plain.finish_reasons
    assert drafting.engine.speculation.num_accepted > 20
    assert num_steps[1] < num_steps[0]
    assert plain.engine.speculation.num_drafted == 0


def test_drafts_push_nobody_out(new_engine) -> None:
    plain, drafting = new_engine(speculation="off", num_blocks=30), new_engine(num_blocks=30)
    for index in range(6):
        for engine in (plain, drafting):
            engine.add(index, COPYING[:30], max_new_tokens=60, temperature=0.0)
    assert drafting.run() == plain.run()
    assert drafting.engine.speculation.num_accepted > 0
    assert drafting.engine.scheduler.num_preemptions <= plain.engine.scheduler.num_preemptions


def test_sequences_with_and_without_drafts_run_together(new_engine) -> None:
    kinds = [{"temperature": 0.0}, {**SEEDED, "repetition_penalty": 1.2}, {"temperature": 0.3, "top_k": 0}]
    plain, drafting = new_engine(speculation="off"), new_engine()
    for index in range(6):
        for engine in (plain, drafting):
            engine.add(index, COPYING[index:], max_new_tokens=50, **kinds[index % 3])
    assert drafting.run() == plain.run()
    assert drafting.engine.speculation.num_accepted > 0


def test_an_aborted_sequence_with_a_draft_under_way_leaves_nothing(new_engine) -> None:
    engine = new_engine()
    engine.add(1, COPYING, max_new_tokens=100, temperature=0.0)
    while not engine.engine.speculation.num_drafted:
        engine.step()
    engine.engine.abort(1)
    assert engine.num_used_blocks == 0
