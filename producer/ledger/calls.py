"""One function a script: which one, with which arguments, and what its answer means.

Nothing here touches a connection: `Ledger` and `AsyncLedger` run the same calls.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar, cast
from urllib.parse import quote

from producer.contract.errors import IdempotencyConflict, InvalidRequest, UnknownRequest
from producer.contract.events import Event, Failed, Finished, Started, Token, decode_event, encode_event
from producer.contract.keys import IDEMPOTENCY_SECONDS, RETENTION_SECONDS, WORKER_SECONDS
from producer.contract.requests import Request, encode_request

T = TypeVar("T")

State = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
FINAL_STATES: Final = frozenset({"done", "failed", "cancelled", "dead"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_CANCELLED: Final = encode_event(Finished(reason="cancelled", text=""))
"""Filled in by the script when a request is cancelled that no worker has."""
_TOO_LATE: Final = encode_event(
    Failed(
        code="deadline_exceeded",
        message="Its deadline passed while it waited in the queue. Give it more time, a more urgent priority, or the model more workers.",
    )
)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A script with its arguments, and how to read the answer."""

    script: str
    args: Sequence[str | int | float]
    parse: Callable[[Any], T]
    again: Callable[[Any], bool] = lambda _: False
    """Whether this answer means: not done yet, call once more."""


# --- producers -------------------------------------------------------------------------------------------------------


class Submitted(NamedTuple):
    """Where a submit has led."""

    request_id: str
    is_new: bool
    """False: it was submitted before, with the same idempotency key or the same id."""


def new_request_id() -> str:
    return uuid.uuid4().hex


def submit(
    request: Request,
    *,
    model: str,
    request_id: str | None = None,
    idempotency_key: str | None = None,
    retention_seconds: float = RETENTION_SECONDS,
    idempotency_seconds: float = IDEMPOTENCY_SECONDS,
) -> Call[Submitted]:
    """Queue a request for `request.model`, or `model` if it names none. A missing seed is drawn here, once.

    Safe to repeat: the same id or the same (tenant, idempotency key) with the same body is the same request. With a
    different body the call raises IdempotencyConflict.
    """
    own_id = new_request_id() if request_id is None else _checked_name("request_id", request_id)
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= 256:
        raise InvalidRequest(
            "idempotency_key", f"has {len(idempotency_key)} characters", "Use 1 to 256 characters."
        )
    model = request.model or model
    resolved = request.model_copy(update={"model": model})
    digest = _digest(resolved.model_dump(mode="json", exclude_defaults=True), request.kind)
    if resolved.sampling.seed is None:
        sampling = resolved.sampling.model_copy(update={"seed": secrets.randbits(63)})
        resolved = resolved.model_copy(update={"sampling": sampling})

    def parse(answer: tuple[int, str]) -> Submitted:
        code, known_id = answer
        if code == -1:
            raise IdempotencyConflict(own_id if idempotency_key is None else idempotency_key, known_id)
        # An id drawn here cannot have been known: then the answer of the first try was lost, and this is its retry.
        return Submitted(known_id, code == 1 or (request_id is None and known_id == own_id))

    return Call(
        "submit",
        [
            own_id,
            digest,
            model,
            request.tenant,
            request.priority,
            encode_request(resolved),
            0 if request.deadline_seconds is None else max(1, _ms(request.deadline_seconds)),
            _ms(retention_seconds),
            "" if idempotency_key is None else quote(idempotency_key, safe=""),
            _ms(idempotency_seconds),
        ],
        parse,
    )


def refuse(
    request_id: str,
    body: Mapping[str, Any],
    failed: Failed,
    *,
    model: str,
    retention_seconds: float = RETENTION_SECONDS,
) -> Call[bool]:
    """Record a request that cannot be queued because its body is invalid, so that its reader learns why.

    Answers False, and changes nothing, if the id is known already.
    """
    text = json.dumps(body, ensure_ascii=False, default=str)
    return Call(
        "refuse",
        [
            _checked_name("request_id", request_id),
            _digest(text, "refused"),
            model,
            "default",
            text,
            encode_event(failed),
            _ms(retention_seconds),
        ],
        bool,
    )


def cancel(request_id: str) -> Call[State]:
    """Ask for the end of a request; answers its state before. Raises UnknownRequest.

    A queued one ends at once. A running one is ended by its worker; a final state stays as it is.
    """

    def parse(state: State | None) -> State:
        if state is None:
            raise UnknownRequest(request_id)
        return state

    return Call("cancel", [request_id, _CANCELLED], parse)


