"""Requests and conversations as the model has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from producer.ledger.calls import FINAL_STATES, State
from tests.producer.ledger.model_check.server import decoded

Place = tuple[int, int]
"""Of an entry in a stream: token index, number."""
Written = str | dict[str, Any]
"""An event as its writer encoded it; or, if a script made it, what must be in it."""

ModelState = State | Literal["new"]
"""`new`: it is in no queue yet, or just between two places."""

START: Place = (0, 0)
NEVER = float("inf")


@dataclass
class Entry:
    """One event where it must be in its stream."""

    place: Place
    event: Written


@dataclass
class ModelRequest:
    """A request as its hash, its stream and the queue must show it."""

    id: str
    body: str
    digest: str
    model: str
    tenant: str
    priority: int
    submitted: int
    age: float
    """When it was submitted, in units of 10 µs: its place among those of its tenant and priority."""
    retention: int
    estimate: int
    """Tokens that it will take."""
    state: ModelState = "new"
    charged: int | None = None
    """Tokens for which its tenant was charged, until it is known how many there were."""
    deadline: int | None = None
    attempt: int = 0
    worker: str = ""
    lease: int | None = None
    started: int | None = None
    claimed: int | None = None
    is_cancel_asked: bool = False
    ended: int | None = None
    readers: list[str] = field(default_factory=list)
    tokens: list[tuple[int, str]] = field(default_factory=list)
    stream: list[Entry] = field(default_factory=list)
    last: Place = START
    """Of the last entry that the stream ever had."""
    prompt_tokens: int = 0
    num_tokens_before: int = 0
    """When its last attempt began."""
    failures: int = 0
    losses: list[tuple[int, str, int, str]] = field(default_factory=list)
    """Attempt, worker, tokens and what happened, of each attempt that was lost."""
    conversation: str | None = None
    memory: str | None = None
    document: str | None = None
    retried: int | None = None
    levels: list[int] = field(default_factory=list)
    left: int = 0
    pieces: int = 0
    piece_prompt_tokens: int = 0
    piece_completion_tokens: int = 0
    expires: int | None = None

    @property
    def is_live(self) -> bool:
        return self.state not in FINAL_STATES

    @property
    def score(self) -> float:
        return self.priority * 5e14 + self.age

    @property
    def is_fold(self) -> bool:
        return bool(decoded(self.body).get("kind") == "fold")

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.tokens)

    def place_after(self, number: int) -> Place:
        """Where an event goes that comes with no token."""
        index = len(self.tokens)
        if self.last[0] == index and self.last[1] >= number:
            return (index, self.last[1] + 1)
        return (index, number)


@dataclass
class ModelConversation:
    """A conversation as its hash, its turns and its lifetime must show it."""

    name: str
    id: str
    tenant: str
    model: str
    lifetime: int
    turns: list[tuple[str, str, str]] = field(default_factory=list)
    """Question, answer, the request that it came from."""
    busy: str | None = None
    folding: str | None = None
    folded: str | None = None
    fold_failures: int = 0
    summary: str = ""
    covered: int = 0
    expires: float = NEVER
    """`NEVER` while an answer is in progress."""


def pieces_of(document: ModelRequest) -> list[str]:
    """The ids of its pieces, of all levels."""
    return [
        f"{document.id}.{level}.{number}"
        for level, total in enumerate(document.levels, 1)
        for number in range(1, total + 1)
    ]
