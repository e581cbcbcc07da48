"""Tickets: the message that Celery itself would send, and what happens when it cannot be sent."""

from __future__ import annotations

import base64
import json
import os
import socket
from typing import Any

import pytest
from celery import Celery

from producer.celery_settings import TICKET_TASK, celery_settings
from producer.contract.keys import Keys
from producer.ledger import Ledger
from producer.settings import Settings
from producer.tickets import Tickets


@pytest.fixture
def tickets(redis_url: str, keys: Keys) -> Tickets:
    return Tickets(redis_url, keys)


def sent(ledger: Ledger, keys: Keys) -> list[dict[str, Any]]:
    queue = f"{keys.namespace}:{keys.celery_queue('m')}"
    return [json.loads(message) for message in ledger.connection.lrange(queue, 0, -1)]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    for name in ("id", "root_id"):
        del message["headers"][name]
    # No result is sent, so there is nobody to send it to.
    for name in ("correlation_id", "delivery_tag", "reply_to"):
        del message["properties"][name]
    return message


def test_a_ticket_is_the_message_that_send_task_would_send(
    tickets: Tickets, ledger: Ledger, keys: Keys, redis_url: str
) -> None:
    tickets.send("m")
    with Celery(set_as_current=False) as app:
        app.conf.update(celery_settings(redis_url, keys.namespace))
        app.send_task(TICKET_TASK, queue=keys.celery_queue("m"), ignore_result=True)
    ours, theirs = (without_ids(message) for message in reversed(sent(ledger, keys)))
    assert ours == theirs
    assert ours["headers"]["task"] == "glmq.next"
    assert json.loads(base64.b64decode(ours["body"]))[:2] == [[], {}]
    tickets.close()


def test_tickets_do_not_become_the_application_s_current_celery_app(tickets: Tickets) -> None:
    from celery import current_app

    tickets.send("m")
    assert current_app.main != "glmq"
    tickets.close()


def test_a_broker_that_is_not_there_costs_a_warning_and_no_request(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tickets = Tickets(f"redis://127.0.0.1:{port}/0", keys)
    assert tickets.send("m") is False
    assert "the ticket for a request of model m was not sent" in caplog.text
    tickets.close()


def test_a_lost_connection_is_replaced(tickets: Tickets, ledger: Ledger, keys: Keys) -> None:
    def connections() -> set[str]:
        return {each["id"] for each in ledger.connection.client_list(_type="normal")}

    others = connections()
    assert tickets.send("m")
    own = connections() - others
    assert own
    for each in own:
        ledger.connection.client_kill_filter(_id=each)
    assert tickets.send("m")
    assert len(sent(ledger, keys)) == 2
    tickets.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_uses_connections_of_its_own(
    tickets: Tickets, ledger: Ledger, keys: Keys, settings: Settings
) -> None:
    tickets.send("m")
    child = os.fork()
    if child == 0:
        os._exit(0 if all(tickets.send("m") for _ in range(20)) else 1)
    for _ in range(20):
        assert tickets.send("m")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(sent(ledger, keys)) == 41
    tickets.close()
