"""Hears what others tell this worker over Redis: cancellations, work that waits, and commands about adapters.

A lost message costs a moment, not the cancellation: it is also in the ledger, which answers with it at the next flush or renewal.
Whoever gives a command about adapters waits for a reply, and sees that there is none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import redis
from redis.exceptions import RedisError

from producer.contract.control import AdapterCommand, CancelCommand, LookCommand, decode_command

logger = logging.getLogger(__name__)

_LISTEN_SECONDS = 0.5
"""How long one wait for a message lasts; stopping takes at most so long."""


class Control:
    """Listens on one channel, on a connection of its own, and comes back after a loss of it."""

    def __init__(
        self,
        connection: redis.Redis,
        channel: str,
        on_cancel: Callable[[str], None],
        on_adapter: Callable[[AdapterCommand], None] | None = None,
        on_look: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._on_cancel = on_cancel
        self._on_adapter = on_adapter
        self._on_look = on_look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except (RedisError, OSError) as error:
                logger.debug("control channel: %s", error)
                self._stop.wait(_LISTEN_SECONDS)
            except Exception:  # the loop is a boundary
                logger.exception("control channel")
                self._stop.wait(_LISTEN_SECONDS)

    def _listen(self) -> None:
        pubsub: Any = self._connection.pubsub  # redis-py has no hints for it
        with pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(self._channel)
            while not self._stop.is_set():
                message = channel.get_message(timeout=_LISTEN_SECONDS)
                if message is not None:
                    self._on_message(str(message["data"]))

    def _on_message(self, data: str) -> None:
        try:
            command = decode_command(data)
        except ValueError as error:
            logger.warning("control channel: not understood: %s", str(error).partition("\n")[0])
            return
        if isinstance(command, CancelCommand):
            self._on_cancel(command.request_id)
        elif isinstance(command, LookCommand):
            if self._on_look is not None:
                self._on_look()
        elif self._on_adapter is not None:
            self._on_adapter(command)
