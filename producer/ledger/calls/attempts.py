"""An attempt at a request: a worker claims it, renews its lease, emits, and ends it or loses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Literal, NamedTuple

from producer.contract.events import (
    Failed,
    Finished,
    NewTokens,
    Started,
    Token,
    decode_event,
    encode_event,
    encode_tokens,
)
from producer.contract.keys import MAX_ATTEMPTS, WORKER_SECONDS
from producer.contract.tenants import DEFAULT_ORDER, QueueOrder
from producer.ledger.calls.call import CANCELLED, Call, checked_name, milliseconds
from producer.ledger.calls.requests import entries_of


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
    worker: str = ""
    """Who has it: the other half of the fence."""


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
        tokens = [event for _, data in entries_of(items) if isinstance(event := decode_event(data), Token)]
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
            worker,
        )

    return Call(
        "claim",
        [
            model,
            checked_name("worker", worker),
            milliseconds(lease_seconds),
            order.tenant_max_running,
            milliseconds(order.ageing_seconds),
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

    worker: whose requests they must be; here and in all calls for an attempt "" leaves that unchecked.
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
    return Call("release", [request_id, attempt, CANCELLED, worker], lambda code: bool(code == 1))


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
        [request_id, attempt, num_before, what, max_attempts, int(keep), int(is_trial), CANCELLED, worker],
        lambda code: _LOSS_OUTCOMES[code],
    )


def reap(
    at_most: int = 100, max_attempts: int = MAX_ATTEMPTS, *, silent_seconds: float = 0
) -> Call[list[str]]:
    """Put requests whose leases have run out back into the queue, at their old places. Answers their ids.

    Those that were lost `max_attempts` times in a row without a new token are dead letters instead. `silent_seconds`: without a
    renewal, after which a worker that nobody hears on its control channel any more is dead, and its leases end at once; 0: never.
    """
    return Call("reap", [at_most, CANCELLED, max_attempts, milliseconds(silent_seconds)], list)


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
            checked_name("worker", worker),
            milliseconds(lease_seconds),
            milliseconds(worker_seconds),
            len(told),
            *told,
            *(part for lease in leases for part in lease),
        ],
        lambda answer: Renewal(*answer),
    )
