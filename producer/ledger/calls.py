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

from producer.contract.conversation import ArchivedTurn
from producer.contract.errors import (
    ConversationBusy,
    DeadlineUnmeetable,
    DocumentEnded,
    IdempotencyConflict,
    InvalidRequest,
    NotDead,
    QueueFull,
    UnknownConversation,
    UnknownRequest,
)
from producer.contract.events import (
    Event,
    Failed,
    Finished,
    NewTokens,
    Started,
    Token,
    decode_event,
    encode_event,
    encode_tokens,
)
from producer.contract.keys import (
    CONVERSATION_SECONDS,
    IDEMPOTENCY_SECONDS,
    MAX_ATTEMPTS,
    RETENTION_SECONDS,
    WORKER_SECONDS,
    conversation_name,
)
from producer.contract.requests import ChatRequest, FoldRequest, Request, SummaryRequest, encode_request
from producer.contract.tenants import (
    DEFAULT_BOUNDS,
    DEFAULT_ORDER,
    QueueBounds,
    QueueOrder,
    TenantSettings,
    estimate_tokens,
)

T = TypeVar("T")

State = Literal["queued", "running", "waiting", "done", "failed", "cancelled", "dead"]
FINAL_STATES: Final = frozenset({"done", "failed", "cancelled", "dead"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_CANCELLED: Final = encode_event(Finished(reason="cancelled", text=""))
"""Filled in by the script when a request is cancelled that no worker has."""


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
    own_id = new_request_id() if request_id is None else _checked_name("request_id", request_id)
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= 256:
        raise InvalidRequest(
            "idempotency_key", f"has {len(idempotency_key)} characters", "Use 1 to 256 characters."
        )
    model = request.model or model
    resolved = request.model_copy(update={"model": model})
    digest = _digest_of(resolved)
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
            0 if request.deadline_seconds is None else max(1, _ms(request.deadline_seconds)),
            _ms(retention_seconds),
            "" if idempotency_key is None else quote(idempotency_key, safe=""),
            _ms(idempotency_seconds),
            "" if conversation_id is None else conversation_name(request.tenant, conversation_id),
            conversation_id or "",
            _ms(conversation_seconds),
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

    A queued one ends at once, and so does a document that waits for its pieces. A running one is ended by its worker; a final state
    stays as it is.
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


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in a deployment, for those who watch it."""

    num_queued: tuple[int, ...]
    """Of the model that was asked for, by priority, 0 (the most urgent) to 9."""
    oldest_seconds: tuple[float, ...]
    """How long the oldest one of each priority has waited."""
    num_running: int
    """Of all models."""
    num_overdue: int
    """Running requests whose lease has ended."""
    num_conversations: int
    num_dead: int
    """Dead letters."""
    memory_used_bytes: int
    """By Redis."""
    memory_max_bytes: int
    """0: no limit."""
    rejected: dict[str, int]
    """Submissions refused at the door, by reason, since the deployment began."""
    num_queued_tokens: int = 0
    """Of the model that was asked for, by estimate (`estimate_tokens`)."""
    drain_tokens_per_second: float = 0.0
    """How fast its queue drained in the last minute or so in which something waited, in the same estimate. 0: not measured yet."""


def backlog(model: str) -> Call[Backlog]:
    """What waits, how long it has waited, and how full Redis is."""

    def parse(answer: list[Any]) -> Backlog:
        queued, oldest_ms, running, overdue, conversations, dead, used, maximum, rejected, load = answer
        *tokens, drained, drained_ms = (float(number or 0) for number in load)
        counts = {reason: int(number) for reason, number in _pairs(rejected).items()}
        return Backlog(
            tuple(queued),
            tuple(ms / 1000 for ms in oldest_ms),
            running,
            overdue,
            conversations,
            dead,
            used,
            maximum,
            counts,
            round(sum(tokens)),
            1000 * drained / drained_ms if drained_ms else 0.0,
        )

    return Call("backlog", [model], parse)


# --- tenants, for whoever operates the deployment ------------------------------------------------------------------------


def set_tenant(tenant: str, changes: str, models: Sequence[str]) -> Call[TenantSettings]:
    """Change what is set for a tenant (JSON of TenantSettings; "": back to the defaults); answers what is set now.

    models: those of which it may have something waiting.
    """
    return Call("tenant", [tenant, changes, *models], TenantSettings.model_validate_json)


# --- workers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pieces:
    """How far a text that was too long for the context has come in pieces."""

    levels: tuple[int, ...] = ()
    """Pieces of the text itself, of their summaries, and so on. All of them are done when the request can be claimed."""
    number: int = 0
    """Of them all, and of theirs if some were too long for whoever took them."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


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
    age_seconds: float = 0.0
    """Since submit."""
    pieces: Pieces = Pieces()
    is_piece: bool = False
    """Of a document."""
    failures: int = 0
    """Attempts in a row before this one that were lost without a new token."""


def claim(
    model: str, worker: str, lease_seconds: float, order: QueueOrder = DEFAULT_ORDER
) -> Call[Claim | None]:
    """Take the request whose turn it is: priority, then fair share of tokens between tenants, then age. None: there is no work.

    Of what waits longer than `order.ageing_seconds`, some goes first now and then although it is less urgent.
    """

    def parse(answer: list[Any]) -> Claim | None:
        if answer[0] == 0:
            return None
        _, request_id, attempt, request, waited, left, items, age, (levels, *counts, document, failures) = (
            answer
        )
        tokens = [event for _, data in _entries(items) if isinstance(event := decode_event(data), Token)]
        return Claim(
            request_id,
            attempt,
            request,
            waited / 1000,
            None if left < 0 else left / 1000,
            tuple(token_id for token in tokens for token_id in token.ids),
            tuple(text for token in tokens for text in token.texts),
            age / 1000,
            Pieces(
                tuple(int(number) for number in (levels or "").split(",") if number),
                *(int(count or 0) for count in counts),
            ),
            document is not None,
            int(failures or 0),
        )

    return Call(
        "claim",
        [
            model,
            _checked_name("worker", worker),
            _ms(lease_seconds),
            order.tenant_max_running,
            _ms(order.ageing_seconds),
            order.ageing_claims,
        ],
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
    event: Started | Token | NewTokens


_EMIT_CODES = {code.value: code for code in EmitCode}


def emit(emissions: Iterable[Emission], *, worker: str = "") -> Call[list[EmitCode]]:
    """Append one flush's events to their streams and push them to their readers. A code each, in order.

    worker: whose requests they must be; here and in the calls below "" leaves that unchecked.
    """
    lines: list[str] = []
    for request_id, attempt, event in emissions:
        if isinstance(event, Started):
            lines.append(f"{request_id}\t{attempt}\t-1\t-1\t{encode_event(event)}\n")
            continue
        index, num_tokens = event.index, len(event.ids)
        if num_tokens == 0:
            raise ValueError(f"a Token of {request_id} has no ids")
        lines.append(f"{request_id}\t{attempt}\t{index - num_tokens}\t{index}\t{encode_tokens(event)}\n")
    return Call("emit", ["".join(lines), worker], lambda codes: [_EMIT_CODES[code] for code in codes])


def finish(
    request_id: str, attempt: int, event: Finished, *, worker: str = "", num_tokens: int | None = None
) -> Call[bool | None]:
    """End a request with its answer, or with what there is of it if it was cancelled. False: fenced.

    num_tokens: that its stream must have; None is the answer, and nothing done, if it has others because Redis came back without its
    last writes.
    """
    state = "cancelled" if event.reason == "cancelled" else "done"
    count = "" if num_tokens is None else num_tokens
    return Call("finish", [request_id, attempt, state, encode_event(event), worker, count], _is_ended)


def fail(request_id: str, attempt: int, event: Failed, *, worker: str = "") -> Call[bool | None]:
    """End a request without an answer. False: fenced.

    A piece of a document goes back to the queue instead, once; the next time it ends, and its document with it.
    """
    return Call("finish", [request_id, attempt, "failed", encode_event(event), worker, ""], _is_ended)


def _is_ended(code: int) -> bool | None:
    return None if code == -3 else code >= 0


def release(request_id: str, attempt: int, *, worker: str = "") -> Call[bool | None]:
    """Hand a running request back to the queue, at its old place. False: fenced."""
    return Call("release", [request_id, attempt, _CANCELLED, worker], lambda code: bool(code == 1))


LossOutcome = Literal["kept", "queued", "ended", "fenced"]
_LOSS_OUTCOMES: Final[dict[int, LossOutcome]] = {2: "kept", 1: "queued", 0: "ended", -1: "fenced"}


def lose(
    request_id: str,
    attempt: int,
    what: str,
    *,
    max_attempts: int = MAX_ATTEMPTS,
    num_before: int = 0,
    keep: bool = False,
    is_trial: bool = False,
    worker: str = "",
) -> Call[LossOutcome]:
    """The engine died with this attempt: it counts against the request if it brought no new token, or was a trial.

    what: happened, as part of a sentence. num_before: how often it was lost in this attempt before. keep: the request stays this
    worker's, which tries it alone; otherwise it goes back to the queue. is_trial: it was alone in the engine. The outcome `ended` is a
    dead letter, or cancelled.
    """
    return Call(
        "lose",
        [request_id, attempt, num_before, what, max_attempts, int(keep), int(is_trial), _CANCELLED, worker],
        lambda code: _LOSS_OUTCOMES[code],
    )


def reap(
    at_most: int = 100, max_attempts: int = MAX_ATTEMPTS, *, silent_seconds: float = 0
) -> Call[list[str]]:
    """Put requests whose leases have run out back into the queue, at their old places. Answers their ids.

    Those that were lost `max_attempts` times in a row without a new token are dead letters instead. `silent_seconds`: without a
    renewal, after which a worker that nobody hears on its control channel any more is dead, and its leases end at once; 0: never.
    """
    return Call("reap", [at_most, _CANCELLED, max_attempts, _ms(silent_seconds)], list)


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


# --- documents, for workers ------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """What has become of a split."""

    outcome: Literal["waiting", "fenced", "cancel_asked", "id_taken"]
    taken_id: str = ""


_SPLIT_OUTCOMES: Final[dict[int, Literal["waiting", "fenced", "cancel_asked", "id_taken"]]] = {
    1: "waiting",
    0: "waiting",
    -1: "fenced",
    -2: "cancel_asked",
    -3: "id_taken",
}


def split(
    request_id: str, attempt: int, *, level: int, priority: int, pieces: Sequence[SummaryRequest]
) -> Call[Split]:
    """Queue the pieces of a running request; it waits for them without a worker, and is queued again when all are done.

    level: 1 for pieces of the text itself, 2 for pieces of their summaries, and so on; no level can be queued twice. A piece's id is
    `<request id>.<level>.<number from 1>`; model, tenant, deadline and retention are the request's.
    """
    return Call(
        "split",
        [
            request_id,
            attempt,
            level,
            priority,
            *(part for piece in pieces for part in _with_estimate(piece)),
        ],
        lambda answer: Split(_SPLIT_OUTCOMES[answer[0]], *answer[1:]),
    )


def pieces(request_id: str, *, level: int, number: int) -> Call[list[Event | None]]:
    """The last event of each piece of a level; None where there is none."""
    return Call(
        "pieces",
        [request_id, level, number],
        lambda answer: [None if event is None else decode_event(event) for event in answer],
    )


# --- dead letters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loss:
    """One attempt that was lost."""

    attempt: int
    worker: str
    num_tokens: int
    """That the answer had by then."""
    what: str
    """What happened."""
    time: float
    """Unix seconds on Redis' clock."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that was lost at too many attempts. Times are Unix seconds on Redis' clock."""

    request_id: str
    model: str
    tenant: str
    kind: str
    attempts: int
    """How often it has been claimed."""
    num_tokens: int
    """Answer tokens emitted so far."""
    submitted_at: float
    died_at: float
    losses: list[Loss]
    """The last ones, oldest first."""
    request: str
    """The request's JSON, as `decode_request` reads it."""


class DeadLettersPage(NamedTuple):
    """Some of the dead letters, the latest first."""

    next: int | None
    """Where the next page begins; None: this was the last."""
    letters: list[DeadLetter]


def dead_letters(*, at: int = 0, num_looked_at: int = 100) -> Call[DeadLettersPage]:
    """One page of the dead letters. A page may be empty and not the last."""

    def parse(answer: tuple[int, list[Any]]) -> DeadLettersPage:
        following, found = answer
        letters = [_dead_letter(request_id, _pairs(flat)) for request_id, flat in found]
        return DeadLettersPage(None if following < 0 else following, letters)

    return Call("dead", [at, num_looked_at], parse)


def dead_letter(request_id: str) -> Call[DeadLetter]:
    """One dead letter. Raises UnknownRequest, and NotDead if it is none."""

    def parse(answer: tuple[Any, int]) -> DeadLetter:
        fields = _pairs(answer[0])
        _check_dead(request_id, fields.get("state"))
        return _dead_letter(request_id, fields)

    return Call("status", [request_id], parse)


def retry_dead(request_id: str, *, conversation_seconds: float = CONVERSATION_SECONDS) -> Call[None]:
    """Queue a dead letter again, under its id; it goes on from its last token, and its deadline does not count any more.

    conversation_seconds: lifetime of the conversation that it begins. Raises UnknownRequest, NotDead, ConversationBusy, and
    DocumentEnded for a piece.
    """

    def parse(answer: list[Any] | None) -> None:
        code, name = (0, None) if answer is None else (answer[0], (*answer[1:], None)[0])
        if code == -1:
            raise ConversationBusy(None, str(name))
        if code == -2:
            raise DocumentEnded(request_id, str(name))
        if code != 1:
            _check_dead(request_id, name)

    return Call("retry", [request_id, _ms(conversation_seconds)], parse)


def drop_dead(request_id: str) -> Call[None]:
    """Let a dead letter expire like any request that has ended. Raises UnknownRequest, NotDead."""
    return Call("drop", [request_id], lambda state: _check_dead(request_id, state))


def _check_dead(request_id: str, state: str | None) -> None:
    if state is None:
        raise UnknownRequest(request_id)
    if state != "dead":
        raise NotDead(request_id, state)


def _dead_letter(request_id: str, fields: Mapping[str, str]) -> DeadLetter:
    losses = json.loads(fields.get("losses", "[]"))
    return DeadLetter(
        request_id=request_id,
        model=fields["model"],
        tenant=fields["tenant"],
        kind=str(json.loads(fields["request"]).get("kind", "unknown")),
        attempts=int(fields["attempt"]),
        num_tokens=int(fields["count"]),
        submitted_at=int(fields["submitted"]) / 1000,
        died_at=int(fields["ended"]) / 1000,
        losses=[
            Loss(
                attempt=loss["attempt"],
                worker=loss["worker"],
                num_tokens=loss["tokens"],
                what=loss["what"],
                time=loss["time"] / 1000,
            )
            for loss in losses
        ],
        request=fields["request"],
    )


# --- conversations, for workers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recollected:
    """What there is to build the prompt of a request that belongs to a conversation."""

    memory: str | None
    """JSON that an earlier attempt left by `remember`."""
    summary: str
    summary_tokens: int
    covered: int
    """Turns that the summary stands for, counted from the first."""
    fold_failures: int
    num_turns: int
    first: int
    """Index of the first of `turns`."""
    turns: list[ArchivedTurn]
    is_known: bool = True
    """False: the conversation is gone, or was forgotten."""


def recollect(
    request_id: str, *, max_turns: int, max_bytes: int, from_head: bool = False
) -> Call[Recollected]:
    """Read a request's conversation: its last turns, or with `from_head` those after the ones that the summary covers.

    At most so many turns, of so many bytes of JSON together. When the request has a memory, exactly the turns that it names.
    """

    def parse(answer: list[Any]) -> Recollected:
        memory, flat, num_turns, first, turns = answer
        fields = _pairs(flat)
        return Recollected(
            memory=memory or None,
            summary=fields.get("summary", ""),
            summary_tokens=int(fields.get("summary_tokens", 0)),
            covered=int(fields.get("covered", 0)),
            fold_failures=int(fields.get("fold_failures", 0)),
            num_turns=num_turns,
            first=first,
            turns=[ArchivedTurn.model_validate_json(turn) for turn in turns],
            is_known=bool(fields),
        )

    return Call("recollect", [request_id, max_turns, max_bytes, "head" if from_head else "tail"], parse)


def remember(request_id: str, attempt: int, memory: str) -> Call[str | None]:
    """Keep with a running request what its prompt consists of (JSON). Answers what is kept from now on; None: fenced."""
    return Call("remember", [request_id, attempt, memory], lambda kept: kept or None)


def fold(
    request: FoldRequest, *, request_id: str, model: str, retention_seconds: float = RETENTION_SECONDS
) -> Call[bool]:
    """Queue a fold of a conversation's turns from `request.first` on, which the summary must end at.

    False, and nothing is done: one is in progress, the summary covers other turns by now, or the conversation is gone.
    """
    encoded, tokens = _with_estimate(request)
    return Call(
        "fold",
        [
            _checked_name("request_id", request_id),
            _digest_of(request),
            model,
            request.tenant,
            request.priority,
            encoded,
            _ms(retention_seconds),
            conversation_name(request.tenant, request.conversation_id),
            request.first,
            tokens,
        ],
        bool,
    )


# --- conversations, for whoever owns them ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConversationStatus:
    """How a conversation is. Times are Unix seconds on Redis' clock."""

    conversation_id: str
    tenant: str
    model: str
    """Of its last request."""
    num_turns: int
    summary: str
    """Of its first `covered` turns; "" while there is none."""
    summary_tokens: int
    covered: int
    context_len: int | None
    """Tokens, of the model that answered last; None before the first answer."""
    busy: str | None
    """The request that is being answered."""
    folding: str | None
    """The request that makes the next summary."""
    fold_failures: int
    """Summaries that were not accepted, or failed, since the last one that was."""
    created_at: float
    updated_at: float


def _conversation_status(flat: list[str], num_turns: int) -> ConversationStatus:
    fields = _pairs(flat)
    return ConversationStatus(
        conversation_id=fields["id"],
        tenant=fields["tenant"],
        model=fields["model"],
        num_turns=num_turns,
        summary=fields.get("summary", ""),
        summary_tokens=int(fields.get("summary_tokens", 0)),
        covered=int(fields.get("covered", 0)),
        context_len=int(fields["context_len"]) if "context_len" in fields else None,
        busy=fields.get("busy"),
        folding=fields.get("folding"),
        fold_failures=int(fields.get("fold_failures", 0)),
        created_at=int(fields["created"]) / 1000,
        updated_at=int(fields["updated"]) / 1000,
    )


class ConversationsPage(NamedTuple):
    """Some of the conversations, those with the latest turn first."""

    next: int | None
    """Where the next page begins; None: this was the last."""
    conversations: list[ConversationStatus]


def conversations(
    tenant: str | None = None, *, at: int = 0, num_looked_at: int = 500
) -> Call[ConversationsPage]:
    """One page of a tenant's conversations, or of everybody's. A page may be empty and not the last."""

    def parse(answer: tuple[int, list[Any]]) -> ConversationsPage:
        following, found = answer
        return ConversationsPage(
            None if following < 0 else following, [_conversation_status(*one) for one in found]
        )

    beginning = "" if tenant is None else conversation_name(tenant, "")
    return Call("conversations", [beginning, at, num_looked_at], parse)


class ConversationTurns(NamedTuple):
    """A conversation, and some of its turns."""

    status: ConversationStatus
    first: int
    """Index of the first of `turns`."""
    turns: list[ArchivedTurn]


def conversation(
    tenant: str, conversation_id: str, *, first: int = 0, count: int = 0
) -> Call[ConversationTurns]:
    """A conversation and `count` of its turns from index `first` on; negative: from the end. Raises UnknownConversation."""

    def parse(answer: list[Any]) -> ConversationTurns:
        flat, num_turns, index, turns = answer
        if not flat:
            raise UnknownConversation(conversation_id)
        decoded = [ArchivedTurn.model_validate_json(turn) for turn in turns]
        return ConversationTurns(_conversation_status(flat, num_turns), index, decoded)

    return Call("conversation", [conversation_name(tenant, conversation_id), first, count], parse)


def forget(tenant: str, conversation_id: str) -> Call[None]:
    """Delete a conversation and what is still kept of its requests; cancel what is in progress. Raises UnknownConversation."""

    def parse(answer: int) -> None:
        if not answer:
            raise UnknownConversation(conversation_id)

    return Call("forget", [conversation_name(tenant, conversation_id), _CANCELLED], parse)


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


def _with_estimate(request: Request) -> tuple[str, int]:
    """A request's JSON, and the tokens that it will take."""
    encoded = encode_request(request)
    return encoded, estimate_tokens(request, encoded)


def _digest_of(request: Request) -> str:
    return _digest(request.model_dump(mode="json", exclude_defaults=True), request.kind)


def _digest(body: object, kind: str) -> str:
    canonical = json.dumps([kind, body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
