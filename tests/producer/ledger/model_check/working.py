"""What workers do, and what becomes of them: every call of a claim, from healthy processes and from those that were thought dead."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from producer.contract import Failed, Finished, FoldRequest, Started, SummaryRequest
from producer.contract.events import Usage
from producer.contract.requests import encode_request
from producer.contract.tenants import QueueOrder, estimate_tokens
from producer.ledger import Emission, EmitCode, Renewal, calls
from producer.ledger.calls import LossOutcome, Split
from tests.producer.ledger.model_check.actors import Held, Operation, Worker
from tests.producer.ledger.model_check.agreement import MODEL
from tests.producer.ledger.model_check.deployment import (
    RETENTION_SECONDS,
    WORKERS,
    Deployment,
    act,
    pick,
)
from tests.producer.ledger.model_check.model import Loss

LEASE_SECONDS: Final = 2.0
MAX_ATTEMPTS: Final = 3
SLOTS: Final = 3
ORDER: Final = QueueOrder(tenant_max_running=4, ageing_seconds=3.0, ageing_claims=3)


def has_holders(workers: Workers) -> bool:
    return bool(workers.holders())


def needs_memory(held: Held) -> bool:
    """Whether its prompt is made of a conversation."""
    return isinstance(held.request, FoldRequest) or bool(getattr(held.request, "conversation_id", None))


def can_be_cut(held: Held) -> bool:
    """A text may turn out to be too long, and so may a piece of one; not once its summary has begun, and not without an end."""
    return (
        isinstance(held.request, SummaryRequest)
        and not held.token_ids
        and len(held.claim.pieces.levels) < 2
        and held.request_id.count(".") < 4
    )


class Workers(Deployment):
    """Processes that claim requests and answer them."""

    def holders(self) -> list[Held]:
        """All that some process believes to have."""
        return [held for worker in (*self.workers.values(), *self.zombies) for held in worker.held.values()]

    def say(self, held: Held, operation: Operation, settle: Callable[[Any], None], *, is_lost: bool) -> None:
        """A worker's call. One that gets no answer is repeated before the worker says anything else."""
        worker = held.worker
        if worker.insists_on is not None:
            operation, settle = worker.insists_on
            worker.insists_on = None
        answer = self.perform(operation)
        if is_lost:
            worker.insists_on = (operation, settle)
        else:
            settle(answer)

    @act(8)
    def work(self, which: int, option: int, is_lost: bool) -> None:
        """What a healthy worker does all the time: it takes work, gives out tokens, and says what has come to its end."""
        worker = self.workers[pick(which, WORKERS)]
        if len(worker.held) < SLOTS:
            self.take(worker, is_lost=False)
        if worker.held:
            self.publish(list(worker.held.values()), option % 3, is_lost=is_lost)
        ready = [held for held in worker.held.values() if held.can_finish]
        if ready and option % 2:
            self.end(ready[0], is_lost=is_lost)

    @act(4)
    def answer_some(self, which: int, option: int, is_lost: bool) -> None:
        """A worker with nothing else to do answers up to four requests from beginning to end, or cuts a text into pieces."""
        worker = Worker(pick(which, WORKERS))
        for i in range(option % 4 + 1):
            self.take(worker, is_lost=False)
            for held in list(worker.held.values()):
                if i == 0 and can_be_cut(held):
                    self.cut(held, option % 3 + 1, is_lost=False)
                    continue
                if needs_memory(held):
                    self.choose(held, option % 3 + 1, is_wrong=option // 9 % 4 == 0)
                self.publish([held], option // 3 % 3, is_lost=False)
                if held.request_id in worker.held and held.can_finish:
                    self.end(held, is_lost=False)

    # --- claims ------------------------------------------------------------------------------------------------------

    @act(3)
    def claim(self, which: int, option: int, is_lost: bool) -> None:
        self.take(self.workers[pick(which, WORKERS)], is_lost=is_lost)

    def take(self, worker: Worker, *, is_lost: bool) -> None:
        answer = self.perform(self.claim_operation(worker.name))
        if is_lost:
            worker.has_lost_claim = True
        elif answer is not None:
            worker.held[answer.request_id] = Held.of(worker, answer)
            if answer.attempt > 1 and not answer.pieces.levels:
                self.tally["takeover"] += 1
                self.tally["continuation"] += bool(answer.emitted_ids)
            self.tally["document back from its pieces"] += bool(answer.pieces.levels)

    def claim_operation(self, worker: str) -> Operation:
        return Operation(
            "claim",
            calls.claim(MODEL, worker, LEASE_SECONDS, ORDER),
            lambda answer: self.model.claim(
                worker, LEASE_SECONDS, ORDER, chosen=getattr(answer, "request_id", None)
            ),
        )

    @act(3, when=lambda self: any(worker.has_lost_claim for worker in self.workers.values()))
    def release_lost_claims(self, which: int, option: int, is_lost: bool) -> None:
        """A worker that does not know what it has claimed hands back whatever it does not know of."""
        worker = pick(which, [worker for worker in self.workers.values() if worker.has_lost_claim])
        worker.has_lost_claim = False
        for request in self.model.in_state("running"):
            if request.worker == worker.name and request.id not in worker.held:
                self.perform(self.release_operation(request.id, request.attempt, worker.name))

    # --- tokens ------------------------------------------------------------------------------------------------------

    @act(10, when=has_holders)
    def flush(self, which: int, option: int, is_lost: bool) -> None:
        """The new tokens of up to three of a process' requests, in one call."""
        first = pick(which, self.holders())
        others = [held for held in first.worker.held.values() if held is not first]
        self.publish([first, *others[: option // 3 % 3]], option % 3, is_lost=is_lost)

    def publish(self, flushed: Sequence[Held], new: int, *, is_lost: bool) -> None:
        """`new` tokens of each."""
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
        self.say(flushed[0], operation, settle, is_lost=is_lost)

    def emit_operation(self, worker: str, emissions: list[Emission]) -> Operation:
        return Operation(
            "emit", calls.emit(emissions, worker=worker), lambda _: self.model.emit(emissions, worker)
        )

    def settle(self, held: Held, emission: Emission, code: EmitCode) -> None:
        self.tally[f"emission: {code.name}"] += 1
        if code is EmitCode.OUT_OF_STEP:
            self.publish_again(held)
            return
        if code is EmitCode.FENCED:
            held.worker.drop(held)
            return
        held.is_cancelled |= code is EmitCode.CANCEL_ASKED
        if isinstance(emission.event, Started):
            held.is_started = True
        else:
            held.num_published = max(held.num_published, emission.event.index)

    def publish_again(self, held: Held) -> None:
        """What the server has lost is still here."""
        assert self.has_lost_writes, "otherwise a worker that keeps to the order is never out of step"
        self.tally["published again"] += 1
        request = self.model.held(held.request_id, held.attempt, held.worker.name)
        if request is None or len(request.tokens) > len(held.token_ids):
            held.worker.drop(held)
        else:
            held.num_published, held.is_started = len(request.tokens), False

    @act(2, when=has_holders)
    def emit_nonsense(self, which: int, option: int, is_lost: bool) -> None:
        """What no worker should send: tokens from anywhere, of any attempt. Nothing of it is believed."""
        held = pick(which, self.holders())
        attempt = held.attempt + pick(option, (-1, 0, 0, 1))
        before = option // 4 % 4
        right = self.model.held(held.request_id, attempt, held.worker.name)
        if right is not None and before == len(right.tokens):
            before += 1
        nonsense = Held(held.worker, held.request_id, attempt, held.request, held.claim, [], [], before)
        nonsense.generate(before + option // 16 % 3 + 1)
        emission = Emission(held.request_id, attempt, nonsense.unpublished())
        self.perform(self.emit_operation(held.worker.name, [emission]))
        # Later it may be the right thing, and not be what its worker says.
        self.sent.pop()

    # --- ends --------------------------------------------------------------------------------------------------------

    @act(4, when=lambda self: any(held.can_finish for held in self.holders()))
    def finish(self, which: int, option: int, is_lost: bool) -> None:
        self.end(pick(which, [held for held in self.holders() if held.can_finish]), is_lost=is_lost)

    def end(self, held: Held, *, is_lost: bool) -> None:
        def settle(is_ended: bool | None) -> None:
            if is_ended is None:
                self.publish_again(held)
            else:
                held.worker.drop(held)

        self.say(held, self.finish_operation(held), settle, is_lost=is_lost)

    def finish_operation(self, held: Held) -> Operation:
        pieces, worker, num_tokens = held.claim.pieces, held.worker.name, len(held.token_ids)
        event = Finished(
            reason="cancelled" if held.is_cancelled else "stop",
            text=held.text,
            usage=Usage(
                prompt_tokens=7,
                completion_tokens=num_tokens,
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

    @act(2, when=has_holders)
    def fail(self, which: int, option: int, is_lost: bool) -> None:
        held = pick(which, self.holders())
        event = Failed(code="internal_error", message="The engine could not answer it. Submit it again.")
        operation = Operation(
            "fail",
            calls.fail(held.request_id, held.attempt, event, worker=held.worker.name),
            lambda _: self.model.fail(held.request_id, held.attempt, event, worker=held.worker.name),
        )
        self.say(held, operation, lambda _: held.worker.drop(held), is_lost=is_lost)

    @act(2, when=has_holders)
    def release(self, which: int, option: int, is_lost: bool) -> None:
        held = pick(which, self.holders())
        operation = self.release_operation(held.request_id, held.attempt, held.worker.name)
        self.say(held, operation, lambda _: held.worker.drop(held), is_lost=is_lost)

    def release_operation(self, request_id: str, attempt: int, worker: str) -> Operation:
        return Operation(
            "release",
            calls.release(request_id, attempt, worker=worker),
            lambda _: self.model.release(request_id, attempt, worker=worker),
        )

    # --- faults ------------------------------------------------------------------------------------------------------

    @act(4, when=has_holders)
    def engine_dies(self, which: int, option: int, is_lost: bool) -> None:
        held = pick(which, self.holders())
        loss = Loss(
            "the engine died",
            max_attempts=MAX_ATTEMPTS,
            num_before=held.num_losses,
            keep=bool(option % 2),
            is_trial=bool(option // 2 % 2),
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

        self.say(held, operation, settle, is_lost=is_lost)

    @act(3)
    def renew(self, which: int, option: int, is_lost: bool) -> None:
        name = pick(which, WORKERS)
        worker = pick(option, [self.workers[name], *(each for each in self.zombies if each.name == name)])
        leases = [(held.request_id, held.attempt) for held in worker.held.values()]
        answer = self.perform(
            Operation(
                "renew",
                calls.renew(name, leases, LEASE_SECONDS, about={"slots": SLOTS}),
                lambda _: Renewal(*self.model.renew(name, leases, LEASE_SECONDS)),
            )
        )
        if not is_lost:
            for request_id in answer.lost:
                worker.drop(worker.held[request_id])
            for request_id in answer.cancelled:
                worker.held[request_id].is_cancelled = True

    @act(4)
    def reap(self, which: int, option: int, is_lost: bool) -> None:
        self.perform(self.reap_operation(pick(option, (100, 100, 2, 1))))

    def reap_operation(self, at_most: int) -> Operation:
        return Operation(
            "reap", calls.reap(at_most, MAX_ATTEMPTS), lambda _: self.model.reap(at_most, MAX_ATTEMPTS)
        )

    @act(2)
    def crash(self, which: int, option: int, is_lost: bool) -> None:
        """The process is gone, or so it seems: it may have been paused, and go on with what it has in memory."""
        name = pick(which, WORKERS)
        self.zombies.append(self.workers[name])
        self.workers[name] = Worker(name)

    @act(3, when=has_holders)
    def fall_silent(self, which: int, option: int, is_lost: bool) -> None:
        """Nobody renews for longer than a lease; what was lost is taken over at once. Whoever had it does not know yet."""
        self.server.advance(int(LEASE_SECONDS * 1000) + 1)
        self.perform(self.reap_operation(100))
        self.take(self.workers[pick(which, WORKERS)], is_lost=is_lost)

    # --- documents ---------------------------------------------------------------------------------------------------

    def splittable(self) -> list[Held]:
        return [held for held in self.holders() if can_be_cut(held)]

    @act(6, when=lambda self: self.splittable())
    def split(self, which: int, option: int, is_lost: bool) -> None:
        self.cut(pick(which, self.splittable()), option % 3 + 1, is_lost=is_lost)

    def cut(self, held: Held, number: int, *, is_lost: bool) -> None:
        level = len(held.claim.pieces.levels) + 1
        priority = min(held.request.priority + 1, 9)
        pieces = [
            SummaryRequest(text=f"t{i}", tenant=held.request.tenant, priority=priority) for i in range(number)
        ]
        operation = Operation(
            "split",
            calls.split(
                held.request_id,
                held.attempt,
                level=level,
                priority=priority,
                pieces=pieces,
                worker=held.worker.name,
            ),
            lambda _: self.model.split(
                held.request_id,
                held.attempt,
                level=level,
                priority=priority,
                pieces=pieces,
                estimates=[estimate_tokens(piece, encode_request(piece)) for piece in pieces],
                worker=held.worker.name,
            ),
        )

        def settle(answer: Split) -> None:
            if answer.outcome == "cancel_asked":
                held.is_cancelled = True
            else:
                held.worker.drop(held)

        self.say(held, operation, settle, is_lost=is_lost)

    # --- conversations -------------------------------------------------------------------------------------------------

    def rememberable(self) -> list[Held]:
        return [held for held in self.holders() if needs_memory(held)]

    @act(4, when=lambda self: self.rememberable())
    def remember(self, which: int, option: int, is_lost: bool) -> None:
        self.choose(
            pick(which, self.rememberable()),
            option % 3 + 1,
            is_stubborn=option // 3 % 2 == 0,
            is_wrong=option // 6 % 2 == 0,
        )

    def choose(
        self, held: Held, max_turns: int, *, is_stubborn: bool = False, is_wrong: bool = False
    ) -> None:
        """The prompt of an answer or a fold, from the conversation as it is now; or as it was chosen before.

        is_stubborn: what was chosen before does not count. is_wrong: a fold claims to begin with another turn than it does.
        """
        is_fold = isinstance(held.request, FoldRequest)
        found = self.perform(
            Operation(
                "recollect",
                calls.recollect(held.request_id, max_turns=max_turns, max_bytes=100_000, from_head=is_fold),
                lambda answer: self.model.recollect(
                    held.request_id, max_turns=max_turns, from_head=is_fold, found=answer
                ),
            )
        )
        if found.memory is not None and not is_stubborn:
            held.has_memory = True
            return
        if is_fold and not found.turns:
            return
        chosen = {"first": found.first, "num_turns": found.num_turns, "question_tokens": max_turns}
        if is_fold:
            first, last = found.first + is_wrong, found.first + len(found.turns)
            chosen = {"summary": found.summary, "first": first, "last": last}
        memory = json.dumps(chosen)
        kept = self.perform(
            Operation(
                "remember",
                calls.remember(held.request_id, held.attempt, memory, worker=held.worker.name),
                lambda _: self.model.remember(held.request_id, held.attempt, memory, worker=held.worker.name),
            )
        )
        held.has_memory |= kept is not None

    @act(4, when=lambda self: any(each.turns for each in self.model.conversations.values()))
    def fold(self, which: int, option: int, is_lost: bool) -> None:
        """Now and then whoever asks for it knows the conversation as it was before the last fold."""
        conversation = pick(which, [each for each in self.model.conversations.values() if each.turns])
        request = FoldRequest(
            conversation_id=conversation.id,
            tenant=conversation.tenant,
            first=conversation.covered if option % 4 else 0,
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
