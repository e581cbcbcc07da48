"""The requests that this worker has claimed and not yet ended: what was generated, what of it is published, which slot it holds.

State only, shared by the worker's threads under one lock; it decides nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from producer.contract import Failed, Finished, FoldRequest, Timings, Usage
from producer.contract.conversation import PromptMemory
from producer.ledger import Pieces
from workers.engine.messages import Generate
from workers.pool import Ticket

EndReason = Literal["stop", "length", "cancelled"]
RELEASED: Final = "released"
"""Not an end for the reader: the request goes back to the queue, and another attempt goes on from its last token."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Not an end for the reader either: the engine died with this attempt."""

    what: str
    """Happened, as part of a sentence."""
    keep: bool = False
    """This worker tries the request alone in its next engine; otherwise it goes back to the queue."""
    is_trial: bool = False
    """It was alone."""


End = EndReason | Literal["released"] | Lost | Failed


class AnswerDetokenizer(Protocol):
    """What a running request needs of the detokenizer: one text a token, never taken back."""

    def add(self, id_: int) -> str: ...

    def finish(self) -> str: ...

    @property
    def is_stopped(self) -> bool: ...


def _accept(_: Finished) -> Failed | None:
    return None


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One claimed request. Mutated only under the lock of its `RunningRequests`."""

    request_id: str
    attempt: int
    """The fencing token: whatever this worker writes for the request carries it."""
    ticket: Ticket | None
    """Completed when the request ends; None when the worker found the request without one."""
    queue_seconds: float
    """From submit to the first claim."""
    age_seconds: float = 0.0
    """Since submit, when it was claimed here."""
    tenant: str = ""
    kind: str = "unknown"
    adapter: str | None = None
    claimed: float = field(default_factory=time.monotonic)
    pieces: Pieces = field(default_factory=Pieces)
    """Of a text that is too long for the context: its pieces, all done."""
    seconds_before: float = 0.0
    """From the first claim to this one, which its pieces have taken."""
    sequence_id: int = 0
    """Under which the engine knows it; 0 before the engine was asked."""
    detokenizer: AnswerDetokenizer | None = None
    prompt_len: int = 0
    max_new_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    """The whole answer so far, earlier attempts included."""
    texts: list[str] = field(default_factory=list)
    num_published: int = 0
    """Tokens that the ledger has, or is being given at this moment."""
    is_started_published: bool = False
    num_emitted_before: int = 0
    """Tokens of earlier attempts."""
    failures: int = 0
    """Attempts in a row before this one that were lost without a new token."""
    num_out_of_step: int = 0
    """So often in a row the ledger did not have what was published before."""
    num_losses: int = 0
    """So often the engine died with this attempt, and the worker kept it."""
    generate: Generate | None = None
    """What the engine was asked first, so that another one can be asked again."""
    first_token: float | None = None
    """On the monotonic clock: the first one of this attempt."""
    last_token: float | None = None
    deadline: float = float("inf")
    """On the monotonic clock: aborted then."""
    end: End | None = None
    """Why it is over, once it is; published after all tokens."""
    memory: PromptMemory | None = None
    """What its prompt remembers of a conversation."""
    fold: FoldRequest | None = None
    """To be asked for once this answer is a turn."""
    check: Callable[[Finished], Failed | None] = _accept
    """What is wrong with the answer, if that makes it none."""

    @property
    def is_known_to_engine(self) -> bool:
        return self.sequence_id > 0

    @property
    def num_new(self) -> int:
        """Tokens of this attempt."""
        return len(self.token_ids) - self.num_emitted_before

    @property
    def num_tries(self) -> int:
        """Attempts, without those that only made pieces."""
        return self.attempt - len(self.pieces.levels)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, token_id: int, text: str, now: float) -> None:
        """One more answer token and the text that it adds."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        self.token_ids.append(token_id)
        self.texts.append(text)

    def finished(self, reason: EndReason) -> Finished:
        """The last event of an answer that ends here."""
        now = time.monotonic()
        return Finished(
            reason=reason,
            text=self.text,
            usage=self._usage(),
            timings=Timings(
                queue_seconds=self.queue_seconds,
                first_token_seconds=self.seconds_before + (self.first_token or now) - self.claimed,
                total_seconds=self.seconds_before + now - self.claimed,
            ),
            attempts=self.num_tries,
        )

    def _usage(self) -> Usage:
        memory = self.memory or PromptMemory()
        return Usage(
            prompt_tokens=self.prompt_len,
            completion_tokens=len(self.token_ids),
            summary_turns=memory.covered,
            recent_turns=memory.num_recent,
            left_out_turns=memory.num_left_out,
            pieces=self.pieces.number,
            piece_prompt_tokens=self.pieces.prompt_tokens,
            piece_completion_tokens=self.pieces.completion_tokens,
        )


class RunningRequests:
    """All of them, by request id and by the engine's sequence id."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._by_id: dict[str, RunningRequest] = {}
        self._by_sequence: dict[int, RunningRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RunningRequest]:
        with self.lock:
            return iter(tuple(self._by_id.values()))

    def add(self, running: RunningRequest) -> None:
        with self.lock:
            self._by_id[running.request_id] = running

    def bind(self, running: RunningRequest, sequence_id: int) -> None:
        """From now on the engine's output for this sequence is the request's."""
        with self.lock:
            self._by_sequence.pop(running.sequence_id, None)
            running.sequence_id = sequence_id
            self._by_sequence[sequence_id] = running

    def unbind(self, running: RunningRequest) -> None:
        """Output of the engine that still arrives for this request is no longer wanted."""
        with self.lock:
            self._by_sequence.pop(running.sequence_id, None)

    def get(self, request_id: str) -> RunningRequest | None:
        return self._by_id.get(request_id)

    def of_sequence(self, sequence_id: int) -> RunningRequest | None:
        return self._by_sequence.get(sequence_id)

    def of_ticket(self, ticket: Ticket) -> RunningRequest | None:
        return next((running for running in self if running.ticket is ticket), None)

    def remove(self, running: RunningRequest) -> bool:
        """Forget it; False if somebody else did already."""
        with self.lock:
            self._by_sequence.pop(running.sequence_id, None)
            # A later attempt of the same request may have come to this worker too.
            if self._by_id.get(running.request_id) is not running:
                return False
            del self._by_id[running.request_id]
            return True

    @property
    def num_generating(self) -> int:
        """Requests that wait for the engine."""
        return len(self._by_sequence)
