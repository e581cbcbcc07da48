"""cancel.lua on the real server, in every state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from producer.contract import ChatRequest, Finished, UnknownRequest
from producer.contract.keys import Keys
from producer.ledger import EmitCode, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def last_event(ledger: Ledger, request_id: str) -> object:
    [followed] = ledger.run(calls.follow("", [(request_id, "0-0")]))
    assert followed is not None
    return calls.events(followed.entries)[-1]


def test_a_queued_request_that_is_cancelled_never_starts(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))

    assert ledger.run(calls.cancel(request_id)) == "queued"

    assert worker.claim() is None
    assert ledger.run(calls.status(request_id)).state == "cancelled"
    event = last_event(ledger, request_id)
    assert isinstance(event, Finished)
    assert (event.reason, event.text, event.attempts) == ("cancelled", "", 0)


def test_a_running_request_is_ended_by_its_worker_which_hears_of_it_twice(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    with ledger.connection.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe(keys.control("worker-1"))
        pubsub.get_message(timeout=1)
        assert ledger.run(calls.cancel(request_id)) == "running"
        assert pubsub.get_message(timeout=1)["data"] == f"cancel {request_id}"

    # If the message is lost, the next emit tells; its token is in the stream.
    assert worker.emit(claim, 1, "a") is EmitCode.CANCEL_ASKED
    assert worker.emit(claim, 1, "a") is EmitCode.CANCEL_ASKED
    assert ledger.run(calls.renew("worker-1", [(request_id, 1)], 5.0)).cancelled == [request_id]
    assert ledger.run(calls.status(request_id)).is_cancel_asked
    assert worker.finish(claim, "a", "cancelled")
    assert ledger.run(calls.status(request_id)).state == "cancelled"


@pytest.mark.parametrize("is_asked_before_release", [True, False])
def test_a_request_cancelled_between_two_workers_keeps_its_text(
    worker: HandWorker, ledger: Ledger, is_asked_before_release: bool
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    texts = ['多"', "喝\n", "", "水\u2028😀/"]
    worker.emit(claim, 3, *texts[:3])
    worker.emit(claim, 4, texts[3])

    if is_asked_before_release:
        assert ledger.run(calls.cancel(request_id)) == "running"
        assert ledger.run(calls.release(request_id, 1))
    else:
        assert ledger.run(calls.release(request_id, 1))
        assert ledger.run(calls.cancel(request_id)) == "queued"

    assert worker.claim() is None
    event = last_event(ledger, request_id)
    assert isinstance(event, Finished)
    assert (event.reason, event.text, event.attempts) == ("cancelled", "".join(texts), 1)
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (7, 4)
    assert ledger.run(calls.overview("chatglm-6b")).num_running == 0


def test_what_has_ended_stays_as_it_is(worker: HandWorker, ledger: Ledger) -> None:
    worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "a")
    before = last_event(ledger, claim.request_id)
    assert ledger.run(calls.cancel(claim.request_id)) == "done"
    assert ledger.run(calls.status(claim.request_id)).state == "done"
    assert last_event(ledger, claim.request_id) == before


def test_an_unknown_request_cannot_be_cancelled(ledger: Ledger) -> None:
    with pytest.raises(UnknownRequest, match="'nobody'"):
        ledger.run(calls.cancel("nobody"))
