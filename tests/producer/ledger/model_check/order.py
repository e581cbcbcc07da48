"""Whose turn it is: priority, then the tenant that has had the fewest tokens for its weight, then age; and what tenants are charged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from producer.contract.tenants import QueueOrder, TenantSettings
from tests.producer.ledger.model_check.state import ModelRequest

IDLE_TENANT_MS = 3_600_000


@dataclass
class Usage:
    """What a tenant has had."""

    time: float = 0.0
    """Virtual: tokens divided by its weight."""
    is_held: bool = False
    """It had as much running as it may when somebody looked."""
    expires: int | None = None


@dataclass
class Order:
    """One model's queue, which is derived from the requests."""

    requests: dict[str, ModelRequest]
    usage: dict[str, Usage] = field(default_factory=dict)
    settings: dict[str, TenantSettings] = field(default_factory=dict)
    resume_time: float = 0.0
    """Where the next tenant begins when nobody has anything waiting."""
    num_claims: int = 0
    """Since something that had waited long was looked for."""

    def settings_of(self, tenant: str) -> TenantSettings:
        return self.settings.get(tenant, TenantSettings())

    def set(self, tenant: str, changes: TenantSettings | None) -> TenantSettings:
        """Change what is set, or go back to the defaults (None); what may run now may run at once."""
        if changes is None:
            self.settings.pop(tenant, None)
        else:
            new = changes.model_dump(exclude_none=True)
            self.settings[tenant] = self.settings_of(tenant).model_copy(update=new)
        if tenant in self.usage:
            self.usage[tenant].is_held = False
        return self.settings_of(tenant)

    def weight(self, tenant: str) -> float:
        return self.settings_of(tenant).weight or 1

    def in_state(self, state: str, tenant: str | None = None) -> list[ModelRequest]:
        return [
            request
            for request in self.requests.values()
            if request.state == state and tenant in (None, request.tenant)
        ]

    def queue(self) -> list[ModelRequest]:
        """By priority and age, as it is shown."""
        return sorted(self.in_state("queued"), key=lambda request: (request.score, request.id))

    def shares(self) -> dict[tuple[int, str], float]:
        """(priority, tenant) → virtual time, of all that may have a turn."""
        return {
            (request.priority, request.tenant): math.floor(self.usage[request.tenant].time)
            for request in self.in_state("queued")
            if not self.usage[request.tenant].is_held
        }

    def next(self, now: int, order: QueueOrder) -> ModelRequest | None:
        """The request whose turn it is. Tenants that may not run more are found out on the way."""
        is_aged_turn = order.ageing_claims > 0 and self.num_claims >= order.ageing_claims - 1
        while shares := self.shares():
            priority, tenant = min(shares, key=lambda share: (share[0], shares[share], share[1]))
            if is_aged_turn and (aged := self._aged(shares, priority, now, order)) is not None:
                priority, tenant = aged
            if not self._may_run(tenant, order):
                self.usage[tenant].is_held = True
                continue
            own = [request for request in self.in_state("queued", tenant) if request.priority == priority]
            return min(own, key=lambda request: (request.age, request.id))
        return None

    def _aged(
        self, shares: dict[tuple[int, str], float], priority: int, now: int, order: QueueOrder
    ) -> tuple[int, str] | None:
        """Of the less urgent priorities the one whose oldest request has waited longest, if that is too long."""
        oldest, found = float("inf"), None
        for other in range(priority + 1, 10):
            waiting = [request.age / 100 for request in self.in_state("queued") if request.priority == other]
            turns = [share for share in shares if share[0] == other]
            since = min(waiting, default=now)
            if turns and now - since > order.ageing_seconds * 1000 and since < oldest:
                oldest, found = since, min(turns, key=lambda share: (shares[share], share[1]))
        return found

    def _may_run(self, tenant: str, order: QueueOrder, more: int = 0) -> bool:
        limit = self.settings_of(tenant).max_running
        limit = order.tenant_max_running if limit is None else limit
        return not limit or len(self.in_state("running", tenant)) + more < limit

    def charge(self, request: ModelRequest, order: QueueOrder) -> None:
        """It is claimed: the first time its tenant is charged for what it is thought to take."""
        is_aged_turn = order.ageing_claims > 0 and self.num_claims >= order.ageing_claims - 1
        self.num_claims = 0 if is_aged_turn else self.num_claims + 1
        usage = self.usage[request.tenant]
        if request.charged is None:
            request.charged = request.estimate
            usage.time += request.estimate / self.weight(request.tenant)
        others = len(self.in_state("queued", request.tenant)) - 1
        if not others and self.shares().keys() == {(request.priority, request.tenant)}:
            self.resume_time = max(self.resume_time, usage.time)
        if others and not self._may_run(request.tenant, order, more=1):
            usage.is_held = True

    def settle(self, request: ModelRequest, used: int) -> None:
        """What it really took counts."""
        if request.charged is not None:
            usage = self.usage[request.tenant]
            usage.time = max(usage.time + (used - request.charged) / self.weight(request.tenant), 0)
            request.charged = None

    def enters(self, tenant: str) -> None:
        """One more will wait. Whoever had nothing waiting has saved up no time by that."""
        usage = self.usage.setdefault(tenant, Usage())
        if not self.in_state("queued", tenant):
            usage.time = max(usage.time, min(self.shares().values(), default=self.resume_time))
            usage.expires = None

    def leaves_running(self, tenant: str, now: int) -> None:
        self.usage[tenant].is_held = False
        self._is_idle(tenant, now)

    def leaves_queue(self, tenant: str, now: int) -> None:
        self._is_idle(tenant, now)

    def _is_idle(self, tenant: str, now: int) -> None:
        if not self.in_state("queued", tenant) and not self.in_state("running", tenant):
            self.usage[tenant].expires = now + IDLE_TENANT_MS

    def forget_idle(self, now: int) -> None:
        for tenant, usage in list(self.usage.items()):
            if usage.expires is not None and usage.expires <= now:
                del self.usage[tenant]
