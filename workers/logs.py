"""How a worker's log looks: one line an event, with fields; JSON where nobody watches, columns at a terminal.

Everything goes through the standard library's logging and comes out in one form, Celery's lines, warnings and tracebacks included. Users' text is
left out unless it was asked for. Knows no Celery, no Redis and no settings, so that the engine process has the same log.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Final, Literal, TextIO, get_args

import msgspec
import structlog

Form = Literal["auto", "json", "console"]
FORMS: Final[tuple[Form, ...]] = get_args(Form)
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")

_OTHERS: Final = ("celery", "kombu", "amqp", "billiard")
"""Loggers whose messages may quote the body of a Celery message, which is what a user asked."""
_FIRST_PLACEHOLDER = re.compile(r"%[sr]")

_Processed = MutableMapping[str, Any]


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that takes fields: `logger.info("claimed", request_id=...)`. Never give it a user's text under any name but `text`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def set_up(
    level: str = "INFO", form: Form = "auto", *, with_text: bool = False, stream: TextIO | None = None
) -> None:
    """Our lines at `level`, everybody else's from WARNING, on `stream` (stderr). A second call replaces the first.

    form: auto is console at a terminal and json elsewhere. with_text: users' text may be in the log.
    """
    stream = stream or sys.stderr
    is_console = form == "console" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_CHAIN,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([] if with_text else [_without_text]),
                *(_console(stream) if is_console else _JSON),
            ],
        )
    )
    if not with_text:
        handler.addFilter(_leave_out_bodies)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("workers").setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("workers").critical(
        "uncaught %s", kind.__name__, exc_info=(kind, error or kind(), traceback)
    )


def _without_text(_logger: object, _method: str, event: _Processed) -> _Processed:
    event.pop("text", None)
    return event


def _leave_out_bodies(record: logging.LogRecord) -> bool:
    """What Celery quotes of a message that it cannot use is cut off behind the reason."""
    if record.name.partition(".")[0] in _OTHERS and isinstance(record.msg, str) and "body" in record.msg:
        line = record.msg.strip().partition("\n")[0]
        arguments = record.args if isinstance(record.args, tuple) else ()
        if (placeholder := _FIRST_PLACEHOLDER.search(line)) is not None and arguments:
            record.msg, record.args = line[: placeholder.end()], arguments[:1]
        else:
            record.msg, record.args = line, ()
    return True


def _as_json(event: _Processed, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


def _ordered(_logger: object, _method: str, event: _Processed) -> _Processed:
    """What every line has comes first."""
    first = {name: event.pop(name) for name in ("time", "level", "logger", "event") if name in event}
    return {**first, **event}


def _console(stream: TextIO) -> list[structlog.typing.Processor]:
    renderer = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(),
        timestamp_key="time",
        pad_event_to=0,
        # The prettier ones show the variables of each frame, and these have users' texts.
        exception_formatter=structlog.dev.plain_traceback,
    )
    return [_short_time, renderer]


def _short_time(_logger: object, _method: str, event: _Processed) -> _Processed:
    event.pop("logger", None)
    event["time"] = event["time"][11:19]
    return event


_CHAIN: Final[list[structlog.typing.Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
]
_JSON: Final[list[structlog.typing.Processor]] = [
    structlog.processors.format_exc_info,
    _ordered,
    structlog.processors.JSONRenderer(serializer=_as_json),
]

structlog.configure(
    processors=[
        structlog.stdlib.filter_by_level,
        *_CHAIN[:3],
        structlog.stdlib.PositionalArgumentsFormatter(),
        _CHAIN[-1],
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
    cache_logger_on_first_use=True,
)
