"""What the model check has found, once each, as short as it can be said."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from producer.contract import ChatRequest, FoldRequest
from producer.contract.keys import Keys
from producer.ledger import Claim, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

MODEL = "chatglm-6b"
FOLD_ID = "turn.fold"


def ask_for_fold(ledger: Ledger, retention_seconds: float = 0.02) -> bool:
    fold = FoldRequest(conversation_id="c", first=0, priority=8)
    call = calls.fold(fold, request_id=FOLD_ID, model=MODEL, retention_seconds=retention_seconds)
    return ledger.run(call)


def take(worker: HandWorker, lease_seconds: float = 5.0) -> Claim:
    claim = worker.claim(lease_seconds)
    assert claim is not None
    return claim


@pytest.fixture
def turn(worker: HandWorker) -> None:
    """A conversation with one."""
    worker.submit(ChatRequest(query="q", conversation_id="c"), conversation_seconds=0.3)
    worker.answer(take(worker), "a")


@pytest.fixture
def fold_of_before(turn: None, worker: HandWorker, ledger: Ledger) -> None:
    """One that failed, and is not kept any more."""
    assert ask_for_fold(ledger)
    assert worker.fail(take(worker), "internal_error")
    time.sleep(0.04)
    assert ledger.run(calls.follow("", [(FOLD_ID, "0")])) == [None]


@pytest.mark.usefixtures("fold_of_before")
def test_a_fold_that_is_asked_for_again_under_its_old_id_keeps_its_stream(ledger: Ledger) -> None:
    assert ask_for_fold(ledger, retention_seconds=5.0)
    ledger.run(calls.cancel(FOLD_ID))
    [followed] = ledger.run(calls.follow("", [(FOLD_ID, "0")]))
    assert followed is not None
    assert followed.state == "cancelled"


@pytest.mark.usefixtures("fold_of_before")
def test_forgetting_ends_a_fold_that_was_asked_for_again_and_it_counts_no_more(
    ledger: Ledger, keys: Keys
) -> None:
    assert ask_for_fold(ledger)
    ledger.run(calls.forget("default", "c"))
    assert ledger.run(calls.overview(MODEL)).num_queued == 0
    assert ledger.connection.hget(keys.usage(MODEL, "default"), "queued") == "0"


@pytest.mark.usefixtures("turn")
def test_a_fold_whose_conversation_is_gone_is_no_dead_letter(worker: HandWorker, ledger: Ledger) -> None:
    assert ask_for_fold(ledger, retention_seconds=5.0)
    claim = take(worker)
    time.sleep(0.35)
    assert (
        ledger.run(calls.lose(claim.request_id, claim.attempt, "the engine died", max_attempts=1)) == "ended"
    )
    assert ledger.run(calls.status(FOLD_ID)).state == "failed"
