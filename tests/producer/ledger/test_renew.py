"""renew.lua, release.lua and overview.lua on the real server: leases, and who is alive."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from producer.contract import ChatRequest
from producer.contract.keys import Keys
from producer.ledger import Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def test_a_renewal_prolongs_the_leases_that_are_still_the_worker_s(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    for _ in range(3):
        worker.submit(ChatRequest(query="q"))
    kept, released, finished = (claim for _ in range(3) if (claim := worker.claim(lease_seconds=1.0)))
    ledger.run(calls.release(released.request_id, released.attempt))
    taken = other_worker.claim()
    assert taken is not None
    worker.answer(finished, "a")
    ends_before = ledger.connection.zscore(keys.leases, kept.request_id)
    other_ends_before = ledger.connection.zscore(keys.leases, taken.request_id)

    held = [(claim.request_id, claim.attempt) for claim in (kept, released, finished)]
    renewal = ledger.run(calls.renew("worker-1", held, 9.0))

    assert renewal.lost == [released.request_id, finished.request_id]
    assert renewal.cancelled == []
    assert ledger.connection.zscore(keys.leases, kept.request_id) > ends_before + 7000
    assert ledger.connection.zscore(keys.leases, taken.request_id) == other_ends_before


def test_a_released_request_goes_back_to_its_old_place(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    first, second = (worker.submit(ChatRequest(query="q")) for _ in range(2))
    claim = worker.claim()
    assert claim is not None
    assert claim.request_id == first

    assert ledger.run(calls.release(first, 1)) is True

    assert [ledger.run(calls.status(each)).place for each in (first, second)] == [0, 1]
    status = ledger.run(calls.status(first))
    assert (status.state, status.worker, status.attempt) == ("queued", None, 1)
    assert ledger.connection.zscore(keys.leases, first) is None
    assert ledger.connection.smembers(keys.running("worker-1")) == set()
    assert ledger.run(calls.release(first, 1)) is False


def test_the_overview_shows_what_workers_say_of_themselves_while_they_live(ledger: Ledger) -> None:
    ledger.run(calls.renew("gpu-0", [], 2.0, about={"model": "chatglm-6b", "slots": 8}))
    ledger.run(calls.renew("gpu-1", [], 2.0))

    workers = {each.worker: each for each in ledger.run(calls.overview("chatglm-6b")).workers}
    assert set(workers) == {"gpu-0", "gpu-1"}
    assert workers["gpu-0"].about == {"model": "chatglm-6b", "slots": "8"}
    assert workers["gpu-0"].silent_seconds < 2

    time.sleep(0.06)
    ledger.run(calls.renew("gpu-1", [], 2.0))
    alive = ledger.run(calls.overview("chatglm-6b", worker_seconds=0.05)).workers
    assert [each.worker for each in alive] == ["gpu-1"]


def test_a_model_is_served_by_others_only_if_one_of_them_is_ready_for_it(ledger: Ledger) -> None:
    def say(worker: str, model: str, state: str) -> None:
        ledger.run(calls.renew(worker, [], 2.0, about={"model": model, "state": state}))

    def is_served(besides: str) -> bool:
        return ledger.run(calls.overview("chatglm-6b")).is_served("chatglm-6b", besides=besides)

    assert not is_served("gpu-0")
    say("gpu-0", "chatglm-6b", "ready")
    assert not is_served("gpu-0")
    assert is_served("gpu-1")
    say("gpu-1", "another", "ready")
    say("gpu-2", "chatglm-6b", "loading")
    ledger.run(calls.renew("gpu-3", [], 2.0))
    assert not is_served("gpu-0")
    say("gpu-2", "chatglm-6b", "ready")
    assert is_served("gpu-0")


def test_what_a_dead_worker_said_goes_away_by_itself(ledger: Ledger, keys: Keys) -> None:
    ledger.run(calls.renew("gpu-0", [], 2.0, about={"slots": 8}, worker_seconds=7))
    assert 5 < ledger.connection.ttl(keys.worker("gpu-0")) <= 7
