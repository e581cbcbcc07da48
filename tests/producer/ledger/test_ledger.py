"""Connections: scripts that the server has not seen, servers that do not answer, keys that nobody documented."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import TYPE_CHECKING

import pytest
import redis

from producer.contract import ChatRequest, IdempotencyConflict, InvalidSetting, QueueFull, RedisUnavailable
from producer.contract import keys as keys_page
from producer.contract.keys import Keys
from producer.contract.tenants import QueueBounds
from producer.embedded import EmbeddedServer
from producer.ledger import AsyncLedger, Call, Ledger, calls
from producer.ledger.scripts import script, script_names

if TYPE_CHECKING:
    from pathlib import Path

    from tests.producer.conftest import HandWorker


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_scripts_survive_a_server_that_has_forgotten_them(ledger: Ledger) -> None:
    ledger.run(calls.submit(ChatRequest(query="q"), model="m"))
    ledger.connection.script_flush()
    assert ledger.run(calls.claim("m", "w", 5.0)) is not None
    assert ledger.connection.script_exists(script("claim").sha) == [True]


def test_every_script_compiles_on_this_server(ledger: Ledger) -> None:
    names = script_names()
    assert {"submit", "claim", "emit", "finish", "cancel", "renew", "release", "follow"} <= set(names)
    for name in names:
        assert ledger.connection.script_load(script(name).source) == script(name).sha


def test_a_server_that_is_not_there_is_said_with_its_address_and_without_its_password() -> None:
    port = closed_port()
    ledger = Ledger.at(f"redis://:s3cret@127.0.0.1:{port}/3", Keys())
    begin = time.monotonic()
    with pytest.raises(
        RedisUnavailable, match=rf"127\.0\.0\.1:{port}/3 cannot be reached .* `glmq up`"
    ) as caught:
        ledger.run(calls.status("x"))
    assert "s3cret" not in str(caught.value)
    assert time.monotonic() - begin < 3


def test_the_asynchronous_ledger_says_the_same() -> None:
    async def run() -> None:
        ledger = AsyncLedger.at(f"redis://127.0.0.1:{closed_port()}", Keys())
        with pytest.raises(RedisUnavailable, match="cannot be reached"):
            await ledger.run(calls.status("x"))
        await ledger.close()

    asyncio.run(run())


def test_a_url_that_is_none_names_the_variable_and_hides_the_password() -> None:
    with pytest.raises(InvalidSetting, match="REDIS_URL") as caught:
        Ledger.at("redis://:s3cret@host:not-a-port/0", Keys())
    assert "s3cret" not in str(caught.value)


def test_a_full_server_is_unavailable_and_not_a_riddle(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        ledger = Ledger.at(server.url, Keys())
        ledger.connection.config_set("maxmemory", "1")
        with pytest.raises(RedisUnavailable, match="maxmemory"):
            ledger.run(calls.submit(ChatRequest(query="q"), model="m"))
        ledger.close()


def test_every_key_is_on_the_page_of_keys_with_its_lifetime(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    for key, conversation_id in (("done", "c"), ("running", None), ("queued", None)):
        worker.submit(ChatRequest(query="q", conversation_id=conversation_id), idempotency_key=key)
    with pytest.raises(IdempotencyConflict):
        worker.submit(ChatRequest(query="another"), idempotency_key="done")
    done = worker.claim()
    assert done is not None
    worker.answer(done, "a")
    running = worker.claim()
    assert running is not None
    worker.start(running)
    ledger.run(calls.renew("worker-1", [(running.request_id, 1)], 5.0, about={"slots": 1}))
    worker.submit(ChatRequest(query="q", deadline_seconds=60, tenant="other"))
    ledger.connection.hset(keys.tenants, "other", '{"weight": 2}')
    bounds = QueueBounds(max_queued=1)
    with pytest.raises(QueueFull):
        ledger.run(calls.submit(ChatRequest(query="refused"), model="chatglm-6b", bounds=bounds))

    page = keys_page.__doc__ or ""
    documented = {
        re.sub(r"<\w+>|[RC]$", "*", name).replace("{ns}:", ""): kind
        for name, kind in re.findall(r"^(\{ns\}:\S+)\s+(hash|stream|zset|set|string|list) ", page, re.M)
    }
    # Replies to commands are not the ledger's, and it only counts dead letters: no script makes one yet.
    del documented["replies:*"], documented["dead"]
    endless = {
        keys.queue("chatglm-6b"),
        keys.queued("chatglm-6b", 5, "default"),
        keys.queued("chatglm-6b", 5, "other"),
        keys.shares("chatglm-6b"),
        keys.load("chatglm-6b"),
        keys.usage("chatglm-6b", "default"),
        keys.usage("chatglm-6b", "other"),
        keys.deadlines,
        keys.tenants,
        keys.leases,
        keys.running("worker-1"),
        keys.workers,
        keys.conversations,
        f"{keys.prefix}rejected:chatglm-6b",
    }
    found = set()
    for key in ledger.connection.scan_iter(f"{keys.prefix}*"):
        [(pattern, kind)] = [
            item
            for item in documented.items()
            if re.fullmatch(
                re.escape(item[0]).replace(r"\*", r"[^:|]+(:[^:|]+)?"), key.removeprefix(keys.prefix)
            )
        ]
        found.add(pattern)
        assert ledger.connection.type(key) == kind
        lives = key in endless or (done.request_id not in key and re.search("request:|events:", key))
        assert (ledger.connection.ttl(key) == -1) == bool(lives), key
    assert found == set(documented)


def test_many_calls_take_one_round_trip_and_answer_as_one_by_one(ledger: Ledger) -> None:
    ids = [ledger.run(calls.submit(ChatRequest(query=str(n)), model="m")).request_id for n in range(5)]
    ledger.connection.script_flush()

    claims = ledger.run_many([calls.claim("m", "w", 5)] * 7)

    assert [claim.request_id if claim else None for claim in claims] == [*ids, None, None]
    assert ledger.run_many([]) == []


def test_a_call_that_fails_among_others_raises_after_they_were_done(ledger: Ledger) -> None:
    request_id = ledger.run(calls.submit(ChatRequest(query="a"), model="m")).request_id
    wrong = Call("emit", [], lambda codes: codes)

    with pytest.raises(redis.ResponseError):
        ledger.run_many([wrong, calls.claim("m", "w", 5)])

    assert ledger.run(calls.status(request_id)).state == "running"
