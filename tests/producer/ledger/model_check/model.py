"""What must be true of a deployment's requests: each script's effect and answer, in plain Python, without Redis.

Written from `contract.keys`, `contract.events` and ARCHITECTURE.md. Where the ledger has a choice the model is told what it chose, and
refuses what was not allowed. Times are ms on the server's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from producer.contract import (
    ChatRequest,
    ConversationBusy,
    DeadlineUnmeetable,
    DocumentEnded,
    Failed,
    Finished,
    FoldRequest,
    IdempotencyConflict,
    NotDead,
    QueueFull,
    Request,
    Started,
    SummaryRequest,
    Token,
    UnknownConversation,
    UnknownRequest,
)
from producer.contract.events import encode_event
from producer.contract.keys import conversation_name
from producer.contract.requests import encode_request
from producer.contract.tenants import QueueBounds, QueueOrder
from producer.ledger import Claim, Emission, EmitCode, Pieces, Recollected
from producer.ledger.calls import LossOutcome, Split, State, Submitted
from tests.producer.ledger.model_check.order import Order
from tests.producer.ledger.model_check.server import decoded
from tests.producer.ledger.model_check.state import (
    NEVER,
    Entry,
    ModelConversation,
    ModelRequest,
    ModelState,
    Place,
    Written,
    pieces_of,
)

IDEMPOTENCY_MS = 86_400_000
MAX_REDUCED_TOKENS = 4096
"""A document that comes back from its pieces is charged for a prompt of this length at most."""
KEPT_ROOM = 0.1
"""Of a queue's bound, while somebody was told to come back."""


class Loss(NamedTuple):
    """An engine's death, as its worker tells it of one request: the options of `calls.lose`."""

    what: str
    max_attempts: int
    num_before: int
    keep: bool
    is_trial: bool
    worker: str


