"""Runs the calls of `calls` on a Redis connection, blocking or asynchronous.

Knows connections and their errors; what a call does and answers is the call's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from producer.contract.errors import InvalidSetting, RedisUnavailable
from producer.contract.keys import Keys
from producer.ledger.calls import Call
from producer.ledger.scripts import script
from producer.ledger.sentinel import SCHEMES, SentinelURL

T = TypeVar("T")

_UNAVAILABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    # It is there, but takes no writes now.
    redis.exceptions.OutOfMemoryError,
    redis.ReadOnlyError,
    redis.exceptions.ClusterDownError,
)
_UNAVAILABLE_ANSWERS = re.compile(r"\b(OOM|MISCONF|READONLY|MASTERDOWN|NOREPLICAS)\b")
"""Of the same kind, without an exception of their own. Redis 6.2 puts the code behind the script's name."""

MAX_CONNECTIONS = 32
"""Of one ledger. More would not make a single-threaded server faster."""


class Ledger:
    """Runs calls on a blocking connection. Safe to share between threads."""

    def __init__(self, connection: redis.Redis, keys: Keys) -> None:
        self.connection = connection
        self.keys = keys
        self.address = address_of(connection)
        self._execute: Any = connection.execute_command

    @classmethod
    def at(cls, url: str, keys: Keys, *, timeout_seconds: float = 5.0, retries: int = 3) -> Self:
        """A ledger on connections of its own."""
        return cls(connect(url, timeout_seconds=timeout_seconds, retries=retries), keys)

    def run(self, call: Call[T]) -> T:
        """The answer of one call. Raises what the call raises, and RedisUnavailable."""
        code = script(call.script)
        arguments = (1, self.keys.prefix, *call.args)
        try:
            while True:
                try:
                    answer = self._execute("EVALSHA", code.sha, *arguments)
                except redis.exceptions.NoScriptError:
                    answer = self._execute("EVAL", code.source, *arguments)
                if not call.again(answer):
                    return call.parse(answer)
        except redis.RedisError as error:
            raise_unavailable(self.address, error)
            raise

    def run_many(self, wanted: Sequence[Call[T]]) -> list[T]:
        """The answers of several calls in one round trip. Each is on its own, as with `run`: others may come in between.

        Raises as `run` does, for the first call that failed; those after it may have been done.
        """
        if len(wanted) == 1:
            return [self.run(wanted[0])]
        pipeline: Any
        with self.connection.pipeline(transaction=False) as pipeline:
            for call in wanted:
                pipeline.execute_command("EVALSHA", script(call.script).sha, 1, self.keys.prefix, *call.args)
            try:
                answers = pipeline.execute(raise_on_error=False)
            except redis.RedisError as error:
                raise_unavailable(self.address, error)
                raise
        parsed: list[T] = []
        for call, answer in zip(wanted, answers, strict=True):
            if isinstance(answer, redis.exceptions.NoScriptError):
                parsed.append(self.run(call))
            elif isinstance(answer, redis.RedisError):
                raise_unavailable(self.address, answer)
                raise answer
            else:
                parsed.append(self.run(call) if call.again(answer) else call.parse(answer))
        return parsed

    def close(self) -> None:
        self.connection.close()


class AsyncLedger:
    """Runs calls on an asynchronous connection, from one event loop."""

    def __init__(self, connection: redis.asyncio.Redis, keys: Keys) -> None:
        self.connection = connection
        self.keys = keys
        self.address = address_of(connection)
        self._execute: Any = connection.execute_command

    @classmethod
    def at(cls, url: str, keys: Keys, *, timeout_seconds: float = 5.0, retries: int = 3) -> Self:
        """A ledger on connections of its own."""
        return cls(connect_async(url, timeout_seconds=timeout_seconds, retries=retries), keys)

    async def run(self, call: Call[T]) -> T:
        """The answer of one call. Raises what the call raises, and RedisUnavailable."""
        code = script(call.script)
        arguments = (1, self.keys.prefix, *call.args)
        try:
            while True:
                try:
                    answer = await self._execute("EVALSHA", code.sha, *arguments)
                except redis.exceptions.NoScriptError:
                    answer = await self._execute("EVAL", code.source, *arguments)
                if not call.again(answer):
                    return call.parse(answer)
        except redis.RedisError as error:
            raise_unavailable(self.address, error)
            raise

    async def close(self) -> None:
        await self.connection.aclose()


def connect(url: str, *, timeout_seconds: float = 5.0, retries: int = 3) -> redis.Redis:
    """A pool of connections to this server; it connects at the first use.

    retries: how often a call that met a connection error is repeated, 20 ms to 0.5 s apart. All calls but `claim` may be
    repeated without harm; a claim whose answer was lost stays claimed until its lease ends.
    """
    options = _options(timeout_seconds, Retry(_backoff(), retries))
    pool = _pool(url, options, redis.BlockingConnectionPool, SentinelURL.pool)
    return redis.Redis.from_pool(pool)


def connect_async(url: str, *, timeout_seconds: float = 5.0, retries: int = 3) -> redis.asyncio.Redis:
    """Like `connect`, for an event loop."""
    options = _options(timeout_seconds, AsyncRetry(_backoff(), retries))
    pool = _pool(url, options, redis.asyncio.BlockingConnectionPool, SentinelURL.async_pool)
    return redis.asyncio.Redis.from_pool(pool)


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.02, cap=0.5)


def _options(timeout_seconds: float, retry: object) -> dict[str, Any]:
    return {
        "max_connections": MAX_CONNECTIONS,
        "timeout": None,
        "decode_responses": True,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "socket_keepalive": True,
        "retry": retry,
    }


def _pool(url: str, options: dict[str, Any], kind: Any, of_sentinel: Callable[..., Any]) -> Any:
    """A pool in which calls wait for a connection: redis-py's ordinary one raises at the hundredth call at a time."""
    try:
        if url.startswith(SCHEMES):
            return of_sentinel(SentinelURL.parse(url), **options)
        return kind.from_url(url, **options)
    except ValueError as error:
        raise InvalidSetting(
            "REDIS_URL", f"{hide_password(url)!r} is not a Redis URL ({error})", "Use redis://host:port/db."
        ) from error


def raise_unavailable(address: str, error: Exception) -> None:
    """Raise RedisUnavailable if the error says that the server cannot be reached or takes no writes now."""
    if isinstance(error, _UNAVAILABLE) or _UNAVAILABLE_ANSWERS.search(str(error)):
        raise RedisUnavailable(address, error) from error


def address_of(connection: redis.Redis | redis.asyncio.Redis) -> str:
    """Where a connection leads, without its password."""
    pool: Any = connection.connection_pool
    settings = pool.connection_kwargs
    if service := getattr(pool, "service_name", None):
        return f"the master of {service}"
    if path := settings.get("path"):
        return f"unix://{path}"
    return f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db') or 0}"


def hide_password(url: str) -> str:
    return re.sub(r"(?<=:)[^:/@]*(?=@)", "***", url)
