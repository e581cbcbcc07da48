"""What a reader sees while workers, engines and Redis die: every token once, in order, and a pause that is bounded."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from producer.client import Client, Submission
from producer.contract import Event, Finished, SamplingParams, Token
from producer.embedded import EmbeddedServer
from producer.ledger import connect
from producer.settings import Settings
from tests.redis_servers import under_sentinel

pytestmark = [pytest.mark.journey, pytest.mark.timeout(180)]

NewWorker = Callable[..., Any]
Pair = Callable[..., list[Any]]

LEEWAY = float(os.environ.get("GLMQ_TEST_LEEWAY", "2"))
"""The bounds are those of a quiet machine; the suite runs two tests at a time, beside whatever else there is."""


@dataclass
class Reader:
    """Follows one answer from a thread of its own, and notes when each event came."""

    submission: Submission
    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        for event in self.submission.stream():
            self.events.append(event)
            self.times.append(time.monotonic())

    @property
    def num_tokens(self) -> int:
        return max((event.index for event in self.events if isinstance(event, Token)), default=0)

    def pause_after(self, moment: float) -> float:
        """The longest time without a token that ended after this moment."""
        at = [when for when, event in zip(self.times, self.events, strict=True) if isinstance(event, Token)]
        return max((after - before for before, after in itertools.pairwise(at) if after > moment), default=0)


class Readers:
    """Several answers at a time, each long enough to be interrupted."""

    def __init__(self, client: Client, number: int, num_tokens: int) -> None:
        self.client = client
        self.sampling = SamplingParams(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, temperature=0.9, seed=7
        )
        self.queries = [f"A long story, number {index}" for index in range(number)]
        self.readers = [Reader(client.chat(query, sampling=self.sampling)) for query in self.queries]

    def wait_for_tokens(self, number: int) -> None:
        """Until each has so many."""
        deadline = time.monotonic() + 60
        while min(reader.num_tokens for reader in self.readers) < number:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def finish(self) -> list[Finished]:
        """Their last events, once each has its whole answer."""
        for reader in self.readers:
            reader.thread.join(120)
            assert not reader.thread.is_alive()
        return [whole(reader.events) for reader in self.readers]

    def longest_pause(self, since: float) -> float:
        return max(reader.pause_after(since) for reader in self.readers)


def whole(events: list[Event]) -> Finished:
    """Every token once, in order, whoever said it. Returns the last event."""
    finished = events[-1]
    assert isinstance(finished, Finished), finished
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.index - len(token.ids) for token in tokens] == [0, *(token.index for token in tokens[:-1])]
    assert "".join(token.text for token in tokens) == finished.text
    assert finished.usage.completion_tokens == tokens[-1].index
    return finished


@pytest.fixture
def pair(new_worker: NewWorker) -> Callable[..., list[Any]]:
    """Starts two workers."""

    def start(*options: str, **environ: str) -> list[Any]:
        workers = [new_worker(*options, ready=False, **environ) for _ in range(2)]
        for worker in workers:
            worker.wait_for_log("ready: ")
        return workers

    return start


def busier(client: Client, workers: list[Any]) -> Any:
    """The one of these workers that runs more."""
    deadline = time.monotonic() + 30
    while True:
        running = {
            int(worker.about["pid"]): int(worker.about["running"]) for worker in client.overview().workers
        }
        worker = max(workers, key=lambda each: running.get(each.process.pid, 0))
        if running.get(worker.process.pid):
            return worker
        assert time.monotonic() < deadline
        time.sleep(0.05)


def report(what: str, seconds: float) -> None:
    print(f"{what}: longest pause {seconds:.2f} s")


def test_a_worker_that_drains_hands_over_within_a_second(pair: Pair, client: Client) -> None:
    # They hear of what is handed over: by themselves they would not look for half a minute.
    workers = pair("--grace-seconds", "0.5", GLMQ_LOOK_SECONDS="30")
    readers = Readers(client, 4, 300)
    readers.wait_for_tokens(5)
    draining = busier(client, workers)
    told = time.monotonic()

    assert draining.end() == 0

    assert max(finished.attempts for finished in readers.finish()) == 2
    report("SIGTERM", readers.longest_pause(told))
    assert readers.longest_pause(told) < 1.0 * LEEWAY


def test_a_killed_worker_is_taken_over_within_three_seconds(pair: Pair, client: Client) -> None:
    workers = pair()
    readers = Readers(client, 4, 300)
    readers.wait_for_tokens(5)
    victim = busier(client, workers)
    killed = time.monotonic()

    victim.process.kill()

    assert max(finished.attempts for finished in readers.finish()) == 2
    report("kill -9 of a worker", readers.longest_pause(killed))
    assert readers.longest_pause(killed) < 3.0 * LEEWAY


def test_a_killed_engine_s_requests_go_to_the_other_worker_at_once(pair: Pair, client: Client) -> None:
    workers = pair(GLMQ_LOOK_SECONDS="30")
    readers = Readers(client, 4, 300)
    readers.wait_for_tokens(5)
    victim = busier(client, workers)
    killed = time.monotonic()

    os.kill(victim.engine_pid(), signal.SIGKILL)

    assert max(finished.attempts for finished in readers.finish()) == 2
    report("kill -9 of an engine, two workers", readers.longest_pause(killed))
    assert readers.longest_pause(killed) < 3.0 * LEEWAY
    assert "lost with its engine" in victim.log


def test_a_killed_engine_of_the_only_worker_costs_its_restart_and_a_second(
    new_worker: NewWorker, client: Client
) -> None:
    worker = new_worker()
    readers = Readers(client, 4, 150)
    readers.wait_for_tokens(5)
    killed = time.monotonic()

    os.kill(worker.engine_pid(), signal.SIGKILL)
    while worker.log.count("ready: ") < 2:
        time.sleep(0.005)
        assert time.monotonic() < killed + 60
    restart = time.monotonic() - killed

    readers.finish()
    report(f"kill -9 of the only engine (restart {restart:.2f} s)", readers.longest_pause(killed))
    assert readers.longest_pause(killed) < restart + 1.0 * LEEWAY


def test_a_redis_that_restarts_after_a_second_costs_less_than_four(
    new_worker: NewWorker, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "mortal"
    server = EmbeddedServer.start(folder)
    for _ in range(2):
        new_worker(REDIS_URL=server.url)
    with Client(replace(settings, redis_url=server.url)) as client:
        readers = Readers(client, 4, 300)
        readers.wait_for_tokens(5)
        killed = time.monotonic()
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(1)
        again = EmbeddedServer.start(folder)

        readers.finish()

        report("a Redis restart of 1 s", readers.longest_pause(killed))
        assert readers.longest_pause(killed) < 4.0 * LEEWAY
    again.stop()


def test_what_a_power_failure_took_from_redis_is_published_again(
    new_worker: NewWorker, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "mortal"
    server = EmbeddedServer.start(folder)
    worker = new_worker(REDIS_URL=server.url)
    with Client(replace(settings, redis_url=server.url)) as client:
        readers = Readers(client, 2, 500)
        readers.wait_for_tokens(1)
        # What the disk has at this moment; the rest of the file is what it never got.
        sizes = {path: path.stat().st_size for path in (folder / "data").rglob("*.incr.aof")}
        readers.wait_for_tokens(1 + max(reader.num_tokens for reader in readers.readers))
        os.kill(server.pid, signal.SIGKILL)
        for path, size in sizes.items():
            os.truncate(path, size)
        again = EmbeddedServer.start(folder)

        readers.finish()

        # And whoever comes later reads the same.
        for reader in readers.readers:
            assert whole(list(client.stream(reader.submission.request_id))).text == whole(reader.events).text
    assert "it is published again" in worker.log
    again.stop()


def test_a_failover_to_a_replica_costs_a_pause_and_no_token(
    new_worker: NewWorker, settings: Settings, tmp_path: Path
) -> None:
    with under_sentinel(tmp_path) as servers:
        worker = new_worker(REDIS_URL=servers.url)
        with Client(replace(settings, redis_url=servers.url)) as client:
            readers = Readers(client, 2, 200)
            readers.wait_for_tokens(10)
            killed = time.monotonic()

            servers.kill_master()

            readers.finish()
            report("a failover", readers.longest_pause(killed))
            # Tickets find their way as well.
            assert client.chat("and now?", sampling=SamplingParams(max_new_tokens=2, seed=1)).result(30)
        assert worker.end() == 0
        assert "Unrecoverable" not in worker.log


def test_a_server_that_may_lose_requests_is_warned_of(
    new_worker: NewWorker, settings: Settings, tmp_path: Path
) -> None:
    with EmbeddedServer.start(tmp_path / "careless") as server:
        with connect(server.url) as connection:
            connection.config_set("appendonly", "no")
            connection.config_set("maxmemory-policy", "allkeys-lru")

        worker = new_worker(REDIS_URL=server.url)

        assert "maxmemory-policy is allkeys-lru" in worker.log
        assert "appendonly is no" in worker.log
        assert worker.end() == 0
