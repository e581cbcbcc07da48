"""What waits in the whole deployment, read from the ledger when somebody scrapes, and no oftener than once a second."""

from __future__ import annotations

import threading
import time
from typing import Final

from redis.exceptions import RedisError

from producer.celery_settings import broker_key_prefix
from producer.contract import RedisUnavailable
from producer.ledger import Ledger, calls

FRESH_SECONDS: Final = 1.0


class BacklogReader:
    """Reads for one model. Safe to share between threads."""

    def __init__(self, ledger: Ledger, namespace: str, model: str) -> None:
        """ledger: with a short timeout, because whoever scrapes does not wait long."""
        self._ledger = ledger
        self._model = model
        self._tickets_key = broker_key_prefix(namespace) + ledger.keys.celery_queue(model)
        self._lock = threading.Lock()
        self._answer: tuple[calls.Backlog, int] | None = None
        self._read_at = float("-inf")

    def read(self) -> tuple[calls.Backlog, int] | None:
        """The backlog, and the number of tickets in the Celery queue; None when Redis does not answer."""
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_SECONDS:
                self._answer = self._read()
                self._read_at = time.monotonic()
            return self._answer

    def _read(self) -> tuple[calls.Backlog, int] | None:
        try:
            backlog = self._ledger.run(calls.backlog(self._model))
            num_tickets: int = self._ledger.connection.llen(self._tickets_key)
        except (RedisUnavailable, RedisError):
            return None
        return backlog, num_tickets
