"""What clients and operators do: submit, cancel, forget, look; retry and drop dead letters, set what tenants may."""

from __future__ import annotations

from typing import Final

from producer.contract import (
    ChatRequest,
    DeadlineUnmeetable,
    Failed,
    QueueFull,
    Request,
    SamplingParams,
    SummaryRequest,
)
from producer.contract.keys import conversation_name
from producer.contract.tenants import DEFAULT_BOUNDS, QueueBounds, TenantSettings, estimate_tokens
from producer.ledger import calls
from tests.producer.ledger.model_check.actors import Operation
from tests.producer.ledger.model_check.agreement import MODEL
from tests.producer.ledger.model_check.deployment import (
    CONVERSATION_SECONDS,
    RETENTION_SECONDS,
    TENANTS,
    Deployment,
    act,
    pick,
)
from tests.producer.ledger.model_check.server import CALL_US
from tests.producer.ledger.model_check.state import ModelRequest

MAX_LIVE: Final = 12
"""With more live requests the steps become slower and no more interesting."""
CONVERSATIONS: Final = ("c1", "c2", "c3")
PRIORITIES: Final = (5, 5, 0, 9)
DEADLINES: Final = (None, None, None, 1.0, 5.0)
SMALL_BOUNDS: Final = (
    QueueBounds(max_queued=2, tenant_max_queued=0),
    QueueBounds(max_queued=0, tenant_max_queued=1),
    QueueBounds(max_queued_tokens=800, tenant_max_queued_tokens=0),
    QueueBounds(max_queued_tokens=0, tenant_max_queued_tokens=300),
)
SETTINGS: Final = (
    None,
    TenantSettings(weight=3),
    TenantSettings(max_running=1),
    TenantSettings(max_running=0, weight=0.5),
    TenantSettings(max_queued=2),
)


def has_room(clients: Clients) -> bool:
    return sum(request.is_live for request in clients.model.requests.values()) < MAX_LIVE


