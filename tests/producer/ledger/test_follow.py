"""follow.lua and unfollow.lua on the real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from producer.contract import ChatRequest
from producer.contract.keys import Keys
from producer.ledger import Ledger, calls

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
