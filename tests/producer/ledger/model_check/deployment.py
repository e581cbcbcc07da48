"""The server and the model side by side: every call is made on both, and all that it did is compared."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, TypeVar

import redis

from producer.contract import GlmqError
from producer.contract.keys import Keys
from producer.streams import parse_push
from tests.producer.ledger.model_check.actors import Operation, Reader, Worker
from tests.producer.ledger.model_check.agreement import (
    MODEL,
    check_all,
    check_places,
    check_pushes,
    check_requests,
)
from tests.producer.ledger.model_check.invariants import check_invariants
from tests.producer.ledger.model_check.model import Model
from tests.producer.ledger.model_check.server import ControlledServer, Substitution

T = TypeVar("T")
ActT = TypeVar("ActT", bound=Callable[..., None])

TENANTS: Final = ("a", "b")
WORKERS: Final = ("w1", "w2", "w3")
READERS: Final = ("r1", "r2")
RETENTION_SECONDS: Final = 10.0
CONVERSATION_SECONDS: Final = 60.0


def pick(number: int, things: Sequence[T]) -> T:
    return things[number % len(things)]


def act(weight: int, when: Callable[[Any], object] = lambda _: True) -> Callable[[ActT], ActT]:
    """Marks what can be done in a step: how often, in comparison with the others, and when it makes sense.

    An act is told two numbers, of which it makes what it needs, and whether its caller never learns the answer.
    """

    def mark(function: ActT) -> ActT:
        function.act = (weight, when)  # type: ignore[attr-defined]
        return function

    return mark


class Deployment:
    """What the acts share. A subclass says on which server, and what is broken there."""

    connection: ClassVar[redis.Redis]
    keys: ClassVar[Keys]
    substitutions: ClassVar[tuple[Substitution, ...]] = ()
    tally: ClassVar[Counter[str]] = Counter()
    """What has happened, over all runs: `step`, `call`, and what the calls came to."""

    def __init__(self) -> None:
        super().__init__()
        self.server = ControlledServer(self.connection, self.keys, self.substitutions)
        self.model = Model()
        self.workers = {name: Worker(name) for name in WORKERS}
        self.zombies: deque[Worker] = deque(maxlen=3)
        """Processes that were thought dead, and still have everything in memory."""
        self.readers = {name: Reader(name) for name in READERS}
        self.sent: deque[Operation] = deque(maxlen=30)
        """Calls that may arrive once more."""
        self.has_lost_writes = False
        self.num_ids = 0

    def new_id(self, kind: str) -> str:
        self.num_ids += 1
        return f"{kind}{self.num_ids}"

    def perform(self, operation: Operation) -> Any:
        """Make a call, and compare all that it did with the model. Answers what it answered; an error is an answer, too."""
        try:
            answer = self.server.run(operation.call)
        except GlmqError as error:
            answer = error
        self.model.begin(self.server.now_us)
        try:
            expected = operation.predict(answer)
        except GlmqError as error:
            expected = error
        assert described(answer) == described(expected), f"{operation.name}: {answer}, not {expected}"
        snapshot = self.server.snapshot(self._names())
        check_requests(self.model, snapshot, self.model.touched)
        check_places(self.model, snapshot)
        check_pushes(self.model, snapshot.published)
        self._tell_readers(snapshot.published)
        self._leave_what_is_gone()
        self.sent.append(operation)
        self.tally["call"] += 1
        self.tally[f"{operation.name}: {outcome(answer)}"] += 1
        return answer

    def check(self) -> None:
        """All keys, against the model and against what must hold anyway."""
        snapshot = self.server.snapshot()
        self.model.begin(self.server.now_us)
        check_all(self.model, snapshot)
        check_invariants(snapshot)

    def _names(self) -> list[str]:
        """The keys that are read after every call."""
        names = ["leases", f"queue:{MODEL}", f"shares:{MODEL}", *(f"running:{name}" for name in WORKERS)]
        for request_id in self.model.touched:
            names += (f"request:{request_id}", f"events:{request_id}")
        return names

    def _tell_readers(self, published: list[tuple[str, str]]) -> None:
        for channel, message in published:
            kind, _, name = channel.partition(":")
            if kind != "push" or self.readers[name].is_deaf:
                continue
            reader = self.readers[name]
            for request_id, push in parse_push(message):
                if request_id in reader.cursors:
                    reader.seen[request_id] += reader.cursors[request_id].push(push)

    def _leave_what_is_gone(self) -> None:
        """Whoever has seen the end of a request, or was told that it is gone, is no reader of what comes under its id later."""
        for reader in self.readers.values():
            for request_id, cursor in list(reader.cursors.items()):
                request = self.model.requests.get(request_id)
                if request is None or (cursor.is_done and request.is_live):
                    reader.leave(request_id)


def described(answer: Any) -> Any:
    """Comparable also where it is an error."""
    return (type(answer), str(answer)) if isinstance(answer, Exception) else answer


def outcome(answer: Any) -> str:
    """One word for the tally."""
    match answer:
        case Exception():
            return type(answer).__name__
        case bool() | None:
            return str(answer)
        case str():
            return answer if answer.isalpha() else "text"
        case list():
            return "some" if answer else "none"
        case _:
            return str(getattr(answer, "outcome", type(answer).__name__))
