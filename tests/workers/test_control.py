"""Cancellations reach the worker at once, also after its connection was cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from producer.ledger import connect
from producer.settings import Settings
from workers.control import Control


@pytest.fixture
def heard(redis_url: str, settings: Settings) -> Iterator[list[str]]:
    messages: list[str] = []
    control = Control(
        connect(redis_url, timeout_seconds=2, retries=0), f"{settings.namespace}:control", messages.append
    )
    control.start()
    yield messages
    control.stop()


def publish(redis_url: str, settings: Settings, message: str) -> None:
    """Tell it to whoever listens, once somebody does."""
    with redis.Redis.from_url(redis_url) as connection:
        deadline = time.monotonic() + 5
        while not connection.publish(f"{settings.namespace}:control", message):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cancellation_arrives(heard: list[str], redis_url: str, settings: Settings) -> None:
    publish(redis_url, settings, "cancel abc")

    wait_for(lambda: heard == ["abc"])


def test_what_is_not_understood_is_passed_over(heard: list[str], redis_url: str, settings: Settings) -> None:
    for message in ("dance", "cancel", "", "cancel abc"):
        publish(redis_url, settings, message)

    wait_for(lambda: heard == ["abc"])


def test_a_cut_connection_is_made_again(heard: list[str], redis_url: str, settings: Settings) -> None:
    publish(redis_url, settings, "cancel one")
    wait_for(lambda: heard == ["one"])

    with redis.Redis.from_url(redis_url) as connection:
        connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    publish(redis_url, settings, "cancel two")

    wait_for(lambda: heard == ["one", "two"])