class Entry(NamedTuple):
    """An event in its place in a request's stream."""

    id: str
    event: str
    """JSON, as `decode_event` reads it."""


class Followed(NamedTuple):
    """A request's state, and its events after the given entry."""

    state: State
    last_id: str
    """Of the stream's last entry, `0-0` before the first."""
    entries: list[Entry]


def follow(reader: str, requests: Iterable[tuple[str, str]]) -> Call[list[Followed | None]]:
    """Read the events of requests after an entry id each, and register a reader for those to come.

    requests: (request id, entry id to read after). reader: "" to register none. Answers None for an unknown request.
    """

    def parse(answer: list[Any]) -> list[Followed | None]:
        return [item and Followed(item[0], item[1], _entries(item[2])) for item in answer]

    return Call("follow", [reader, *(part for pair in requests for part in pair)], parse)


def unfollow(reader: str, request_id: str) -> Call[bool]:
    """Take a reader off a request."""
    return Call("unfollow", [reader, request_id], bool)


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """How far a request is. Times are Unix seconds on Redis' clock."""

    request_id: str
    state: State
    model: str
    tenant: str
    priority: int
    attempt: int
    """How often it has been claimed."""
    worker: str | None
    num_tokens: int
    """Answer tokens emitted so far."""
    is_cancel_asked: bool
    place: int | None
    """Requests before it in the queue; None when it is not queued."""
    submitted_at: float
    claimed_at: float | None
    ended_at: float | None
    request: str
    """The request's JSON, as `decode_request` reads it."""


def status(request_id: str) -> Call[RequestStatus]:
    """How far a request is. Raises UnknownRequest."""

    def parse(answer: tuple[Any, int]) -> RequestStatus:
        fields, place = _pairs(answer[0]), answer[1]
        if not fields:
            raise UnknownRequest(request_id)
        return RequestStatus(
            request_id=request_id,
            state=cast(State, fields["state"]),
            model=fields["model"],
            tenant=fields["tenant"],
            priority=int(fields["priority"]),
            attempt=int(fields["attempt"]),
            worker=fields.get("worker") or None,
            num_tokens=int(fields["count"]),
            is_cancel_asked="cancel" in fields,
            place=None if place < 0 else place,
            submitted_at=int(fields["submitted"]) / 1000,
            claimed_at=_seconds_or_none(fields.get("claimed")),
            ended_at=_seconds_or_none(fields.get("ended")),
            request=fields["request"],
        )

    return Call("status", [request_id], parse)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker last said of itself."""

    worker: str
    silent_seconds: float
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Overview:
    """What a deployment does now."""

    num_queued: int
    """Of the model that was asked for."""
    num_running: int
    """Of all models."""
    workers: list[WorkerStatus]


def overview(model: str, worker_seconds: float = WORKER_SECONDS) -> Call[Overview]:
    """Queue length of a model, running requests, and the workers heard of in the last `worker_seconds`."""

    def parse(answer: tuple[int, int, list[Any]]) -> Overview:
        queued, running, workers = answer
        return Overview(
            queued,
            running,
            [WorkerStatus(name, silent / 1000, _pairs(about)) for name, silent, about in workers],
        )

    return Call("overview", [model, _ms(worker_seconds)], parse)


# --- workers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that a worker may now answer, until its lease ends. `attempt` is the fencing token."""

    request_id: str
    attempt: int
    request: str
    """The request's JSON, as `decode_request` reads it."""
    queue_seconds: float
    """From submit to the first claim."""
    deadline_seconds: float | None = None
    """From now until it must be aborted."""
    emitted_ids: tuple[int, ...] = ()
    """Answer tokens that earlier attempts have emitted; go on after them."""
    emitted_texts: tuple[str, ...] = ()
    """Their texts, as the reader has them."""


def claim(model: str, worker: str, lease_seconds: float) -> Call[Claim | None]:
    """Take the most urgent request of a model, of equally urgent ones the oldest. None: there is no work."""

    def parse(answer: list[Any]) -> Claim | None:
        if answer[0] == 0:
            return None
        _, request_id, attempt, request, waited, left, items = answer
        tokens = [event for _, data in _entries(items) if isinstance(event := decode_event(data), Token)]
        return Claim(
            request_id,
            attempt,
            request,
            waited / 1000,
            None if left < 0 else left / 1000,
            tuple(token_id for token in tokens for token_id in token.ids),
            tuple(text for token in tokens for text in token.texts),
        )

    return Call(
        "claim",
        [model, _checked_name("worker", worker), _ms(lease_seconds), _TOO_LATE],
        parse,
        again=lambda answer: bool(answer[0] == 2),
    )


