"""The Celery tasks: the ticket, and what a service that speaks only Celery may send by name.

Only names and how their arguments become a request. The pool never runs a task's body.
"""

from __future__ import annotations

import json
from typing import Any, Final

from celery import Celery

from producer.celery_settings import CHAT_TASK, SUMMARIZE_TASK, TICKET_TASK
from producer.contract import InvalidRequest, Request, decode_request

_KINDS: Final = {CHAT_TASK: "chat", SUMMARIZE_TASK: "summary"}
"""Tasks whose keyword arguments are the fields of a request of this kind; the task id becomes the request id."""


def carries_request(task_name: str) -> bool:
    """Whether a message of this task brings a request along that is not in the ledger yet."""
    return task_name in _KINDS


def request_of(task_name: str, args: list[Any], kwargs: dict[str, Any], *, model: str) -> Request:
    """The request that a plain task carries, for the model of the queue on which it came.

    Raises InvalidRequest.
    """
    if args:
        raise InvalidRequest("args", f"{task_name} takes no positional arguments", "Send keyword arguments.")
    kind = _KINDS[task_name]
    if kwargs.get("kind", kind) != kind:
        raise InvalidRequest(
            "kind", f"{kwargs['kind']!r} is not what {task_name} does", f"Use {kind!r}, or leave it out."
        )
    # As JSON, as it came: the contract is strict, and only JSON may write a tuple as a list.
    request = decode_request(json.dumps({**kwargs, "kind": kind}))
    if request.model is None:
        return request.replace(model=model)
    if request.model != model:
        raise InvalidRequest(
            "model",
            f"{request.model!r} is not served from this queue",
            f"Send it to the queue of {request.model!r}, or leave model out to mean {model!r}.",
        )
    return request


def register_tasks(app: Celery) -> None:
    """Make the names known to this app's worker."""
    for name in (TICKET_TASK, CHAT_TASK, SUMMARIZE_TASK):
        app.task(_never_run, name=name, ignore_result=True, acks_late=False)


def _never_run(*_args: Any, **_kwargs: Any) -> None:
    raise NotImplementedError(
        "glmq's tasks run in workers.pool:EnginePool. Start the worker with `python -m workers`."
    )
