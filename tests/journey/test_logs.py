"""The log of a real worker: lines of JSON with request ids, and no user's text unless it was asked for."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from producer.celery_settings import celery_settings
from producer.client import Client
from producer.contract import RequestFailed, SamplingParams
from producer.settings import Settings

pytestmark = [pytest.mark.journey, pytest.mark.timeout(180)]

SECRET = "Rumpelstilzchen"
NewWorker = Callable[..., Any]


def lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines()]


@pytest.fixture
def service(settings: Settings) -> Any:
    """A program that knows Celery alone."""
    app = Celery("service", set_as_current=False)
    app.conf.update(celery_settings(settings.redis_url or "", settings.namespace))
    yield (
        lambda name, **kwargs: (
            app.send_task(
                name,
                kwargs=kwargs,
                task_id=uuid.uuid4().hex,
                queue=settings.keys.celery_queue(settings.model),
            ).id
        )
    )
    app.close()


def test_every_line_has_a_form_and_requests_have_their_id(
    new_worker: NewWorker,
    tiny_checkpoint: Path,
    client: Client,
    service: Callable[..., str],
    settings: Settings,
) -> None:
    worker = new_worker(checkpoint=tiny_checkpoint)
    sampling = SamplingParams(max_new_tokens=4, seed=1)
    answered = client.chat(SECRET, sampling=sampling, history=[(SECRET, SECRET)])
    answered.result(60)
    failed = client.chat(SECRET, adapter="unheard-of")
    with pytest.raises(RequestFailed):
        failed.result(60)
    refused = service("glmq.chat", query=SECRET, priority=SECRET, colour=SECRET)
    service("glmq.chatt", query=SECRET)
    deadline = time.monotonic() + 30
    while "Received unregistered task" not in worker.log or refused not in worker.log:
        assert time.monotonic() < deadline, worker.log
        time.sleep(0.05)

    assert worker.end() == 0

    events = lines(worker.log)
    assert all({"time", "level", "logger", "event"} <= event.keys() for event in events)
    by_id = {event["request_id"]: event for event in events if "request_id" in event}
    assert by_id[answered.request_id]["event"] == "answered"
    assert by_id[answered.request_id]["tokens"] == 4
    assert (by_id[failed.request_id]["event"], by_id[failed.request_id]["code"]) == (
        "failed",
        "unknown_adapter",
    )
    assert by_id[refused]["code"] == "invalid_request"
    assert SECRET not in worker.log


def test_with_leave_the_log_has_question_and_answer(
    new_worker: NewWorker, tiny_checkpoint: Path, client: Client
) -> None:
    worker = new_worker(checkpoint=tiny_checkpoint, GLMQ_LOG_TEXT="1")

    finished = client.chat(SECRET, sampling=SamplingParams(max_new_tokens=8, seed=1)).result(60)

    worker.wait_for_log('"event":"answered"')
    texts = {event["event"]: event.get("text") for event in lines(worker.log)}
    assert (texts["claimed"], texts["answered"]) == (SECRET, finished.text)
