"""Tells a model's workers through Celery that there is work. What the work is, the ledger knows.

A ticket that is lost costs its request a second at most: workers with a free slot also look for queued work by themselves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery import Celery
from celery.utils import uuid
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel, Transport

from producer.celery_settings import TICKET_TASK, celery_settings
from producer.contract.keys import Keys

logger = logging.getLogger(__name__)


class Tickets:
    """Sends tickets over Celery's own pool of connections. Safe to share between threads and to carry over a fork."""

    def __init__(self, redis_url: str, keys: Keys) -> None:
        self._redis_url = redis_url
        self._keys = keys
        self._app = self._create_app()
        self._pid = os.getpid()

    def send(self, model: str) -> bool:
        """Send one. Answers False, and warns, if the broker took none: the request is in the ledger all the same."""
        if self._pid != os.getpid():
            # The sockets in the pool belong to the parent.
            self._app, self._pid = self._create_app(), os.getpid()
        # The message that `send_task` would send; its routing and signals, which nobody needs here, would double the time of a submit.
        message = self._app.amqp.as_task_v2(uuid(), TICKET_TASK, ignore_result=True)
        try:
            with self._app.producer_pool.acquire(block=True) as producer:
                producer.publish(
                    message.body,
                    exchange="",
                    routing_key=self._keys.celery_queue(model),
                    headers=message.headers,
                    serializer="json",
                    # Once more at once: a pooled connection may have died with a server that is back by now.
                    retry=True,
                    retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
                    **message.properties,
                )
        except (OperationalError, redis.RedisError) as error:
            logger.warning("the ticket for a request of model %s was not sent: %s", model, error)
            return False
        return True

    def close(self) -> None:
        self._app.close()

    def _create_app(self) -> Celery:
        # Never the current app: the caller may have one of its own.
        app = Celery("glmq", set_as_current=False)
        app.conf.update(celery_settings(self._redis_url, self._keys.namespace))
        if self._redis_url.startswith(("redis://", "rediss://")):
            app.conf.broker_transport = f"{__name__}:SteadyTransport"
        return app


class SteadyChannel(Channel):
    """Publishes with one client. kombu makes one for each message, which is a third of a ticket's cost in the caller."""

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        yield client or self.client


class SteadyTransport(Transport):
    """kombu's transport, with such channels."""

    Channel = SteadyChannel
