"""Conversations: what a worker recollects, folds and remembers of one, and what whoever owns it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from producer.contract.conversation import ArchivedTurn
from producer.contract.errors import UnknownConversation
from producer.contract.keys import RETENTION_SECONDS, conversation_name
from producer.contract.requests import FoldRequest
from producer.ledger.calls.call import (
    CANCELLED,
    Call,
    checked_name,
    digest_of,
    milliseconds,
    pairs,
    with_estimate,
)


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
        fields = pairs(flat)
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


def remember(request_id: str, attempt: int, memory: str, *, worker: str = "") -> Call[str | None]:
    """Keep with a running request what its prompt consists of (JSON). Answers what is kept from now on; None: fenced."""
    return Call("remember", [request_id, attempt, memory, worker], lambda kept: kept or None)


def fold(
    request: FoldRequest, *, request_id: str, model: str, retention_seconds: float = RETENTION_SECONDS
) -> Call[bool]:
    """Queue a fold of a conversation's turns from `request.first` on, which the summary must end at.

    False, and nothing is done: one is in progress, the summary covers other turns by now, or the conversation is gone.
    """
    encoded, tokens = with_estimate(request)
    return Call(
        "fold",
        [
            checked_name("request_id", request_id),
            digest_of(request),
            model,
            request.tenant,
            request.priority,
            encoded,
            milliseconds(retention_seconds),
            conversation_name(request.tenant, request.conversation_id),
            request.first,
            tokens,
        ],
        bool,
    )


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
    fields = pairs(flat)
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

    return Call("forget", [conversation_name(tenant, conversation_id), CANCELLED], parse)
