"""follow.lua and unfollow.lua on the real server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from producer.contract import ChatRequest, Failed, Finished, decode_event
from producer.contract.keys import Keys
from producer.ledger import Ledger, calls
from producer.streams import parse_push

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def readers(ledger: Ledger, keys: Keys, request_id: str) -> object:
    return ledger.connection.hget(keys.request(request_id), "readers")


def test_a_reader_gets_what_it_has_not_read_and_is_registered_once(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    worker.emit(claim, 1, "a")
    worker.emit(claim, 2, "b")

    for after, expected in [("0-0", ["0-1", "1-0", "2-0"]), ("1-0", ["2-0"]), ("2-0", [])]:
        [followed, unknown] = ledger.run(calls.follow("r1", [(request_id, after), ("unknown", "0-0")]))
        assert followed is not None
        assert unknown is None
        assert (followed.state, followed.last_id) == ("running", "2-0")
        assert [entry.id for entry in followed.entries] == expected
    assert readers(ledger, keys, request_id) == "r1"


def test_readers_come_and_go_by_themselves(worker: HandWorker, ledger: Ledger, keys: Keys) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    # One name is the beginning of another.
    for reader in ("r", "r1", "r12"):
        ledger.run(calls.follow(reader, [(request_id, "0-0")]))
    assert readers(ledger, keys, request_id) == "r,r1,r12"
    assert ledger.run(calls.unfollow("r1", request_id)) is True
    assert ledger.run(calls.unfollow("r1", request_id)) is False
    assert readers(ledger, keys, request_id) == "r,r12"
    assert ledger.run(calls.unfollow("r1", "unknown")) is False


def test_looking_leaves_no_reader_and_an_ended_request_takes_none(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    ledger.run(calls.follow("", [(request_id, "0-0")]))
    assert readers(ledger, keys, request_id) is None
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "a")
    ledger.run(calls.follow("r", [(request_id, "0-0")]))
    assert readers(ledger, keys, request_id) is None


def finish(worker: HandWorker, request_id: str) -> None:
    claim = worker.claim()
    assert claim is not None
    assert worker.finish(claim, "")


def cancel_in_the_queue(worker: HandWorker, request_id: str) -> None:
    worker.ledger.run(calls.cancel(request_id))


def cancel_and_release(worker: HandWorker, request_id: str) -> None:
    worker.claim()
    worker.ledger.run(calls.cancel(request_id))
    worker.ledger.run(calls.release(request_id, 1))


def claim_too_late(worker: HandWorker, request_id: str) -> None:
    time.sleep(0.06)
    assert worker.claim() is None


def claim_the_next_one_too_late(worker: HandWorker, request_id: str) -> None:
    worker.submit(ChatRequest(query="next"))
    time.sleep(0.06)
    assert worker.claim() is not None


@pytest.mark.parametrize(
    "end",
    [finish, cancel_in_the_queue, cancel_and_release, claim_too_late, claim_the_next_one_too_late],
)
def test_every_kind_of_end_is_pushed_and_leaves_nothing_behind(
    worker: HandWorker, keys: Keys, end: Callable[[HandWorker, str], None]
) -> None:
    ledger = worker.ledger
    request_id = worker.submit(
        ChatRequest(query="q", deadline_seconds=0.05 if "late" in end.__name__ else 60)
    )
    ledger.run(calls.follow("r", [(request_id, "0-0")]))
    with ledger.connection.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe(keys.push("r"))
        pubsub.get_message(timeout=1)
        end(worker, request_id)
        [(pushed_id, push)] = parse_push(pubsub.get_message(timeout=1)["data"])
    assert pushed_id == request_id
    assert isinstance(decode_event(push.event), Finished | Failed)

    assert readers(ledger, keys, request_id) is None
    assert not ledger.run(calls.status(request_id)).is_cancel_asked
    assert ledger.connection.zscore(keys.leases, request_id) is None
    assert not ledger.connection.sismember(keys.running("worker-1"), request_id)
    assert ledger.connection.zscore(keys.queue("chatglm-6b"), request_id) is None