class EmitCode(IntEnum):
    """What has become of one event of an `emit`."""

    WRITTEN = 1
    ALREADY_WRITTEN = 0
    """By an earlier call whose answer was lost. As good as written."""
    FENCED = -1
    """The request is not this attempt's any more: forget it, and write nothing more."""
    CANCEL_ASKED = -2
    """It is in the stream, and the answer is not wanted any more: abort, then `finish` with reason cancelled."""
    OUT_OF_STEP = -3
    """Not written: it does not follow the stream's last token, or no Started of this attempt came before."""


class Emission(NamedTuple):
    """One event for the stream of a request. An attempt's first is a Started."""

    request_id: str
    attempt: int
    event: Started | Token


def emit(emissions: Iterable[Emission]) -> Call[list[EmitCode]]:
    """Append one flush's events to their streams and push them to their readers. A code each, in order."""
    lines: list[str] = []
    for request_id, attempt, event in emissions:
        if isinstance(event, Token):
            if not event.ids:
                raise ValueError(f"a Token of {request_id} has no ids")
            before, index = event.index - len(event.ids), event.index
        else:
            before = index = -1
        lines.append(f"{request_id}\t{attempt}\t{before}\t{index}\t{encode_event(event)}\n")
    return Call("emit", ["".join(lines)], lambda codes: [EmitCode(code) for code in codes])


def finish(request_id: str, attempt: int, event: Finished) -> Call[bool]:
    """End a request with its answer, or with what there is of it if it was cancelled. False: fenced."""
    state = "cancelled" if event.reason == "cancelled" else "done"
    return Call("finish", [request_id, attempt, state, encode_event(event)], lambda code: bool(code >= 0))


def fail(request_id: str, attempt: int, event: Failed) -> Call[bool]:
    """End a request without an answer. False: fenced."""
    return Call("finish", [request_id, attempt, "failed", encode_event(event)], lambda code: bool(code >= 0))


def release(request_id: str, attempt: int) -> Call[bool]:
    """Hand a running request back to the queue, at its old place. False: fenced."""
    return Call("release", [request_id, attempt, _CANCELLED], lambda code: bool(code == 1))


@dataclass(frozen=True, slots=True)
class Renewal:
    """What has become of a worker's leases."""

    lost: list[str] = field(default_factory=list)
    """Request ids that are not its own any more: abort them."""
    cancelled: list[str] = field(default_factory=list)
    """Request ids that are its own, and whose cancellation is asked for."""


def renew(
    worker: str,
    leases: Iterable[tuple[str, int]],
    lease_seconds: float,
    *,
    about: Mapping[str, str | int | float] | None = None,
    worker_seconds: float = WORKER_SECONDS,
) -> Call[Renewal]:
    """Sign of life of a worker: prolong the leases of all requests it holds, in one call.

    leases: (request id, attempt). about: what the worker says of itself, for `overview`.
    """
    told = [part for pair in (about or {}).items() for part in pair]
    return Call(
        "renew",
        [
            _checked_name("worker", worker),
            _ms(lease_seconds),
            _ms(worker_seconds),
            len(told),
            *told,
            *(part for lease in leases for part in lease),
        ],
        lambda answer: Renewal(*answer),
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def events(entries: Iterable[Entry]) -> list[Event]:
    """The events of these entries."""
    return [decode_event(entry.event) for entry in entries]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _seconds_or_none(ms: str | None) -> float | None:
    return None if ms is None else int(ms) / 1000


def _entries(items: list[Any]) -> list[Entry]:
    """XRANGE's answer; each entry has one field, `event`."""
    return [Entry(entry_id, fields[1]) for entry_id, fields in items]


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _checked_name(field: str, value: str) -> str:
    """Ids travel in keys, in channel names and in tab-separated lines."""
    if not _NAME.fullmatch(value):
        raise InvalidRequest(
            field,
            f"{value!r} cannot be an id",
            "Use at most 128 letters, digits and . _ : @ -, a letter or digit first.",
        )
    return value


def _digest(body: object, kind: str) -> str:
    canonical = json.dumps([kind, body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
