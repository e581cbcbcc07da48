"""A worker whose broker goes away while it holds tickets that are not acknowledged."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from producer.embedded import EmbeddedServer
from producer.settings import Settings
from tests.workers.test_pool import Taker, wait_for
from workers.app import create_app
from workers.pool import EnginePool, Ticket
from workers.settings import WorkerSettings


class SlowTaker(Taker):
    """Takes tickets and does nothing with them by itself."""

    def take(self, ticket: Ticket) -> None:
        self.taken.append(ticket)

    def complete_later(self, ticket: Ticket) -> None:
        threading.Thread(target=self.complete, args=(ticket,)).start()


@pytest.mark.parametrize("accepted", ["while it is away", "after it is back"])
def test_a_ticket_that_is_held_when_the_connection_is_lost_does_not_end_the_worker(
    settings: Settings, tmp_path: Path, accepted: str, caplog: pytest.LogCaptureFixture
) -> None:
    taker = SlowTaker()
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer.start(tmp_path))
        app = stack.enter_context(create_app(WorkerSettings(queue=settings), server.url, taker))
        app.conf.broker_transport_options["visibility_timeout"] = 1
        # Two slots: the connection also waits for the next ticket when it is lost.
        worker = start_worker(
            app, pool=EnginePool, concurrency=2, perform_ping_check=False, shutdown_timeout=20
        )
        with worker:
            held = send(app)
            wait_for(lambda: taker.taken)

            os.kill(server.pid, signal.SIGKILL)
            wait_for(lambda: "Cannot connect to" in caplog.text)
            if accepted == "while it is away":
                taker.complete_later(taker.taken[0])
            stack.enter_context(EmbeddedServer.start(tmp_path))
            if accepted == "after it is back":
                wait_for(lambda: app.control.ping(timeout=0.2))
                taker.complete_later(taker.taken[0])

            # It was never acknowledged, so it comes again, and new ones come as well.
            wait_for(lambda: taken(taker, held) == 2)
            taker.complete_later(taker.taken[-1])
            new = send(app)
            wait_for(lambda: taken(taker, new) == 1)
            taker.complete_later(taker.taken[-1])
            wait_for(lambda: len(taker.completed) == 3)
    assert "Unrecoverable" not in caplog.text


def send(app: Celery) -> str:
    return str(app.send_task("glmq.next").id)


def taken(taker: Taker, task_id: str) -> int:
    """So often the worker got it."""
    return [ticket.task_id for ticket in taker.taken].count(task_id)
