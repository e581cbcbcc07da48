"""The network that the chaos suite cuts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chaos.proxy import Proxy


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    proxy = Proxy(redis_url)
    yield proxy
    proxy.close()


def _connect(proxy: Proxy, timeout: float) -> redis.Redis:
    return redis.Redis.from_url(proxy.url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def test_while_it_is_cut_nobody_hears_anything(proxy: Proxy) -> None:
    with _connect(proxy, 0.3) as old, _connect(proxy, 0.3) as new:
        assert old.ping()
        proxy.cut()

        for connection in (old, new):
            with pytest.raises(redis.TimeoutError):
                connection.ping()

        proxy.mend()
        assert old.ping()


def test_what_was_sent_while_it_was_cut_arrives_when_it_is_mended(proxy: Proxy, redis_url: str) -> None:
    with _connect(proxy, 0.3) as sender, redis.Redis.from_url(redis_url) as reader:
        sender.ping()
        proxy.cut()
        with pytest.raises(redis.TimeoutError):
            sender.set("proxy:late", "1")
        assert reader.get("proxy:late") is None

        proxy.mend()
        deadline = time.monotonic() + 5
        while reader.get("proxy:late") is None and time.monotonic() < deadline:
            time.sleep(0.02)

        assert reader.getdel("proxy:late") == b"1"
