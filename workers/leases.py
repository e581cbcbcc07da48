"""Keeps what this worker has claimed, from a thread of its own, so that a long prefill cannot lose it; and takes from the dead.

An engine that has work and makes no progress gets no renewal: whoever is stuck must not hold on to requests. Leases that ran out,
anybody's, go back to the queue: every worker does that, and none leads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from redis.exceptions import RedisError

from producer.contract import Failed, RedisUnavailable
from producer.contract.keys import MAX_ATTEMPTS
from producer.ledger import Ledger, calls
from workers.logs import get_logger
from workers.metrics import Metrics
from workers.publisher import Publisher
from workers.running import RunningRequests

logger = get_logger(__name__)

RENEWALS_PER_LEASE = 4
MISSED_RENEWALS = 1.5
"""After so many a worker without a connection is taken for dead. One renewal may be late."""

_OVERDUE = Failed(
    code="deadline_exceeded",
    message="Its deadline passed before the answer was complete. Give it more time, or ask for fewer tokens.",
)


class Leases:
    """Renews all leases in one call, and with them what the worker says of itself (`about`)."""

    def __init__(
        self,
        ledger: Ledger,
        running: RunningRequests,
        publisher: Publisher,
        worker_id: str,
        *,
        lease_seconds: float,
        about: Callable[[], Mapping[str, str | int | float]],
        is_stuck: Callable[[], bool],
        on_reaped: Callable[[], None],
        metrics: Metrics,
        on_stuck: Callable[[], None] = lambda: None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._publisher = publisher
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._about = about
        self._is_stuck = is_stuck
        self._on_stuck = on_stuck
        self._on_reaped = on_reaped
        self._max_attempts = max_attempts
        self._reap_from = 0.0
        self._metrics = metrics
        self._last_renewal = time.monotonic()
        self._is_reachable = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; `glmq status` does not show the worker any more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)
        keys, connection = self._ledger.keys, self._ledger.connection
        try:
            connection.zrem(keys.workers, self._worker_id)
            connection.delete(keys.worker(self._worker_id))
        except RedisError as error:
            logger.debug("cannot sign off: %s", error)

    def _run(self) -> None:
        was_stuck = False
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                self._abort_overdue(begin)
                is_stuck = self._is_stuck()
                if is_stuck and not was_stuck:
                    logger.error("the engine makes no progress: it is killed, and leases are not renewed")
                was_stuck = is_stuck
                if is_stuck:
                    self._on_stuck()
                else:
                    self.renew()
                    self._reap(time.monotonic())
            except Exception:  # the loop is a boundary
                logger.exception("renewing failed")
            pause = self._lease_seconds / RENEWALS_PER_LEASE - (time.monotonic() - begin)
            self._stop.wait(max(min(pause, self._seconds_to_next_end()), 0.01))

    @property
    def renewal_age_seconds(self) -> float:
        """Since Redis last confirmed the leases."""
        return time.monotonic() - self._last_renewal

    def renew(self) -> None:
        """One sign of life, now."""
        held = {running.request_id: running.attempt for running in self._running}
        try:
            renewal = self._ledger.run(
                calls.renew(self._worker_id, held.items(), self._lease_seconds, about=self._about())
            )
        except (RedisUnavailable, RedisError) as error:
            if self._is_reachable:
                logger.warning("leases cannot be renewed: %s", error)
            self._is_reachable = False
            # Nobody could renew meanwhile. When Redis is back, everybody gets the time to do so.
            self._reap_from = time.monotonic() + self._lease_seconds
            return
        self._last_renewal = time.monotonic()
        if not self._is_reachable:
            logger.info("leases are renewed again")
        self._is_reachable = True
        for request_id in renewal.lost:
            running = self._running.get(request_id)
            # With an end: it was being published while the renewal was under way.
            if running is not None and running.end is None and running.attempt == held[request_id]:
                self._metrics.leases_lost.inc()
                logger.info("the lease was lost", request_id=request_id, attempt=running.attempt)
                self._publisher.drop(running)
        for request_id in renewal.cancelled:
            running = self._running.get(request_id)
            if running is not None:
                self._publisher.end(running, "cancelled")

    def _reap(self, now: float) -> None:
        if now < self._reap_from:
            return
        try:
            silent_seconds = self._lease_seconds / RENEWALS_PER_LEASE * MISSED_RENEWALS
            reaped = self._ledger.run(
                calls.reap(max_attempts=self._max_attempts, silent_seconds=silent_seconds)
            )
        except (RedisUnavailable, RedisError) as error:
            logger.debug("cannot reap: %s", error)
            return
        for request_id in reaped:
            logger.info("its worker is silent: back to the queue", request_id=request_id)
        if reaped:
            self._metrics.leases_reaped.inc(len(reaped))
            self._on_reaped()

    def _seconds_to_next_end(self) -> float:
        """Until the next lease of anybody runs out. Leases of the living are renewed long before, so that only somebody's silence makes this
        shorter than a pause: then the reaper comes in time, instead of up to a renewal late. Infinite: nobody holds one, or it is not known."""
        try:
            pipeline = self._ledger.connection.pipeline(transaction=False)
            pipeline.time()
            pipeline.zrange(self._ledger.keys.leases, 0, 0, withscores=True)
            (seconds, microseconds), first = pipeline.execute()
        except RedisError:
            return float("inf")
        if not first:
            return float("inf")
        left = float(first[0][1]) / 1000 - seconds - microseconds / 1e6
        # One that has ended already is not reaped on purpose: after an outage everybody is given time.
        return left + 0.002 if left > 0 else float("inf")

    def _abort_overdue(self, now: float) -> None:
        for running in self._running:
            if running.deadline <= now:
                self._publisher.end(running, _OVERDUE)
