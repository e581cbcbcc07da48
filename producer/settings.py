"""What a producer is told by its environment, read once: where Redis is, which deployment, how long results are kept, how much may wait.

Knows nothing about workers, whose own settings are in `workers.settings`, and connects to nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from producer.contract.errors import InvalidSetting
from producer.contract.keys import CONVERSATION_SECONDS, IDEMPOTENCY_SECONDS, RETENTION_SECONDS, Keys
from producer.contract.tenants import DEFAULT_BOUNDS, DEFAULT_ORDER, QueueBounds, QueueOrder

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_SCHEMES = ("redis://", "rediss://", "unix://", "sentinel://", "sentinels://")


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """`$XDG_STATE_HOME/glmq`, else `~/.local/state/glmq`.

    In the home directory, not in the working directory: the service that submits and the worker that answers are rarely
    started from the same one, and must find the same server.
    """
    if base := environ.get("XDG_STATE_HOME"):
        return Path(base) / "glmq"
    try:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError as error:
        raise InvalidSetting(
            "GLMQ_STATE_DIR", "is not set, and this user has no home directory", "Set it to a directory."
        ) from error
    return home / ".local" / "state" / "glmq"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a producer can be told. Built once and handed down.

    =============================  ==================================================================================
    variable                       meaning
    =============================  ==================================================================================
    REDIS_URL                      redis://, rediss:// (TLS; `?ssl_ca_certs=/path` names the authority) or unix:// of the server, or
                                   sentinel://host:port,host:port/service (sentinels://: TLS). Unset or empty: the embedded
                                   server of this machine, found through the state directory
    GLMQ_NAMESPACE                 prefix of all keys; two deployments on one server need two (default `glmq`)
    GLMQ_MODEL                     the model of requests that name none (default `chatglm-6b`)
    GLMQ_STATE_DIR                 where the embedded server keeps its data (default `$XDG_STATE_HOME/glmq`, else
                                   `~/.local/state/glmq`)
    GLMQ_RETENTION_SECONDS         how long a request and its events are kept after its end (default 600)
    GLMQ_IDEMPOTENCY_SECONDS       how long an idempotency key is remembered (default 86400)
    GLMQ_CONVERSATION_SECONDS      how long a conversation is kept after its last turn (default 2592000, 30 days)
    GLMQ_MAX_QUEUED                requests of a model that may wait before others are refused (default 10000; 0: no bound)
    GLMQ_MAX_QUEUED_TOKENS         their tokens, by estimate (default 10000000; 0: no bound)
    GLMQ_TENANT_MAX_QUEUED         of these the requests of one tenant (default 5000; 0: no bound)
    GLMQ_TENANT_MAX_QUEUED_TOKENS  and their tokens (default 5000000; 0: no bound)
    GLMQ_TENANT_MAX_RUNNING        requests of one tenant that may run at a time (default 0: no limit)
    GLMQ_AGEING_SECONDS            a less urgent request that has waited longer goes first now and then (default 60)
    GLMQ_AGEING_CLAIMS             once in so many claims (default 8; 0: never)
    GLMQ_REDIS_TIMEOUT_SECONDS     how long one call may take, connecting included (default 5)
    GLMQ_RECONNECT_SECONDS         how long a stream waits for a Redis that went away (default 60)
    =============================  ==================================================================================
    """

    redis_url: str | None = None
    namespace: str = "glmq"
    model: str = "chatglm-6b"
    state_dir: Path = field(default_factory=lambda: default_state_dir(os.environ))
    retention_seconds: float = RETENTION_SECONDS
    idempotency_seconds: float = IDEMPOTENCY_SECONDS
    conversation_seconds: float = CONVERSATION_SECONDS
    bounds: QueueBounds = DEFAULT_BOUNDS
    order: QueueOrder = DEFAULT_ORDER
    redis_timeout_seconds: float = 5.0
    reconnect_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.redis_url is not None and not self.redis_url.startswith(_SCHEMES):
            raise InvalidSetting(
                "REDIS_URL",
                f"{_without_password(self.redis_url)!r} is not a Redis URL",
                "Use redis://host:port/db, rediss://host:port/db, unix:///path/to/socket or sentinel://host:port,host:port/service.",
            )
        for name, value, pattern, others in (
            ("GLMQ_NAMESPACE", self.namespace, _NAMESPACE, ". _ -"),
            ("GLMQ_MODEL", self.model, _MODEL, ". _ : / @ -"),
        ):
            if not pattern.fullmatch(value):
                raise InvalidSetting(
                    name,
                    f"{value!r} is not a name",
                    f"Use at most 128 letters, digits and {others}, a letter or digit first.",
                )
        for name, seconds in (
            ("GLMQ_RETENTION_SECONDS", self.retention_seconds),
            ("GLMQ_IDEMPOTENCY_SECONDS", self.idempotency_seconds),
            ("GLMQ_CONVERSATION_SECONDS", self.conversation_seconds),
            ("GLMQ_AGEING_SECONDS", self.order.ageing_seconds),
            ("GLMQ_REDIS_TIMEOUT_SECONDS", self.redis_timeout_seconds),
            ("GLMQ_RECONNECT_SECONDS", self.reconnect_seconds),
        ):
            if not (math.isfinite(seconds) and 0.001 <= seconds <= 366 * 86_400):
                raise InvalidSetting(name, f"{seconds} is out of range", "Use 0.001 to 31622400 seconds.")
        for name, number in (
            ("GLMQ_MAX_QUEUED", self.bounds.max_queued),
            ("GLMQ_MAX_QUEUED_TOKENS", self.bounds.max_queued_tokens),
            ("GLMQ_TENANT_MAX_QUEUED", self.bounds.tenant_max_queued),
            ("GLMQ_TENANT_MAX_QUEUED_TOKENS", self.bounds.tenant_max_queued_tokens),
            ("GLMQ_TENANT_MAX_RUNNING", self.order.tenant_max_running),
            ("GLMQ_AGEING_CLAIMS", self.order.ageing_claims),
        ):
            if not 0 <= number <= 10**12:
                raise InvalidSetting(name, f"{number} is out of range", "Use 0 (none) or more.")

    @property
    def keys(self) -> Keys:
        return Keys(self.namespace)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The settings in these variables (None: the process' environment). Raises InvalidSetting."""
        if environ is None:
            environ = os.environ
        state_dir = environ.get("GLMQ_STATE_DIR")
        return cls(
            redis_url=environ.get("REDIS_URL") or None,
            namespace=environ.get("GLMQ_NAMESPACE") or "glmq",
            model=environ.get("GLMQ_MODEL") or "chatglm-6b",
            state_dir=Path(state_dir).expanduser() if state_dir else default_state_dir(environ),
            retention_seconds=_seconds(environ, "GLMQ_RETENTION_SECONDS", RETENTION_SECONDS),
            idempotency_seconds=_seconds(environ, "GLMQ_IDEMPOTENCY_SECONDS", IDEMPOTENCY_SECONDS),
            conversation_seconds=_seconds(environ, "GLMQ_CONVERSATION_SECONDS", CONVERSATION_SECONDS),
            bounds=QueueBounds(
                max_queued=_number(environ, "GLMQ_MAX_QUEUED", DEFAULT_BOUNDS.max_queued),
                max_queued_tokens=_number(
                    environ, "GLMQ_MAX_QUEUED_TOKENS", DEFAULT_BOUNDS.max_queued_tokens
                ),
                tenant_max_queued=_number(
                    environ, "GLMQ_TENANT_MAX_QUEUED", DEFAULT_BOUNDS.tenant_max_queued
                ),
                tenant_max_queued_tokens=_number(
                    environ, "GLMQ_TENANT_MAX_QUEUED_TOKENS", DEFAULT_BOUNDS.tenant_max_queued_tokens
                ),
            ),
            order=QueueOrder(
                tenant_max_running=_number(
                    environ, "GLMQ_TENANT_MAX_RUNNING", DEFAULT_ORDER.tenant_max_running
                ),
                ageing_seconds=_seconds(environ, "GLMQ_AGEING_SECONDS", DEFAULT_ORDER.ageing_seconds),
                ageing_claims=_number(environ, "GLMQ_AGEING_CLAIMS", DEFAULT_ORDER.ageing_claims),
            ),
            redis_timeout_seconds=_seconds(environ, "GLMQ_REDIS_TIMEOUT_SECONDS", 5.0),
            reconnect_seconds=_seconds(environ, "GLMQ_RECONNECT_SECONDS", 60.0),
        )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError as error:
        raise InvalidSetting(name, f"{text!r} is not a number", "Give seconds, such as 600.") from error


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise InvalidSetting(
            name, f"{text!r} is not a whole number", "Give a number, such as 1000."
        ) from error


def _without_password(url: str) -> str:
    return re.sub(r"(?<=:)[^:/@]*(?=@)", "***", url)
