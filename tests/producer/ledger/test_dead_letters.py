"""Lost attempts, and the dead letters that they make, on the real server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from producer.contract import (
    ChatRequest,
    ConversationBusy,
    DocumentEnded,
    Event,
    Failed,
    NotDead,
    SummaryRequest,
    UnknownConversation,
    UnknownRequest,
)
from producer.contract.keys import Keys
from producer.ledger import Claim, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def lose(worker: HandWorker, claim: Claim, **options: object) -> str:
    return worker.ledger.run(calls.lose(claim.request_id, claim.attempt, "the engine died", **options))  # type: ignore[arg-type]


def let_fall_silent(worker: HandWorker) -> Claim:
    """Claim, say nothing, be reaped."""
    claim = worker.claim(lease_seconds=0.01)
    assert claim is not None
    time.sleep(0.015)
    assert worker.ledger.run(calls.reap()) == [claim.request_id]
    return claim


def kill(worker: HandWorker, request_id: str) -> None:
    """Make a dead letter of the request that is next."""
    for _ in range(3):
        claim = worker.claim()
        assert claim is not None
        assert claim.request_id == request_id
        lose(worker, claim)


def events(ledger: Ledger, request_id: str, after: str = "0") -> list[Event]:
    [followed] = ledger.run(calls.follow("", [(request_id, after)]))
    return [] if followed is None else calls.events(followed.entries)


def state(ledger: Ledger, request_id: str) -> str:
    return ledger.run(calls.status(request_id)).state


def test_a_request_that_three_workers_took_into_their_silence_is_a_dead_letter(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    for each in (worker, other_worker):
        let_fall_silent(each)
        assert state(ledger, request_id) == "queued"
    assert (claim := worker.claim(0.01)) is not None
    assert claim.failures == 2
    time.sleep(0.015)

    assert ledger.run(calls.reap()) == [request_id]

    assert state(ledger, request_id) == "dead"
    assert other_worker.claim() is None
    [failed] = events(ledger, request_id)
    assert isinstance(failed, Failed)
    assert failed.code == "dead_letter"
    assert f"glmq dead retry {request_id}" in failed.message
    letter = ledger.run(calls.dead_letter(request_id))
    assert [(loss.attempt, loss.worker, loss.what) for loss in letter.losses] == [
        (1, "worker-1", "its worker worker-1 fell silent"),
        (2, "worker-2", "its worker worker-2 fell silent"),
        (3, "worker-1", "its worker worker-1 fell silent"),
    ]
    assert all(abs(loss.time - time.time()) < 60 for loss in letter.losses)


def test_one_new_token_makes_up_for_all_attempts_before_it(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    for index in range(1, 7):
        if index % 3 == 0:
            claim = worker.claim()
            assert claim is not None
            worker.start(claim)
            worker.emit(claim, index // 3, "x")
            assert lose(worker, claim) == "queued"
        else:
            let_fall_silent(worker)

    assert state(ledger, request_id) == "queued"
    claim = worker.claim()
    assert claim is not None
    assert claim.failures == 0
    assert claim.emitted_texts == ("x", "x")


def test_what_is_handed_back_does_not_count(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    let_fall_silent(worker)
    for _ in range(5):
        claim = worker.claim()
        assert claim is not None
        assert claim.failures == 1
        assert ledger.run(calls.release(request_id, claim.attempt))
    assert state(ledger, request_id) == "queued"


def test_a_worker_that_tries_a_request_alone_keeps_its_lease_until_it_is_dead(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)

    assert lose(worker, claim, keep=True) == "kept"
    assert other_worker.claim() is None
    # It gave a token before it killed the engine again: alone, that is no excuse.
    worker.emit(claim, 1, "a")
    assert lose(worker, claim, keep=True, is_trial=True, num_before=1) == "kept"
    assert state(ledger, request_id) == "running"
    assert lose(worker, claim, keep=True, is_trial=True, num_before=2) == "ended"

    assert state(ledger, request_id) == "dead"
    assert ledger.connection.zscore(keys.leases, request_id) is None
    assert [event.type for event in events(ledger, request_id)] == ["started", "token", "failed"]
    assert lose(worker, claim, keep=True, is_trial=True, num_before=3) == "fenced"


def test_a_loss_that_is_told_twice_counts_once(worker: HandWorker) -> None:
    worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    assert lose(worker, claim, keep=True) == "kept"
    for _ in range(5):
        assert lose(worker, claim, keep=True) == "kept"
    assert lose(worker, claim, num_before=1) == "queued"
    again = worker.claim()
    assert again is not None
    assert again.failures == 2
    assert lose(worker, claim, num_before=1) == "fenced"


def test_a_lost_request_that_nobody_wants_any_more_ends_cancelled(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    claim = worker.claim()
    assert claim is not None
    ledger.run(calls.cancel(request_id))
    assert lose(worker, claim, keep=True) == "ended"
    assert state(ledger, request_id) == "cancelled"


def test_a_dead_letter_is_kept_until_it_is_dropped(worker: HandWorker, ledger: Ledger, keys: Keys) -> None:
    request_id = worker.submit(ChatRequest(query="q"), retention_seconds=30)
    kill(worker, request_id)
    own = [keys.request(request_id), keys.events(request_id)]
    assert [ledger.connection.ttl(key) for key in own] == [-1, -1]
    assert [letter.request_id for letter in ledger.run(calls.dead_letters()).letters] == [request_id]
    assert ledger.run(calls.backlog("chatglm-6b")).num_dead == 1

    ledger.run(calls.drop_dead(request_id))

    assert all(0 < ledger.connection.ttl(key) <= 30 for key in own)
    assert ledger.run(calls.dead_letters()).letters == []
    assert ledger.run(calls.backlog("chatglm-6b")).num_dead == 0


def test_a_dead_letter_that_is_tried_again_goes_on_from_its_last_token_and_can_be_followed(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ChatRequest(query="q", deadline_seconds=0.2), retention_seconds=30)
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    worker.emit(claim, 2, "a", "b")
    lose(worker, claim)
    kill(worker, request_id)
    before = events(ledger, request_id)
    assert isinstance(before[-1], Failed)
    time.sleep(0.2)

    ledger.run(calls.retry_dead(request_id))

    assert events(ledger, request_id) == before[:-1]
    assert ledger.run(calls.dead_letters()).letters == []
    [followed] = ledger.run(calls.follow("reader", [(request_id, "2-0")]))
    assert followed is not None
    assert followed.state == "queued"
    again = worker.claim()
    assert again is not None
    assert (again.attempt, again.failures, again.emitted_texts) == (5, 0, ("a", "b"))
    worker.start(again)
    worker.emit(again, 3, "c")
    worker.finish(again, "abc")
    assert [event.type for event in events(ledger, request_id)] == [
        "started",
        "token",
        "started",
        "token",
        "finished",
    ]
    assert 0 < ledger.connection.ttl(keys.request(request_id)) <= 30


def test_it_dies_again_after_as_many_attempts(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    kill(worker, request_id)
    ledger.run(calls.retry_dead(request_id))
    kill(worker, request_id)
    assert state(ledger, request_id) == "dead"
    assert [event.type for event in events(ledger, request_id)] == ["failed"]
    assert len(ledger.run(calls.dead_letter(request_id)).losses) == 6


def test_what_is_no_dead_letter_is_left_alone(worker: HandWorker, ledger: Ledger) -> None:
    request_id = worker.submit(ChatRequest(query="q"))
    for call in (calls.retry_dead, calls.drop_dead, calls.dead_letter):
        with pytest.raises(NotDead, match="is queued"):
            ledger.run(call(request_id))
        with pytest.raises(UnknownRequest):
            ledger.run(call("nobody"))
    assert state(ledger, request_id) == "queued"


def test_a_dead_answer_frees_its_conversation_and_takes_it_again(worker: HandWorker, ledger: Ledger) -> None:
    first = worker.submit(ChatRequest(query="one", conversation_id="c"))
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "1")
    dead = worker.submit(ChatRequest(query="two", conversation_id="c"))
    kill(worker, dead)

    other = worker.submit(ChatRequest(query="three", conversation_id="c"))
    with pytest.raises(ConversationBusy, match=other):
        ledger.run(calls.retry_dead(dead))
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "3")
    ledger.run(calls.retry_dead(dead))
    with pytest.raises(ConversationBusy, match=dead):
        worker.submit(ChatRequest(query="four", conversation_id="c"))
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "2")

    turns = ledger.run(calls.conversation("default", "c", count=9)).turns
    assert [(turn.request_id, turn.query) for turn in turns] == [
        (first, "one"),
        (other, "three"),
        (dead, "two"),
    ]


def test_a_dead_first_question_begins_its_conversation_when_it_is_tried_again(
    worker: HandWorker, ledger: Ledger
) -> None:
    dead = worker.submit(ChatRequest(query="one", conversation_id="c"))
    kill(worker, dead)
    with pytest.raises(UnknownConversation):
        ledger.run(calls.conversation("default", "c"))
    ledger.run(calls.retry_dead(dead, conversation_seconds=77))
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "1")
    found = ledger.run(calls.conversation("default", "c", count=9))
    assert [turn.answer for turn in found.turns] == ["1"]


def test_a_forgotten_conversation_takes_its_dead_letters_along(worker: HandWorker, ledger: Ledger) -> None:
    dead = worker.submit(ChatRequest(query="one", conversation_id="c"))
    kill(worker, dead)
    others = worker.submit(ChatRequest(query="one", conversation_id="d"))
    kill(worker, others)

    ledger.run(calls.forget("default", "c"))

    with pytest.raises(UnknownRequest):
        ledger.run(calls.status(dead))
    assert [letter.request_id for letter in ledger.run(calls.dead_letters()).letters] == [others]


def test_a_dead_piece_fails_its_document(worker: HandWorker, ledger: Ledger) -> None:
    document = worker.submit(SummaryRequest(text="long"))
    claim = worker.claim()
    assert claim is not None
    pieces = [SummaryRequest(text=text) for text in ("one", "two")]
    ledger.run(calls.split(document, claim.attempt, level=1, priority=6, pieces=pieces))
    kill(worker, f"{document}.1.1")

    assert state(ledger, document) == "failed"
    [*_, failed] = events(ledger, document)
    assert isinstance(failed, Failed)
    assert failed.code == "dead_letter"
    assert f"{document}.1.1" in failed.message
    assert state(ledger, f"{document}.1.2") == "cancelled"
    with pytest.raises(DocumentEnded, match=document):
        ledger.run(calls.retry_dead(f"{document}.1.1"))
    ledger.run(calls.drop_dead(f"{document}.1.1"))


def test_the_number_of_dead_letters_is_bounded_and_the_oldest_make_room(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    ids = [worker.submit(ChatRequest(query="q"), retention_seconds=30) for _ in range(3)]
    kill(worker, ids[0])
    # As if they had been there before.
    ledger.connection.zadd(keys.dead, {f"other-{number}": number + 1 for number in range(999)})
    kill(worker, ids[1])
    # Their order is that of their milliseconds.
    time.sleep(0.002)
    kill(worker, ids[2])
    assert ledger.connection.zcard(keys.dead) == 1000
    assert ledger.connection.zscore(keys.dead, "other-0") is None
    assert ledger.connection.zscore(keys.dead, "other-2") is not None
    page = ledger.run(calls.dead_letters(num_looked_at=2))
    assert [letter.request_id for letter in page.letters] == [ids[2], ids[1]]
    assert page.next == 2
