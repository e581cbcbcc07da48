"""reap.lua on the real server: what a silent worker had goes back to the queue, and nothing else does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from producer.contract import ChatRequest
from producer.contract.keys import Keys
from producer.ledger import Claim, EmitCode, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def test_a_request_whose_lease_has_run_out_is_taken_over_where_it_stood(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    dead = worker.claim(lease_seconds=0.02)
    assert dead is not None
    worker.start(dead)
    worker.emit(dead, 2, "a", "b")
    time.sleep(0.03)

    assert ledger.run(calls.reap()) == [request_id]
    assert ledger.run(calls.reap()) == []
    assert ledger.connection.smembers(keys.running(worker.name)) == set()
    claim = other_worker.claim()
    assert claim is not None
    assert (claim.request_id, claim.attempt, claim.emitted_texts) == (request_id, 2, ("a", "b"))
    assert worker.emit(dead, 3, "x") is EmitCode.FENCED
    assert ledger.run(calls.renew(worker.name, [(request_id, 1)], 5.0)).lost == [request_id]


def test_live_leases_are_left_alone(worker: HandWorker, ledger: Ledger) -> None:
    worker.submit(ChatRequest(query="q"))
    assert worker.claim() is not None
    assert ledger.run(calls.reap()) == []
    assert ledger.run(calls.overview("chatglm-6b")).num_queued == 0


def test_it_goes_back_to_its_old_place(worker: HandWorker, ledger: Ledger) -> None:
    first = worker.submit(ChatRequest(query="q"))
    worker.claim(lease_seconds=0.01)
    worker.submit(ChatRequest(query="q"))
    time.sleep(0.02)
    ledger.run(calls.reap())
    claim = worker.claim()
    assert claim is not None
    assert claim.request_id == first


def test_one_that_was_to_be_cancelled_ends_with_what_it_had(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    claim = worker.claim(lease_seconds=0.02)
    assert claim is not None
    worker.start(claim)
    worker.emit(claim, 1, "so far")
    ledger.run(calls.cancel(request_id))
    time.sleep(0.03)
    ledger.run(calls.reap())

    [followed] = ledger.run(calls.follow("", [(request_id, "0")]))
    assert followed is not None
    assert followed.state == "cancelled"
    assert calls.events(followed.entries)[-1].text == "so far"  # type: ignore[union-attr]


def test_a_call_reaps_a_bounded_number(worker: HandWorker, ledger: Ledger) -> None:
    for _ in range(5):
        worker.submit(ChatRequest(query="q"))
        worker.claim(lease_seconds=0.01)
    time.sleep(0.02)
    assert [len(ledger.run(calls.reap(2))) for _ in range(4)] == [2, 2, 1, 0]


def test_a_lease_of_a_request_that_is_gone_is_cleared_away(ledger: Ledger, keys: Keys) -> None:
    ledger.connection.zadd(keys.leases, {"nobody": 1})
    ledger.run(calls.reap())
    assert ledger.connection.zcard(keys.leases) == 0


def hold(worker: HandWorker, ledger: Ledger) -> Claim:
    """A request whose lease is long, by a worker that has said that it lives."""
    worker.submit(ChatRequest(query="q"))
    claim = worker.claim(lease_seconds=60)
    assert claim is not None
    ledger.run(calls.renew(worker.name, [(claim.request_id, claim.attempt)], 60))
    return claim


def test_a_worker_that_is_silent_and_has_no_connection_any_more_loses_its_requests_before_its_lease_ends(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger
) -> None:
    claim = hold(worker, ledger)
    time.sleep(0.03)

    assert ledger.run(calls.reap(silent_seconds=10)) == []
    assert ledger.run(calls.reap()) == []
    assert ledger.run(calls.reap(silent_seconds=0.01)) == [claim.request_id]

    taken_over = other_worker.claim(lease_seconds=60)
    assert taken_over is not None
    assert taken_over.request_id == claim.request_id


def test_a_silent_worker_that_still_has_its_connection_keeps_its_requests_until_their_lease_ends(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    claim = hold(worker, ledger)
    with ledger.connection.pubsub() as channel:
        channel.subscribe(keys.control(worker.name))
        assert channel.get_message(timeout=5) is not None
        time.sleep(0.03)

        assert ledger.run(calls.reap(silent_seconds=0.01)) == []

    deadline = time.monotonic() + 5
    while not (reaped := ledger.run(calls.reap(silent_seconds=0.01))):
        assert time.monotonic() < deadline, "the server has not noticed that the connection is closed"
        time.sleep(0.01)
    assert reaped == [claim.request_id]
