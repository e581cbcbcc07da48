"""What submit.lua refuses for want of room or time, and what it says of when to come back."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from producer.contract import (
    ChatRequest,
    DeadlineUnmeetable,
    Finished,
    FoldRequest,
    IdempotencyConflict,
    QueueFull,
    SamplingParams,
    SummaryRequest,
)
from producer.contract.keys import Keys
from producer.contract.tenants import QueueBounds
from producer.ledger import Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

MODEL = "chatglm-6b"
FIVE = QueueBounds(max_queued=5)


def submit(
    ledger: Ledger, query: str = "q", bounds: QueueBounds = FIVE, key: str | None = None, **fields: Any
) -> str:
    request = ChatRequest(query=query, **fields)
    return ledger.run(calls.submit(request, model=MODEL, bounds=bounds, idempotency_key=key)).request_id


def fill(ledger: Ledger, number: int, bounds: QueueBounds = FIVE, **fields: Any) -> list[str]:
    return [submit(ledger, f"fill {number}", bounds, **fields) for number in range(number)]


def answer_one(worker: HandWorker) -> None:
    claim = worker.claim()
    assert claim is not None
    assert worker.ledger.run(calls.finish(claim.request_id, claim.attempt, Finished(reason="stop", text="")))


def measure(worker: HandWorker, number: int, seconds: float) -> None:
    """Answer so many requests, one after the other, so many seconds each: the ledger learns how fast the queue drains."""
    for _ in range(number):
        time.sleep(seconds)
        answer_one(worker)


def contents(ledger: Ledger, keys: Keys) -> dict[str, object]:
    """What a submission that is accepted changes."""
    connection: Any = ledger.connection
    names = sorted(
        key
        for key in connection.scan_iter(f"{keys.prefix}*")
        if not key.startswith((f"{keys.prefix}rejected", f"{keys.prefix}promised", f"{keys.prefix}expected"))
    )
    return {key: connection.dump(key) for key in names}


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_keeps_nothing_of_what_it_refused(ledger: Ledger, keys: Keys) -> None:
    fill(ledger, 5)
    before = contents(ledger, keys)

    with pytest.raises(
        QueueFull, match=r"queue of 'chatglm-6b' is full \(5 requests\)\. Submit .* again in"
    ) as caught:
        submit(ledger, "too many", key="k", conversation_id="c")

    assert contents(ledger, keys) == before
    assert caught.value.tenant is None
    assert 0 < caught.value.retry_after <= 60
    assert ledger.run(calls.backlog(MODEL)).rejected == {"queue_full": 1}


def test_a_refused_submission_does_not_use_up_its_key(worker: HandWorker, ledger: Ledger) -> None:
    fill(ledger, 5)
    with pytest.raises(QueueFull):
        submit(ledger, "later", key="k")
    answer_one(worker)
    accepted = submit(ledger, "later", key="k")
    assert submit(ledger, "later", key="k") == accepted


def test_what_is_known_is_answered_although_the_queue_is_full(ledger: Ledger) -> None:
    [first, *_] = fill(ledger, 1, key="k")
    fill(ledger, 4)
    assert submit(ledger, "fill 0", key="k") == first
    with pytest.raises(IdempotencyConflict):
        submit(ledger, "other", key="k")


def test_the_tokens_in_the_queue_are_bounded_too(ledger: Ledger) -> None:
    bounds = QueueBounds(max_queued_tokens=2000)
    for _ in range(4):
        submit(ledger, "字" * 300, bounds, sampling=SamplingParams(max_new_tokens=200))
    submit(ledger, "short", bounds, sampling=SamplingParams(max_new_tokens=10))
    with pytest.raises(QueueFull, match=r"2000 tokens"):
        submit(ledger, "字" * 300, bounds, sampling=SamplingParams(max_new_tokens=200))


def test_a_request_that_is_larger_than_the_whole_bound_may_be_alone_in_the_queue(ledger: Ledger) -> None:
    bounds = QueueBounds(max_queued_tokens=100)
    request = SummaryRequest(text="A long text. " * 1000)
    ledger.run(calls.submit(request, model=MODEL, bounds=bounds))
    with pytest.raises(QueueFull):
        ledger.run(calls.submit(request, model=MODEL, bounds=bounds))


def test_one_tenant_cannot_fill_the_queue_for_the_others(ledger: Ledger) -> None:
    bounds = QueueBounds(max_queued=10, tenant_max_queued=4)
    fill(ledger, 4, bounds, tenant="flood")
    with pytest.raises(QueueFull, match=r"the part of tenant 'flood' in .* `glmq tenants set`") as caught:
        submit(ledger, "one more", bounds, tenant="flood")
    assert caught.value.tenant == "flood"
    submit(ledger, "mine", bounds, tenant="quiet")
    assert ledger.run(calls.backlog(MODEL)).rejected == {"tenant_queue_full": 1}


def test_a_bound_of_a_tenant_s_own_goes_before_the_default(ledger: Ledger) -> None:
    bounds = QueueBounds(tenant_max_queued=2)
    ledger.run(calls.set_tenant("large", '{"max_queued": 3}', []))
    fill(ledger, 3, bounds, tenant="large")
    with pytest.raises(QueueFull):
        submit(ledger, "fourth", bounds, tenant="large")


def test_no_bound_is_zero(ledger: Ledger) -> None:
    none = QueueBounds(0, 0, 0, 0)
    for _ in range(30):
        submit(ledger, "字" * 1000, none)


def test_what_belongs_to_something_accepted_is_not_refused(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(SummaryRequest(text="Long. " * 2000))
    document = worker.claim()
    assert document is not None
    talk = worker.submit(ChatRequest(query="q", conversation_id="c"))
    claim = worker.claim()
    assert claim is not None
    assert claim.request_id == talk
    worker.answer(claim, "a")
    fill(ledger, 5)

    pieces = [SummaryRequest(text="piece", max_length=32)] * 7
    split = ledger.run(calls.split(request_id, document.attempt, level=1, priority=6, pieces=pieces))
    assert split.outcome == "waiting"
    fold = FoldRequest(conversation_id="c", first=0, priority=8)
    assert ledger.run(calls.fold(fold, request_id="f", model=MODEL))
    with pytest.raises(QueueFull):
        submit(ledger, "one more")


# --- when to come back --------------------------------------------------------------------------------------------------


def test_the_time_to_come_back_follows_the_speed_at_which_the_queue_drains(
    worker: HandWorker, ledger: Ledger
) -> None:
    fill(ledger, 20, QueueBounds(0, 0, 0, 0))
    measure(worker, 15, 0.1)

    with pytest.raises(QueueFull) as caught:
        submit(ledger, "too many")
    # Five wait, and the first of them leaves in about a tenth of a second.
    first = caught.value.retry_after
    assert 0.05 <= first < 0.3


def test_a_herd_is_told_successive_times_and_each_is_let_in_at_its_own(
    worker: HandWorker, ledger: Ledger
) -> None:
    fill(ledger, 20, QueueBounds(0, 0, 0, 0))
    measure(worker, 15, 0.1)
    told = []
    for number in range(40):
        with pytest.raises(QueueFull) as caught:
            submit(ledger, f"herd {number}")
        told.append(caught.value.retry_after)
    gaps = [later - earlier for earlier, later in itertools.pairwise(told)]
    assert min(gaps) > 0
    assert statistics.median(gaps) == pytest.approx(0.1, rel=0.5)
    assert 2 < told[-1] < 8

    # Who knocks before its time keeps its place.
    with pytest.raises(QueueFull) as caught:
        submit(ledger, "herd 39")
    assert caught.value.retry_after == pytest.approx(told[-1], abs=0.3)


def test_room_is_kept_for_those_who_come_back_in_time(worker: HandWorker, ledger: Ledger) -> None:
    bounds = QueueBounds(max_queued=20)
    fill(ledger, 30, QueueBounds(0, 0, 0, 0))
    measure(worker, 10, 0.03)
    with pytest.raises(QueueFull) as caught:
        submit(ledger, "promised", bounds)
    time.sleep(caught.value.retry_after)
    answer_one(worker)

    # A place is free, and it is promised: a newcomer has none, and whoever was told to come has.
    with pytest.raises(QueueFull):
        submit(ledger, "newcomer", bounds)
    submit(ledger, "promised", bounds)


def test_a_promise_of_which_nobody_makes_use_does_not_keep_others_out(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    bounds = QueueBounds(max_queued=20)
    fill(ledger, 20, bounds)
    with pytest.raises(QueueFull):
        submit(ledger, "gone for good", bounds)
    for _ in range(3):
        answer_one(worker)
    submit(ledger, "newcomer", bounds)
    # And the kept room, once the promise is over: as if its time had been a while ago.
    [name] = ledger.connection.zrange(keys.expected(MODEL), 0, -1)  # type: ignore[misc]
    ledger.connection.zadd(keys.expected(MODEL), {name: 1})
    submit(ledger, "another", bounds)
    submit(ledger, "the last", bounds)


def test_a_queue_that_nobody_drains_asks_for_more_and_more_patience(ledger: Ledger, keys: Keys) -> None:
    fill(ledger, 5)
    with pytest.raises(QueueFull) as early:
        submit(ledger, "a")
    # As if it had been full for a minute.
    since = int(ledger.connection.hget(keys.load(MODEL), "drained_at") or 0)
    ledger.connection.hset(keys.load(MODEL), "drained_at", str(since - 60_000))
    with pytest.raises(QueueFull) as late:
        submit(ledger, "b")
    assert 1 <= early.value.retry_after <= 2
    assert 30 <= late.value.retry_after <= 60


# --- deadlines ----------------------------------------------------------------------------------------------------------


def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    fill(ledger, 60, QueueBounds(0, 0, 0, 0))
    measure(worker, 20, 0.1)
    before = contents(ledger, keys)

    # Forty wait, a tenth of a second each.
    with pytest.raises(
        DeadlineUnmeetable, match=r"deadline_seconds: 1 s are not enough: .* wait \d+\.\d s"
    ) as caught:
        submit(ledger, "too late", QueueBounds(), deadline_seconds=1)
    assert contents(ledger, keys) == before
    assert 3 < caught.value.wait_seconds < 8
    assert caught.value.retry_after == pytest.approx(caught.value.wait_seconds - 1, abs=0.2)
    with pytest.raises(DeadlineUnmeetable) as second:
        submit(ledger, "too late as well", QueueBounds(), deadline_seconds=1)
    assert second.value.retry_after >= caught.value.retry_after
    assert ledger.run(calls.backlog(MODEL)).rejected == {"deadline_unmeetable": 2}
    submit(ledger, "patient", QueueBounds(), deadline_seconds=60)
    # What is more urgent does not wait for the others, and another tenant's turn comes soon.
    submit(ledger, "urgent", QueueBounds(), deadline_seconds=1, priority=0)
    submit(ledger, "another's", QueueBounds(), deadline_seconds=1, tenant="other")


def test_before_anything_was_measured_no_deadline_is_refused(ledger: Ledger) -> None:
    fill(ledger, 50, QueueBounds())
    submit(ledger, "q", QueueBounds(), deadline_seconds=0.01)
