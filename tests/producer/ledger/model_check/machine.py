"""Workers, clients and readers call every script in any order; calls are lost, doubled and late, workers die and come back.

Each rule is one step. After it the answer, the pushes and what the call may have touched are compared with the model, and every few
steps all keys are. When the steps are over everything that lives must come to an end, and nothing may be left behind.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from producer.contract import (
    ChatRequest,
    DeadlineUnmeetable,
    Failed,
    Finished,
    FoldRequest,
    GlmqError,
    QueueFull,
    Request,
    Started,
    SummaryRequest,
)
from producer.contract.events import Usage
from producer.contract.keys import Keys, conversation_name
from producer.contract.requests import encode_request
from producer.contract.tenants import (
    DEFAULT_BOUNDS,
    QueueBounds,
    QueueOrder,
    TenantSettings,
    estimate_tokens,
)
from producer.ledger import Emission, EmitCode, Renewal, calls
from producer.ledger.calls import LossOutcome
from producer.streams import StreamCursor, parse_push
from tests.producer.ledger.model_check.actors import Held, Operation, Reader, Worker
from tests.producer.ledger.model_check.agreement import (
    check_all,
    check_entries,
    check_nothing_is_left,
    check_places,
    check_pushes,
    check_requests,
)
from tests.producer.ledger.model_check.invariants import check_invariants
from tests.producer.ledger.model_check.model import Loss, Model
from tests.producer.ledger.model_check.server import (
    CALL_US,
    ControlledServer,
    Substitution,
    decoded,
    place_of,
)

T = TypeVar("T")

MODEL = "m"
TENANTS = ("a", "b")
WORKERS = ("w1", "w2", "w3")
READERS = ("r1", "r2")
CONVERSATIONS = ("c1", "c2", "c3")
LEASE_SECONDS = 2.0
RETENTION_SECONDS = 10.0
CONVERSATION_SECONDS = 60.0
MAX_ATTEMPTS = 3
MAX_REQUESTS = 25
ORDER = QueueOrder(tenant_max_running=4, ageing_seconds=3.0, ageing_claims=3)
SMALL_BOUNDS = (
    QueueBounds(max_queued=2, tenant_max_queued=0),
    QueueBounds(max_queued=0, tenant_max_queued=1),
    QueueBounds(max_queued_tokens=800, tenant_max_queued_tokens=0),
    QueueBounds(max_queued_tokens=0, tenant_max_queued_tokens=300),
)
SETTINGS = (
    None,
    TenantSettings(weight=3),
    TenantSettings(max_running=1),
    TenantSettings(max_running=0, weight=0.5),
    TenantSettings(max_queued=2),
)
FULL_CHECK_STEPS = 12
"""All keys are read every so many steps; the others read what a call may have touched."""

picks = st.integers(0, 2**12)
"""Which of the things that there are then."""
few = st.integers(1, 3)
tenants = st.sampled_from(TENANTS)
is_lost = st.sampled_from((False, False, False, True))
"""The call runs, and whoever made it never hears so."""


def pick(number: int, things: Sequence[T]) -> T:
    return things[number % len(things)]


class LedgerMachine(RuleBasedStateMachine):
    """A subclass says on which server, and what is broken there."""

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
        self.num_ids = 0
        self.num_steps = 0
        self.is_broken = False

    # --- one call ----------------------------------------------------------------------------------------------------

    def perform(self, operation: Operation) -> Any:
        """Make a call, and compare all that it did with the model. Answers what it answered; an error is an answer, too."""
        try:
            return self._perform(operation)
        except BaseException:
            self.is_broken = True
            raise

    def _perform(self, operation: Operation) -> Any:
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
                    self.leave(reader, request_id)

    def check(self) -> None:
        """All keys, against the model and against what must hold anyway."""
        snapshot = self.server.snapshot()
        self.model.begin(self.server.now_us)
        try:
            check_all(self.model, snapshot)
            check_invariants(snapshot)
        except BaseException:
            self.is_broken = True
            raise

    def end_step(self) -> None:
        self.tally["step"] += 1
        self.num_steps += 1
        if self.num_steps % FULL_CHECK_STEPS == 0:
            self.check()

    def new_id(self, kind: str) -> str:
        self.num_ids += 1
        return f"{kind}{self.num_ids}"

    # --- clients -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        request_id: str,
        idempotency_key: str | None = None,
        bounds: QueueBounds = DEFAULT_BOUNDS,
    ) -> None:
        call = calls.submit(
            request,
            model=MODEL,
            bounds=bounds,
            request_id=request_id,
            idempotency_key=idempotency_key,
            retention_seconds=RETENTION_SECONDS,
            conversation_seconds=CONVERSATION_SECONDS,
        )
        self.perform(
            Operation(
                "submit",
                call,
                lambda answer: self.model.submit(
                    request,
                    model=MODEL,
                    request_id=request_id,
                    digest=str(call.args[1]),
                    body=str(call.args[5]),
                    estimate=estimate_tokens(request, str(call.args[5])),
                    bounds=bounds,
                    refusal=answer if isinstance(answer, QueueFull | DeadlineUnmeetable) else None,
                    idempotency_key=idempotency_key,
                    retention_seconds=RETENTION_SECONDS,
                    conversation_seconds=CONVERSATION_SECONDS,
                ),
            )
        )

    @initialize(number=st.integers(2, 6))
    def submit_some(self, number: int) -> None:
        """Otherwise many runs would begin with nothing to do."""
        for i in range(number):
            request: Request = ChatRequest(query="q", tenant=pick(i, TENANTS), priority=pick(i, (5, 5, 0)))
            if i % 3 == 1:
                request = SummaryRequest(text="t", tenant=pick(i, TENANTS))
            elif i % 3 == 2:
                request = ChatRequest(query="q", tenant=pick(i, TENANTS), conversation_id="c1")
            self.submit(request, self.new_id("i"))

    @precondition(lambda self: self.has_room)
    @rule(
        tenant=tenants,
        priority=st.sampled_from((0, 5, 5, 9)),
        deadline=st.sampled_from((None, None, 1.0, 5.0)),
    )
    def submit_chat(self, tenant: str, priority: int, deadline: float | None) -> None:
        request = ChatRequest(query="q", tenant=tenant, priority=priority, deadline_seconds=deadline)
        self.submit(request, self.new_id("q"))
        self.end_step()

    @precondition(lambda self: self.has_room)
    @rule(tenant=tenants, priority=st.sampled_from((0, 5, 9)), deadline=st.sampled_from((None, None, 5.0)))
    def submit_summary(self, tenant: str, priority: int, deadline: float | None) -> None:
        request = SummaryRequest(text="t", tenant=tenant, priority=priority, deadline_seconds=deadline)
        self.submit(request, self.new_id("s"))
        self.end_step()

    @rule(tenant=tenants, key=st.sampled_from(("k1", "k2")), query=st.sampled_from(("q", "q", "other")))
    def submit_with_idempotency_key(self, tenant: str, key: str, query: str) -> None:
        self.submit(ChatRequest(query=query, tenant=tenant), self.new_id("k"), key)
        self.end_step()

    @rule(
        tenant=tenants,
        priority=st.sampled_from((0, 5)),
        deadline=st.sampled_from((None, 1.0)),
        bounds=st.sampled_from(SMALL_BOUNDS),
    )
    def submit_to_a_full_queue(
        self, tenant: str, priority: int, deadline: float | None, bounds: QueueBounds
    ) -> None:
        """Refused or not, as the bounds are."""
        request = ChatRequest(query="q", tenant=tenant, priority=priority, deadline_seconds=deadline)
        self.submit(request, self.new_id("b"), pick(self.num_ids, (None, "k3", "k4")), bounds)
        self.end_step()

    @rule(tenant=tenants, changes=st.sampled_from(SETTINGS))
    def set_tenant(self, tenant: str, changes: TenantSettings | None) -> None:
        """None: back to the defaults."""
        self.perform(
            Operation(
                "tenant",
                calls.set_tenant(tenant, "" if changes is None else changes.encode(), [MODEL]),
                lambda _: self.model.order.set(tenant, changes),
            )
        )
        self.end_step()

    @rule(tenant=tenants, which=picks, is_busy=st.sampled_from((False, False, False, True)))
    def submit_in_conversation(self, tenant: str, which: int, is_busy: bool) -> None:
        """Mostly one without an answer in progress, if there is such a one."""
        free = [
            name
            for name in CONVERSATIONS
            if (found := self.model.conversations.get(conversation_name(tenant, name))) is None
            or found.busy is None
        ]
        conversation = pick(which, CONVERSATIONS if is_busy or not free else free)
        request_id = self.new_id("c")
        request = ChatRequest(query=f"q {request_id}", tenant=tenant, conversation_id=conversation)
        self.submit(request, request_id)
        self.end_step()

    @rule(which=picks, is_known=st.booleans())
    def refuse(self, which: int, is_known: bool) -> None:
        known = [request.id for request in self.model.requests.values() if request.is_live]
        request_id = pick(which, known) if known and is_known else self.new_id("x")
        failed = Failed(code="invalid_request", message="It is invalid. Correct it.")
        call = calls.refuse(request_id, {}, failed, model=MODEL, retention_seconds=RETENTION_SECONDS)
        self.perform(
            Operation(
                "refuse",
                call,
                lambda _: self.model.refuse(
                    request_id,
                    failed,
                    model=MODEL,
                    digest=str(call.args[1]),
                    body=str(call.args[4]),
                    retention_seconds=RETENTION_SECONDS,
                ),
            )
        )
        self.end_step()

    @precondition(lambda self: self.model.requests)
    @rule(which=picks)
    def cancel(self, which: int) -> None:
        request_id = pick(which, list(self.model.requests))
        self.perform(Operation("cancel", calls.cancel(request_id), lambda _: self.model.cancel(request_id)))
        self.end_step()

    @precondition(lambda self: self.model.conversations)
    @rule(which=picks)
    def forget(self, which: int) -> None:
        conversation = pick(which, list(self.model.conversations.values()))
        tenant, conversation_id = conversation.tenant, conversation.id
        self.perform(
            Operation(
                "forget",
                calls.forget(tenant, conversation_id),
                lambda _: self.model.forget(tenant, conversation_id),
            )
        )
        self.end_step()

    # --- readers -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.requests)
    @rule(name=st.sampled_from(READERS), which=picks, number=few)
    def follow(self, name: str, which: int, number: int) -> None:
        """Requests that the reader does not know yet, or some more of those that it follows."""
        known = list(self.model.requests)
        self.read(self.readers[name], [pick(which + i, known) for i in range(number)])
        self.end_step()

    @rule(name=st.sampled_from(READERS))
    def read_after_gaps(self, name: str) -> None:
        """A client reads the stream of what it follows as soon as it finds that a push is missing."""
        reader = self.readers[name]
        reader.hears_again()
        self.read(reader, [each for each, cursor in reader.cursors.items() if cursor.wants_read])
        self.end_step()

    def read(self, reader: Reader, request_ids: list[str]) -> None:
        request_ids = list(dict.fromkeys(request_ids))
        for request_id in request_ids:
            reader.cursors.setdefault(request_id, StreamCursor(request_id))
            reader.seen.setdefault(request_id, [])
        wanted = [(request_id, reader.cursors[request_id].position) for request_id in request_ids]

        def predict(answer: Any) -> Any:
            places = [(request_id, place_of(at)) for request_id, at in wanted]
            expected = self.model.follow(reader.name, places)
            assert len(answer) == len(expected)
            for (request_id, _), followed, wanted_answer in zip(wanted, answer, expected, strict=True):
                if wanted_answer is None:
                    assert followed is None
                    continue
                state, last, entries = wanted_answer
                assert (followed.state, place_of(followed.last_id)) == (state, last)
                found = [(place_of(entry.id), entry.event) for entry in followed.entries]
                check_entries(request_id, entries, found)
            return answer

        answer = self.perform(Operation("follow", calls.follow(reader.name, wanted), predict))
        for request_id, followed in zip(request_ids, answer, strict=True):
            cursor = reader.cursors.get(request_id)
            if cursor is not None and not cursor.is_done:
                reader.seen[request_id] += cursor.read(followed)

    def leave(self, reader: Reader, request_id: str) -> None:
        reader.cursors.pop(request_id, None)
        reader.seen.pop(request_id, None)

    @rule(name=st.sampled_from(READERS))
    def pushes_are_lost(self, name: str) -> None:
        """Its connection breaks: nothing more is heard."""
        self.readers[name].is_deaf = True
        self.end_step()

    @precondition(lambda self: any(reader.cursors for reader in self.readers.values()))
    @rule(which=picks)
    def unfollow(self, which: int) -> None:
        followed = [(reader, each) for reader in self.readers.values() for each in reader.cursors]
        reader, request_id = pick(which, followed)
        self.leave(reader, request_id)
        self.perform(
            Operation(
                "unfollow",
                calls.unfollow(reader.name, request_id),
                lambda _: self.model.unfollow(reader.name, request_id),
            )
        )
        self.end_step()

    @property
    def has_room(self) -> bool:
        """More would make the steps slower and no more interesting."""
        return len(self.model.requests) < MAX_REQUESTS

    # --- workers -----------------------------------------------------------------------------------------------------

    def holders(self) -> list[Held]:
        """All that some process believes to have."""
        return [held for worker in (*self.workers.values(), *self.zombies) for held in worker.held.values()]

    def say(self, held: Held, operation: Operation, settle: Callable[[Any], None], *, lost: bool) -> None:
        """A worker's call. One that gets no answer is repeated before the worker says anything else."""
        worker = held.worker
        if worker.insists_on is not None:
            operation, settle = worker.insists_on
            worker.insists_on = None
        answer = self.perform(operation)
        if lost:
            worker.insists_on = (operation, settle)
        else:
            settle(answer)

    @rule(name=st.sampled_from(WORKERS), new=few, is_end=st.booleans())
    def work(self, name: str, new: int, is_end: bool) -> None:
        """What a healthy worker does all the time: it takes work, gives out tokens, and says what has come to its end."""
        worker = self.workers[name]
        if len(worker.held) < 3:
            self.take(worker, lost=False)
        if worker.held:
            self.publish(list(worker.held.values()), new, lost=False)
        ready = [held for held in worker.held.values() if held.can_finish]
        if is_end and ready:
            self.end(ready[0], lost=False)
        self.end_step()

    @rule(name=st.sampled_from(WORKERS), lost=is_lost)
    def claim(self, name: str, lost: bool) -> None:
        self.take(self.workers[name], lost=lost)
        self.end_step()

    def take(self, worker: Worker, *, lost: bool) -> None:
        answer = self.perform(self.claim_operation(worker.name))
        if lost:
            worker.has_lost_claim = True
        elif answer is not None:
            worker.held[answer.request_id] = Held.of(worker, answer)
            if answer.attempt > 1 and not answer.pieces.levels:
                self.tally["takeover"] += 1
                self.tally["continuation"] += bool(answer.emitted_ids)

    def claim_operation(self, worker: str) -> Operation:
        return Operation(
            "claim",
            calls.claim(MODEL, worker, LEASE_SECONDS, ORDER),
            lambda answer: self.model.claim(
                worker, LEASE_SECONDS, ORDER, chosen=getattr(answer, "request_id", None)
            ),
        )

    @precondition(lambda self: self.holders())
    @rule(which=picks, number=few, new=st.integers(0, 3), lost=is_lost)
    def flush(self, which: int, number: int, new: int, lost: bool) -> None:
        """The new tokens of up to three of a worker's requests, in one call."""
        first = pick(which, self.holders())
        others = [held for held in first.worker.held.values() if held is not first]
        self.publish([first, *others[: number - 1]], new, lost=lost)
        self.end_step()

    def publish(self, flushed: Sequence[Held], new: int, *, lost: bool) -> None:
        batch: list[tuple[Held, Emission]] = []
        for held in flushed:
            if not held.is_started:
                started = Started(attempt=held.attempt, worker=held.worker.name, prompt_tokens=7)
                batch.append((held, Emission(held.request_id, held.attempt, started)))
            held.generate(new)
            if not held.is_published:
                batch.append((held, Emission(held.request_id, held.attempt, held.unpublished())))
        emissions = [emission for _, emission in batch]

        def settle(codes: list[EmitCode]) -> None:
            for (held, emission), code in zip(batch, codes, strict=True):
                self.settle(held, emission, code)

        operation = self.emit_operation(flushed[0].worker.name, emissions)
        self.say(flushed[0], operation, settle, lost=lost)

    def emit_operation(self, worker: str, emissions: list[Emission]) -> Operation:
        return Operation(
            "emit", calls.emit(emissions, worker=worker), lambda _: self.model.emit(emissions, worker)
        )

    def settle(self, held: Held, emission: Emission, code: EmitCode) -> None:
        self.tally[f"emission: {code.name}"] += 1
        assert code is not EmitCode.OUT_OF_STEP, "a worker that keeps to the order is never out of step"
        if code is EmitCode.FENCED:
            held.worker.drop(held)
            return
        held.is_cancelled |= code is EmitCode.CANCEL_ASKED
        if isinstance(emission.event, Started):
            held.is_started = True
        else:
            held.num_published = max(held.num_published, emission.event.index)

    @precondition(lambda self: self.holders())
    @rule(which=picks, before=st.integers(-1, 3), number=few, number_of_attempt=st.integers(-1, 1))
    def emit_out_of_step(self, which: int, before: int, number: int, number_of_attempt: int) -> None:
        """What no worker should send: tokens from anywhere, of any attempt."""
        held = pick(which, self.holders())
        broken = Held(
            held.worker,
            held.request_id,
            held.attempt + number_of_attempt,
            held.request,
            held.claim,
            [],
            [],
            0,
        )
        broken.generate(max(before, 0) + number)
        broken.num_published = max(before, 0)
        emissions = [Emission(broken.request_id, broken.attempt, broken.unpublished())]
        if before < 0:
            started = Started(attempt=broken.attempt, worker=broken.worker.name)
            emissions = [Emission(broken.request_id, broken.attempt, started)]
        if self.model.held(broken.request_id, broken.attempt) is not None:
            # It would be believed. Only one that is refused is of interest.
            current = self.model.requests[broken.request_id]
            if before < 0 or max(before, 0) == len(current.tokens):
                return
        self.perform(self.emit_operation(broken.worker.name, emissions))
        self.end_step()

    @precondition(lambda self: any(held.can_finish for held in self.holders()))
    @rule(which=picks, lost=is_lost)
    def finish(self, which: int, lost: bool) -> None:
        self.end(pick(which, [held for held in self.holders() if held.can_finish]), lost=lost)
        self.end_step()

    def end(self, held: Held, *, lost: bool) -> None:
        operation = self.finish_operation(held)
        self.say(held, operation, lambda _: held.worker.drop(held), lost=lost)

    def finish_operation(self, held: Held) -> Operation:
        pieces, worker, num_tokens = held.claim.pieces, held.worker.name, len(held.token_ids)
        event = Finished(
            reason="cancelled" if held.is_cancelled else "stop",
            text=held.text,
            usage=Usage(
                prompt_tokens=7,
                completion_tokens=len(held.token_ids),
                pieces=pieces.number,
                piece_prompt_tokens=pieces.prompt_tokens,
                piece_completion_tokens=pieces.completion_tokens,
            ),
            attempts=held.attempt,
        )
        return Operation(
            "finish",
            calls.finish(held.request_id, held.attempt, event, worker=worker, num_tokens=num_tokens),
            lambda _: self.model.finish(held.request_id, held.attempt, event, worker=worker),
        )

    @precondition(lambda self: self.holders())
    @rule(which=picks, lost=is_lost)
    def fail(self, which: int, lost: bool) -> None:
        held = pick(which, self.holders())
        event = Failed(code="internal_error", message="The engine could not answer it. Submit it again.")
        operation = Operation(
            "fail",
            calls.fail(held.request_id, held.attempt, event, worker=held.worker.name),
            lambda _: self.model.fail(held.request_id, held.attempt, event, worker=held.worker.name),
        )
        self.say(held, operation, lambda _: held.worker.drop(held), lost=lost)
        self.end_step()

    @precondition(lambda self: self.holders())
    @rule(which=picks, lost=is_lost)
    def release(self, which: int, lost: bool) -> None:
        held = pick(which, self.holders())
        operation = self.release_operation(held.request_id, held.attempt, held.worker.name)
        self.say(held, operation, lambda _: held.worker.drop(held), lost=lost)
        self.end_step()

    def release_operation(self, request_id: str, attempt: int, worker: str) -> Operation:
        return Operation(
            "release",
            calls.release(request_id, attempt, worker=worker),
            lambda _: self.model.release(request_id, attempt, worker=worker),
        )

    @rule(name=st.sampled_from(WORKERS))
    def renew(self, name: str) -> None:
        worker = self.workers[name]
        leases = [(held.request_id, held.attempt) for held in worker.held.values()]
        answer = self.perform(
            Operation(
                "renew",
                calls.renew(name, leases, LEASE_SECONDS, about={"slots": 4}),
                lambda _: Renewal(*self.model.renew(name, leases, LEASE_SECONDS)),
            )
        )
        for request_id in answer.lost:
            worker.drop(worker.held[request_id])
        for request_id in answer.cancelled:
            worker.held[request_id].is_cancelled = True
        self.end_step()

    @rule(at_most=st.sampled_from((1, 2, 100)))
    def reap(self, at_most: int) -> None:
        self.perform(self.reap_operation(at_most))
        self.end_step()

    def reap_operation(self, at_most: int) -> Operation:
        return Operation(
            "reap", calls.reap(at_most, MAX_ATTEMPTS), lambda _: self.model.reap(at_most, MAX_ATTEMPTS)
        )

    @precondition(lambda self: self.holders())
    @rule(which=picks, keep=st.booleans(), is_trial=st.booleans(), lost=is_lost)
    def engine_dies(self, which: int, keep: bool, is_trial: bool, lost: bool) -> None:
        held = pick(which, self.holders())
        loss = Loss(
            "the engine died",
            max_attempts=MAX_ATTEMPTS,
            num_before=held.num_losses,
            keep=keep,
            is_trial=is_trial,
            worker=held.worker.name,
        )
        operation = Operation(
            "lose",
            calls.lose(held.request_id, held.attempt, **loss._asdict()),
            lambda _: self.model.lose(held.request_id, held.attempt, loss),
        )

        def settle(outcome: LossOutcome) -> None:
            if outcome == "kept":
                held.num_losses += 1
            else:
                held.worker.drop(held)

        self.say(held, operation, settle, lost=lost)
        self.end_step()

    # --- dead letters ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.requests)
    @rule(which=picks, is_dead=st.sampled_from((True, True, False)), is_dropped=st.booleans())
    def retry_or_drop(self, which: int, is_dead: bool, is_dropped: bool) -> None:
        dead = self.model.in_state("dead")
        request_id = pick(which, dead if dead and is_dead else list(self.model.requests.values())).id
        if is_dropped:
            self.perform(self.drop_operation(request_id))
        else:
            operation = Operation(
                "retry",
                calls.retry_dead(request_id, conversation_seconds=CONVERSATION_SECONDS),
                lambda _: self.model.retry_dead(request_id, conversation_seconds=CONVERSATION_SECONDS),
            )
            self.perform(operation)
        self.end_step()

    def drop_operation(self, request_id: str) -> Operation:
        return Operation("drop", calls.drop_dead(request_id), lambda _: self.model.drop_dead(request_id))

    @precondition(lambda self: any(worker.has_lost_claim for worker in self.workers.values()))
    @rule(which=picks)
    def release_lost_claims(self, which: int) -> None:
        """A worker that does not know what it has claimed hands back whatever it does not know of."""
        worker = pick(which, [worker for worker in self.workers.values() if worker.has_lost_claim])
        worker.has_lost_claim = False
        for request in self.model.in_state("running"):
            if request.worker == worker.name and request.id not in worker.held:
                self.perform(self.release_operation(request.id, request.attempt, worker.name))
        self.end_step()

    @rule(name=st.sampled_from(WORKERS))
    def crash(self, name: str) -> None:
        """The process is gone, or so it seems: it may have been paused, and go on with what it has in memory."""
        self.zombies.append(self.workers[name])
        self.workers[name] = Worker(name)
        self.end_step()

    # --- documents and conversations, by workers ------------------------------------------------------------------------

    def splittable(self) -> list[Held]:
        return [h for h in self.holders() if isinstance(h.request, SummaryRequest) and not h.token_ids]

    @precondition(lambda self: self.splittable())
    @rule(which=picks, number=few, lost=is_lost)
    def split(self, which: int, number: int, lost: bool) -> None:
        held = pick(which, self.splittable())
        level = len(held.claim.pieces.levels) + 1
        priority = min(held.request.priority + 1, 9)
        pieces = [
            SummaryRequest(text=f"t{i}", tenant=held.request.tenant, priority=priority) for i in range(number)
        ]
        operation = Operation(
            "split",
            calls.split(held.request_id, held.attempt, level=level, priority=priority, pieces=pieces),
            lambda _: self.model.split(
                held.request_id,
                held.attempt,
                level=level,
                priority=priority,
                pieces=pieces,
                estimates=[estimate_tokens(piece, encode_request(piece)) for piece in pieces],
            ),
        )

        def settle(answer: Any) -> None:
            if answer.outcome == "cancel_asked":
                held.is_cancelled = True
            else:
                held.worker.drop(held)

        self.say(held, operation, settle, lost=lost)
        self.end_step()

    def rememberable(self) -> list[Held]:
        return [
            held
            for held in self.holders()
            if isinstance(held.request, FoldRequest)
            or (isinstance(held.request, ChatRequest) and held.request.conversation_id)
        ]

    @precondition(lambda self: self.rememberable())
    @rule(which=picks, number=few)
    def remember(self, which: int, number: int) -> None:
        """The prompt of an answer or a fold is chosen, from the conversation as it is now."""
        held = pick(which, self.rememberable())
        is_fold = isinstance(held.request, FoldRequest)
        found = self.perform(
            Operation(
                "recollect",
                calls.recollect(held.request_id, max_turns=number, max_bytes=100_000, from_head=is_fold),
                lambda answer: self.model.recollect(
                    held.request_id, max_turns=number, from_head=is_fold, found=answer
                ),
            )
        )
        if found.memory is not None:
            held.has_memory = True
        elif found.turns or not is_fold:
            if is_fold:
                chosen = {
                    "summary": found.summary,
                    "first": found.first,
                    "last": found.first + len(found.turns),
                }
            else:
                chosen = {"first": found.first, "num_turns": found.num_turns, "question_tokens": 3}
            memory = json.dumps(chosen)
            kept = self.perform(
                Operation(
                    "remember",
                    calls.remember(held.request_id, held.attempt, memory),
                    lambda _: self.model.remember(held.request_id, held.attempt, memory),
                )
            )
            held.has_memory = kept is not None
        self.end_step()

    @precondition(lambda self: any(c.turns for c in self.model.conversations.values()))
    @rule(which=picks, is_late=st.sampled_from((False, False, False, True)))
    def fold(self, which: int, is_late: bool) -> None:
        """`is_late`: whoever asks for it knows the conversation as it was before the last fold."""
        conversation = pick(which, [c for c in self.model.conversations.values() if c.turns])
        request = FoldRequest(
            conversation_id=conversation.id,
            tenant=conversation.tenant,
            first=0 if is_late else conversation.covered,
            priority=8,
        )
        request_id = f"{conversation.turns[-1][2]}.fold"
        call = calls.fold(request, request_id=request_id, model=MODEL, retention_seconds=RETENTION_SECONDS)
        self.perform(
            Operation(
                "fold",
                call,
                lambda _: self.model.fold(
                    request,
                    request_id=request_id,
                    model=MODEL,
                    digest=str(call.args[1]),
                    estimate=estimate_tokens(request, str(call.args[5])),
                    retention_seconds=RETENTION_SECONDS,
                ),
            )
        )
        self.end_step()

    # --- the world ---------------------------------------------------------------------------------------------------

    @rule(ms=st.sampled_from((1, 100, 900, 2_100, 2_100, 5_000, 11_000, 61_000)))
    def time_passes(self, ms: int) -> None:
        self.server.advance(ms)
        self.end_step()

    @precondition(lambda self: self.sent)
    @rule(which=picks)
    def a_call_arrives_again(self, which: int) -> None:
        """Its sender had no answer in time and sent it twice; the first copy was only late. Or the sender was paused."""
        operation = pick(which, list(self.sent))
        if operation.name == "submit" and self._is_over(str(operation.call.args[0])):
            # So long afterwards it would be a new request with an old id: only an idempotency key is kept for longer.
            return
        self.perform(operation)
        self.tally["doubled call"] += 1
        self.end_step()

    @precondition(lambda self: self.model.requests)
    @rule(which=picks)
    def look(self, which: int) -> None:
        """What people and dashboards are shown."""
        request = pick(which, list(self.model.requests.values()))
        status = self.server.run(calls.status(request.id)) if not self._is_over(request.id) else None
        self.model.begin(self.server.now_us)
        if status is not None:
            queue = [each.id for each in self.model.order.queue()]
            place = queue.index(request.id) if request.state == "queued" else None
            assert (status.state, status.attempt, status.num_tokens, status.place) == (
                request.state,
                request.attempt,
                len(request.tokens),
                place,
            )
        overview = self.server.run(calls.overview(MODEL))
        running = self.model.in_state("running")
        assert (overview.num_queued, overview.num_running) == (len(self.model.order.queue()), len(running))
        backlog = self.server.run(calls.backlog(MODEL))
        self.model.begin(self.server.now_us)
        assert sum(backlog.num_queued) == len(self.model.order.queue())
        assert backlog.num_overdue == sum(each.lease < self.model.now for each in running if each.lease)
        assert backlog.num_conversations == sum(at >= self.model.now for at in self.model.listed.values())
        self.end_step()

    def _is_over(self, request_id: str) -> bool:
        self.model.begin(self.server.now_us + CALL_US)
        return request_id not in self.model.requests

    # --- the end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if not self.is_broken:
                self.check()
                self.drain()
                self.check_readers()
                self.expire_everything()
        finally:
            self.server.clear()

    def drain(self) -> None:
        """All workers are gone for good, and a new one does whatever there is to do: then every request has ended."""
        for _ in range(40):
            if not any(request.is_live for request in self.model.requests.values()):
                break
            self.server.advance(int(LEASE_SECONDS * 1000) + 1)
            while self.perform(self.reap_operation(100)):
                pass
            while (claim := self.perform(self.claim_operation("w1"))) is not None:
                held = Held.of(Worker("w1"), claim)
                started = [
                    Emission(held.request_id, held.attempt, Started(attempt=held.attempt, worker="w1"))
                ]
                self.perform(self.emit_operation("w1", started))
                self.perform(self.finish_operation(held))
        live = [request.id for request in self.model.requests.values() if request.is_live]
        assert live == [], f"these never end: {live}"
        assert self.model.ends == self.model.creations, "each request has exactly one end"
        self.check()

    def check_readers(self) -> None:
        """Whoever follows a request to its end has had every event, in order, each once."""
        for reader in self.readers.values():
            reader.hears_again()
            for request_id, cursor in list(reader.cursors.items()):
                if cursor.wants_read:
                    self.read(reader, [request_id])
            for request_id, seen in reader.seen.items():
                if request_id not in self.model.requests:
                    continue
                assert reader.cursors[request_id].is_done
                stream = self.server.snapshot([f"events:{request_id}"]).streams[request_id]
                assert [event.model_dump() for event in seen] == [
                    type(event).model_validate(decoded(entry.event)).model_dump()
                    for event, entry in zip(seen, stream, strict=True)
                ]
                self.tally["stream read to its end"] += 1

    def expire_everything(self) -> None:
        for request in self.model.dead_letters():
            self.perform(self.drop_operation(request.id))
        self.server.advance(86_400_000 + int(CONVERSATION_SECONDS * 1000))
        check_nothing_is_left(self.server.snapshot())


def described(answer: Any) -> Any:
    """Comparable also where it is an error."""
    return (type(answer), str(answer)) if isinstance(answer, Exception) else answer


def outcome(answer: Any) -> str:
    """One word for the tally."""
    match answer:
        case Exception():
            return type(answer).__name__
        case bool() | str() | None:
            return str(answer)
        case list():
            return "some" if answer else "none"
        case _:
            return str(getattr(answer, "outcome", type(answer).__name__))
