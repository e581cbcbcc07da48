"""Tickets through a real Celery worker with our pool: slots, acknowledgement, termination, size."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ImproperlyConfigured

from producer.celery_settings import celery_settings
from producer.settings import Settings
from workers.pool import EnginePool, Ticket
from workers.tasks import register_tasks


@dataclass
class Taker:
    """Holds each ticket for `seconds`, in a thread of its own, like an engine."""

    seconds: float = 0.05
    slots: int = 0
    taken: deque[Ticket] = field(default_factory=deque)
    completed: list[Ticket] = field(default_factory=list)
    withdrawn: list[Ticket] = field(default_factory=list)
    most: int = 0
    name: str = "taker"

    def start(self, check_interrupted: Callable[[], None]) -> None:
        check_interrupted()

    def take(self, ticket: Ticket) -> None:
        self.taken.append(ticket)
        self.most = max(self.most, len(self.taken) - len(self.completed))
        if self.seconds < 60:
            threading.Timer(self.seconds, self.complete, (ticket,)).start()
        threading.Thread(target=ticket.accept).start()

    def complete(self, ticket: Ticket) -> None:
        self.completed.append(ticket)
        ticket.complete()

    def withdraw(self, ticket: Ticket) -> None:
        self.withdrawn.append(ticket)
        threading.Thread(target=self.complete, args=(ticket,)).start()

    def resize(self, slots: int) -> None:
        self.slots = slots

    def drain(self) -> None:
        """Nothing to stop."""

    def stop(self) -> None:
        """Nothing to end."""


@pytest.fixture
def app(redis_url: str, settings: Settings) -> Iterator[Celery]:
    app = Celery("pool", set_as_current=False)
    app.conf.update(celery_settings(redis_url, settings.namespace))
    app.conf.update(task_default_queue=f"{settings.namespace}.m", worker_hijack_root_logger=False)
    register_tasks(app)
    level = logging.getLogger().level
    yield app
    app.close()
    # Celery sets it for the whole process, and other tests look at warnings.
    logging.getLogger().setLevel(level)


def run(app: Celery, taker: Taker, slots: int) -> Any:
    app.ticket_taker = taker
    return start_worker(
        app,
        pool=EnginePool,
        concurrency=slots,
        perform_ping_check=False,
        shutdown_timeout=20,
        loglevel="ERROR",
    )


def send(app: Celery, number: int) -> None:
    for _ in range(number):
        app.send_task("glmq.next")


def wait_listening(app: Celery) -> None:
    """Redis forgets a command to which no worker has subscribed yet."""
    wait_for(lambda: app.control.ping(timeout=0.2))


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("slots", "tickets", "seconds"), [(1, 20, 6), (4, 40, 4)])
def test_a_slot_is_filled_again_as_soon_as_it_is_free(
    app: Celery, slots: int, tickets: int, seconds: float
) -> None:
    """The threads pool needs up to a second for each: with worker_disable_prefetch nothing wakes the hub."""
    taker = Taker()
    with run(app, taker, slots):
        begin = time.monotonic()
        send(app, tickets)
        wait_for(lambda: len(taker.completed) == tickets)
        took = time.monotonic() - begin

    assert took < seconds
    assert taker.most == slots


def test_a_ticket_is_acknowledged_once_it_is_accepted(app: Celery, settings: Settings) -> None:
    taker = Taker(seconds=60)
    with run(app, taker, 2), app.connection_for_read() as connection:
        send(app, 1)
        wait_for(lambda: taker.taken)
        client = connection.default_channel.client
        wait_for(lambda: client.hlen("unacked") == 0)
        assert taker.completed == []
        taker.complete(taker.taken[0])


def test_completing_twice_gives_one_slot_back(app: Celery) -> None:
    taker = Taker(seconds=60)
    with run(app, taker, 1):
        send(app, 3)
        wait_for(lambda: taker.taken)
        for _ in range(2):
            taker.complete(taker.taken[0])
        wait_for(lambda: len(taker.taken) == 2)
        time.sleep(0.2)
        assert len(taker.taken) == 2
        while taker.taken:
            taker.complete(taker.taken.popleft())
            time.sleep(0.05)


def test_a_revoked_task_with_terminate_is_withdrawn(app: Celery) -> None:
    taker = Taker(seconds=60)
    with run(app, taker, 1):
        result = app.send_task("glmq.next")
        wait_for(lambda: taker.taken)
        wait_listening(app)
        app.control.revoke(result.id, terminate=True)
        wait_for(lambda: taker.withdrawn)
    # Celery terminates a task that is accepted at this moment twice.
    assert set(taker.withdrawn) == {taker.taken[0]}


def test_a_pool_that_grows_takes_more_at_a_time(app: Celery) -> None:
    taker = Taker(seconds=60)
    with run(app, taker, 1):
        send(app, 3)
        wait_for(lambda: len(taker.taken) == 1)
        wait_listening(app)
        app.control.pool_grow(1)
        wait_for(lambda: len(taker.taken) == 2)
        assert taker.slots == 2
        app.control.pool_shrink(1)
        wait_for(lambda: taker.slots == 1)
        while taker.taken:
            taker.complete(taker.taken.popleft())
            time.sleep(0.05)


def test_a_pool_whose_app_has_nobody_to_take_tickets_says_how_to_start_one() -> None:
    with pytest.raises(ImproperlyConfigured, match="python -m workers"):
        EnginePool(1, app=Celery("bare", set_as_current=False))
