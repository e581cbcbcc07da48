"""Who calls the ledger: workers with what they have in memory, readers with what they have seen. None of them talks to Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from producer.contract import FoldRequest, Request, Token, decode_request
from producer.ledger import Claim
from producer.ledger.calls import Call
from producer.streams import StreamCursor


@dataclass
class Operation:
    """One call, to be made once or several times; `predict` is told its answer, and says what it had to be."""

    name: str
    call: Call[Any]
    predict: Callable[[Any], Any]


@dataclass
class Held:
    """A request as the worker that claimed it sees it."""

    worker: Worker = field(repr=False)
    request_id: str
    attempt: int
    request: Request
    claim: Claim
    token_ids: list[int]
    texts: list[str]
    num_published: int
    is_started: bool = False
    is_cancelled: bool = False
    has_memory: bool = False
    num_losses: int = 0
    """How often the engine died under this attempt, and the worker kept the request."""

    @classmethod
    def of(cls, worker: Worker, claim: Claim) -> Held:
        return cls(
            worker,
            claim.request_id,
            claim.attempt,
            decode_request(claim.request),
            claim,
            list(claim.emitted_ids),
            list(claim.emitted_texts),
            len(claim.emitted_ids),
        )

    @property
    def is_published(self) -> bool:
        return self.num_published == len(self.token_ids)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def can_finish(self) -> bool:
        """A fold whose turns nobody has chosen has no answer."""
        return self.is_published and (self.has_memory or not isinstance(self.request, FoldRequest))

    def generate(self, number: int) -> None:
        """New tokens that say who made them: another attempt would say something else."""
        for index in range(len(self.token_ids) + 1, len(self.token_ids) + number + 1):
            self.token_ids.append(100 * self.attempt + index)
            self.texts.append(f"{self.worker.name}/{self.attempt}/{index} ")

    def unpublished(self) -> Token:
        before = self.num_published
        return Token(
            index=len(self.token_ids), ids=tuple(self.token_ids[before:]), texts=tuple(self.texts[before:])
        )


@dataclass
class Worker:
    """A process with some requests. One that was thought dead may go on beside another one of its name."""

    name: str
    held: dict[str, Held] = field(default_factory=dict)
    insists_on: tuple[Operation, Callable[[Any], None]] | None = None
    """The call whose answer did not come, and what to do with the answer: it is repeated before anything else is said."""
    has_lost_claim: bool = False

    def drop(self, held: Held) -> None:
        if self.held.get(held.request_id) is held:
            del self.held[held.request_id]


@dataclass
class Reader:
    """Follows requests by pushes, and reads streams where a push was lost, as a client does."""

    name: str
    cursors: dict[str, StreamCursor] = field(default_factory=dict)
    seen: dict[str, list[Any]] = field(default_factory=dict)
    """Request id → events, in the order in which the reader had them."""
    is_deaf: bool = False
    """Pushes are lost."""

    def hears_again(self) -> None:
        """Its connection has come back, and it knows that something may be missing."""
        if self.is_deaf:
            for cursor in self.cursors.values():
                cursor.interrupted()
        self.is_deaf = False

    def leave(self, request_id: str) -> None:
        self.cursors.pop(request_id, None)
        self.seen.pop(request_id, None)
