"""`sentinel://` and `rediss://`: what such URLs say, and connections of the ledger, the streams and the broker over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from celery import Celery

from producer.celery_settings import celery_settings
from producer.client import AsyncClient, Client
from producer.contract import ChatRequest, InvalidSetting, RedisUnavailable
from producer.embedded import EmbeddedServer
from producer.ledger.sentinel import SentinelURL
from producer.settings import Settings
from tests.redis_servers import Servers, behind_tls, self_signed, under_sentinel


def test_all_parts_of_a_url_are_read() -> None:
    url = SentinelURL.parse(
        "sentinels://us%40er:p%2Fw@a:1,b,[::1]:3/main/2?sentinel_password=s&ssl_ca_certs=/ca.pem&ssl_check_hostname=false"
    )
    assert url.hosts == (("a", 1), ("b", 26379), ("::1", 3))
    assert (url.service, url.db, url.username, url.password) == ("main", 2, "us@er", "p/w")
    assert (url.is_tls, url.ssl) == (True, {"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False})
    assert url.sentinel_credentials == {"password": "s"}


def test_celery_s_form_of_several_addresses_is_understood_and_spoken() -> None:
    url = SentinelURL.parse("sentinel://:pw@a:1;sentinel://:pw@b:2/main")
    assert (url.hosts, url.password) == ((("a", 1), ("b", 2)), "pw")
    settings = celery_settings("sentinel://:pw@a:1,b:2/main/3", "glmq")
    assert settings["broker_url"] == "sentinel://:pw@a:1/3;sentinel://:pw@b:2/3"
    assert settings["broker_transport_options"]["master_name"] == "main"
    assert settings["broker_transport_options"]["global_keyprefix"] == "glmq:"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("sentinel://a:1", "name of the service"),
        ("sentinel://a:one/main", "no host:port"),
        ("sentinel:///main", "no host:port"),
        ("sentinel://a/main/x", "database"),
        ("sentinel://a/main?what=1", "'what'"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_with_the_reason(url: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=f"REDIS_URL: .*{problem}"):
        Client(Settings(redis_url=url, state_dir=tmp_path))


def test_where_no_sentinel_answers_the_service_is_named(tmp_path: Path) -> None:
    settings = Settings(redis_url="sentinel://127.0.0.1:1/main", state_dir=tmp_path, redis_timeout_seconds=1)
    with Client(settings) as client, pytest.raises(RedisUnavailable, match="the master of main"):
        client.status("x")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with under_sentinel(tmp_path_factory.mktemp("sentinel")) as servers:
        yield servers


def test_requests_survive_a_failover(servers: Servers, tmp_path: Path) -> None:
    settings = Settings(redis_url=servers.url, state_dir=tmp_path, reconnect_seconds=30)
    with Client(settings) as client:
        before = client.submit(ChatRequest(query="q"))
        app = Celery("reader", set_as_current=False)
        app.conf.update(celery_settings(servers.url, settings.namespace))
        queue = settings.keys.celery_queue(settings.model)
        with app.connection_for_read() as broker:
            assert broker.SimpleQueue(queue).get(timeout=10).headers["task"] == "glmq.next"
        old_master = servers.master_port
        time.sleep(0.3)  # replication is asynchronous

        servers.kill_master()

        deadline = time.monotonic() + 30
        while True:
            try:
                after = client.submit(ChatRequest(query="q"))
                break
            except RedisUnavailable:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert servers.master_port != old_master
        assert client.status(before.request_id).state == "queued"
        assert client.status(after.request_id).place == 1
        client.cancel(after.request_id)
        assert [event.type for event in client.stream(after.request_id)] == ["finished"]
        with app.connection_for_read() as broker:
            assert broker.SimpleQueue(queue).get(timeout=20).headers["task"] == "glmq.next"
        app.close()

    async def cancel() -> None:
        async with AsyncClient(settings) as client:
            await client.cancel(before.request_id)
            assert [event.type async for event in client.stream(before.request_id)] == ["finished"]

    asyncio.run(cancel())


def test_tls_with_an_authority_of_one_s_own(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with EmbeddedServer.start(tmp_path / "server") as server:
        password = urlsplit(server.url).password
        with behind_tls(server.port, certificate, key) as port:
            plain = f"rediss://:{password}@127.0.0.1:{port}/0"
            settings = Settings(redis_url=f"{plain}?ssl_ca_certs={certificate}", state_dir=tmp_path)
            with Client(settings) as client:
                submission = client.submit(ChatRequest(query="q"))
                app = Celery("reader", set_as_current=False)
                app.conf.update(celery_settings(settings.redis_url or "", settings.namespace))
                with app.connection_for_read() as broker:
                    queue = broker.SimpleQueue(settings.keys.celery_queue(settings.model))
                    assert queue.get(timeout=10).headers["task"] == "glmq.next"
                app.close()
                client.cancel(submission.request_id)
                assert [event.type for event in submission.stream()] == ["finished"]
            # Nobody vouches for it.
            strangers = Settings(redis_url=plain, state_dir=tmp_path, redis_timeout_seconds=2)
            with Client(strangers) as client, pytest.raises(RedisUnavailable, match="certificate"):
                client.status("x")
