"""A worker keeps what it has claimed, as long as it deserves to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from producer.contract import ChatRequest, RedisUnavailable
from producer.ledger import calls
from tests.workers.conftest import wait_for
from workers.leases import Leases

NewBench = Callable[..., Any]


@pytest.fixture
def new_leases(bench: Any) -> Iterator[Callable[..., Leases]]:
    made: list[Leases] = []

    def new(*, lease_seconds: float = 0.4, is_stuck: Callable[[], bool] = lambda: False) -> Leases:
        leases = Leases(
            bench.ledger,
            bench.running,
            bench.publisher,
            "worker-0",
            lease_seconds=lease_seconds,
            about=lambda: {"model": "chatglm-6b", "slots": 4, "running": len(bench.running)},
            is_stuck=is_stuck,
            on_reaped=bench.claims.look,
            metrics=bench.metrics,
        )
        made.append(leases)
        return leases

    yield new
    for leases in made:
        leases.stop()


def reaping_leases(bench: Any) -> Leases:
    return Leases(
        bench.ledger,
        bench.running,
        bench.publisher,
        bench.settings.worker_id,
        lease_seconds=2.0,
        about=dict,
        is_stuck=lambda: False,
        on_reaped=bench.claims.look,
        metrics=bench.metrics,
    )


def lease_left(bench: Any, request_id: str) -> float:
    """Seconds until the lease ends, on Redis' clock."""
    seconds, microseconds = bench.ledger.connection.time()
    ends = bench.ledger.connection.zscore(bench.ledger.keys.leases, request_id)
    return float(ends / 1000 - seconds - microseconds / 1e6)


def test_a_lease_is_renewed_before_it_ends(bench: Any, new_leases: Callable[..., Leases]) -> None:
    request_id = bench.submit()
    bench.generation(request_id)
    new_leases(lease_seconds=2).start()

    time.sleep(2.1)  # the lease of the claim is over
    assert lease_left(bench, request_id) > 0


def test_a_stuck_engine_gets_no_renewal(bench: Any, new_leases: Callable[..., Leases]) -> None:
    request_id = bench.submit()
    bench.generation(request_id)
    new_leases(lease_seconds=0.4, is_stuck=lambda: True).start()
    before = bench.ledger.connection.zscore(bench.ledger.keys.leases, request_id)

    time.sleep(0.3)

    assert bench.ledger.connection.zscore(bench.ledger.keys.leases, request_id) == before


def test_a_lease_that_was_lost_aborts_the_request(bench: Any, new_leases: Callable[..., Leases]) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.claims.stop()
    assert bench.ledger.run(calls.release(request_id, 1))

    new_leases().renew()

    assert bench.aborted == [generation.sequence_id]
    assert len(bench.running) == 0


def test_a_cancellation_whose_message_was_lost_comes_with_the_renewal(
    bench: Any, new_leases: Callable[..., Leases]
) -> None:
    request_id = bench.submit()
    generation = bench.generation(request_id)
    bench.ledger.run(calls.cancel(request_id))

    new_leases().renew()

    assert bench.ended(request_id)[-1].reason == "cancelled"
    assert bench.aborted == [generation.sequence_id]


def test_the_reaper_comes_when_the_lease_of_a_silent_worker_ends(bench: Any) -> None:
    # Somebody else's, who falls silent at once; between two renewals of this worker are 2 s. Of another model, which this worker does not claim.
    request_id = bench.ledger.run(calls.submit(ChatRequest(query="hello"), model="another")).request_id
    assert bench.ledger.run(calls.claim("another", "silent", 0.5)) is not None
    leases = Leases(
        bench.ledger,
        bench.running,
        bench.publisher,
        bench.settings.worker_id,
        lease_seconds=8,
        about=dict,
        is_stuck=lambda: False,
        on_reaped=lambda: None,
        metrics=bench.metrics,
    )
    begin = time.monotonic()
    leases.start()

    wait_for(lambda: bench.ledger.run(calls.status(request_id)).state == "queued")

    assert time.monotonic() - begin < 1.5
    leases.stop()


