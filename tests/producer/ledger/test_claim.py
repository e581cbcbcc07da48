"""claim.lua on the real server: order, tickets, deadlines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from producer.contract import ChatRequest, Failed, decode_request
from producer.contract.keys import Keys
from producer.ledger import EmitCode, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def test_a_claim_gives_the_request_an_attempt_and_a_lease(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="怎么预防感冒？"))
    before = time.time() * 1000

    claim = worker.claim(lease_seconds=2.0)

    assert claim is not None
    assert (claim.request_id, claim.attempt, claim.emitted_ids, claim.emitted_texts) == (
        request_id,
        1,
        (),
        (),
    )
    assert claim.deadline_seconds is None
    assert 0 <= claim.queue_seconds < 5
    request = decode_request(claim.request)
    assert isinstance(request, ChatRequest)
    assert request.query == "怎么预防感冒？"
    status = ledger.run(calls.status(request_id))
    assert (status.state, status.worker, status.attempt, status.place) == ("running", "worker-1", 1, None)
    lease_end = ledger.connection.zscore(keys.leases, request_id)
    assert abs(lease_end - before - 2000) < 1000
    assert ledger.connection.smembers(keys.running("worker-1")) == {request_id}


def test_the_most_urgent_request_goes_first_and_of_equals_the_oldest(worker: HandWorker) -> None:
    order = [worker.submit(ChatRequest(query="q", priority=priority)) for priority in (5, 9, 0, 5, 0)]
    claims = [worker.claim() for _ in order]
    assert [claim.request_id for claim in claims if claim] == [order[i] for i in (2, 4, 0, 3, 1)]


def test_a_hundred_requests_of_one_millisecond_keep_their_order(worker: HandWorker, ledger: Ledger) -> None:
    pipeline_order = [worker.submit(ChatRequest(query=str(i))) for i in range(100)]
    claimed = []
    while claim := worker.claim():
        claimed.append(claim.request_id)
    assert claimed == pipeline_order


def test_a_ticket_too_many_finds_no_work(worker: HandWorker, other_worker: HandWorker) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    first, doubled, foreign = worker.claim(), worker.claim(), other_worker.claim()
    assert first is not None
    assert (first.request_id, doubled, foreign) == (request_id, None, None)


def test_a_lost_ticket_loses_nothing_because_any_ticket_takes_the_oldest(worker: HandWorker) -> None:
    # Tickets carry no id: the one that arrives serves the request whose ticket was lost, and a look at the queue the other one.
    lost = worker.submit(ChatRequest(query="its ticket is lost"))
    kept = worker.submit(ChatRequest(query="its ticket arrives"))
    first, second = worker.claim(), worker.claim()
    assert first is not None
    assert second is not None
    assert [first.request_id, second.request_id] == [lost, kept]


def test_no_request_is_claimed_twice_by_workers_that_race(worker: HandWorker, ledger: Ledger) -> None:
    submitted = {worker.submit(ChatRequest(query="q")) for _ in range(60)}

    def claim_until_empty(name: str) -> list[str]:
        taken = []
        while claim := ledger.run(calls.claim("chatglm-6b", name, 5.0)):
            taken.append(claim.request_id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [each for those in pool.map(claim_until_empty, "abcd") for each in those]
    assert len(taken) == len(submitted)
    assert set(taken) == submitted


def test_a_request_past_its_deadline_fails_and_the_next_one_is_taken(
    worker: HandWorker, ledger: Ledger
) -> None:
    late = worker.submit(ChatRequest(query="late", priority=0, deadline_seconds=0.01))
    good = worker.submit(ChatRequest(query="good", deadline_seconds=60))
    time.sleep(0.03)

    claim = worker.claim()

    assert claim is not None
    assert claim.request_id == good
    assert claim.deadline_seconds is not None
    assert 55 < claim.deadline_seconds <= 60
    [followed] = ledger.run(calls.follow("", [(late, "0-0")]))
    assert followed is not None
    [event] = calls.events(followed.entries)
    assert isinstance(event, Failed)
    assert event.code == "deadline_exceeded"
    assert ledger.run(calls.status(late)).state == "failed"
    assert ledger.run(calls.status(late)).attempt == 0


def test_a_crowd_past_its_deadline_is_cleared_away_in_one_claim(worker: HandWorker, ledger: Ledger) -> None:
    late = [worker.submit(ChatRequest(query="late", deadline_seconds=0.001)) for _ in range(250)]
    good = worker.submit(ChatRequest(query="good"))
    time.sleep(0.01)
    claim = worker.claim()
    assert claim is not None
    assert claim.request_id == good
    assert {ledger.run(calls.status(each)).state for each in late} == {"failed"}


def test_a_claim_after_a_release_brings_what_was_emitted(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    first = worker.claim()
    assert first is not None
    worker.start(first)
    worker.emit(first, 2, "多", "喝")
    worker.emit(first, 3, "")
    ledger.run(calls.release(request_id, first.attempt))

    second = other_worker.claim()

    assert second is not None
    assert (second.request_id, second.attempt) == (request_id, 2)
    assert second.emitted_ids == (101, 102, 103)
    assert second.emitted_texts == ("多", "喝", "")
    assert other_worker.start(second) is EmitCode.WRITTEN
    assert other_worker.emit(second, 4, "水") is EmitCode.WRITTEN


def test_the_waiting_time_is_that_before_the_first_claim(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    time.sleep(0.02)
    first = worker.claim()
    assert first is not None
    time.sleep(0.1)
    ledger.run(calls.release(request_id, 1))
    second = other_worker.claim()
    assert second is not None
    assert 0.015 <= first.queue_seconds < 0.1
    assert second.queue_seconds == first.queue_seconds


def test_a_worker_takes_only_its_model_s_requests(ledger: Ledger) -> None:
    ledger.run(calls.submit(ChatRequest(query="q", model="other"), model="m"))
    assert ledger.run(calls.claim("m", "w", 5.0)) is None
    assert ledger.run(calls.claim("other", "w", 5.0)) is not None
