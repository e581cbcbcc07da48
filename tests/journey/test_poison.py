"""Requests that kill the engine which takes them: they become dead letters, and take others down with them at most once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from producer.client import Client, Submission
from producer.contract import Event, Finished, RequestFailed, SamplingParams, Token
from producer.ledger import calls
from tests.poisoned_engine import WORKER, Poison

pytestmark = [pytest.mark.journey, pytest.mark.timeout(180)]

NewWorker = Callable[..., Any]
PROGRAM = ("-c", WORKER)


LONG = 300
"""Tokens of an answer that still runs when somebody else's engine dies, also on a slow machine."""


def ask(client: Client, query: str, num_tokens: int, seed: int = 7) -> Submission:
    sampling = SamplingParams(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, temperature=0.9, seed=seed
    )
    return client.chat(query, sampling=sampling)


def poison(client: Client, kind: Poison, num_tokens: int = 50) -> Submission:
    return ask(client, f"I am {kind.name}", num_tokens, kind)


def first_tokens(submissions: list[Submission]) -> list[Any]:
    """Their streams, once each has begun to answer."""
    streams = [submission.stream() for submission in submissions]
    for stream in streams:
        next(event for event in stream if isinstance(event, Token))
    return streams


def whole(events: list[Event]) -> Finished:
    finished = events[-1]
    assert isinstance(finished, Finished), finished
    return finished


def assert_dead(client: Client, submission: Submission, *whats: str) -> None:
    with pytest.raises(RequestFailed) as raised:
        submission.result(90)
    assert raised.value.code == "dead_letter"
    losses = client.ledger.run(calls.dead_letter(submission.request_id)).losses
    assert len(losses) == len(whats), losses
    for loss, what in zip(losses, whats, strict=True):
        assert what in loss.what


def test_who_kills_engines_in_its_prefill_dies_alone(new_worker: NewWorker, client: Client) -> None:
    worker = new_worker(program=PROGRAM)
    others = [ask(client, f"A long story, number {number}", LONG) for number in range(3)]
    streams = first_tokens(others)

    submission = poison(client, Poison.CRASH_IN_PREFILL)

    assert_dead(
        client,
        submission,
        "over it (signal 11)",
        "while it ran alone (signal 11)",
        "while it ran alone (signal 11)",
    )
    ends = [whole(list(stream)) for stream in streams]
    assert [finished.attempts for finished in ends] == [2, 2, 2]
    # Word for word what they say when nobody dies.
    assert [each.result(5).text for each in others] == [finished.text for finished in ends]
    assert ask(client, "A long story, number 0", LONG).result(60).text == ends[0].text
    assert worker.end() == 0


def test_who_kills_engines_in_a_decode_is_found_out_too(new_worker: NewWorker, client: Client) -> None:
    new_worker(program=PROGRAM)
    others = [ask(client, f"A long story, number {number}", LONG) for number in range(2)]
    streams = first_tokens(others)

    submission = poison(client, Poison.CRASH_IN_DECODE)

    with pytest.raises(RequestFailed) as raised:
        submission.result(90)
    assert raised.value.code == "dead_letter"
    for stream in streams:
        assert whole(list(stream)).attempts <= 4
    letter = client.ledger.run(calls.dead_letter(submission.request_id))
    assert [loss.what for loss in letter.losses[-3:]] == [
        "the engine died while it ran alone (signal 11)"
    ] * 3
    assert letter.num_tokens > 0


def test_an_exception_in_a_step_is_the_reason_that_is_kept(new_worker: NewWorker, client: Client) -> None:
    new_worker(program=PROGRAM, GLMQ_MAX_ATTEMPTS="2")
    submission = poison(client, Poison.RAISE_IN_PREFILL)
    assert_dead(client, submission, "RuntimeError: CUDA error", "RuntimeError: CUDA error")
    assert ask(client, "and now?", 3).result(60)


def test_an_engine_that_hangs_is_killed_and_everything_goes_on(new_worker: NewWorker, client: Client) -> None:
    worker = new_worker(program=PROGRAM, GLMQ_STALL_SECONDS="1", GLMQ_MAX_ATTEMPTS="2")
    other = ask(client, "A long story", LONG)
    [stream] = first_tokens([other])

    submission = poison(client, Poison.HANG_IN_PREFILL)

    assert_dead(client, submission, "over it (no step ended for", "ran alone (no step ended for")
    assert whole(list(stream)).attempts == 2
    assert "the engine makes no progress" in worker.log


def test_an_engine_that_hangs_while_it_loads_is_killed_and_the_operator_told(new_worker: NewWorker) -> None:
    worker = new_worker(ready=False, program=PROGRAM, GLMQ_LOAD_SECONDS="1", POISONED_LOADING="1")

    assert worker.process.wait(30) == 1
    assert "the model was not loaded after 1 s" in worker.log
    assert "GLMQ_LOAD_SECONDS" in worker.log


def test_two_suspects_of_which_one_is_innocent(new_worker: NewWorker, client: Client) -> None:
    # Both wait for a place, and then are prefilled together.
    new_worker("--slots", "3", program=PROGRAM)
    innocent = ask(client, "I have done nothing", 20)
    submission = poison(client, Poison.CRASH_IN_PREFILL)

    assert whole(list(innocent.stream())).reason == "length"
    with pytest.raises(RequestFailed) as raised:
        submission.result(90)
    assert raised.value.code == "dead_letter"


def test_a_worker_that_drains_while_it_tries_suspects_releases_them(
    new_worker: NewWorker, client: Client
) -> None:
    worker = new_worker("--grace-seconds", "0", program=PROGRAM, GLMQ_STALL_SECONDS="1")
    submission = poison(client, Poison.HANG_IN_PREFILL)
    worker.wait_for_log("tried alone")

    assert worker.end() == 0

    status = submission.status()
    assert status.state == "queued"
    claim = client.ledger.run(calls.claim(client.model, "by-hand", 30))
    assert claim is not None
    assert claim.failures >= 1
