"""Celery's worker program in this process, with signals that mean draining and a log that is ours."""

from __future__ import annotations

import signal
import threading
import warnings
from types import FrameType
from typing import Any

from celery import Celery, signals
from celery.apps.worker import Worker as CeleryWorker
from celery.exceptions import SecurityWarning
from celery.worker import state as celery_state
from kombu.asynchronous import get_event_loop

DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ForegroundWorker(CeleryWorker):  # type: ignore[misc]
    """Stops in one way only: the first signal drains, the second does not wait for running requests, and the exit code is 0.

    Celery's own handlers give Ctrl-C an exit code of failure, and cancel all tasks from inside the second signal's handler.
    """

    def install_platform_tweaks(self, worker: CeleryWorker) -> None:
        """Celery calls this before it starts the pool."""

        def on_signal(_signal: int, _frame: FrameType | None) -> None:
            celery_state.should_stop = 0
            # Not in the handler itself: the interrupted thread may hold a lock that draining needs.
            threading.Thread(target=self._drain, name="drain", daemon=True).start()

        for number in DRAIN_SIGNALS:
            signal.signal(number, on_signal)

    def _drain(self) -> None:
        self.app.ticket_taker.drain()
        hub: Any = get_event_loop()
        if hub is not None:
            # Else it would notice up to a second later.
            hub.call_soon(lambda: None)


def run_celery(app: Celery) -> int:
    """Take tickets until a signal comes. Returns the exit code."""
    worker = ForegroundWorker(
        app=app,
        hostname=f"glmq@{app.ticket_taker.name}",
        quiet=True,
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    return worker.exitcode or 0


def keep_log() -> None:
    """The log stays as it was set up (`logs.set_up`), whatever Celery would make of it."""
    # About pickled messages; ours are JSON, and in a container everybody is root.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    # Somebody is connected, so Celery does not configure logging.
    signals.setup_logging.connect(_keep_log, weak=False)


def _keep_log(**_: Any) -> None:
    return None
