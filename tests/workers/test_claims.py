"""Tickets, their absence and their doubles: the ledger decides what is done, and each request is done once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from producer.contract import ChatRequest, Failed, RedisUnavailable, SamplingParams, Started, Token
from producer.contract.tenants import QueueBounds
from producer.ledger import Call, Claim, Emission, calls
from producer.settings import Settings
from tests.workers.conftest import Letters, wait_for
from workers.engine.client import EngineDied
from workers.engine.messages import Generate
from workers.pool import Ticket
from workers.prompts import Prompts

NewBench = Callable[..., Any]
T = TypeVar("T")


def settle() -> None:
    """Long enough for anything that would happen by mistake."""
    time.sleep(0.3)


def test_a_ticket_brings_the_prompt_to_the_engine_and_holds_its_slot_until_the_end(
    new_bench: NewBench,
) -> None:
    # Its own look must not come before the ticket: then the ticket would find nothing, and be completed.
    bench = new_bench(look_seconds=60)
    settle()
    request_id = bench.submit("hello")
    ticket = bench.ticket()
    bench.claims.take(ticket)

    generation = bench.generation(request_id)
    assert generation.prompt_ids == [*map(ord, "hello")]
    settle()
    assert bench.completed == []

    bench.say(generation.sequence_id, "hi", "stop")
    bench.ended(request_id)
    while not bench.completed:
        time.sleep(0.01)


def test_a_lost_ticket_costs_about_a_look(bench: Any) -> None:
    settle()
    begin = time.monotonic()

    bench.generation(bench.submit())

    assert time.monotonic() - begin < 1


def test_work_that_is_told_of_while_a_claim_finds_nothing_is_claimed_at_once(new_bench: NewBench) -> None:
    bench = new_bench(start=False, look_seconds=60)
    run = bench.ledger.run
    submitted: list[str] = []

    def slow(call: Call[T]) -> T:
        answer = run(call)
        if call.script == "claim" and not submitted:
            # Before the worker has read that there is nothing.
            submitted.append(bench.submit())
            bench.claims.look()
        return answer

    bench.ledger.run = slow
    bench.start()

    wait_for(lambda: submitted)
    bench.generation(submitted[0])


def test_a_ticket_that_comes_twice_changes_nothing(new_bench: NewBench) -> None:
    bench = new_bench(look_seconds=60)
    settle()
    request_id = bench.submit()
    tickets = [bench.ticket(), bench.ticket()]
    for ticket in tickets:
        bench.claims.take(ticket)

    generation = bench.generation(request_id)
    while len(bench.completed) < 1:
        time.sleep(0.01)
    assert len(bench.generated) == 1
    bench.say(generation.sequence_id, "hi", "stop")

    assert [event.attempt for event in bench.ended(request_id) if isinstance(event, Started)] == [1]
    while len(bench.completed) < 2:
        time.sleep(0.01)


def test_one_ticket_after_a_lost_one_brings_both_requests_in(new_bench: NewBench) -> None:
    bench = new_bench(look_seconds=0.5)
    ids = [bench.submit(), bench.submit()]

    bench.claims.take(bench.ticket())

    for request_id in ids:
        bench.generation(request_id)


def test_no_more_requests_run_than_there_are_slots(new_bench: NewBench) -> None:
    bench = new_bench(slots=2)
    ids = [bench.submit() for _ in range(3)]
    first = bench.generation(ids[0])
    bench.generation(ids[1])
    settle()
    assert len(bench.generated) == 2

    bench.say(first.sequence_id, "x", "stop")
    bench.generation(ids[2])

    bench.claims.resize(4)
    bench.generation(bench.submit())


def test_a_plain_task_is_in_the_ledger_before_its_message_is_acknowledged(new_bench: NewBench) -> None:
    bench = new_bench(slots=1)
    bench.generation(bench.submit("takes the slot"))

    bench.claims.take(bench.ticket("glmq.chat", "plain-1", query="hello", priority=2))

    while True:
        try:
            status = bench.ledger.run(calls.status("plain-1"))
            break
        except LookupError:
            time.sleep(0.01)
    assert (status.state, status.priority) == ("queued", 2)
    assert bench.accepted == []


def test_a_plain_task_that_comes_twice_is_answered_once(bench: Any) -> None:
    for _ in range(2):
        bench.claims.take(bench.ticket("glmq.chat", "plain-1", query="hello"))

    generation = bench.generation("plain-1")
    bench.say(generation.sequence_id, "hi", "stop")

    bench.ended("plain-1")
    while len(bench.completed) < 2:
        time.sleep(0.01)
    settle()
    assert len(bench.generated) == 1
    assert bench.ended("plain-1")[-1].text == "hi"


def test_a_plain_summary_is_answered_within_its_length(bench: Any) -> None:
    bench.claims.take(bench.ticket("glmq.summarize", "plain-2", text="A text.", style="title", max_length=8))

    generation = bench.generation("plain-2")

    assert "".join(map(chr, generation.prompt_ids)) == "Write a title for the following text:\nA text."
    assert generation.sampling.max_new_tokens == 8


def test_a_plain_task_with_wrong_arguments_fails_in_its_own_stream(bench: Any) -> None:
    bench.claims.take(bench.ticket("glmq.chat", "plain-3", query="hello", priority=11))

    (failed,) = bench.ended("plain-3")
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_request"
    assert failed.message.startswith("priority: ")
    while len(bench.completed) < 1:
        time.sleep(0.01)
    bench.generation(bench.submit("the next one"))


def test_a_plain_task_for_which_there_is_no_room_fails_in_its_own_stream(
    new_bench: NewBench, settings: Settings
) -> None:
    bench = new_bench(start=False, queue=replace(settings, bounds=QueueBounds(max_queued=1)))
    # Without an engine it registers what comes, and claims nothing.
    bench.claims.start()
    bench.submit("the one that may wait")

    bench.claims.take(bench.ticket("glmq.chat", "plain-5", query="hello"))

    (failed,) = bench.ended("plain-5")
    assert failed.code == "queue_full"
    assert "Submit the same request again in" in failed.message


def test_a_plain_task_whose_id_cannot_be_a_request_id_is_dropped(bench: Any) -> None:
    bench.claims.take(bench.ticket("glmq.chat", "no id\tat all", query="hello"))

    while len(bench.completed) < 1:
        time.sleep(0.01)
    bench.generation(bench.submit("the next one"))


def test_a_prompt_that_does_not_fit_fails_and_frees_its_slot(bench: Any) -> None:
    request_id = bench.submit("x" * 2000)
    bench.claims.take(bench.ticket())

    (failed,) = bench.ended(request_id)

    assert failed.code == "context_exceeded"
    while not bench.completed:
        time.sleep(0.01)
    assert bench.generated == []


def test_a_request_of_a_later_contract_fails_by_name(bench: Any) -> None:
    bench.claims.drain()
    call = calls.submit(ChatRequest(query="x"), model="chatglm-6b")
    later = [
        argument.replace('"version":1', '"version":2') if isinstance(argument, str) else argument
        for argument in call.args
    ]
    request_id = bench.ledger.run(Call("submit", later, call.parse)).request_id
    bench.claims._is_draining = False
    bench.claims.on_free_slot()

    (failed,) = bench.ended(request_id)

    assert failed.code == "invalid_request"
    assert failed.message.startswith("version: ")


def emit_as_a_dead_worker(bench: Any, request_id: str, text: str, ids: tuple[int, ...]) -> None:
    """An attempt that said this much and then gave up."""
    claim = bench.ledger.run(calls.claim("chatglm-6b", "dead", 60))
    assert claim.request_id == request_id
    token = Token(index=len(ids), ids=ids, texts=(*text, *[""] * (len(ids) - len(text))))
    started = Started(attempt=1, worker="dead", prompt_tokens=5)
    bench.ledger.run(calls.emit([Emission(request_id, 1, started), Emission(request_id, 1, token)]))
    bench.ledger.run(calls.release(request_id, 1))


@pytest.mark.parametrize(
    ("ids", "sampling", "reason", "text"),
    [
        ((*map(ord, "ab"), 0), {}, "stop", "ab"),
        ((*map(ord, "ab"),), {"max_new_tokens": 2}, "length", "ab"),
        ((*map(ord, "ab."),), {"stop": (".",)}, "stop", "ab"),
    ],
)
def test_an_answer_that_was_complete_when_its_worker_died_is_only_finished(
    new_bench: NewBench, ids: tuple[int, ...], sampling: dict[str, Any], reason: str, text: str
) -> None:
    bench = new_bench(start=False)
    request_id = bench.submit("hello", sampling=sampling)
    emit_as_a_dead_worker(bench, request_id, text, ids)

    bench.start()

    finished = bench.ended(request_id)[-1]
    assert (finished.reason, finished.text, finished.attempts) == (reason, text, 2)
    assert finished.usage.completion_tokens == len(ids)
    assert bench.generated == []


def test_an_answer_goes_on_after_the_tokens_that_a_dead_worker_emitted(new_bench: NewBench) -> None:
    bench = new_bench(start=False)
    request_id = bench.submit("hello")
    emit_as_a_dead_worker(bench, request_id, "a", (*map(ord, "a "),))

    bench.start()
    generation = bench.generation(request_id)
    bench.say(generation.sequence_id, "b", "stop")

    assert generation.emitted_ids == [*map(ord, "a ")]
    # The space that the dead worker held back comes now, once.
    assert bench.ended(request_id)[-1].text == "a b"


def test_a_claim_whose_answer_was_lost_is_made_again(new_bench: NewBench) -> None:
    bench = new_bench(start=False)
    request_id = bench.submit()
    run, lost = bench.ledger.run, []

    def losing_the_first_claim(call: Call[T]) -> T:
        answer = run(call)
        if call.script == "claim" and not lost:
            lost.append(answer)
            raise RedisUnavailable("somewhere", "reply lost")
        return answer

    bench.ledger.run = losing_the_first_claim
    bench.start()

    bench.generation(request_id)
    assert lost[0].attempt == 1
    assert bench.running.get(request_id).attempt == 2


def test_a_request_that_meets_a_dead_engine_is_released(new_bench: NewBench) -> None:
    bench = new_bench(start=False)
    asked: list[Generate] = []

    def dead_once(generate: Generate) -> None:
        asked.append(generate)
        if len(asked) == 1:
            raise EngineDied(-9, None)
        bench.generated.append(generate)

    bench.claims._generate = dead_once
    bench.start()
    request_id = bench.submit()

    while not bench.generated:
        time.sleep(0.01)
    bench.say(bench.generated[0].sequence_id, "x", "stop")

    assert bench.ended(request_id)[-1].attempts == 2


def test_nothing_is_claimed_while_there_is_no_engine(bench: Any) -> None:
    bench.claims.close()
    settle()
    request_id = bench.submit()
    bench.claims.take(bench.ticket())
    settle()

    assert bench.ledger.run(calls.status(request_id)).state == "queued"


def test_nothing_is_claimed_in_a_drain_and_tickets_stay_unacknowledged(bench: Any) -> None:
    bench.claims.drain()
    settle()
    request_id = bench.submit()
    bench.claims.take(bench.ticket())
    bench.claims.take(bench.ticket("glmq.chat", "plain", query="x"))
    settle()

    assert bench.ledger.run(calls.status(request_id)).state == "queued"
    assert bench.accepted == []


def test_the_most_urgent_request_is_claimed_first(new_bench: NewBench) -> None:
    bench = new_bench(start=False, slots=1)
    patient = bench.submit(priority=9)
    urgent = bench.submit(priority=0)

    bench.start()

    bench.generation(urgent)
    assert bench.running.get(patient) is None


def test_a_request_keeps_its_seed_and_sampling_on_the_way_to_the_engine(bench: Any) -> None:
    sampling = SamplingParams(seed=42, temperature=0.5, top_k=3, logit_bias={7: 1.5}, min_new_tokens=2)
    request_id = bench.ledger.run(
        calls.submit(ChatRequest(query="x", sampling=sampling), model="chatglm-6b")
    ).request_id

    sent = bench.generation(request_id).sampling

    assert (sent.seed, sent.temperature, sent.top_k) == (42, 0.5, 3)
    assert (sent.logit_bias, sent.min_new_tokens, sent.max_new_tokens) == ({7: 1.5}, 2, 999)


def test_a_crowd_is_claimed_in_few_round_trips_and_its_tickets_are_all_used_up(new_bench: NewBench) -> None:
    bench = new_bench(start=False, slots=400, look_seconds=5)
    ids = [bench.submit() for _ in range(120)]
    tickets = [bench.ticket() for _ in range(150)]
    sizes: list[int] = []
    run_many = bench.ledger.run_many

    def counting(wanted: Sequence[Call[T]]) -> list[T]:
        sizes.append(len(wanted))
        return run_many(wanted)

    bench.ledger.run_many = counting
    for ticket in tickets:
        bench.claims.take(ticket)
    bench.start()
    for request_id in ids:
        bench.generation(request_id)

    assert len(sizes) < 12
    assert max(sizes) <= 32
    # 30 tickets told of nothing.
    while len(bench.completed) < 30:
        time.sleep(0.01)
    assert len(bench.accepted) == 150


def test_what_was_claimed_together_with_a_request_that_meets_an_outage_is_not_lost(
    new_bench: NewBench,
) -> None:
    bench = new_bench(start=False, slots=400)
    ids = [bench.submit() for _ in range(16)]
    begin, failed = bench.claims._begin, []

    def failing_once(claim: Claim, ticket: Ticket | None) -> None:
        if claim.request_id == ids[2] and not failed:
            failed.append(claim)
            raise RedisUnavailable("somewhere", "away for a moment")
        begin(claim, ticket)

    bench.claims._begin = failing_once
    for _ in ids:
        bench.claims.take(bench.ticket())
    bench.start()

    for request_id in ids:
        bench.generation(request_id)


def test_an_adapter_that_only_the_first_worker_had_is_waited_for_and_then_refused(
    new_bench: NewBench,
) -> None:
    bench = new_bench(max_attempts=3, start=False)
    request_id = bench.submit(adapter="fitness")
    first = bench.ledger.run(calls.claim("chatglm-6b", "another", 5))
    assert first is not None
    begin = time.monotonic()
    bench.start()
    bench.ledger.run(calls.release(request_id, first.attempt))

    assert bench.ended(request_id)[-1].code == "unknown_adapter"

    # Twice back to the queue, for half a second each; the third time it is enough.
    assert time.monotonic() - begin > 1
    status = bench.ledger.run(calls.status(request_id))
    assert (status.state, status.attempt) == ("failed", 4)


def test_another_worker_that_has_the_adapter_gets_the_request(new_bench: NewBench) -> None:
    without, knowing = new_bench(start=False), new_bench(start=False)
    request_id = without.submit(adapter="fitness")
    first = without.ledger.run(calls.claim("chatglm-6b", "another", 5))
    assert first is not None
    without.ledger.run(calls.release(request_id, first.attempt))
    without.start()
    while without.running.get(request_id) is None:
        time.sleep(0.005)
    knowing.start()
    knowing.claims.open(Prompts(Letters(), 1000, {"fitness"}))

    assert knowing.generation(request_id).adapter == "fitness"


def test_an_adapter_that_nobody_has_fails_a_new_request_at_once(bench: Any) -> None:
    request_id = bench.submit(adapter="fitness")
    assert bench.ended(request_id)[-1].code == "unknown_adapter"
    assert bench.ledger.run(calls.status(request_id)).attempt == 1
