"""split.lua and pieces.lua on the real server: a document leaves its worker, and comes back when its pieces are done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from producer.contract import Failed, Finished, Progress, SummaryRequest
from producer.contract.keys import Keys
from producer.ledger import Claim, EmitCode, Ledger, Pieces, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

TEXTS = [f"Part {number}." for number in range(1, 13)]


@pytest.fixture
def claim(worker: HandWorker) -> Claim:
    worker.submit(SummaryRequest(text=" ".join(TEXTS)), retention_seconds=30.0)
    claim = worker.claim()
    assert claim is not None
    return claim


def split(ledger: Ledger, claim: Claim, *, level: int = 1, texts: list[str] = TEXTS) -> str:
    pieces = [SummaryRequest(text=text) for text in texts]
    call = calls.split(claim.request_id, claim.attempt, level=level, priority=6, pieces=pieces)
    return ledger.run(call).outcome


def take(worker: HandWorker) -> Claim:
    claim = worker.claim()
    assert claim is not None
    return claim


def test_only_the_worker_that_has_a_document_can_split_it(claim: Claim, ledger: Ledger) -> None:
    # Redis came back without its last writes, and gave the same attempt to another one.
    pieces = [SummaryRequest(text=TEXTS[0])]

    def outcome(worker: str) -> str:
        call = calls.split(claim.request_id, claim.attempt, level=1, priority=6, pieces=pieces, worker=worker)
        return ledger.run(call).outcome

    assert outcome("another") == "fenced"
    assert outcome(claim.worker) == "waiting"


def test_pieces_are_claimed_in_their_order_and_their_document_is_not(
    worker: HandWorker, claim: Claim, ledger: Ledger, keys: Keys
) -> None:
    assert split(ledger, claim) == "waiting"

    claims = [take(worker) for _ in TEXTS]
    assert [piece.request_id for piece in claims] == [
        f"{claim.request_id}.1.{number}" for number in range(1, len(TEXTS) + 1)
    ]
    assert all(piece.is_piece for piece in claims)
    assert worker.claim() is None
    assert ledger.run(calls.status(claim.request_id)).state == "waiting"
    assert not ledger.connection.sismember(keys.running(worker.name), claim.request_id)
    assert ledger.run(calls.reap()) == []


def test_the_document_is_claimed_again_with_what_its_pieces_have_said(
    worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    assert not claim.pieces.levels
    split(ledger, claim, texts=TEXTS[:2])
    for _ in range(2):
        piece = take(worker)
        worker.answer(piece, "So", f" {piece.attempt}.")

    again = take(worker)
    assert (again.request_id, again.attempt) == (claim.request_id, 2)
    assert again.pieces == Pieces(levels=(2,), number=2, prompt_tokens=0, completion_tokens=0)
    ends = ledger.run(calls.pieces(claim.request_id, level=1, number=3))
    assert [end and end.text for end in ends if not isinstance(end, Failed)] == ["So 1.", "So 1.", None]  # type: ignore[union-attr]
    worker.answer(again, "All.")


def test_a_split_whose_answer_was_lost_can_be_repeated(
    worker: HandWorker, claim: Claim, ledger: Ledger, keys: Keys
) -> None:
    assert split(ledger, claim) == "waiting"
    before = ledger.connection.xlen(keys.events(claim.request_id))
    assert split(ledger, claim) == "waiting"
    assert ledger.connection.xlen(keys.events(claim.request_id)) == before == 1
    assert ledger.run(calls.overview("chatglm-6b")).num_queued == len(TEXTS)


def test_a_split_is_fenced(worker: HandWorker, claim: Claim, ledger: Ledger) -> None:
    ledger.run(calls.release(claim.request_id, claim.attempt))
    assert split(ledger, claim) == "fenced"
    again = take(worker)
    assert split(ledger, claim) == "fenced"
    assert split(ledger, again, level=2) == "fenced", "there is no first level"
    assert split(ledger, again) == "waiting"


def test_a_document_whose_end_is_asked_for_is_not_split(claim: Claim, ledger: Ledger) -> None:
    ledger.run(calls.cancel(claim.request_id))
    assert split(ledger, claim) == "cancel_asked"
    assert ledger.run(calls.overview("chatglm-6b")).num_queued == 0


def test_a_reader_that_comes_while_a_document_waits_follows_it(
    worker: HandWorker, claim: Claim, ledger: Ledger, keys: Keys
) -> None:
    split(ledger, claim, texts=TEXTS[:1])
    [followed] = ledger.run(calls.follow("reader", [(claim.request_id, "0")]))
    assert followed is not None
    assert followed.state == "waiting"
    assert calls.events(followed.entries) == [Progress(level=1, done=0, total=1)]
    assert ledger.connection.hget(keys.request(claim.request_id), "readers") == "reader"


def test_events_of_many_levels_keep_their_order(worker: HandWorker, claim: Claim, ledger: Ledger) -> None:
    for level in (1, 2, 3):
        split(ledger, claim, level=level, texts=TEXTS[:2])
        for _ in range(2):
            worker.answer(take(worker), "s")
        claim = take(worker)
    worker.answer(claim, "a", "b")

    [followed] = ledger.run(calls.follow("", [(claim.request_id, "0")]))
    assert followed is not None
    places = [tuple(map(int, entry.id.split("-"))) for entry in followed.entries]
    assert places == sorted(set(places))
    types = [event.type for event in calls.events(followed.entries)]
    assert types == ["progress"] * 9 + ["started", "token", "token", "finished"]
    assert places[-3:] == [(1, 0), (2, 0), (2, claim.attempt + 1)]


def test_a_piece_goes_back_once_when_it_fails_also_if_the_answer_is_lost(
    worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    split(ledger, claim, texts=TEXTS[:1])
    piece = take(worker)
    worker.start(piece)
    assert worker.emit(piece, 1, "S") is EmitCode.WRITTEN

    assert worker.fail(piece, "internal_error")
    assert worker.fail(piece, "internal_error"), "the retry of that call"
    assert ledger.run(calls.status(piece.request_id)).state == "queued"

    again = take(worker)
    assert again.emitted_texts == ("S",)
    assert worker.fail(again, "internal_error")
    assert ledger.run(calls.status(claim.request_id)).state == "failed"
    [followed] = ledger.run(calls.follow("", [(claim.request_id, "0")]))
    assert followed is not None
    failed = calls.events(followed.entries)[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "internal_error"


def test_a_cancelled_document_says_what_its_pieces_have_cost(
    worker: HandWorker, claim: Claim, ledger: Ledger
) -> None:
    split(ledger, claim, texts=TEXTS[:3])
    piece = take(worker)
    worker.start(piece)
    finished = Finished.model_validate(
        {"reason": "stop", "text": "s", "usage": {"prompt_tokens": 70, "completion_tokens": 4}}
    )
    ledger.run(calls.finish(piece.request_id, piece.attempt, finished))

    assert ledger.run(calls.cancel(claim.request_id)) == "waiting"

    [followed] = ledger.run(calls.follow("", [(claim.request_id, "0")]))
    assert followed is not None
    cancelled = calls.events(followed.entries)[-1]
    assert isinstance(cancelled, Finished)
    assert cancelled.reason == "cancelled"
    usage = cancelled.usage
    assert (usage.pieces, usage.piece_prompt_tokens, usage.piece_completion_tokens) == (1, 70, 4)
    assert worker.claim() is None


def test_workers_are_called_to_look_for_pieces(
    worker: HandWorker, claim: Claim, ledger: Ledger, keys: Keys
) -> None:
    ledger.run(calls.renew("worker-1", [], 2.0))
    pubsub = ledger.connection.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    with pubsub as channel:
        channel.subscribe(keys.control("worker-1"))
        channel.get_message(timeout=1.0)
        split(ledger, claim)
        message = channel.get_message(timeout=1.0)
    assert message is not None
    assert message["data"] == "look"


def test_a_document_of_a_thousand_pieces_is_cancelled_in_one_go(claim: Claim, ledger: Ledger) -> None:
    texts = [f"Part {number}." for number in range(1000)]
    assert split(ledger, claim, texts=texts) == "waiting"
    ledger.run(calls.cancel(claim.request_id))
    assert ledger.run(calls.overview("chatglm-6b")).num_queued == 0
    states = {ledger.run(calls.status(f"{claim.request_id}.1.{n}")).state for n in (1, 500, 1000)}
    assert states == {"cancelled"}
