"""Redis behind Sentinel: what a `sentinel://` URL says, and connections that follow whichever server is the master.

Knows addresses and connections; what is said over them is others' business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

SCHEMES: Final = ("sentinel://", "sentinels://")
DEFAULT_PORT: Final = 26379


@dataclass(frozen=True, slots=True)
class SentinelURL:
    """`sentinel://[user:password@]host:port,host:port/service[/db]`, with `sentinels://` for TLS.

    User and password are the servers'; the query may have the sentinels' (`sentinel_username`, `sentinel_password`), and `ssl_*` as in a
    `rediss://` URL. Celery's form of several addresses (`sentinel://a:1;sentinel://b:2/service`) is understood, too.
    """

    hosts: tuple[tuple[str, int], ...]
    service: str
    db: int = 0
    username: str | None = None
    password: str | None = None
    is_tls: bool = False
    sentinel_credentials: dict[str, str] = field(default_factory=dict)
    ssl: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises ValueError, which says what is wrong."""
        scheme, _, rest = url.partition("://")
        rest = re.sub(r";sentinels?://(?:[^/;]*@)?", ",", rest)
        split = urlsplit(f"//{rest}")
        login, _, addresses = split.netloc.rpartition("@")
        username, _, password = login.partition(":")
        service, _, db = split.path.strip("/").partition("/")
        if not service:
            raise ValueError("the name of the service is missing: sentinel://host:port/service")
        if db and not db.isdigit():
            raise ValueError(f"{db!r} is no database number")
        query = dict(parse_qsl(split.query))
        credentials = {
            name.removeprefix("sentinel_"): query.pop(name)
            for name in ("sentinel_username", "sentinel_password")
            if name in query
        }
        if unknown := [name for name in query if not name.startswith("ssl_")]:
            raise ValueError(f"{unknown[0]!r} is no option")
        return cls(
            hosts=tuple(map(_host, addresses.split(","))),
            service=unquote(service),
            db=int(db or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
            is_tls=scheme == "sentinels",
            sentinel_credentials=credentials,
            ssl=_ssl_options(query),
        )

    @property
    def addresses(self) -> str:
        return ",".join(f"{host}:{port}" for host, port in self.hosts)

    @property
    def broker_url(self) -> str:
        """As Celery wants it; the service's name is `broker_options`' business."""
        login = ""
        if self.password is not None:
            login = f"{quote(self.username or '', safe='')}:{quote(self.password, safe='')}@"
        return ";".join(f"sentinel://{login}{host}:{port}/{self.db}" for host, port in self.hosts)

    @property
    def broker_options(self) -> dict[str, Any]:
        """What Celery's transport needs besides the URL."""
        return {"master_name": self.service, "sentinel_kwargs": self._sentinel_options(Retry(NoBackoff(), 0))}

    def _sentinel_options(self, retry: object) -> dict[str, Any]:
        """A sentinel that does not answer is not asked again: the next one is."""
        tls = {"ssl": True, **self.ssl} if self.is_tls else {}
        times = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, "retry": retry}
        return {**times, **self.sentinel_credentials, **tls}

    def pool(self, **options: Any) -> Any:
        """Blocking connections to the master."""
        retry = Retry(NoBackoff(), 0)
        manager = _Sentinel(list(self.hosts), sentinel_kwargs=self._sentinel_options(retry))
        return _new_pool(self.service, manager, **self._options(options))

    def async_pool(self, **options: Any) -> Any:
        """Asynchronous connections to the master."""
        retry = AsyncRetry(NoBackoff(), 0)
        manager = _AsyncSentinel(list(self.hosts), sentinel_kwargs=self._sentinel_options(retry))
        return _new_async_pool(self.service, manager, **self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        own = {"username": self.username, "password": self.password, "db": self.db}
        return {**options, **own, **({"ssl": True, **self.ssl} if self.is_tls else {})}


class _Pool(redis.sentinel.SentinelConnectionPool, redis.BlockingConnectionPool):
    """Calls wait for a connection, where redis-py's own raises at the hundredth call at a time; closes those to the sentinels, too."""

    sentinel_manager: Any

    def disconnect(self, *args: Any, **options: Any) -> None:
        super().disconnect(*args, **options)
        for sentinel in self.sentinel_manager.sentinels:
            sentinel.close()


class _AsyncPool(redis.asyncio.sentinel.SentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """Like `_Pool`."""

    sentinel_manager: Any

    async def disconnect(self, *args: Any, **options: Any) -> None:
        await super().disconnect(*args, **options)
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


# redis-py has no hints for these.
_Sentinel: Any = redis.sentinel.Sentinel
_AsyncSentinel: Any = redis.asyncio.sentinel.Sentinel
_new_pool: Any = _Pool
_new_async_pool: Any = _AsyncPool


def _host(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":") if ":" in address.rpartition("]")[2] else (address, "", "")
    if not host or (port and not port.isdigit()):
        raise ValueError(f"{address!r} is no host:port")
    return host.strip("[]"), int(port or DEFAULT_PORT)


def _ssl_options(query: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = dict(query)
    if "ssl_check_hostname" in options:
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() not in ("false", "0", "no")
    return options
