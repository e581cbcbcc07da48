"""What a second worker brings: the same requests with one worker and with two, each worker and its engine bound to a core of its own.

    python -m ops.bench.fleet --requests 200 --tokens 64

Starts a server and workers of its own with the demo checkpoint. One and two workers take turns, so that both see the same machine. The roof is
half of one worker's time; server and reader share the cores with the workers, so it is not reached. Exit code 1 above `--limit`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time

from ops.bench.deployment import Deployment, deployment
from producer.client import AsyncClient
from producer.contract import ChatRequest, SamplingParams

LIMIT = 0.6


def start_pinned(running: Deployment, number: int) -> None:
    """Start a worker on this core. It has not begun to spawn its engine yet, which inherits that."""
    name = f"worker{number}"
    running.start_worker(name)
    os.sched_setaffinity(running.workers[name].pid, {sorted(os.sched_getaffinity(0))[number]})
    running.wait_until_ready(name)


async def answer_all(running: Deployment, num_requests: int, num_tokens: int) -> tuple[float, list[int]]:
    """(seconds from the first submit to the last end, answers of each worker)."""
    sampling = SamplingParams(max_new_tokens=num_tokens, min_new_tokens=num_tokens, temperature=0.0)
    async with AsyncClient(running.settings) as client:

        async def answer(number: int) -> str:
            submission = await client.submit(
                ChatRequest(query=f"第{number}个问题：怎样才能睡得更好？", sampling=sampling)
            )
            workers = [event.worker async for event in submission.stream() if event.type == "started"]
            return workers[-1]

        # The first requests of a process meet cold caches.
        await asyncio.gather(*(answer(-number) for number in range(1, 33)))
        begin = time.perf_counter()
        answered_by = await asyncio.gather(*(answer(number) for number in range(num_requests)))
        seconds = time.perf_counter() - begin
    return seconds, sorted(answered_by.count(worker) for worker in set(answered_by))


def main(num_requests: int, num_tokens: int, num_slots: int, num_rounds: int, limit: float) -> int:
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two workers need two cores")
    took: dict[int, list[float]] = {1: [], 2: []}
    with deployment(0, "--device", "cpu", "--threads", "1", "--slots", str(num_slots)) as running:
        start_pinned(running, 0)
        for _ in range(num_rounds):
            for num_workers, times in took.items():
                if num_workers == 2:
                    start_pinned(running, 1)
                seconds, shares = asyncio.run(answer_all(running, num_requests, num_tokens))
                times.append(seconds)
                rate = num_requests * num_tokens / seconds
                print(
                    f"{num_workers} worker(s): {seconds:6.2f} s, {rate:6.0f} tokens/s, answers {shares}",
                    flush=True,
                )
            running.workers["worker1"].terminate()
            running.workers.pop("worker1").wait(60)
    ratios = [two / one for one, two in zip(took[1], took[2], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{num_requests} requests of {num_tokens} tokens, {num_slots} slots each: two workers take {ratio:.2f} of one's time "
        f"(rounds {', '.join(f'{each:.2f}' for each in ratios)}; roof 0.50, limit {limit:.2f})"
    )
    return int(ratio > limit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200, dest="num_requests")
    parser.add_argument("--tokens", type=int, default=64, dest="num_tokens")
    parser.add_argument("--slots", type=int, default=16, dest="num_slots", help="of each worker")
    parser.add_argument("--rounds", type=int, default=3, dest="num_rounds")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of one worker's time")
    sys.exit(main(**vars(parser.parse_args())))
