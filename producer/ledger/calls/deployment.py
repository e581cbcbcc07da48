"""The deployment as whoever operates it sees it: workers, backlog, tenants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from producer.contract.keys import WORKER_SECONDS
from producer.contract.tenants import TenantSettings
from producer.ledger.calls.call import Call, milliseconds, pairs


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker last said of itself."""

    worker: str
    silent_seconds: float
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Overview:
    """What a deployment does now."""

    num_queued: int
    """Of the model that was asked for."""
    num_running: int
    """Of all models."""
    workers: list[WorkerStatus]

    def is_served(self, model: str, *, besides: str) -> bool:
        """Whether a worker other than `besides` says that it is ready for this model."""
        return any(
            each.worker != besides and each.about.get("model") == model and each.about.get("state") == "ready"
            for each in self.workers
        )


def overview(model: str, worker_seconds: float = WORKER_SECONDS) -> Call[Overview]:
    """Queue length of a model, running requests, and the workers heard of in the last `worker_seconds`."""

    def parse(answer: tuple[int, int, list[Any]]) -> Overview:
        queued, running, workers = answer
        return Overview(
            queued,
            running,
            [WorkerStatus(name, silent / 1000, pairs(about)) for name, silent, about in workers],
        )

    return Call("overview", [model, milliseconds(worker_seconds)], parse)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in a deployment, for those who watch it."""

    num_queued: tuple[int, ...]
    """Of the model that was asked for, by priority, 0 (the most urgent) to 9."""
    oldest_seconds: tuple[float, ...]
    """How long the oldest one of each priority has waited."""
    num_running: int
    """Of all models."""
    num_overdue: int
    """Running requests whose lease has ended."""
    num_conversations: int
    num_dead: int
    """Dead letters."""
    memory_used_bytes: int
    """By Redis."""
    memory_max_bytes: int
    """0: no limit."""
    rejected: dict[str, int]
    """Submissions refused at the door, by reason, since the deployment began."""
    num_queued_tokens: int = 0
    """Of the model that was asked for, by estimate (`estimate_tokens`)."""
    drain_tokens_per_second: float = 0.0
    """How fast its queue drained in the last minute or so in which something waited, in the same estimate. 0: not measured yet."""


def backlog(model: str) -> Call[Backlog]:
    """What waits, how long it has waited, and how full Redis is."""

    def parse(answer: list[Any]) -> Backlog:
        queued, oldest_ms, running, overdue, conversations, dead, used, maximum, rejected, load = answer
        *tokens, drained, drained_ms = (float(number or 0) for number in load)
        counts = {reason: int(number) for reason, number in pairs(rejected).items()}
        return Backlog(
            tuple(queued),
            tuple(ms / 1000 for ms in oldest_ms),
            running,
            overdue,
            conversations,
            dead,
            used,
            maximum,
            counts,
            round(sum(tokens)),
            1000 * drained / drained_ms if drained_ms else 0.0,
        )

    return Call("backlog", [model], parse)


def set_tenant(tenant: str, changes: str, models: Sequence[str]) -> Call[TenantSettings]:
    """Change what is set for a tenant (JSON of TenantSettings; "": back to the defaults); answers what is set now.

    models: those of which it may have something waiting.
    """
    return Call("tenant", [tenant, changes, *models], TenantSettings.model_validate_json)
