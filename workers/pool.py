"""Celery's side of the worker: a pool whose slots are the engine's.

A message becomes a `Ticket` and goes to a taker (the worker), which accepts it and completes it from threads of its own; the slot stays taken
in between. It knows nothing about ledgers, prompts or engines.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from celery.concurrency.base import BasePool
from celery.exceptions import ImproperlyConfigured, WorkerShutdown
from celery.worker import state as celery_state

logger = logging.getLogger(__name__)


class Ticket:
    """One Celery message in this worker: accepted once its work is safe elsewhere, completed when its slot is free again."""

    def __init__(
        self,
        pool: EnginePool,
        pid: int,
        *,
        task_name: str,
        task_id: str,
        args: list[Any],
        kwargs: dict[str, Any],
        accept_callback: Callable[[int, float], object] | None,
        callback: Callable[[tuple[bool, object, float]], object] | None,
    ) -> None:
        self.pid = pid
        """Not of a process: the number under which Celery names this ticket when it wants it terminated."""
        self.task_name = task_name
        self.task_id = task_id
        self.args = args
        self.kwargs = kwargs
        self._pool = pool
        self._accept_callback = accept_callback
        self._callback = callback
        self._received = time.monotonic()

    def accept(self) -> None:
        """Acknowledge the message: from here on its work must not depend on it. Not from the hub's thread."""
        accept_callback, self._accept_callback = self._accept_callback, None
        if accept_callback is not None:
            accept_callback(self.pid, time.monotonic())

    def complete(self) -> None:
        """Give the slot back. A second call does nothing. Not from the hub's thread."""
        self.accept()
        callback, self._callback = self._callback, None
        if callback is None:
            return
        try:
            callback((False, None, time.monotonic() - self._received))
        finally:
            self._pool.forget(self)

    def terminate(self, signal: int | None = None) -> None:
        """What Celery calls on the apply result of a task that was revoked with `terminate`."""
        self._pool.terminate_job(self.pid, signal)


class TicketTaker(Protocol):
    """Who does the work. Methods may be called from the hub's thread and must not block, `start` and `stop` excepted."""

    def start(self, check_interrupted: Callable[[], None]) -> None:
        """Get ready to work; blocks until then, and calls `check_interrupted`, which may raise, while it waits."""

    def take(self, ticket: Ticket) -> None:
        """Accept it and complete it some time, from another thread."""

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody wants what this ticket stands for any more: cancel it. May come more than once for a ticket."""

    def resize(self, slots: int) -> None:
        """Work on at most so many requests at a time."""

    def drain(self) -> None:
        """Start nothing new. The second call means: do not wait for what runs either."""

    def stop(self) -> None:
        """Finish within the grace time or give back what runs, then end everything that `start` began."""


class StartFailed(Exception):
    """The taker cannot work on this machine or with these settings. The message is for the operator."""


class EnginePool(BasePool):  # type: ignore[misc]
    """`celery worker -P custom` with CELERY_CUSTOM_WORKER_POOL=workers.pool:EnginePool, or the app's `worker_pool`."""

    signal_safe = False
    """Stopping waits for running requests: not inside a signal handler."""
    body_can_be_buffer = True
    task_join_will_block = False
    uses_semaphore = False

    limit: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        taker: TicketTaker | None = getattr(self.app, "ticket_taker", None)
        if taker is None:
            raise ImproperlyConfigured(
                "EnginePool needs an app that a worker was composed for. Start it with `python -m workers`, "
                "or with `celery -A workers.worker worker`."
            )
        self._taker = taker
        self._hub: Any = None
        self._pids = itertools.count(1)
        # Celery's Request keeps only a weak reference to what on_apply returns: these are the strong ones.
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()

    # --- life ---------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        self._taker.resize(self.limit)
        try:
            self._taker.start(celery_state.maybe_shutdown)
        except StartFailed as error:
            logger.critical("cannot start: %s", error)
            raise WorkerShutdown(1) from error

    def register_with_event_loop(self, loop: Any) -> None:
        """Called again after each reconnect."""
        self._hub = loop

    def on_stop(self) -> None:
        """The hub does not run any more: what the taker completes here reaches Celery from the taker's own threads."""
        self._taker.stop()

    def on_terminate(self) -> None:
        self._taker.stop()

    # --- tickets ------------------------------------------------------------------------------------------------

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        callback: Callable[[Any], object] | None = None,
        accept_callback: Callable[[int, float], object] | None = None,
        **_: Any,
    ) -> Ticket:
        """`target` would run the task's body here and now; the taker does the work instead."""
        task_name, task_id, message, *_body = args
        ticket = Ticket(
            self,
            next(self._pids),
            task_name=task_name,
            task_id=task_id,
            args=list(message.get("args") or ()),
            kwargs=dict(message.get("kwargs") or {}),
            accept_callback=accept_callback,
            callback=callback,
        )
        with self._lock:
            self._tickets[ticket.pid] = ticket
        self._taker.take(ticket)
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """The ticket is completed. Its slot is free, which the hub must be told: with worker_disable_prefetch nothing else wakes it."""
        with self._lock:
            self._tickets.pop(ticket.pid, None)
        self.wake_hub()

    def wake_hub(self) -> None:
        """Make the event loop look again; from any thread but its own."""
        if self._hub is not None:
            self._hub.call_soon(_nothing)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        with self._lock:
            ticket = self._tickets.get(pid)
        if ticket is not None:
            self._taker.withdraw(ticket)

    # --- size ---------------------------------------------------------------------------------------------------

    def grow(self, n: int = 1) -> None:
        self.limit += n
        self._taker.resize(self.limit)

    def shrink(self, n: int = 1) -> None:
        self.limit = max(self.limit - n, 1)
        self._taker.resize(self.limit)

    @property
    def num_processes(self) -> int:
        """Celery's word for the number of slots."""
        return self.limit

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        with self._lock:
            info["tickets"] = len(self._tickets)
        return info


def _nothing() -> None:
    """What call_soon is given when only its waking is wanted."""
