"""The tenants of a deployment: what is set for each, and what each has running and waiting.

Reads and sets; how shares and limits are kept is the ledger's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import redis

from producer.client import Client
from producer.contract.tenants import TenantSettings, check_tenant_name
from producer.ledger import calls
from producer.ledger.ledger import raise_unavailable

_SCAN_COUNT = 1000


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """One tenant, as one model's queue sees it."""

    tenant: str
    settings: TenantSettings
    num_running: int
    num_queued: int
    num_queued_tokens: int
    """By estimate."""
    num_used_tokens: int
    """Of prompts and answers that have ended, since it had nothing here for an hour."""
    is_held: bool
    """It has as much running as it may, and its queued requests wait for that."""

    @classmethod
    def of(cls, tenant: str, settings: TenantSettings, fields: dict[str, str]) -> Self:
        """From the fields of its usage."""
        running, queued, tokens, used = (
            int(float(fields.get(name, 0))) for name in ("running", "queued", "queued_tokens", "used")
        )
        return cls(tenant, settings, running, queued, tokens, used, "held" in fields)


class Tenants:
    """Of one deployment. Methods raise RedisUnavailable."""

    def __init__(self, client: Client, model: str | None = None) -> None:
        """model: whose queue `list` looks at; None: the client's."""
        self._model = model or client.model
        self._ledger = client.ledger
        self._connection: Any = client.ledger.connection

    def list(self) -> list[TenantStatus]:
        """Tenants for which something is set, and those that have used the model within the last hour, by name."""
        keys = self._ledger.keys
        try:
            texts: dict[str, str] = self._connection.hgetall(keys.tenants)
            beginning = keys.usage(self._model, "")
            names = texts.keys() | {key.removeprefix(beginning) for key in self._scan(f"{beginning}*")}
            ordered = sorted(names)
            with self._connection.pipeline(transaction=False) as pipeline:
                for name in ordered:
                    pipeline.hgetall(keys.usage(self._model, name))
                usages = pipeline.execute()
        except redis.RedisError as error:
            raise_unavailable(self._ledger.address, error)
            raise
        return [
            TenantStatus.of(name, TenantSettings.model_validate_json(texts.get(name, "{}")), usage)
            for name, usage in zip(ordered, usages, strict=True)
        ]

    def set(self, tenant: str, changes: TenantSettings) -> TenantSettings:
        """Change what `changes` names and leave the rest; answers what is set now. Raises InvalidRequest for a name that no request can carry."""
        return self._change(tenant, changes.encode())

    def unset(self, tenant: str) -> None:
        """Everything is as for other tenants again."""
        self._change(tenant, "")

    def _change(self, tenant: str, changes: str) -> TenantSettings:
        check_tenant_name(tenant)
        keys = self._ledger.keys
        beginning, end = keys.usage("", "").removesuffix("|"), f"|{tenant}"
        try:
            used = {key.removeprefix(beginning).removesuffix(end) for key in self._scan(f"{beginning}*{end}")}
        except redis.RedisError as error:
            raise_unavailable(self._ledger.address, error)
            raise
        return self._ledger.run(calls.set_tenant(tenant, changes, sorted(used)))

    def _scan(self, pattern: str) -> Iterator[str]:
        found: Iterator[str] = self._connection.scan_iter(pattern, count=_SCAN_COUNT)
        return found