class Clients(Deployment):
    """Producers of requests, and the people who watch over a deployment."""

    def submit(
        self,
        request: Request,
        request_id: str,
        idempotency_key: str | None = None,
        bounds: QueueBounds = DEFAULT_BOUNDS,
    ) -> None:
        # A seed drawn by the call would make the next run of these steps another one.
        request = request.model_copy(update={"sampling": SamplingParams(seed=1)})
        call = calls.submit(
            request,
            model=MODEL,
            request_id=request_id,
            idempotency_key=idempotency_key,
            retention_seconds=RETENTION_SECONDS,
            conversation_seconds=CONVERSATION_SECONDS,
            bounds=bounds,
        )
        digest, body = str(call.args[1]), str(call.args[5])
        self.perform(
            Operation(
                "submit",
                call,
                lambda answer: self.model.submit(
                    request,
                    model=MODEL,
                    request_id=request_id,
                    digest=digest,
                    body=body,
                    estimate=estimate_tokens(request, body),
                    bounds=bounds,
                    idempotency_key=idempotency_key,
                    retention_seconds=RETENTION_SECONDS,
                    conversation_seconds=CONVERSATION_SECONDS,
                    refusal=answer if isinstance(answer, QueueFull | DeadlineUnmeetable) else None,
                ),
            )
        )

    @act(2, when=has_room)
    def submit_chat(self, which: int, option: int, is_lost: bool) -> None:
        request = ChatRequest(
            query="q",
            tenant=pick(which, TENANTS),
            priority=pick(option, PRIORITIES),
            deadline_seconds=pick(option // len(PRIORITIES), DEADLINES),
        )
        self.submit(request, self.new_id("q"))

    @act(3, when=has_room)
    def submit_summary(self, which: int, option: int, is_lost: bool) -> None:
        """Of a text that may turn out to be too long, and so a document."""
        request = SummaryRequest(
            text="t",
            tenant=pick(which, TENANTS),
            priority=pick(option, PRIORITIES),
            deadline_seconds=pick(option // len(PRIORITIES), DEADLINES),
        )
        self.submit(request, self.new_id("s"))

    @act(1)
    def submit_with_idempotency_key(self, which: int, option: int, is_lost: bool) -> None:
        """The same two keys again and again, mostly with the same body."""
        request = ChatRequest(query=pick(option, ("q", "q", "other")), tenant=pick(which, TENANTS))
        self.submit(request, self.new_id("k"), pick(which // 2, ("k1", "k2")))

    @act(1)
    def submit_to_a_full_queue(self, which: int, option: int, is_lost: bool) -> None:
        """Refused or not, as the bounds are; what is refused leaves nothing, and its key free."""
        request = ChatRequest(
            query="q",
            tenant=pick(which, TENANTS),
            priority=pick(which // 2, PRIORITIES),
            deadline_seconds=pick(option // len(SMALL_BOUNDS), DEADLINES),
        )
        self.submit(request, self.new_id("b"), pick(which, (None, "k3", "k4")), pick(option, SMALL_BOUNDS))

    @act(4, when=has_room)
    def submit_in_conversation(self, which: int, option: int, is_lost: bool) -> None:
        """Mostly in one without an answer in progress, if there is such a one."""
        tenant = pick(which, TENANTS)
        names = {name: conversation_name(tenant, name) for name in CONVERSATIONS}
        busy = {c.name for c in self.model.conversations.values() if c.busy is not None}
        free = [each for each, name in names.items() if name not in busy]
        conversation = pick(which // 2, free if free and option % 4 else CONVERSATIONS)
        request_id = self.new_id("c")
        request = ChatRequest(query=f"q {request_id}", tenant=tenant, conversation_id=conversation)
        self.submit(request, request_id)

    @act(1)
    def refuse(self, which: int, option: int, is_lost: bool) -> None:
        known = [request.id for request in self.model.requests.values() if request.is_live]
        request_id = pick(which, known) if known and option % 2 else self.new_id("x")
        failed = Failed(code="invalid_request", message="It is invalid. Correct it.")
        call = calls.refuse(request_id, {}, failed, model=MODEL, retention_seconds=RETENTION_SECONDS)
        digest, body = str(call.args[1]), str(call.args[4])
        self.perform(
            Operation(
                "refuse",
                call,
                lambda _: self.model.refuse(
                    request_id,
                    failed,
                    model=MODEL,
                    digest=digest,
                    body=body,
                    retention_seconds=RETENTION_SECONDS,
                ),
            )
        )

    @act(3, when=lambda self: self.model.requests)
    def cancel(self, which: int, option: int, is_lost: bool) -> None:
        request_id = self.a_request(which, is_live=bool(option % 4)).id
        self.perform(Operation("cancel", calls.cancel(request_id), lambda _: self.model.cancel(request_id)))

    @act(1, when=lambda self: self.model.conversations)
    def forget(self, which: int, option: int, is_lost: bool) -> None:
        conversation = pick(which, list(self.model.conversations.values()))
        tenant, conversation_id = conversation.tenant, conversation.id
        self.perform(
            Operation(
                "forget",
                calls.forget(tenant, conversation_id),
                lambda _: self.model.forget(tenant, conversation_id),
            )
        )

    def a_request(self, which: int, *, is_live: bool) -> ModelRequest:
        """One that is live, if there is such a one and it is asked for; else any."""
        known = list(self.model.requests.values())
        live = [request for request in known if request.is_live]
        return pick(which, live if live and is_live else known)

    # --- operators ---------------------------------------------------------------------------------------------------

    @act(1)
    def set_tenant(self, which: int, option: int, is_lost: bool) -> None:
        tenant, changes = pick(which, TENANTS), pick(option, SETTINGS)
        self.perform(
            Operation(
                "tenant",
                calls.set_tenant(tenant, "" if changes is None else changes.encode(), [MODEL]),
                lambda _: self.model.order.set(tenant, changes),
            )
        )

    @act(6, when=lambda self: self.model.in_state("dead"))
    def retry_dead(self, which: int, option: int, is_lost: bool) -> None:
        request_id = pick(which, self.model.in_state("dead")).id
        self.perform(
            Operation(
                "retry",
                calls.retry_dead(request_id, conversation_seconds=CONVERSATION_SECONDS),
                lambda _: self.model.retry_dead(request_id, conversation_seconds=CONVERSATION_SECONDS),
            )
        )

    @act(1, when=lambda self: self.model.requests)
    def drop_dead(self, which: int, option: int, is_lost: bool) -> None:
        """A dead letter if there is one; anything else is left alone."""
        dead = self.model.in_state("dead")
        self.drop((pick(which, dead) if dead else self.a_request(which, is_live=bool(option % 2))).id)

    def drop(self, request_id: str) -> None:
        self.perform(
            Operation("drop", calls.drop_dead(request_id), lambda _: self.model.drop_dead(request_id))
        )

    @act(1, when=lambda self: self.model.requests)
    def look(self, which: int, option: int, is_lost: bool) -> None:
        """What people and dashboards are shown."""
        request = self.a_request(which, is_live=True)
        if not self.is_over(request.id):
            status = self.server.run(calls.status(request.id))
            queue = [each.id for each in self.model.order.queue()]
            assert (status.state, status.attempt, status.num_tokens, status.place) == (
                request.state,
                request.attempt,
                len(request.tokens),
                queue.index(request.id) if request.state == "queued" else None,
            )
        backlog = self.server.run(calls.backlog(MODEL))
        self.model.begin(self.server.now_us)
        queued, running = self.model.in_state("queued"), self.model.in_state("running")
        assert sum(backlog.num_queued) == len(queued)
        assert backlog.num_queued_tokens == sum(each.estimate for each in queued)
        assert backlog.num_running == len(running)
        assert backlog.num_overdue == sum(each.lease < self.model.now for each in running if each.lease)
        assert backlog.num_dead == len(self.model.dead_letters())
        overview = self.server.run(calls.overview(MODEL))
        assert (overview.num_queued, overview.num_running) == (len(queued), len(running))
        letters = self.server.run(calls.dead_letters()).letters
        self.model.begin(self.server.now_us)
        assert [each.request_id for each in letters] == [each.id for each in self.model.dead_letters()]

    def is_over(self, request_id: str) -> bool:
        """Whether it will have expired when the next call runs."""
        self.model.begin(self.server.now_us + CALL_US)
        return request_id not in self.model.requests