def test_a_running_request_is_aborted_at_its_deadline(bench: Any, new_leases: Callable[..., Leases]) -> None:
    request_id = bench.submit(deadline_seconds=0.3)
    generation = bench.generation(request_id)
    new_leases(lease_seconds=0.4).start()

    failed = bench.ended(request_id)[-1]

    assert failed.code == "deadline_exceeded"
    assert bench.aborted == [generation.sequence_id]


def test_what_a_worker_says_of_itself_is_shown_until_it_signs_off(
    bench: Any, new_leases: Callable[..., Leases]
) -> None:
    leases = new_leases()
    leases.start()
    time.sleep(0.1)

    (shown,) = bench.ledger.run(calls.overview("chatglm-6b")).workers
    assert shown.worker == "worker-0"
    assert shown.about["slots"] == "4"

    leases.stop()
    assert bench.ledger.run(calls.overview("chatglm-6b")).workers == []


def test_a_request_of_a_silent_worker_is_taken_over(new_bench: NewBench) -> None:
    dead = new_bench(lease_seconds=0.4)
    request_id = dead.submit()
    sequence_id = dead.generation(request_id).sequence_id
    dead.say(sequence_id, "ab")
    wait_for(lambda: "token" in dead.types(request_id))
    dead.claims.stop()
    alive = new_bench(look_seconds=60.0)
    leases = reaping_leases(alive)
    leases.start()

    taken = alive.generation(request_id)
    assert taken.emitted_ids == [ord("a"), ord("b")]
    assert taken.prompt_ids == dead.generated[0].prompt_ids
    alive.say(taken.sequence_id, "c", "stop")
    dead.say(sequence_id, "x", "stop")
    assert alive.ended(request_id)[-1].text == "abc"
    wait_for(lambda: dead.running.get(request_id) is None)
    leases.stop()


def test_a_stuck_worker_takes_nothing_from_others(bench: Any, new_leases: Callable[..., Leases]) -> None:
    # Of a model that the bench itself does not claim.
    request_id = bench.submit(model="another")
    claim = bench.ledger.run(calls.claim("another", "dead", 0.05))
    new_leases(is_stuck=lambda: True).start()
    time.sleep(0.5)
    assert bench.ledger.run(calls.status(request_id)).attempt == claim.attempt
    assert bench.ledger.run(calls.status(request_id)).state == "running"


def test_leases_that_nobody_could_renew_are_not_reaped_at_once(
    bench: Any, new_leases: Callable[..., Leases], monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = bench.submit(model="another")
    bench.ledger.run(calls.claim("another", "other", 0.05))
    run = bench.ledger.run
    is_down = True

    def sometimes(call: Any) -> Any:
        if is_down:
            raise RedisUnavailable("here", "it is down")
        return run(call)

    monkeypatch.setattr(bench.ledger, "run", sometimes)
    new_leases(lease_seconds=1.0).start()
    time.sleep(0.4)
    is_down = False
    time.sleep(0.5)
    assert run(calls.status(request_id)).state == "running"
    wait_for(lambda: run(calls.status(request_id)).state == "queued")


def test_a_worker_that_gets_its_own_request_back_goes_on_with_the_later_attempt(bench: Any) -> None:
    request_id = bench.submit()
    first = bench.generation(request_id)
    bench.say(first.sequence_id, "ab")
    wait_for(lambda: "token" in bench.types(request_id))
    bench.ledger.connection.zadd(bench.ledger.keys.leases, {request_id: 1})
    bench.ledger.run(calls.reap())
    bench.claims.look()

    second = wait_for(lambda: next((g for g in bench.generated if g.emitted_ids), None))
    assert bench.aborted == [first.sequence_id]
    bench.say(second.sequence_id, "c", "stop")
    assert bench.ended(request_id)[-1].text == "abc"
    assert bench.ended(request_id)[-1].attempts == 2
