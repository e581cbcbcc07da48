"""Cancellations reach the worker at once, also after its connection was cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from producer.contract.control import AdapterCommand, LoadAdapterCommand, encode_command
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
    for message in ("dance", "cancel", "", "load-adapter {", "cancel abc"):
        publish(redis_url, settings, message)

    wait_for(lambda: heard == ["abc"])


def test_a_cut_connection_is_made_again(heard: list[str], redis_url: str, settings: Settings) -> None:
    publish(redis_url, settings, "cancel one")
    wait_for(lambda: heard == ["one"])

    with redis.Redis.from_url(redis_url) as connection:
        connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    # A server may count a connection that it is about to close among those that have heard.
    def tell() -> list[str]:
        publish(redis_url, settings, "cancel two")
        return heard

    wait_for(lambda: tell()[-1] == "two")
    assert set(heard) == {"one", "two"}


def test_a_command_about_adapters_arrives(redis_url: str, settings: Settings) -> None:
    commands: list[AdapterCommand] = []
    connection = connect(redis_url, timeout_seconds=2, retries=0)
    control = Control(connection, f"{settings.namespace}:control", lambda _: None, commands.append)
    control.start()
    load = LoadAdapterCommand(command_id="c1", name="law", folder="/adapters/law")
    publish(redis_url, settings, encode_command(load))

    wait_for(lambda: commands == [load])
    control.stop()
