"""The log: one form for everybody's lines, and no user's text in it unless that was asked for."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.worker.consumer import consumer as celery_consumer
from structlog.contextvars import bound_contextvars

from producer.contract import ChatRequest, decode_event, decode_request
from producer.contract.conversation import ArchivedTurn
from workers import logs

SECRET = "Rumpelstilzchen"
SetUp = Callable[..., "Log"]


class Log(io.StringIO):
    """A stream that can be read as lines of JSON."""

    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def set_up() -> Iterator[SetUp]:
    """Logs to a stream of the test's; afterwards logging is as it was."""
    root, ours = logging.getLogger(), logging.getLogger("workers")
    before = (root.handlers[:], root.level, ours.level, sys.excepthook, threading.excepthook)

    def begin(
        level: str = "INFO", form: logs.Form = "auto", *, is_terminal: bool = False, **options: Any
    ) -> Log:
        stream = Log()
        stream.is_terminal = is_terminal
        logs.set_up(level, form, stream=stream, **options)
        return stream

    yield begin
    root.handlers[:], level, our_level, sys.excepthook, threading.excepthook = before
    root.setLevel(level)
    ours.setLevel(our_level)
    logging.captureWarnings(False)


logger = logs.get_logger("workers.test")


def test_a_line_is_json_where_nobody_watches(set_up: SetUp) -> None:
    log = set_up()

    logger.info("ready: %s", "glm", request_id="r1", seconds=0.5)

    (line,) = log.lines
    assert list(line)[:4] == ["time", "level", "logger", "event"]
    assert line["time"].endswith("Z")
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "workers.test",
        "event": "ready: glm",
        "request_id": "r1",
        "seconds": 0.5,
    }


def test_a_line_is_short_and_coloured_at_a_terminal(set_up: SetUp) -> None:
    log = set_up(is_terminal=True)

    logger.warning("released", request_id="r1")

    shown = log.getvalue()
    assert "released" in shown
    assert "r1" in shown
    assert "\x1b[" in shown
    assert not shown.startswith("{")


@pytest.mark.parametrize(("form", "is_json"), [("json", True), ("console", False)])
def test_the_form_can_be_chosen(set_up: SetUp, form: logs.Form, is_json: bool) -> None:
    log = set_up(form=form, is_terminal=is_json)

    logger.info("hello")

    assert log.getvalue().startswith("{") is is_json
    assert ("\x1b[" in log.getvalue()) is False


def test_everybody_s_lines_have_the_same_form(set_up: SetUp) -> None:
    log = set_up()

    logging.getLogger("workers.other").info("plain %d", 1, extra={"request_id": "r2"})
    logging.getLogger("celery.worker").warning("consumer: Connection to broker lost.")
    logging.getLogger("kombu").error("broken")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)

    assert [(line["logger"], line["level"]) for line in log.lines] == [
        ("workers.other", "info"),
        ("celery.worker", "warning"),
        ("kombu", "error"),
        ("py.warnings", "warning"),
    ]
    assert log.lines[0]["request_id"] == "r2"
    assert "deprecated" in log.lines[3]["event"]


def test_others_are_heard_from_warnings_on_and_we_from_the_level(set_up: SetUp) -> None:
    log = set_up("WARNING")
    logging.getLogger("celery").info("chatter")
    logger.info("not now")
    logger.warning("now")
    assert [line["event"] for line in log.lines] == ["now"]

    log = set_up("DEBUG")
    logging.getLogger("celery").info("chatter")
    logger.debug("detail")
    assert [line["event"] for line in log.lines] == ["detail"]


