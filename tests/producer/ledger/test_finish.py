"""finish.lua on the real server: the end of a request, and what stays of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from producer.contract import ChatRequest
from producer.contract.keys import Keys
from producer.ledger import Claim, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


@pytest.fixture
def claim(worker: HandWorker) -> Claim:
    worker.submit(ChatRequest(query="q"), retention_seconds=30.0)
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    return claim


@pytest.mark.parametrize(
    ("reason", "state"), [("stop", "done"), ("length", "done"), ("cancelled", "cancelled")]
)
def test_a_finished_request_is_kept_for_its_retention(
    worker: HandWorker, claim: Claim, keys: Keys, reason: str, state: str
) -> None:
    ledger, redis = worker.ledger, worker.ledger.connection
    assert redis.ttl(keys.request(claim.request_id)) == -1
    assert worker.finish(claim, "", reason)

    status = ledger.run(calls.status(claim.request_id))
    assert status.state == state
    assert status.ended_at is not None
    assert 25 < redis.ttl(keys.request(claim.request_id)) <= 30
    assert 25 < redis.ttl(keys.events(claim.request_id)) <= 30
    assert redis.zscore(keys.leases, claim.request_id) is None
    assert redis.smembers(keys.running("worker-1")) == set()


def test_a_failed_request_is_over_too(worker: HandWorker, claim: Claim, ledger: Ledger) -> None:
    assert worker.fail(claim, "context_exceeded")
    assert ledger.run(calls.status(claim.request_id)).state == "failed"
    assert ledger.run(calls.overview("chatglm-6b")).num_running == 0


def test_the_retry_of_a_finish_whose_answer_was_lost_says_yes_and_writes_nothing(
    worker: HandWorker, claim: Claim, ledger: Ledger, keys: Keys
) -> None:
    assert worker.finish(claim, "")
    before = ledger.connection.xlen(keys.events(claim.request_id))
    assert worker.finish(claim, "")
    assert ledger.connection.xlen(keys.events(claim.request_id)) == before


def test_a_request_ends_only_once(worker: HandWorker, claim: Claim, ledger: Ledger, keys: Keys) -> None:
    assert worker.finish(claim, "")
    before = ledger.connection.xlen(keys.events(claim.request_id))
    assert worker.fail(claim, "x") is False
    assert worker.finish(claim, "", "cancelled") is False
    assert ledger.run(calls.release(claim.request_id, claim.attempt)) is False
    assert ledger.run(calls.status(claim.request_id)).state == "done"
    assert ledger.connection.xlen(keys.events(claim.request_id)) == before
