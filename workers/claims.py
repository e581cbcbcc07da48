"""Takes work while there are free slots: tickets as they come, and a look of its own now and then, so that a lost ticket costs a moment.

A claimed request gets its prompt and goes to the engine. Knows Celery only as tickets; what comes out of the engine is the publisher's.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from redis.exceptions import RedisError
from structlog.contextvars import bound_contextvars

from producer.contract import (
    ChatRequest,
    ConversationBusy,
    DeadlineUnmeetable,
    Failed,
    FoldRequest,
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    RedisUnavailable,
    Request,
    SummaryRequest,
    UnknownRequest,
    decode_request,
)
from producer.ledger import Claim, Ledger, calls
from workers.documents import CancelAsked, Documents, Waiting
from workers.engine.client import EngineDied
from workers.engine.messages import Generate
from workers.folding import FoldPrompts, check_summary, due_fold
from workers.logs import get_logger
from workers.memory import Fenced, Memory
from workers.metrics import Metrics
from workers.pool import Ticket
from workers.prompts import Prompt, Prompts, Refusal
from workers.publisher import Publisher
from workers.running import RELEASED, AnswerDetokenizer, Lost, RunningRequest, RunningRequests
from workers.settings import WorkerSettings
from workers.tasks import carries_request, request_of

logger = get_logger(__name__)

MAX_AT_ONCE = 32
"""Claims in one round trip."""
HAND_ON_SECONDS: Final = 0.5
"""How long a request waits that has an adapter which this worker does not have, and then this worker for somebody else to take it."""

NewDetokenizer = Callable[[Sequence[str], Sequence[int]], AnswerDetokenizer]
"""From stop strings and the ids that were emitted already."""


class Claims:
    """Fills the slots. `generate` hands a sequence to the engine."""

    def __init__(
        self,
        ledger: Ledger,
        running: RunningRequests,
        publisher: Publisher,
        settings: WorkerSettings,
        *,
        generate: Callable[[Generate], None],
        new_detokenizer: NewDetokenizer,
        end_id: int,
        metrics: Metrics,
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._publisher = publisher
        self._settings = settings
        self._generate = generate
        self._new_detokenizer = new_detokenizer
        self._end_id = end_id
        self._metrics = metrics
        self._memory = Memory(ledger)
        self._folds = FoldPrompts(ledger)
        self._documents = Documents(ledger)
        self._sequence_ids = itertools.count(1)
        self._slots = settings.slots
        self._prompts: Prompts | None = None
        self._wake = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        """Tickets with a request that the ledger does not know yet."""
        self._tickets: deque[Ticket] = deque()
        self._next_look = 0.0
        self._num_at_once = 1
        """So many claims in one round trip next; doubled while all of them find work."""
        self._pause_until = 0.0
        self._is_draining = False
        self._is_stopping = False
        self._has_lost_claim = False
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Claim nothing more; tickets that are still here were not acknowledged, and go back to the broker."""
        with self._wake:
            self._is_draining = self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(5)

    # --- from any thread --------------------------------------------------------------------------------------------

    def take(self, ticket: Ticket) -> None:
        self._metrics.on_ticket(ticket.task_name)
        with self._wake:
            (self._arrived if carries_request(ticket.task_name) else self._tickets).append(ticket)
            self._wake.notify()

    def resize(self, slots: int) -> None:
        with self._wake:
            self._slots = slots
            self._wake.notify()

    @property
    def slots(self) -> int:
        return self._slots

    def open(self, prompts: Prompts) -> None:
        """The engine is ready, and this is how prompts are built for it."""
        with self._wake:
            self._prompts = prompts
            self._next_look = 0.0
            self._wake.notify()

    def close(self) -> None:
        """There is no engine for the time being."""
        with self._wake:
            self._prompts = None

    def drain(self) -> None:
        """Claim nothing more."""
        with self._wake:
            self._is_draining = True

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def on_free_slot(self) -> None:
        with self._wake:
            self._wake.notify()

    def look(self) -> None:
        """There is work of which no ticket tells."""
        self._look_by(0.0)

    def _look_by(self, when: float) -> None:
        """At that instant of the monotonic clock, or earlier."""
        with self._wake:
            self._next_look = min(self._next_look, when)
            self._wake.notify()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = 0.05
        while not self._is_stopping:
            try:
                if not (self._register_next() or self._claim_next()):
                    self._wait()
                pause = 0.05
            except (RedisUnavailable, RedisError) as error:
                self._look_by(0.0)
                if pause >= 1:
                    logger.warning("cannot claim: %s", error)
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except Exception:  # the loop is a boundary
                self._look_by(0.0)
                logger.exception("claiming failed")
                time.sleep(1)

    def _wait(self) -> None:
        with self._wake:
            if self._is_stopping or self._arrived:
                return
            if not self._may_claim():
                pause = self._pause_until - time.monotonic()
                self._wake.wait(pause if pause > 0 else self._settings.look_seconds)
            elif not self._tickets:
                self._wake.wait(max(self._next_look - time.monotonic(), 0))

    def _may_claim(self) -> bool:
        return (
            self._prompts is not None
            and not self._is_draining
            and len(self._running) < self._slots
            and time.monotonic() >= self._pause_until
        )

    def _register_next(self) -> bool:
        """Put the request of one plain task into the ledger; from then on its message is a ticket like any other."""
        with self._wake:
            if not self._arrived or self._is_draining:
                return False
            ticket = self._arrived[0]
        is_registered = self._register(ticket)
        with self._wake:
            self._arrived.popleft()
            if is_registered:
                self._tickets.append(ticket)
        if not is_registered:
            ticket.complete()
        return True

    def _register(self, ticket: Ticket) -> bool:
        """False: there is nothing to do for it. Raises what Redis raises; then nothing is lost, and it is tried again."""
        model, retention = self._settings.model, self._settings.queue.retention_seconds
        request_id = ticket.task_id
        try:
            request = request_of(ticket.task_name, ticket.args, ticket.kwargs, model=model)
            self._ledger.run(
                calls.submit(
                    request,
                    model=model,
                    request_id=request_id,
                    retention_seconds=retention,
                    conversation_seconds=self._settings.queue.conversation_seconds,
                    bounds=self._settings.queue.bounds,
                )
            )
        except (InvalidRequest, ConversationBusy, QueueFull, DeadlineUnmeetable) as error:
            code = "invalid_request" if isinstance(error, InvalidRequest) else error.code
            self._metrics.on_task_refused(code)
            logger.info("refused", request_id=request_id, code=code)
            failed = Failed(code=code, message=str(error))
            try:
                self._ledger.run(
                    calls.refuse(request_id, ticket.kwargs, failed, model=model, retention_seconds=retention)
                )
            except InvalidRequest:
                logger.warning("the task's id cannot be a request's: nobody can be told", task_id=request_id)
            return False
        except IdempotencyConflict:
            self._metrics.on_task_refused("idempotency_conflict")
            logger.warning("exists already, with another body: this one is dropped", request_id=request_id)
            return False
        return True

    def _claim_next(self) -> bool:
        """Claim for the tickets that are here, or because it is time to look. False: nothing to do now.

        While there is plenty, several requests are claimed in one round trip: behind the scripts that write a thousand
        streams each round trip waits for milliseconds.
        """
        with self._wake:
            if not self._may_claim():
                return False
            num_tickets = len(self._tickets)
            is_due = time.monotonic() >= self._next_look
            if not num_tickets and not is_due:
                return False
            # Whoever says that there is work while claims are under way is heard after them.
            next_look, self._next_look = self._next_look, float("inf")
            num_free = self._slots - len(self._running)
            # A share of the free slots: other workers are to get some too.
            number = min(max(num_tickets, self._num_at_once), MAX_AT_ONCE, max(num_free // 8, 1))
        claims = self._claim(number)
        for index, claim in enumerate(claims):
            with self._wake:
                ticket = self._tickets.popleft() if self._tickets else None
            if ticket is not None:
                ticket.accept()
            try:
                self._begin(claim, ticket)
            except (RedisUnavailable, RedisError):
                # The others of this batch are claimed, and nobody here knows them.
                self._has_lost_claim = index + 1 < len(claims)
                raise
        if len(claims) == number:
            is_plenty = is_due or number > 1
            self._num_at_once = 2 * number if is_plenty else 1
            self._look_by(0.0 if is_plenty else next_look)
            return True
        self._num_at_once = 1
        self._look_by(time.monotonic() + self._settings.look_seconds)
        # Tickets that were here before came twice, or somebody else was faster.
        for _ in range(num_tickets - len(claims)):
            with self._wake:
                ticket = self._tickets.popleft()
            ticket.complete()
        return num_tickets > 0

    def _claim(self, number: int) -> list[Claim]:
        """Up to so many."""
        if self._has_lost_claim:
            self._release_lost_claims()
            self._has_lost_claim = False
        settings = self._settings
        call = calls.claim(settings.model, settings.worker_id, settings.lease_seconds, settings.queue.order)
        try:
            return [claim for claim in self._ledger.run_many([call] * number) if claim is not None]
        except (RedisUnavailable, RedisError):
            self._has_lost_claim = True
            raise

    def _release_lost_claims(self) -> None:
        """A claim whose answer was lost may have been made: nobody else would touch that request while its lease lasts."""
        worker_id = self._settings.worker_id
        held: set[str] = set(self._ledger.connection.smembers(self._ledger.keys.running(worker_id)))  # type: ignore[arg-type]
        for request_id in held:
            if self._running.get(request_id) is not None:
                continue
            try:
                status = self._ledger.run(calls.status(request_id))
            except UnknownRequest:
                continue
            if status.state == "running" and status.worker == worker_id:
                logger.info("claimed without knowing it: released", request_id=request_id)
                self._ledger.run(calls.release(request_id, status.attempt))

    def _begin(self, claim: Claim, ticket: Ticket | None) -> None:
        """Build the prompt and hand it to the engine; whatever is wrong with the request ends only the request."""
        if (stale := self._running.get(claim.request_id)) is not None:
            # It lost the request, another attempt came to this very worker, and it has not heard of that yet.
            self._publisher.drop(stale)
        running = RunningRequest(
            claim.request_id,
            claim.attempt,
            ticket,
            claim.queue_seconds,
            token_ids=list(claim.emitted_ids),
            texts=list(claim.emitted_texts),
            num_published=len(claim.emitted_ids),
            num_emitted_before=len(claim.emitted_ids),
            age_seconds=claim.age_seconds,
            pieces=claim.pieces,
            failures=claim.failures,
        )
        if claim.pieces.levels:
            running.seconds_before = claim.age_seconds - claim.queue_seconds
        if claim.deadline_seconds is not None:
            running.deadline = running.claimed + claim.deadline_seconds
        self._running.add(running)
        self._metrics.on_claim(running)
        try:
            with bound_contextvars(request_id=claim.request_id):
                self._hand_over(running, claim)
        except Refusal as refusal:
            if self._may_be_known_elsewhere(running, refusal):
                self._hand_on(running, refusal)
            else:
                self._publisher.end(running, Failed(code=refusal.code, message=refusal.message))
        except InvalidRequest as error:
            self._publisher.end(running, Failed(code="invalid_request", message=str(error)))
        except (Fenced, Waiting):
            self._publisher.drop(running)
        except CancelAsked:
            self._publisher.end(running, "cancelled")
        except (RedisUnavailable, RedisError):
            self._publisher.end(running, RELEASED)
            raise
        except Exception:  # one request is a boundary
            logger.exception("could not be begun", request_id=claim.request_id)
            message = (
                "The worker could not begin it; its log says why. Submit it again once that is repaired."
            )
            self._publisher.end(running, Failed(code="internal_error", message=message))

    def _may_be_known_elsewhere(self, running: RunningRequest, refusal: Refusal) -> bool:
        """Another worker has begun it with an adapter that this one does not have."""
        return (
            refusal.code == "unknown_adapter"
            and running.num_tries > 1
            and running.failures + 1 < self._settings.max_attempts
        )

    def _hand_on(self, running: RunningRequest, refusal: Refusal) -> None:
        """Back to the queue after a while, in which this worker may learn the adapter or another one get a slot."""
        logger.info("not for this worker: handed on", request_id=running.request_id, code=refusal.code)
        lost = Lost(f"the worker did not have the adapter {running.adapter}")

        def hand_on() -> None:
            with self._wake:
                # Somebody else first.
                self._pause_until = time.monotonic() + HAND_ON_SECONDS
            self._publisher.end(running, lost)

        timer = threading.Timer(HAND_ON_SECONDS, hand_on)
        timer.daemon = True
        timer.start()

    def _hand_over(self, running: RunningRequest, claim: Claim) -> None:
        prompts = self._prompts
        if prompts is None:
            # The engine died between the look and the claim.
            self._publisher.end(running, RELEASED)
            return
        request = decode_request(claim.request)
        running.tenant, running.adapter = request.tenant, request.adapter
        running.kind = "piece" if claim.is_piece else "document" if claim.pieces.levels else request.kind
        prompt = self._prompt_of(request, running, claim, prompts)
        running.prompt_len = len(prompt.ids)
        running.max_new_tokens = prompt.sampling.max_new_tokens
        log = logger.info if self._settings.log_text else logger.debug
        log(
            "claimed",
            attempt=running.attempt,
            kind=running.kind,
            tenant=running.tenant,
            prompt_tokens=running.prompt_len,
            queue_seconds=round(running.queue_seconds, 3),
            **(_text_of(request) if self._settings.log_text else {}),
        )
        running.detokenizer = self._new_detokenizer(request.sampling.stop, claim.emitted_ids)
        if claim.emitted_ids:
            # An earlier attempt may have said everything and died before it could say so.
            if claim.emitted_ids[-1] == self._end_id or running.detokenizer.is_stopped:
                self._publisher.end(running, "stop")
                return
            if len(claim.emitted_ids) >= prompt.sampling.max_new_tokens:
                self._publisher.end(running, "length")
                return
        running.generate = Generate(0, prompt.ids, prompt.sampling, adapter=prompt.adapter)
        try:
            if prompts is not self._prompts:
                # It was claimed for an engine that has died since, and the next one may have suspects to try first.
                raise EngineDied(None, None)
            self.resume(running)
        except EngineDied:
            self._publisher.end(running, RELEASED)

    def resume(self, running: RunningRequest) -> None:
        """Ask the engine for what comes after the tokens that there are. Raises EngineDied."""
        generate, sequence_id = running.generate, next(self._sequence_ids)
        assert generate is not None, "a prompt comes first"
        with self._running.lock:
            if running.end is not None:
                return
            self._running.bind(running, sequence_id)
            emitted_ids = list(running.token_ids)
        self._generate(msgspec.structs.replace(generate, sequence_id=sequence_id, emitted_ids=emitted_ids))
        self._publisher.on_started()

    def _prompt_of(self, request: Request, running: RunningRequest, claim: Claim, prompts: Prompts) -> Prompt:
        """Raises Refusal, Fenced, and what the ledger raises."""
        if isinstance(request, FoldRequest):
            running.check = check_summary
            return self._folds.build(prompts, request, claim)
        if isinstance(request, ChatRequest) and request.conversation_id is not None:
            remembering = self._memory.build(prompts, request, claim)
            running.memory = remembering.memory
            running.fold = due_fold(request, remembering)
            return remembering.prompt
        if isinstance(request, SummaryRequest):
            return self._documents.build(prompts, request, claim)
        return prompts.build(request)


def _text_of(request: Request) -> dict[str, str]:
    """What a user wrote, for a log that may have it."""
    if isinstance(request, ChatRequest):
        return {"text": request.query}
    return {"text": request.text} if isinstance(request, SummaryRequest) else {}
