"""A worker keeps what it has claimed, as long as it deserves to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from producer.ledger import calls
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
            metrics=bench.metrics,
        )
        made.append(leases)
        return leases

    yield new
    for leases in made:
        leases.stop()


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
    bench.claims.drain()
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
