"""A request as its producer sees it: submitted, followed, asked about, cancelled."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from producer.contract.errors import (
    ConversationBusy,
    DeadlineUnmeetable,
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    UnknownRequest,
)
from producer.contract.events import Event, Failed, decode_event, encode_event
from producer.contract.keys import (
    CONVERSATION_SECONDS,
    IDEMPOTENCY_SECONDS,
    RETENTION_SECONDS,
    conversation_name,
)
from producer.contract.requests import ChatRequest, FoldRequest, Request, encode_request
from producer.contract.tenants import DEFAULT_BOUNDS, QueueBounds, estimate_tokens
from producer.ledger.calls.call import (
    CANCELLED,
    Call,
    State,
    checked_name,
    digest_of,
    digest_of_body,
    milliseconds,
    pairs,
    seconds_or_none,
)


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
    conversation_seconds: float = CONVERSATION_SECONDS,
    bounds: QueueBounds = DEFAULT_BOUNDS,
) -> Call[Submitted]:
    """Queue a request for `request.model`, or `model` if it names none. A missing seed is drawn here, once.

    Safe to repeat: the same id or the same (tenant, idempotency key) with the same body is the same request. With a
    different body the call raises IdempotencyConflict. ConversationBusy while another answer of its conversation is in progress.
    QueueFull beyond a bound, DeadlineUnmeetable if its turn would come too late; neither uses up the key.
    """
    if isinstance(request, FoldRequest):
        raise InvalidRequest("kind", "'fold' is made by workers alone", "Submit a chat or a summary.")
    conversation_id = request.conversation_id if isinstance(request, ChatRequest) else None
    own_id = new_request_id() if request_id is None else checked_name("request_id", request_id)
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= 256:
        raise InvalidRequest(
            "idempotency_key", f"has {len(idempotency_key)} characters", "Use 1 to 256 characters."
        )
    model = request.model or model
    resolved = request.model_copy(update={"model": model})
    digest = digest_of(resolved)
    if resolved.sampling.seed is None:
        sampling = resolved.sampling.model_copy(update={"seed": secrets.randbits(63)})
        resolved = resolved.model_copy(update={"sampling": sampling})

    encoded = encode_request(resolved)

    def parse(answer: list[Any]) -> Submitted:
        code, known_id = answer[:2]
        if code == -3:
            _, _, wait_ms, what, bound = answer
            raise QueueFull(
                model,
                request.tenant if known_id == "tenant_queue_full" else None,
                wait_ms / 1000,
                f"{bound} {what}",
            )
        if code == -4:
            raise DeadlineUnmeetable(model, request.deadline_seconds or 0, known_id / 1000, answer[2] / 1000)
        if code == -1:
            raise IdempotencyConflict(own_id if idempotency_key is None else idempotency_key, known_id)
        if code == -2:
            raise ConversationBusy(conversation_id or "", known_id)
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
            encoded,
            0 if request.deadline_seconds is None else max(1, milliseconds(request.deadline_seconds)),
            milliseconds(retention_seconds),
            "" if idempotency_key is None else quote(idempotency_key, safe=""),
            milliseconds(idempotency_seconds),
            "" if conversation_id is None else conversation_name(request.tenant, conversation_id),
            conversation_id or "",
            milliseconds(conversation_seconds),
            estimate_tokens(resolved, encoded),
            bounds.max_queued,
            bounds.max_queued_tokens,
            bounds.tenant_max_queued,
            bounds.tenant_max_queued_tokens,
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
            checked_name("request_id", request_id),
            digest_of_body(text, "refused"),
            model,
            "default",
            text,
            encode_event(failed),
            milliseconds(retention_seconds),
        ],
        bool,
    )


def cancel(request_id: str) -> Call[State]:
    """Ask for the end of a request; answers its state before. Raises UnknownRequest.

    A queued one ends at once, and so does a document that waits for its pieces. A running one is ended by its worker; a final state
    stays as it is.
    """

    def parse(state: State | None) -> State:
        if state is None:
            raise UnknownRequest(request_id)
        return state

    return Call("cancel", [request_id, CANCELLED], parse)


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
        return [item and Followed(item[0], item[1], entries_of(item[2])) for item in answer]

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
        fields, place = pairs(answer[0]), answer[1]
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
            claimed_at=seconds_or_none(fields.get("claimed")),
            ended_at=seconds_or_none(fields.get("ended")),
            request=fields["request"],
        )

    return Call("status", [request_id], parse)


def events(entries: Iterable[Entry]) -> list[Event]:
    """The events of these entries."""
    return [decode_event(entry.event) for entry in entries]


def entries_of(items: list[Any]) -> list[Entry]:
    """XRANGE's answer; each entry has one field, `event`."""
    return [Entry(entry_id, fields[1]) for entry_id, fields in items]
