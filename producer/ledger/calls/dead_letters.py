"""Requests that were lost at too many attempts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from producer.contract.errors import ConversationBusy, DocumentEnded, NotDead, UnknownRequest
from producer.contract.keys import CONVERSATION_SECONDS
from producer.ledger.calls.call import Call, milliseconds, pairs


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
        letters = [_dead_letter(request_id, pairs(flat)) for request_id, flat in found]
        return DeadLettersPage(None if following < 0 else following, letters)

    return Call("dead", [at, num_looked_at], parse)


def dead_letter(request_id: str) -> Call[DeadLetter]:
    """One dead letter. Raises UnknownRequest, and NotDead if it is none."""

    def parse(answer: tuple[Any, int]) -> DeadLetter:
        fields = pairs(answer[0])
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

    return Call("retry", [request_id, milliseconds(conversation_seconds)], parse)


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
