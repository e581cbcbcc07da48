"""An engine that launches a step before it has read the last one's tokens says what one says that waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from workers.engine.model_runner import Launched, ModelRunner
from workers.engine.scheduler import Schedule
from workers.models.batch import Batch

PROMPTS = [
    "你好",
    "感冒了怎么办",
    "Hello, how are you?",
    "深蹲的时候\n膝盖不要超过脚尖",
    "a",
    "It is easy, isn't it! " * 5,
]
SEEDED = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}


class AheadRunner(ModelRunner):
    """Keeps each row's last token where the host does not see it, as a GPU does."""

    runs_ahead = True
    num_unread = 0

    def launch(self, schedule: Schedule) -> Launched:
        assert self.num_unread <= 1
        self._rows = [sequence.row for sequence in schedule.sequences]
        launched = super().launch(schedule)
        tokens = launched.token_ids()
        self._last = {**getattr(self, "_last", {}), **dict(zip(self._rows, tokens, strict=True))}
        self.num_unread += 1

        def token_ids() -> list[int]:
            self.num_unread -= 1
            return tokens

        return SimpleNamespace(sequences=list(schedule.sequences), token_ids=token_ids)

    def _decode_batch(self, sequences: list, drafts: list | None = None) -> Batch:
        batch = super()._decode_batch(sequences, drafts)
        batch.token_ids = torch.tensor([self._last[row] for row in self._rows])
        return batch


@pytest.fixture
def new_ahead(new_engine, monkeypatch) -> Callable:
    def new(**config):
        with monkeypatch.context() as patch:
            patch.setattr("workers.engine.engine.ModelRunner", AheadRunner)
            # With drafts an engine does not always run ahead (test_speculation.py).
            return new_engine(speculation="off", **config)

    return new


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SEEDED, {**SEEDED, "repetition_penalty": 1.2}])
def test_running_ahead_gives_the_same_answers(new_engine, new_ahead, sampling):
    ahead, waiting = new_ahead(), new_engine()
    for index in range(12):
        for engine in (ahead, waiting):
            engine.add(index, PROMPTS[index % 6], max_new_tokens=1 + 4 * index, **sampling)
    assert ahead.run() == waiting.run()
    assert ahead.finish_reasons == waiting.finish_reasons
    assert "length" in waiting.finish_reasons.values()


def test_preempted_sequences_go_on_where_they_were(new_engine, new_ahead):
    ahead, waiting = new_ahead(num_blocks=14), new_engine()
    for index in range(6):
        for engine in (ahead, waiting):
            engine.add(index, PROMPTS[index % 4], max_new_tokens=40, **SEEDED)
    assert ahead.run() == waiting.run()
    assert ahead.engine.scheduler.num_preemptions > 3


def test_a_step_holds_only_sequences_that_still_run(new_ahead):
    engine = new_ahead()
    for index in range(4):
        engine.add(index, PROMPTS[index], max_new_tokens=30, temperature=0.0)
    engine.step()
    engine.step()
    engine.engine.abort(2)
    assert 2 not in engine.step().sequence_ids
    # The same id may come back while the old one's last step is still on its way.
    engine.answers.pop(2)
    engine.add(2, PROMPTS[2], max_new_tokens=30, temperature=0.0)
    answers = engine.run()
    alone = new_ahead()
    alone.add(2, PROMPTS[2], max_new_tokens=30, temperature=0.0)
    assert answers[2] == alone.run()[2]


def test_adds_and_aborts_at_any_time_lose_nothing(new_engine, new_ahead):
    rng = random.Random(5)
    ahead, waiting = new_ahead(num_blocks=20, max_num_seqs=5), new_engine()
    aborted, next_id = set(), 0
    for _ in range(150):
        if rng.random() < 0.3:
            fields = {"max_new_tokens": rng.randint(1, 25), **SEEDED}
            prompt = rng.choice(PROMPTS)
            ahead.add(next_id, prompt, **fields)
            waiting.add(next_id, prompt, **fields)
            next_id += 1
        if rng.random() < 0.1 and next_id:
            aborted.add(victim := rng.randrange(next_id))
            ahead.engine.abort(victim)
        if ahead.engine.has_work:
            ahead.step()
    ahead.run()
    waiting.run()
    assert len(aborted) > 5
    for sequence_id, answer in waiting.answers.items():
        if sequence_id in aborted:
            assert ahead.answers[sequence_id] == answer[: len(ahead.answers[sequence_id])]
        else:
            assert ahead.answers[sequence_id] == answer
    assert ahead.num_used_blocks == 0
