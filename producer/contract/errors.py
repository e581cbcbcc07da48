"""Every error that a caller can meet, on one page.

::

    GlmqError
    ├── InvalidRequest           a field of a request is wrong; names the field and the remedy
    ├── InvalidSetting           a setting is wrong; names the variable and the remedy
    ├── RedisUnavailable         Redis could not be reached; says which address was tried
    ├── IdempotencyConflict      the same idempotency key was used for a different request
    ├── ConversationBusy         an answer is in progress in this conversation; names its request
    ├── QueueFull                the queue has no room for this request; says when it will
    ├── DeadlineUnmeetable       the request's turn would come after its deadline; says when it would
    ├── UnknownConversation      no such conversation: never begun, forgotten, or its lifetime is over
    ├── UnknownRequest           no such request: never submitted, or its lifetime is over
    ├── NotDead                  this request is no dead letter; says what it is
    ├── DocumentEnded            a piece cannot be tried again: its document has ended; names it
    ├── StreamGone               the events after this token index are no longer kept
    ├── RequestFailed            the request ended in `Failed`; carries its code
    └── RequestCancelled         the request was cancelled; carries the text so far
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError


class GlmqError(Exception):
    """Base of all errors that this package raises on purpose."""


class InvalidRequest(GlmqError, ValueError):
    """A field of a request is missing, unknown or out of range."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}. {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy

    @classmethod
    def from_validation(cls, error: ValidationError) -> InvalidRequest:
        """The first problem that pydantic found, as a sentence with a remedy."""
        first = error.errors(include_url=False)[0]
        # A discriminated union puts its tag in front of the path: not a field of ours.
        field = (
            ".".join(str(part) for part in first["loc"] if part not in ("chat", "summary", "fold"))
            or "request"
        )
        problem = first["msg"].removeprefix("Value error, ").rstrip(".")
        return cls(field, problem, _remedy(first["type"], first.get("ctx") or {}))


_REMEDIES = {
    "missing": "Give it a value.",
    "extra_forbidden": "Remove it, or put it into metadata.",
    "greater_than_equal": "Use {ge} or more.",
    "less_than_equal": "Use {le} or less.",
    "greater_than": "Use a value above {gt}.",
    "less_than": "Use a value below {lt}.",
    "string_too_short": "Give at least {min_length}.",
    "too_short": "Give at least {min_length}.",
    "string_too_long": "Give at most {max_length}.",
    "too_long": "Give at most {max_length}.",
    "string_pattern_mismatch": "Use a value that matches {pattern}.",
    "literal_error": "Use {expected}.",
    "value_error": "Correct the value.",
    "json_invalid": "Send valid JSON.",
    "union_tag_invalid": "Set kind to 'chat' or 'summary'.",
    "union_tag_not_found": "Set kind to 'chat' or 'summary'.",
}


_TYPES = {"tuple": "list", "dict": "object", "named_tuple": "[query, answer]"}
"""What a caller who writes JSON calls them."""


def _remedy(kind: str, context: dict[str, Any]) -> str:
    """What to do about a pydantic error of this type."""
    if kind in _REMEDIES:
        return _REMEDIES[kind].format(**context)
    expected = kind.removesuffix("_type").removesuffix("_parsing")
    return f"Send a value of type {_TYPES.get(expected, expected.replace('_', ' '))}."


class InvalidSetting(GlmqError, ValueError):
    """A setting (an environment variable or an option) has a value that cannot be used."""

    def __init__(self, name: str, problem: str, remedy: str) -> None:
        super().__init__(f"{name}: {problem}. {remedy}")
        self.name = name


class RedisUnavailable(GlmqError, ConnectionError):
    """Redis did not answer. The message says which address was tried and what to do."""

    def __init__(self, address: str, reason: object) -> None:
        super().__init__(
            f"Redis at {address} cannot be reached ({reason}). "
            "Start one with `glmq up`, or set REDIS_URL to a server that runs."
        )
        self.address = address


class IdempotencyConflict(GlmqError):
    """This idempotency key belongs to a request with a different body."""

    def __init__(self, key: str, request_id: str) -> None:
        super().__init__(
            f"idempotency_key: {key!r} was used for request {request_id} with a different body. "
            "Use a new key for a new request."
        )
        self.request_id = request_id