@dataclass
class Model:
    """One deployment. `now_us` is the clock of the call that comes next."""

    now_us: int = 0
    requests: dict[str, ModelRequest] = field(default_factory=dict)
    conversations: dict[str, ModelConversation] = field(default_factory=dict)
    idempotency: dict[tuple[str, str], tuple[str, str, int]] = field(default_factory=dict)
    """(tenant, key) → request id, digest, ms at which it expires."""
    listed: dict[str, float] = field(default_factory=dict)
    """Conversations in the sorted set, which is pruned when somebody writes to it."""
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    touched: set[str] = field(default_factory=set)
    """Requests that the last call may have changed."""
    pushes: dict[str, list[tuple[str, Place, Entry]]] = field(default_factory=dict)
    """reader → (request id, place of the entry before, entry) of the last call, in order."""
    cancels: list[tuple[str, str]] = field(default_factory=list)
    """(worker, request id) of the cancellations that the last call announced."""
    order: Order = field(init=False)
    creations: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    """How often a request of this id has begun to exist, and come to a final state."""

    def __post_init__(self) -> None:
        self.order = Order(self.requests)

    @property
    def now(self) -> int:
        return self.now_us // 1000

    def begin(self, now_us: int) -> None:
        """The clock shows this, and what has outlived its time is gone."""
        self.now_us = now_us
        self.touched = set()
        self.pushes = {}
        self.cancels = []
        for request in list(self.requests.values()):
            if request.expires is not None and request.expires <= self.now:
                del self.requests[request.id]
        for conversation in list(self.conversations.values()):
            if conversation.expires <= self.now:
                del self.conversations[conversation.name]
        self.order.forget_idle(self.now)
        for key, (_, _, expires) in list(self.idempotency.items()):
            if expires <= self.now:
                del self.idempotency[key]

    # --- looking -----------------------------------------------------------------------------------------------------

    def in_state(self, *states: State) -> list[ModelRequest]:
        return [request for request in self.requests.values() if request.state in states]

    def is_live(self, request_id: str | None) -> bool:
        return request_id in self.requests and self.requests[request_id].is_live

    def held(self, request_id: str, attempt: int, worker: str | None = None) -> ModelRequest | None:
        """The request, if it is running with this attempt, at this worker."""
        request = self.requests.get(request_id)
        if request is None or request.state != "running" or request.attempt != attempt:
            return None
        return request if worker in (None, request.worker) else None

    # --- producers ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        *,
        model: str,
        request_id: str,
        digest: str,
        body: str,
        estimate: int,
        bounds: QueueBounds,
        idempotency_key: str | None = None,
        retention_seconds: float,
        conversation_seconds: float,
        refusal: QueueFull | DeadlineUnmeetable | None,
    ) -> Submitted:
        """`refusal`: how the ledger refused it, if it did."""
        model = request.model or model
        known = self.requests.get(request_id)
        record = self.idempotency.get((request.tenant, idempotency_key)) if idempotency_key else None
        known_id, known_digest = (known.id, known.digest) if known else record[:2] if record else ("", "")
        if known_id:
            if known_digest != digest:
                self.rejected[model, "idempotency_conflict"] += 1
                raise IdempotencyConflict(idempotency_key or request_id, known_id)
            return Submitted(known_id, False)
        name = None
        if isinstance(request, ChatRequest) and request.conversation_id is not None:
            name = conversation_name(request.tenant, request.conversation_id)
            conversation = self.conversations.get(name)
            if conversation is not None and conversation.busy and self.is_live(conversation.busy):
                self.rejected[model, "conversation_busy"] += 1
                raise ConversationBusy(request.conversation_id, conversation.busy)
        self.touched.add(request_id)
        if refusal is not None:
            self._check_refusal(request, model, estimate, bounds, refusal)
            raise refusal
        self._check_room(request.tenant, estimate, bounds)
        if idempotency_key:
            self.idempotency[request.tenant, idempotency_key] = (
                request_id,
                digest,
                self.now + IDEMPOTENCY_MS,
            )
        deadline = None
        if request.deadline_seconds is not None:
            deadline = self.now + max(1, round(request.deadline_seconds * 1000))
        created = self._create(
            request_id,
            body,
            digest,
            model,
            request.tenant,
            request.priority,
            round(retention_seconds * 1000),
            estimate,
            deadline,
        )
        if name is not None and isinstance(request, ChatRequest):
            created.conversation = name
            self._begin_answer(created, request.conversation_id or "", conversation_seconds)
        return Submitted(request_id, True)

    def _room(self, tenant: str, estimate: int, bounds: QueueBounds) -> list[tuple[str, int, int, int]]:
        """(reason, bound, used, with this one) of each bound that counts now."""
        queued = self.in_state("queued")
        own = [request for request in queued if request.tenant == tenant]
        settings = self.order.settings_of(tenant)
        found = []
        for reason, waiting, max_queued, max_tokens in (
            ("queue_full", queued, bounds.max_queued, bounds.max_queued_tokens),
            (
                "tenant_queue_full",
                own,
                bounds.tenant_max_queued if settings.max_queued is None else settings.max_queued,
                bounds.tenant_max_queued_tokens
                if settings.max_queued_tokens is None
                else settings.max_queued_tokens,
            ),
        ):
            tokens = sum(request.estimate for request in waiting)
            # What is larger than the whole queue may be alone in it.
            if max_queued and waiting:
                found.append((reason, max_queued, len(waiting), len(waiting) + 1))
            if max_tokens and waiting:
                found.append((reason, max_tokens, tokens, tokens + estimate))
        return found

    def _check_room(self, tenant: str, estimate: int, bounds: QueueBounds) -> None:
        for reason, bound, used, after in self._room(tenant, estimate, bounds):
            assert after <= bound, (
                f"accepted beyond a bound ({reason}): {used} of {bound}, {after} with this one"
            )

    def _check_refusal(
        self,
        request: Request,
        model: str,
        estimate: int,
        bounds: QueueBounds,
        refusal: QueueFull | DeadlineUnmeetable,
    ) -> None:
        if isinstance(refusal, DeadlineUnmeetable):
            assert request.deadline_seconds is not None
            assert self.in_state("queued"), "nothing stands before it"
            self.rejected[model, "deadline_unmeetable"] += 1
            return
        reason = "queue_full" if refusal.tenant is None else "tenant_queue_full"
        assert any(
            after > int(bound * (1 - KEPT_ROOM))
            for found, bound, _, after in self._room(request.tenant, estimate, bounds)
            if found == reason
        ), f"{reason}: there is room"
        assert 0 < refusal.retry_after <= 60
        self.rejected[model, reason] += 1

    def refuse(
        self, request_id: str, failed: Failed, *, model: str, digest: str, body: str, retention_seconds: float
    ) -> bool:
        if request_id in self.requests:
            return False
        request = ModelRequest(
            request_id,
            body,
            digest,
            model,
            "default",
            priority=0,
            submitted=self.now,
            age=0,
            retention=round(retention_seconds * 1000),
            estimate=0,
        )
        self._begin(request)
        self._end(request, "failed", encode_event(failed))
        return True

    def cancel(self, request_id: str) -> ModelState:
        if request_id not in self.requests:
            raise UnknownRequest(request_id)
        return self._cancel(self.requests[request_id])

    def follow(self, reader: str, requests: Sequence[tuple[str, Place]]) -> list[Any]:
        """(state, last place, entries) each, or None."""
        answers: list[Any] = []
        for request_id, after in requests:
            request = self.requests.get(request_id)
            if request is None:
                answers.append(None)
                continue
            if reader and request.is_live and reader not in request.readers:
                request.readers.append(reader)
                self.touched.add(request_id)
            answers.append(
                (request.state, request.last, [entry for entry in request.stream if entry.place > after])
            )
        return answers

    def unfollow(self, reader: str, request_id: str) -> bool:
        request = self.requests.get(request_id)
        if request is None or reader not in request.readers:
            return False
        request.readers.remove(reader)
        self.touched.add(request_id)
        return True

    # --- workers -----------------------------------------------------------------------------------------------------

    def claim(
        self, worker: str, lease_seconds: float, order: QueueOrder, *, chosen: str | None
    ) -> Claim | None:
        """`chosen`: the request that the ledger gave out."""
        self._end_expired()
        request = self.order.next(self.now, order)
        expected = request and request.id
        assert chosen == expected, f"it was the turn of {expected}, and {chosen} was claimed"
        if request is None:
            return None
        self.order.charge(request, order)
        request.state, request.worker = "running", worker
        request.attempt += 1
        request.claimed = self.now if request.claimed is None else request.claimed
        request.lease = self.now + round(lease_seconds * 1000)
        self.touched.add(request.id)
        return Claim(
            request_id=request.id,
            attempt=request.attempt,
            request=request.body,
            queue_seconds=(request.claimed - request.submitted) / 1000,
            deadline_seconds=None if request.deadline is None else (request.deadline - self.now) / 1000,
            emitted_ids=tuple(token_id for token_id, _ in request.tokens),
            emitted_texts=tuple(text for _, text in request.tokens),
            age_seconds=(self.now - request.submitted) / 1000,
            pieces=Pieces(
                tuple(request.levels),
                request.pieces,
                request.piece_prompt_tokens,
                request.piece_completion_tokens,
            ),
            is_piece=request.document is not None,
            failures=request.failures,
            worker=request.worker,
        )

    def emit(self, emissions: Iterable[Emission], worker: str) -> list[EmitCode]:
        return [self._emit(*emission, worker) for emission in emissions]

    def _emit(self, request_id: str, attempt: int, event: Started | Token, worker: str) -> EmitCode:
        request = self.held(request_id, attempt, worker)
        if request is None:
            return EmitCode.FENCED
        code = EmitCode.WRITTEN
        if isinstance(event, Started):
            if request.started == attempt:
                code = EmitCode.ALREADY_WRITTEN
            else:
                self._append(request, request.place_after(attempt), encode_event(event))
                request.started, request.prompt_tokens = attempt, event.prompt_tokens
        elif event.index <= len(request.tokens):
            code = EmitCode.ALREADY_WRITTEN
        elif event.index - len(event.ids) != len(request.tokens) or request.started != attempt:
            return EmitCode.OUT_OF_STEP
        else:
            self._append(request, (event.index, 0), encode_event(event))
            request.tokens += zip(event.ids, event.texts, strict=True)
        return EmitCode.CANCEL_ASKED if request.is_cancel_asked else code

    def finish(self, request_id: str, attempt: int, event: Finished, *, worker: str) -> bool | None:
        state: State = "cancelled" if event.reason == "cancelled" else "done"
        return self._finish(request_id, attempt, state, event, worker)

    def fail(self, request_id: str, attempt: int, event: Failed, *, worker: str) -> bool | None:
        return self._finish(request_id, attempt, "failed", event, worker)

    def _finish(
        self, request_id: str, attempt: int, state: State, event: Finished | Failed, worker: str
    ) -> bool | None:
        request = self.requests.get(request_id)
        if request is None or request.attempt != attempt:
            return False
        if request.state == state or (request.state == "queued" and request.retried == attempt):
            return True
        if self.held(request_id, attempt, worker) is None:
            return False
        if isinstance(event, Finished) and event.usage.completion_tokens != len(request.tokens):
            return None
        if state == "failed" and request.document is not None and request.retried is None:
            request.retried = attempt
            self._requeue(request)
            return True
        self._end(request, state, encode_event(event))
        return True

    def release(self, request_id: str, attempt: int, *, worker: str) -> bool:
        request = self.held(request_id, attempt, worker)
        if request is None:
            return False
        self._requeue(request)
        return True

    def _end_expired(self) -> None:
        """What waits beyond its deadline is never begun."""
        expired = [
            request
            for request in self.in_state("queued")
            if request.deadline is not None and request.deadline <= self.now
        ]
        for request in sorted(expired, key=lambda request: (request.deadline, request.id)):
            if request.state == "queued":
                self.rejected[request.model, "deadline_exceeded"] += 1
                self._end(request, "failed", {"type": "failed", "code": "deadline_exceeded"})

    def reap(self, at_most: int, max_attempts: int) -> list[str]:
        overdue = [r for r in self.in_state("running") if r.lease is not None and r.lease <= self.now]
        overdue.sort(key=lambda request: (request.lease, request.id))
        reaped = [request.id for request in overdue[:at_most]]
        for request_id in reaped:
            # The end of one may end another: a document's piece.
            request = self.requests.get(request_id)
            if request is not None and request.state == "running":
                what = f"its worker {request.worker} fell silent"
                if self._lose(request, what, max_attempts, is_trial=False):
                    self._requeue(request)
        self._end_expired()
        return reaped

    def lose(self, request_id: str, attempt: int, loss: Loss) -> LossOutcome:
        request = self.held(request_id, attempt, loss.worker)
        if request is None:
            return "fenced"
        if sum(lost == attempt for lost, *_ in request.losses) > loss.num_before:
            return "kept"
        # Among others it may be innocent: only a trial is the end of one that is kept for it.
        bound = NEVER if loss.keep and not loss.is_trial else loss.max_attempts
        if not self._lose(request, loss.what, bound, is_trial=loss.is_trial):
            return "ended"
        if loss.keep:
            return "kept"
        self._requeue(request)
        return "queued"

    # --- dead letters ------------------------------------------------------------------------------------------------

    def dead_letters(self) -> list[ModelRequest]:
        """Those that are kept, the latest first."""
        kept = [request for request in self.in_state("dead") if request.expires is None]
        return sorted(kept, key=lambda request: (request.ended or 0, request.id), reverse=True)

    def retry_dead(self, request_id: str, *, conversation_seconds: float) -> None:
        request = self._dead(request_id)
        if request.document is not None:
            raise DocumentEnded(request_id, request.document)
        if request.conversation is not None:
            conversation = self.conversations.get(request.conversation)
            if conversation is not None and self.is_live(conversation.busy):
                raise ConversationBusy(None, str(conversation.busy))
            body = decoded(request.body)
            self._begin_answer(request, body["conversation_id"], conversation_seconds)
        if request.expires is None or request.stream:
            request.stream.pop()
        request.worker, request.ended, request.deadline, request.expires = "", None, None, None
        request.failures, request.num_tokens_before = 0, len(request.tokens)
        request.age = request.submitted * 100
        self._enqueue(request)
        self.creations[request_id] += 1
        self.touched.add(request_id)

    def drop_dead(self, request_id: str) -> None:
        request = self._dead(request_id)
        if request.expires is None:
            self._expire(request, request.retention)

    def _dead(self, request_id: str) -> ModelRequest:
        request = self.requests.get(request_id)
        if request is None:
            raise UnknownRequest(request_id)
        if request.state != "dead":
            raise NotDead(request_id, request.state)
        return request

    def renew(
        self, worker: str, leases: Iterable[tuple[str, int]], lease_seconds: float
    ) -> tuple[list[str], list[str]]:
        """Ids that are not the worker's own any more, ids that are to be cancelled."""
        lost, cancelled = [], []
        for request_id, attempt in leases:
            request = self.held(request_id, attempt, worker)
            if request is None:
                lost.append(request_id)
                continue
            request.lease = self.now + round(lease_seconds * 1000)
            self.touched.add(request_id)
            if request.is_cancel_asked:
                cancelled.append(request_id)
        return lost, cancelled

    # --- documents ---------------------------------------------------------------------------------------------------

    def split(
        self,
        request_id: str,
        attempt: int,
        *,
        level: int,
        priority: int,
        pieces: Sequence[SummaryRequest],
        estimates: Sequence[int],
        worker: str,
    ) -> Split:
        request = self.requests.get(request_id)
        if request is None or request.attempt != attempt:
            return Split("fenced")
        if request.state == "waiting" and len(request.levels) == level:
            return Split("waiting")
        if request.state != "running" or len(request.levels) != level - 1 or request.worker != worker:
            return Split("fenced")
        if request.is_cancel_asked:
            return Split("cancel_asked")
        ids = [f"{request_id}.{level}.{number}" for number in range(1, len(pieces) + 1)]
        for piece_id in ids:
            if piece_id in self.requests:
                return Split("id_taken", piece_id)
        for number, (piece_id, piece, estimate) in enumerate(zip(ids, pieces, estimates, strict=True), 1):
            created = self._create(
                piece_id,
                encode_request(piece),
                "",
                request.model,
                request.tenant,
                priority,
                request.retention,
                estimate,
                request.deadline,
                number,
            )
            created.document = request_id
        self.order.settle(request, 0)
        request.estimate = min(request.estimate, MAX_REDUCED_TOKENS)
        self._leave_running(request, "waiting")
        request.failures = 0
        request.levels.append(len(pieces))
        request.left = len(pieces)
        self._append_progress(request)
        return Split("waiting")

    def pieces(self, request_id: str, *, level: int, number: int) -> list[Written | None]:
        """The last event of each piece."""
        found = [self.requests.get(f"{request_id}.{level}.{each}") for each in range(1, number + 1)]
        return [piece.stream[-1].event if piece and piece.stream else None for piece in found]

    # --- conversations -----------------------------------------------------------------------------------------------

    def remember(self, request_id: str, attempt: int, memory: str, *, worker: str) -> str | None:
        request = self.held(request_id, attempt, worker)
        if request is None:
            return None
        if request.memory is None:
            request.memory = memory
        self.touched.add(request_id)
        return request.memory

    def recollect(
        self, request_id: str, *, max_turns: int, from_head: bool, found: Recollected
    ) -> Recollected:
        """`found` has the turns with all their fields, which are compared elsewhere."""
        request = self.requests.get(request_id)
        conversation = self.conversations.get((request and request.conversation) or "")
        memory = request.memory if request is not None else None
        turns = conversation.turns if conversation is not None else []
        covered = conversation.covered if conversation is not None else 0
        if memory is not None:
            kept = decoded(memory)
            first, last = kept["first"], kept.get("last") or kept["num_turns"]
        elif from_head:
            first, last = covered, covered + max_turns
        else:
            first, last = max(len(turns) - max_turns, 0), len(turns)
        assert [turn.request_id for turn in found.turns] == [each for _, _, each in turns[first:last]]
        return replace(
            found,
            memory=memory,
            summary=conversation.summary if conversation is not None else "",
            covered=covered,
            fold_failures=conversation.fold_failures if conversation is not None else 0,
            num_turns=len(turns),
            first=first,
            is_known=conversation is not None,
        )

    def fold(
        self,
        request: FoldRequest,
        *,
        request_id: str,
        model: str,
        digest: str,
        estimate: int,
        retention_seconds: float,
    ) -> bool:
        name = conversation_name(request.tenant, request.conversation_id)
        conversation = self.conversations.get(name)
        if (
            conversation is None
            or conversation.covered != request.first
            or self.is_live(conversation.folding)
            or request_id in self.requests
        ):
            return False
        created = self._create(
            request_id,
            encode_request(request),
            digest,
            model,
            request.tenant,
            request.priority,
            round(retention_seconds * 1000),
            estimate,
        )
        created.conversation = name
        conversation.folding = request_id
        return True

    def forget(self, tenant: str, conversation_id: str) -> None:
        name = conversation_name(tenant, conversation_id)
        conversation = self.conversations.get(name)
        dead = [request for request in self.dead_letters() if request.conversation == name]
        for request in dead:
            self._delete(request.id)
        if conversation is None:
            if dead:
                return
            raise UnknownConversation(conversation_id)
        for request_id in [request_id for _, _, request_id in conversation.turns] + [conversation.folded]:
            if request_id is not None and not self.is_live(request_id):
                self._delete(request_id)
        self._drop(conversation)
        for request_id in (conversation.busy, conversation.folding):
            if request_id is not None and self.is_live(request_id):
                request = self.requests[request_id]
                request.retention = 10_000
                self.touched.add(request_id)
                self._cancel(request)

    # --- what the scripts share -----------------------------------------------------------------------------------------

    def _begin_answer(self, request: ModelRequest, conversation_id: str, conversation_seconds: float) -> None:
        name = request.conversation or ""
        conversation = self.conversations.setdefault(
            name, ModelConversation(name, conversation_id, request.tenant, request.model, 0)
        )
        conversation.model, conversation.lifetime = request.model, round(conversation_seconds * 1000)
        conversation.busy, conversation.expires = request.id, NEVER
        self.listed[name] = NEVER

    def _create(  # noqa: PLR0917
        self,
        request_id: str,
        body: str,
        digest: str,
        model: str,
        tenant: str,
        priority: int,
        retention: int,
        estimate: int,
        deadline: int | None = None,
        behind: int = 0,
    ) -> ModelRequest:
        request = ModelRequest(
            request_id,
            body,
            digest,
            model,
            tenant,
            priority,
            self.now,
            self.now_us // 10 + behind,
            retention,
            estimate,
            deadline=deadline,
        )
        self._begin(request)
        self._enqueue(request)
        return request

    def _begin(self, request: ModelRequest) -> None:
        self.requests[request.id] = request
        self.creations[request.id] += 1
        self.touched.add(request.id)

    def _enqueue(self, request: ModelRequest) -> None:
        self.order.enters(request.tenant)
        request.state = "queued"

    def _leave_running(self, request: ModelRequest, state: ModelState) -> None:
        request.state, request.worker, request.lease = state, "", None
        self.order.leaves_running(request.tenant, self.now)

    def _append(self, request: ModelRequest, place: Place, event: Written) -> None:
        assert place > request.last, "the model itself would break the order"
        entry = Entry(place, event)
        for reader in request.readers:
            self.pushes.setdefault(reader, []).append((request.id, request.last, entry))
        request.stream.append(entry)
        request.last = place
        self.touched.add(request.id)

    def _append_progress(self, request: ModelRequest) -> None:
        total = request.levels[-1]
        event = {
            "type": "progress",
            "level": len(request.levels),
            "done": total - request.left,
            "total": total,
        }
        self._append(request, request.place_after(1), event)

    def _requeue(self, request: ModelRequest) -> None:
        if request.is_cancel_asked:
            self._end_cancelled(request)
            return
        self._count_failures(request, 0)
        self._leave_running(request, "new")
        request.age = request.submitted * 100
        self._enqueue(request)
        self.touched.add(request.id)

    def _lose(self, request: ModelRequest, what: str, max_attempts: float, *, is_trial: bool) -> bool:
        """An attempt is lost. False: and so the request has ended."""
        self.touched.add(request.id)
        if request.is_cancel_asked:
            self._end_cancelled(request)
            return False
        request.losses.append((request.attempt, request.worker, len(request.tokens), what))
        if is_trial:
            request.num_tokens_before = len(request.tokens)
        self._count_failures(request, 1)
        if request.failures < max_attempts:
            return True
        event = {"type": "failed", "code": "dead_letter"}
        self._end(request, "failed" if request.is_fold else "dead", event)
        return False

    def _count_failures(self, request: ModelRequest, more: int) -> None:
        """In a row, without a new token."""
        if len(request.tokens) > request.num_tokens_before:
            request.failures, request.num_tokens_before = 0, len(request.tokens)
        else:
            request.failures += more

    def _cancel(self, request: ModelRequest) -> ModelState:
        state = request.state
        if state in ("queued", "waiting"):
            self._end_cancelled(request)
        elif state == "running":
            request.is_cancel_asked = True
            self.touched.add(request.id)
            self.cancels.append((request.worker, request.id))
        return state

    def _end_cancelled(self, request: ModelRequest) -> None:
        event = {
            "type": "finished",
            "reason": "cancelled",
            "text": request.text,
            "attempts": request.attempt - len(request.levels),
            "usage": {
                "prompt_tokens": request.prompt_tokens,
                "completion_tokens": len(request.tokens),
                "pieces": request.pieces,
                "piece_prompt_tokens": request.piece_prompt_tokens,
                "piece_completion_tokens": request.piece_completion_tokens,
            },
        }
        self._end(request, "cancelled", event)

    def _end(self, request: ModelRequest, state: State, event: Written) -> None:
        assert request.is_live, "the model itself would end a request twice"
        self._append(request, request.place_after(request.attempt + 1), event)
        before, worker = request.state, request.worker
        request.ended = self.now
        request.readers, request.is_cancel_asked = [], False
        self.ends[request.id] += 1
        fields = event if isinstance(event, dict) else decoded(event)
        request.state = state
        conversation = self.conversations.get(request.conversation or "")
        if conversation is not None and conversation.busy == request.id:
            self._end_answer(conversation, request, fields)
        elif conversation is not None and conversation.folding == request.id:
            self._end_fold(conversation, request, fields)
        if before == "running":
            self._leave_running(request, state)
            request.worker = worker
        if before in ("running", "queued"):
            usage = fields.get("usage")
            spent = request.estimate if request.tokens else 0
            self.order.settle(
                request, spent if usage is None else usage["prompt_tokens"] + len(request.tokens)
            )
        if before == "queued":
            self.order.leaves_queue(request.tenant, self.now)
        if request.levels:
            self._end_pieces(request)
        if request.document is not None:
            self._end_piece(request, fields)
        if state == "dead":
            request.expires = None
        elif not self.is_live(request.document):
            self._expire(request, request.retention)

    def _end_answer(
        self, conversation: ModelConversation, request: ModelRequest, event: dict[str, Any]
    ) -> None:
        conversation.busy = None
        if request.state == "done":
            query = decoded(request.body)["query"]
            conversation.turns.append((query, event["text"], request.id))
        elif not conversation.turns:
            self._drop(conversation)
            return
        conversation.expires = self.now + conversation.lifetime
        self.listed = {name: at for name, at in self.listed.items() if at > self.now}
        self.listed[conversation.name] = conversation.expires

    def _end_fold(
        self, conversation: ModelConversation, request: ModelRequest, event: dict[str, Any]
    ) -> None:
        conversation.folding = None
        before, conversation.folded = conversation.folded, request.id
        if before is not None and before != request.id:
            self._delete(before)
        memory = decoded(request.memory) if request.memory is not None else None
        if request.state == "done" and memory is not None and memory["first"] == conversation.covered:
            conversation.summary, conversation.covered = event["text"], memory["last"]
            conversation.fold_failures = 0
        else:
            conversation.fold_failures += 1

    def _drop(self, conversation: ModelConversation) -> None:
        del self.conversations[conversation.name]
        self.listed.pop(conversation.name, None)

    def _delete(self, request_id: str) -> None:
        self.requests.pop(request_id, None)
        self.touched.add(request_id)

    def _expire(self, request: ModelRequest, ms: int) -> None:
        request.expires = self.now + ms
        self.touched.add(request.id)
        if ms <= 0:
            self._delete(request.id)

    def _end_pieces(self, document: ModelRequest) -> None:
        for piece_id in pieces_of(document):
            piece = self.requests.get(piece_id)
            if piece is None:
                continue
            if piece.is_live:
                self._cancel(piece)
            else:
                self._expire(piece, document.retention)

    def _end_piece(self, piece: ModelRequest, event: dict[str, Any]) -> None:
        document = self.requests.get(piece.document or "")
        if document is None or document.state != "waiting":
            return
        if piece.state == "cancelled":
            self._cancel(document)
            return
        if piece.state != "done":
            self._end(document, "failed", {"type": "failed", "code": event["code"]})
            return
        usage = event["usage"]
        document.pieces += 1 + usage.get("pieces", 0)
        document.piece_prompt_tokens += usage["prompt_tokens"] + usage.get("piece_prompt_tokens", 0)
        document.piece_completion_tokens += usage["completion_tokens"] + usage.get(
            "piece_completion_tokens", 0
        )
        document.left -= 1
        self._append_progress(document)
        if document.left == 0:
            document.age = document.submitted * 100
            self._enqueue(document)
