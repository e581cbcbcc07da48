"""Measures what the queue costs: submit in the caller, claim, the fenced emit of 256 requests, and 256 streams at 50 tokens/s.

    python -m ops.bench.ledger

Uses REDIS_URL, else starts an embedded server with an append-only file, as in production. Beside each figure: the limit that
the project has set itself, and what the same server needs for a PING, the floor of any call.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from producer.client import AsyncClient, Client
from producer.contract import ChatRequest, Finished, NewTokens, Started, Token
from producer.contract.tenants import QueueBounds
from producer.embedded import EmbeddedServer
from producer.ledger import Call, Claim, Emission, Ledger, Submitted, calls
from producer.settings import Settings

STREAMS = 256
TOKENS_PER_SECOND = 50
SECONDS = 5
TENANTS = 1000
QUEUED = 100_000


def timed(
    ledger: Ledger, name: str, call: Callable[[], object], *, times: int, limit_ms: float | None
) -> None:
    """p50 and p99 of a call, and the CPU time that it costs its caller (p50) and the server (mean); in ms.

    The CPU times together are what it would take on a machine with nothing else to do.
    """
    for _ in range(min(20, times)):
        call()
    spent, cpu = [], []
    server_before = server_cpu_seconds(ledger)
    for _ in range(times):
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        call()
        spent.append((time.perf_counter() - begin) * 1e3)
        cpu.append((time.thread_time() - cpu_begin) * 1e3)
    server = (server_cpu_seconds(ledger) - server_before) * 1e3 / times
    cuts = statistics.quantiles(spent, n=100)
    limit = "" if limit_ms is None else f"{limit_ms:g}"
    row(name, f"{cuts[49]:.3f}", f"{cuts[98]:.3f}", f"{statistics.median(cpu):.3f}", f"{server:.3f}", limit)


def server_cpu_seconds(ledger: Ledger) -> float:
    info = ledger.connection.info("cpu")  # type: ignore[no-untyped-call]
    return float(info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"])


def row(*cells: str) -> None:
    print(f"{cells[0]:<46}" + "".join(f"{cell:>12}" for cell in cells[1:]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = None if os.environ.get("REDIS_URL") else EmbeddedServer.start(Path(folder))
        url = os.environ.get("REDIS_URL") or (server.url if server else "")
        settings = Settings(redis_url=url, namespace=f"bench-{uuid.uuid4().hex[:8]}", state_dir=Path(folder))
        ledger = Ledger.at(url, settings.keys)
        info = ledger.connection.info("server")  # type: ignore[no-untyped-call]
        version = info.get("valkey_version", info["redis_version"])
        print(
            f"server {info.get('server_name', 'redis')} {version}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        )
        row("ms", "p50", "p99", "CPU caller", "CPU server", "limit p50")
        try:
            measure_calls(settings, ledger)
            measure_streams(settings, ledger)
            measure_crowd(ledger)
        finally:
            for key in ledger.connection.scan_iter(f"*{settings.namespace}*"):
                ledger.connection.delete(key)
            ledger.close()
            if server is not None:
                server.stop()


def measure_calls(settings: Settings, ledger: Ledger) -> None:
    timed(ledger, "PING", ledger.connection.ping, times=1000, limit_ms=None)
    request = ChatRequest(query="新冠肺炎怎么预防")
    with Client(settings) as client:
        timed(ledger, "submit: ledger and ticket", lambda: client.submit(request), times=1000, limit_ms=1.0)
    timed(
        ledger,
        "submit: ledger alone",
        lambda: ledger.run(calls.submit(request, model=settings.model)),
        times=1000,
        limit_ms=None,
    )
    claims: list[Claim | None] = []
    timed(
        ledger,
        "claim",
        lambda: claims.append(ledger.run(calls.claim(settings.model, "bench", 60.0))),
        times=1000,
        limit_ms=0.5,
    )
    running = [claim for claim in claims if claim][:STREAMS]
    started = Started(attempt=1, worker="bench")
    ledger.run(calls.emit([Emission(claim.request_id, 1, started) for claim in running]))
    ledger.run(calls.follow("nobody", [(claim.request_id, "0-0") for claim in running]))
    index = 0

    def emit() -> None:
        nonlocal index
        index += 1
        tokens = NewTokens(index, [5000 + index], ["词"])
        codes = ledger.run(calls.emit([Emission(claim.request_id, 1, tokens) for claim in running]))
        assert set(codes) == {1}

    timed(ledger, f"emit of {STREAMS} requests, pushed to a reader", emit, times=300, limit_ms=4.0)
    held = [(claim.request_id, 1) for claim in running]
    timed(
        ledger,
        f"renew {STREAMS} leases",
        lambda: ledger.run(calls.renew("bench", held, 60.0)),
        times=300,
        limit_ms=None,
    )
    finished = Finished(reason="stop", text="")
    for claim in claims:
        if claim:
            ledger.run(calls.finish(claim.request_id, 1, finished))


def measure_streams(settings: Settings, ledger: Ledger) -> None:
    """256 answers at 50 tokens/s, flushed every 20 ms, read by one AsyncClient; latency from flush to reader."""
    for _ in range(10_000):
        if ledger.run(calls.claim(settings.model, "bench", 60.0)) is None:
            break
    latencies: list[float] = []
    flushed: list[float] = []
    num_tokens = SECONDS * TOKENS_PER_SECOND

    async def read(client: AsyncClient, request_id: str) -> str:
        parts = []
        async for event in client.stream(request_id):
            if isinstance(event, Token):
                latencies.append((time.perf_counter() - flushed[event.index - 1]) * 1e3)
                parts.append(event.text)
        return "".join(parts)

    def write() -> None:
        running = [
            claim for _ in range(STREAMS) if (claim := ledger.run(calls.claim(settings.model, "bench", 60.0)))
        ]
        started = Started(attempt=1, worker="bench")
        ledger.run(calls.emit([Emission(claim.request_id, 1, started) for claim in running]))
        begin = time.perf_counter()
        for index in range(1, num_tokens + 1):
            time.sleep(max(0.0, begin + index / TOKENS_PER_SECOND - time.perf_counter()))
            tokens = NewTokens(index, [index], ["词"])
            flushed.append(time.perf_counter())
            ledger.run(calls.emit([Emission(claim.request_id, 1, tokens) for claim in running]))
        for claim in running:
            ledger.run(calls.finish(claim.request_id, 1, Finished(reason="stop", text="词" * num_tokens)))

    async def follow_all() -> tuple[float, float]:
        async with AsyncClient(settings) as client:
            ids = [(await client.chat("q")).request_id for _ in range(STREAMS)]
            reading = [asyncio.create_task(read(client, request_id)) for request_id in ids]
            await asyncio.sleep(0.5)
            thread = threading.Thread(target=write)
            before = resource.getrusage(resource.RUSAGE_SELF)
            begin = time.perf_counter()
            thread.start()
            texts = await asyncio.gather(*reading)
            spent = time.perf_counter() - begin
            after = resource.getrusage(resource.RUSAGE_SELF)
            thread.join()
            assert set(texts) == {"词" * num_tokens}
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return spent, cpu

    spent, cpu = asyncio.run(follow_all())
    cuts = statistics.quantiles(latencies, n=100)
    name = f"{STREAMS} streams at {TOKENS_PER_SECOND} tokens/s, flush to reader"
    row(name, f"{cuts[49]:.3f}", f"{cuts[98]:.3f}")
    print(
        f"\n{len(latencies) / spent:,.0f} tokens/s read, all {STREAMS} answers whole; "
        f"writer and reader together used {cpu / spent:.0%} of one core"
    )


def measure_crowd(ledger: Ledger) -> None:
    """Submit and claim with as many tenants and as much in the queue as anybody will have."""
    model, bounds = "crowd", QueueBounds(0, 0, 0, 0)
    requests = [
        ChatRequest(query="新冠肺炎怎么预防", tenant=f"t{number}", priority=priority)
        for number in range(TENANTS)
        for priority in (4, 5)
    ]

    def submissions() -> Iterator[Call[Submitted]]:
        while True:
            for request in requests:
                yield calls.submit(request, model=model, bounds=bounds)

    endless = submissions()
    for _ in range(QUEUED // 500):
        ledger.run_many(list(itertools.islice(endless, 500)))
    row(f"\nwith {QUEUED:,} queued by {TENANTS:,} tenants")
    timed(ledger, "submit: ledger alone", lambda: ledger.run(next(endless)), times=1000, limit_ms=1.0)
    timed(ledger, "claim", lambda: ledger.run(calls.claim(model, "bench", 60.0)), times=1000, limit_ms=0.5)


if __name__ == "__main__":
    main()
