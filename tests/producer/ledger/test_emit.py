"""emit.lua on the real server: fences, retries, order, pushes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from producer.contract import ChatRequest, Finished, Started, Token, decode_event
from producer.contract.keys import Keys
from producer.ledger import Claim, Emission, EmitCode, Entry, Ledger, calls
from producer.streams import parse_push

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def entries(ledger: Ledger, request_id: str) -> list[Entry]:
    [followed] = ledger.run(calls.follow("", [(request_id, "0-0")]))
    assert followed is not None
    return followed.entries


@pytest.fixture
def claim(worker: HandWorker) -> Claim:
    worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    return claim


def test_every_event_has_its_place_as_its_id(worker: HandWorker, claim: Claim, ledger: Ledger) -> None:
    worker.start(claim)
    worker.emit(claim, 1, "多")
    worker.emit(claim, 3, "喝", "水")
    worker.finish(claim, "多喝水")

    stream = entries(ledger, claim.request_id)
    assert [entry.id for entry in stream] == ["0-1", "1-0", "3-0", "3-2"]
    assert [type(decode_event(entry.event)) for entry in stream] == [Started, Token, Token, Finished]
    assert ledger.run(calls.status(claim.request_id)).num_tokens == 3


def test_an_emit_with_an_old_attempt_number_writes_nothing(
    worker: HandWorker, other_worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    worker.start(claim)
    worker.emit(claim, 1, "多")
    ledger.run(calls.release(claim.request_id, claim.attempt))
    second = other_worker.claim()
    assert second is not None
    before = entries(ledger, claim.request_id), ledger.run(calls.status(claim.request_id))

    # The first worker was only paused, and goes on as if nothing had happened.
    assert worker.emit(claim, 2, "喝") is EmitCode.FENCED
    assert worker.start(claim) is EmitCode.FENCED
    assert worker.finish(claim, "多喝") is False
    assert worker.fail(claim, "x") is False
    assert ledger.run(calls.release(claim.request_id, claim.attempt)) is False
    assert ledger.run(calls.renew("worker-1", [(claim.request_id, claim.attempt)], 5.0)).lost == [
        claim.request_id
    ]

    assert (entries(ledger, claim.request_id), ledger.run(calls.status(claim.request_id))) == before
    assert other_worker.start(second) is EmitCode.WRITTEN
    assert other_worker.emit(second, 2, "喝") is EmitCode.WRITTEN


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_an_emit_after_the_end_writes_nothing(
    worker: HandWorker, claim: Claim, ledger: Ledger, end: str
) -> None:
    worker.start(claim)
    assert worker.finish(claim, "") if end == "finish" else worker.fail(claim, "x")
    before = entries(ledger, claim.request_id)
    assert worker.emit(claim, 1, "late") is EmitCode.FENCED
    assert entries(ledger, claim.request_id) == before


def test_an_emit_for_a_request_in_the_queue_or_unknown_writes_nothing(
    worker: HandWorker, ledger: Ledger
) -> None:
    queued = worker.submit(ChatRequest(query="q"))
    token = Token(index=1, ids=(1,), texts=("x",))
    codes = ledger.run(calls.emit([Emission(queued, 0, token), Emission("unknown", 1, token)]))
    assert codes == [EmitCode.FENCED, EmitCode.FENCED]
    assert entries(ledger, queued) == []


def test_the_retry_of_an_emit_whose_answer_was_lost_writes_nothing_twice(
    worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    started = Started(attempt=1, worker="worker-1")
    tokens = Token(index=2, ids=(1, 2), texts=("a", "b"))
    flush = calls.emit([Emission(claim.request_id, 1, started), Emission(claim.request_id, 1, tokens)])

    assert ledger.run(flush) == [EmitCode.WRITTEN, EmitCode.WRITTEN]
    before = entries(ledger, claim.request_id)
    assert ledger.run(flush) == [EmitCode.ALREADY_WRITTEN, EmitCode.ALREADY_WRITTEN]
    assert entries(ledger, claim.request_id) == before
    assert worker.emit(claim, 3, "c") is EmitCode.WRITTEN


def test_a_token_that_does_not_follow_the_last_one_is_out_of_step(
    worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    assert worker.emit(claim, 1, "no Started yet") is EmitCode.OUT_OF_STEP
    worker.start(claim)
    worker.emit(claim, 2, "a", "b")
    assert worker.emit(claim, 4, "one is missing") is EmitCode.OUT_OF_STEP
    assert worker.emit(claim, 3, "b", "overlaps") is EmitCode.OUT_OF_STEP
    assert [entry.id for entry in entries(ledger, claim.request_id)] == ["0-1", "2-0"]


def test_each_attempt_says_started_before_its_tokens(
    worker: HandWorker, other_worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    worker.start(claim)
    worker.emit(claim, 2, "a", "b")
    ledger.run(calls.release(claim.request_id, 1))
    second = other_worker.claim()
    assert second is not None
    assert other_worker.emit(second, 3, "c") is EmitCode.OUT_OF_STEP
    other_worker.start(second)
    other_worker.emit(second, 3, "c")
    other_worker.finish(second, "abc")
    assert [entry.id for entry in entries(ledger, claim.request_id)] == ["0-1", "2-0", "2-2", "3-0", "3-3"]


def test_a_token_without_ids_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="has no ids"):
        calls.emit([Emission("r", 1, Token(index=0, ids=(), texts=()))])


def test_one_flush_answers_for_each_event_by_itself(worker: HandWorker, ledger: Ledger) -> None:
    for _ in range(3):
        worker.submit(ChatRequest(query="q"))
    claims = [claim for _ in range(3) if (claim := worker.claim())]
    started = [Emission(each.request_id, 1, Started(attempt=1, worker="w")) for each in claims]
    ledger.run(calls.cancel(claims[1].request_id))
    codes = ledger.run(calls.emit([started[0], started[1], started[2]._replace(attempt=9)]))
    assert codes == [EmitCode.WRITTEN, EmitCode.CANCEL_ASKED, EmitCode.FENCED]


def test_texts_with_separators_and_controls_arrive_unchanged(
    worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    texts = ("\t", "\n", "\r\n", "\u2028", "\x85", "\x00", '"\\/', "é́", "😀", "</script>")
    worker.start(claim)
    worker.emit(claim, len(texts), *texts)
    event = decode_event(entries(ledger, claim.request_id)[1].event)
    assert isinstance(event, Token)
    assert event.texts == texts


def test_a_flush_is_one_message_a_reader_with_all_its_lines(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    for _ in range(2):
        worker.submit(ChatRequest(query="q"))
    claims = [claim for _ in range(2) if (claim := worker.claim())]
    first, second = (claim.request_id for claim in claims)
    ledger.run(calls.follow("both", [(first, "0-0"), (second, "0-0")]))
    ledger.run(calls.follow("one", [(second, "0-0")]))
    with ledger.connection.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe(keys.push("both"), keys.push("one"))
        pubsub.get_message(timeout=1)
        pubsub.get_message(timeout=1)

        ledger.run(
            calls.emit([Emission(c.request_id, 1, Started(attempt=1, worker="\u2028")) for c in claims])
        )

        messages = [pubsub.get_message(timeout=1) for _ in range(2)]
        assert pubsub.get_message(timeout=0.05) is None
    lines = {message["channel"]: list(parse_push(message["data"])) for message in messages}
    assert [request_id for request_id, _ in lines[keys.push("both")]] == [first, second]
    [(request_id, push)] = lines[keys.push("one")]
    assert (request_id, push.previous_id, push.entry_id) == (second, "0-0", "0-1")
    assert decode_event(push.event) == Started(attempt=1, worker="\u2028")
