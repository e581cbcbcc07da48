"""What those who watch a deployment are told about its queue."""

from __future__ import annotations

import time

import pytest

from producer.contract import ChatRequest, IdempotencyConflict
from producer.ledger import Ledger, calls

MODEL = "chatglm-6b"


def submit(ledger: Ledger, query: str = "hello", **fields: object) -> str:
    return ledger.run(calls.submit(ChatRequest(query=query, **fields), model=MODEL)).request_id  # type: ignore[arg-type]


def test_an_empty_deployment_has_no_backlog(ledger: Ledger) -> None:
    backlog = ledger.run(calls.backlog(MODEL))

    assert backlog.num_queued == (0,) * 10
    assert backlog.oldest_seconds == (0,) * 10
    assert (backlog.num_running, backlog.num_overdue, backlog.rejected) == (0, 0, {})
    assert backlog.memory_used_bytes > 0


def test_queued_requests_are_counted_by_priority_and_model(ledger: Ledger) -> None:
    for priority in (0, 5, 5, 9):
        submit(ledger, priority=priority)
    submit(ledger, model="another")

    assert ledger.run(calls.backlog(MODEL)).num_queued == (1, 0, 0, 0, 0, 2, 0, 0, 0, 1)
    assert sum(ledger.run(calls.backlog("another")).num_queued) == 1


def test_the_oldest_of_each_priority_is_known(ledger: Ledger) -> None:
    submit(ledger, priority=9)
    time.sleep(0.3)
    submit(ledger, priority=9)
    submit(ledger, priority=0)

    oldest = ledger.run(calls.backlog(MODEL)).oldest_seconds
    assert 0.3 <= oldest[9] < 5
    assert oldest[0] < oldest[9]
    assert oldest[1:9] == (0,) * 8


def test_a_request_that_expired_in_the_queue_is_counted(ledger: Ledger) -> None:
    submit(ledger, deadline_seconds=0.01)
    time.sleep(0.05)
    assert ledger.run(calls.claim(MODEL, "w", lease_seconds=60)) is None

    assert ledger.run(calls.backlog(MODEL)).rejected == {"deadline_exceeded": 1}


def test_a_running_request_is_overdue_once_its_lease_has_ended(ledger: Ledger) -> None:
    submit(ledger)
    submit(ledger)
    ledger.run(calls.claim(MODEL, "w", lease_seconds=0.05))
    ledger.run(calls.claim(MODEL, "w", lease_seconds=60))
    time.sleep(0.1)

    backlog = ledger.run(calls.backlog(MODEL))
    assert (sum(backlog.num_queued), backlog.num_running, backlog.num_overdue) == (0, 2, 1)


def test_submissions_that_were_refused_are_counted_by_reason(ledger: Ledger) -> None:
    ledger.run(calls.submit(ChatRequest(query="a"), model=MODEL, idempotency_key="k"))
    for _ in range(2):
        with pytest.raises(IdempotencyConflict):
            ledger.run(calls.submit(ChatRequest(query="b"), model=MODEL, idempotency_key="k"))
    ledger.run(calls.submit(ChatRequest(query="a"), model=MODEL, idempotency_key="k"))

    assert ledger.run(calls.backlog(MODEL)).rejected == {"idempotency_conflict": 2}


def test_looking_changes_nothing_and_costs_little(ledger: Ledger) -> None:
    for _ in range(300):
        submit(ledger)
    before = ledger.run(calls.overview(MODEL)).num_queued

    begin = time.perf_counter()
    for _ in range(20):
        ledger.run(calls.backlog(MODEL))
    assert (time.perf_counter() - begin) / 20 < 0.02
    assert ledger.run(calls.overview(MODEL)).num_queued == before == 300