class ConversationBusy(GlmqError):
    """A conversation has one answer at a time."""

    code = "conversation_busy"

    def __init__(self, conversation_id: str | None, request_id: str) -> None:
        name = "the conversation" if conversation_id is None else repr(conversation_id)
        super().__init__(
            f"conversation_id: {name} is busy with request {request_id}. Wait for its answer, or cancel it."
        )
        self.conversation_id = conversation_id
        self.request_id = request_id


class QueueFull(GlmqError):
    """The queue has no room for this request now. Nothing of it was kept; `retry_after` seconds from now there is room, by estimate."""

    code = "queue_full"

    def __init__(self, model: str, tenant: str | None, retry_after: float, bound: str) -> None:
        whose = (
            f"the queue of {model!r}"
            if tenant is None
            else f"the part of tenant {tenant!r} in the queue of {model!r}"
        )
        super().__init__(
            f"{whose} is full ({bound}). Submit the same request again in {retry_after:.1f} s, "
            + (
                "or give the model more workers."
                if tenant is None
                else "or raise its bound: `glmq tenants set`."
            )
        )
        self.tenant = tenant
        """Whose part is full; None: the whole queue."""
        self.retry_after = retry_after
        self.bound = bound


class DeadlineUnmeetable(GlmqError):
    """A request's turn would come after its deadline, by estimate. Nothing of it was kept."""

    code = "deadline_unmeetable"

    def __init__(self, model: str, deadline_seconds: float, wait_seconds: float, retry_after: float) -> None:
        super().__init__(
            f"deadline_seconds: {deadline_seconds:g} s are not enough: requests of this kind wait {wait_seconds:.1f} s in the queue "
            f"of {model!r} now. Give it more time or a more urgent priority, or submit it again in {retry_after:.1f} s."
        )
        self.wait_seconds = wait_seconds
        """Until its turn, by estimate."""
        self.retry_after = retry_after
        """Seconds after which the deadline can be met, by estimate, and those who were refused before have been let in."""


class UnknownConversation(GlmqError, LookupError):
    """Nothing is known about this conversation."""

    def __init__(self, conversation_id: str) -> None:
        super().__init__(
            f"conversation_id: nothing is known about {conversation_id!r}. "
            "It was never begun, was forgotten, or had its last turn longer ago than conversations are kept."
        )
        self.conversation_id = conversation_id


class UnknownRequest(GlmqError, LookupError):
    """Nothing is known about this request id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id: nothing is known about {request_id!r}. "
            "It was never submitted, or it ended longer ago than results are kept."
        )
        self.request_id = request_id


class NotDead(GlmqError):
    """Only a dead letter can be shown, tried again or dropped as one."""

    def __init__(self, request_id: str, state: str) -> None:
        super().__init__(
            f"request_id: {request_id!r} is {state}, not a dead letter. `glmq dead list` has those that are."
        )
        self.request_id = request_id
        self.state = state


class DocumentEnded(GlmqError):
    """A piece of a text does not go on without its document."""

    def __init__(self, request_id: str, document_id: str) -> None:
        super().__init__(
            f"request_id: {request_id!r} is a piece of {document_id!r}, which has failed with it. "
            "Submit the whole text again, and drop this one."
        )
        self.request_id = request_id
        self.document_id = document_id


class StreamGone(GlmqError, LookupError):
    """The events of this request are no longer kept; the request is not run again."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id: the stream of {request_id!r} is gone: it ended longer ago than streams are kept. "
            "Submit the request again if its answer is still wanted."
        )
        self.request_id = request_id


class RequestFailed(GlmqError):
    """The request ended without an answer. `code` is stable; the message says what to do."""

    def __init__(self, request_id: str, code: str, message: str) -> None:
        super().__init__(f"request {request_id} failed ({code}): {message}")
        self.request_id = request_id
        self.code = code
        self.message = message


class RequestCancelled(GlmqError):
    """The request was cancelled before its answer was complete; `text` is what came until then."""

    def __init__(self, request_id: str, text: str) -> None:
        super().__init__(f"request {request_id} was cancelled after {len(text)} characters")
        self.request_id = request_id
        self.text = text