def test_what_happens_for_a_request_carries_its_id(set_up: SetUp) -> None:
    log = set_up()

    with bound_contextvars(request_id="r3"):
        logger.info("deep down")
        logging.getLogger("workers.other").warning("also here")
    logger.info("elsewhere")

    assert [line.get("request_id") for line in log.lines] == ["r3", "r3", None]


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_variables(set_up: SetUp, form: logs.Form) -> None:
    log = set_up(form=form)
    query = SECRET.upper()

    try:
        raise ValueError(f"{len(query)} characters")
    except ValueError:
        logger.exception("failed", request_id="r4")

    shown = log.getvalue()
    assert "ValueError: 15 characters" in shown
    assert "test_logs.py" in shown
    assert SECRET.upper() not in shown
    if form == "json":
        assert len(log.lines) == 1


def test_a_request_that_is_wrong_does_not_show_what_it_said(set_up: SetUp) -> None:
    """pydantic quotes the input, unless it is told not to."""
    log = set_up()

    wrong: list[Callable[[], object]] = [
        lambda: ChatRequest(query=SECRET, history=[SECRET], priority=SECRET),  # type: ignore[arg-type]
        lambda: decode_request(
            json.dumps({"kind": "chat", "query": SECRET, "tenant": f"{SECRET} / {SECRET}"})
        ),
        lambda: decode_request(json.dumps({"kind": "summary", "text": SECRET, "style": SECRET})),
        lambda: decode_request(f'{{"kind": "chat", "query": "{SECRET}'),
        lambda: decode_event(json.dumps({"type": "token", "ids": [1], "texts": SECRET})),
        lambda: ArchivedTurn.model_validate_json(json.dumps({"query": [SECRET]})),
    ]
    for build in wrong:
        try:
            build()
        except ValueError:
            logger.exception("could not be begun")

    assert len(log.lines) == len(wrong)
    assert SECRET not in log.getvalue()


@pytest.mark.parametrize("with_text", [False, True])
def test_text_is_left_out_unless_it_is_asked_for(set_up: SetUp, with_text: bool) -> None:
    log = set_up(with_text=with_text)

    logger.info("answered", request_id="r5", text=SECRET)

    (line,) = log.lines
    assert line.get("text") == (SECRET if with_text else None)


def test_messages_that_celery_cannot_use_are_not_quoted(set_up: SetUp) -> None:
    log = set_up()
    headers = {"argsrepr": SECRET, "id": "t1"}

    celery_consumer.error(
        celery_consumer.UNKNOWN_TASK_ERROR, KeyError("glmq.chatt"), SECRET, headers, {"queue": "q"}
    )
    celery_consumer.error(celery_consumer.INVALID_TASK_ERROR, ValueError("no id"), SECRET)
    celery_consumer.crit(
        celery_consumer.MESSAGE_DECODE_ERROR, ValueError("not JSON"), "text", "utf-8", repr(headers), SECRET
    )
    celery_consumer.warn(celery_consumer.UNKNOWN_FORMAT, f"body: {SECRET}")

    assert [line["event"] for line in log.lines] == [
        "Received unregistered task of type 'glmq.chatt'",
        "Received invalid task message: no id",
        "Can't decode message body: ValueError('not JSON')",
        "Received and deleted unknown message.  Wrong destination?!?",
    ]
    assert SECRET not in log.getvalue()


def test_with_text_celery_s_quotes_are_there(set_up: SetUp) -> None:
    log = set_up(with_text=True)

    celery_consumer.error(celery_consumer.INVALID_TASK_ERROR, ValueError("no id"), SECRET)

    assert SECRET in log.getvalue()


def test_a_chinese_text_is_written_as_it_is(set_up: SetUp) -> None:
    log = set_up()
    logger.info("对话")
    assert "对话" in log.getvalue()


def test_a_value_that_json_does_not_know_is_written_as_text(set_up: SetUp) -> None:
    log = set_up()
    logger.info("loaded", folder=Path("here"), problem=ValueError("why"))
    assert (log.lines[0]["folder"], log.lines[0]["problem"]) == ("here", "why")


def test_what_nobody_caught_is_in_the_log() -> None:
    script = """
import threading
from workers import logs
logs.set_up()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("the end")
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
    )

    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["uncaught ZeroDivisionError", "uncaught RuntimeError"]
    assert "the end" in lines[1]["exception"]
