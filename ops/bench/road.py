"""The whole road on this machine: many streams through the real queue, measured at the reader.

    python -m ops.bench.road --streams 200 --tokens 64

Needs a running deployment (`glmq up`). Prints tokens/s, the wait for the first token, the gaps between token events, and what the
Celery process and Redis cost in CPU. Beside it stands the roof: what the engine alone could have done is in its own benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from producer.client import AsyncClient
from producer.contract import ChatRequest, Finished, SamplingParams, Token


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def read(client: AsyncClient, request: ChatRequest) -> tuple[float, list[float], Finished]:
    """(seconds from submit to the first token, seconds between token events, the end)."""
    begin = time.perf_counter()
    submission = await client.submit(request)
    first, last, gaps = 0.0, 0.0, []
    async for event in submission.stream():
        now = time.perf_counter()
        if isinstance(event, Token):
            if first:
                gaps.append(now - last)
            else:
                first = now - begin
            last = now
        elif isinstance(event, Finished):
            return first, gaps, event
    raise AssertionError("a stream ends with Finished")


def quantiles(values: list[float]) -> str:
    """p50 and p99 in ms."""
    if len(values) < 2:
        return f"{values[0] * 1e3:.1f} ms" if values else "none"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return f"p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms"


async def main(num_streams: int, num_tokens: int, num_idle: int) -> None:
    async with AsyncClient() as client:
        (worker,) = (await client.overview()).workers
        info = await client.ledger.connection.info("server")

        def request(number: int, tokens: int) -> ChatRequest:
            sampling = SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens, seed=number)
            return ChatRequest(query=f"第{number}个问题：怎样才能睡得更好？", sampling=sampling)

        await read(client, request(0, 4))
        idle = []
        for number in range(num_idle):
            idle.append((await read(client, request(number, 2)))[0])
            await asyncio.sleep(0.05)
        print(f"first token, idle system, {num_idle} times: {quantiles(idle)}")

        pids = {"celery process": int(worker.about["pid"]), "redis": int(info["process_id"])}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        begin = time.perf_counter()
        answers = await asyncio.gather(*(read(client, request(n, num_tokens)) for n in range(num_streams)))
        took = time.perf_counter() - begin
        made = sum(finished.usage.completion_tokens for _, _, finished in answers)
        print(
            f"{num_streams} streams of {num_tokens} tokens on {worker.about['slots']} slots: {made / took:.0f} tokens/s in {took:.2f} s"
        )
        print(
            f"first token under this load (waiting for a slot included): {quantiles([first for first, _, _ in answers])}"
        )
        print(f"between token events: {quantiles([gap for _, gaps, _ in answers for gap in gaps])}")
        for name, pid in pids.items():
            used = cpu_seconds(pid) - before[name]
            print(f"{name}: {used / took:.0%} of one core, {used / made * 1e6:.0f} µs a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=200, dest="num_streams")
    parser.add_argument("--tokens", type=int, default=64, dest="num_tokens")
    parser.add_argument("--idle", type=int, default=30, dest="num_idle")
    asyncio.run(main(**vars(parser.parse_args())))
