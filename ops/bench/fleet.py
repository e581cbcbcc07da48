"""What a second worker brings: the same requests with one worker and with two, each worker and its engine bound to a core of its own.

    python -m ops.bench.fleet --requests 200 --tokens 64

Starts a server and workers of its own with the demo checkpoint. One and two workers take turns, so that both see the same machine. The roof is
half of one worker's time; server and reader share the cores with the workers. Beside each time stands what everybody else took of the cores
meanwhile: rounds in which that was above a tenth of a core are shown and not counted. Exit code 1 above `--limit`, 2 if no round counts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

from ops.bench.deployment import Deployment, deployment
from producer.client import AsyncClient
from producer.contract import ChatRequest, SamplingParams

LIMIT = 0.6
QUIET_CORES = 0.1
"""A round counts if others take no more than this of the machine's cores."""
TICKS = os.sysconf("SC_CLK_TCK")


def start_pinned(running: Deployment, number: int) -> None:
    """Start a worker on this core. It has not begun to spawn its engine yet, which inherits that."""
    name = f"worker{number}"
    running.start_worker(name)
    os.sched_setaffinity(running.workers[name].pid, {sorted(os.sched_getaffinity(0))[number]})
    running.wait_until_ready(name)


def busy_seconds() -> tuple[float, float]:
    """(CPU seconds of the whole machine, taken away by its host included; those of this process and everything below it)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])

    def is_ours(pid: int) -> bool:
        while pid not in (0, os.getpid()):
            pid = parents.get(pid, 0)
        return pid != 0

    ours = sum(ticks[pid] for pid in ticks if is_ours(pid))
    return (user + nice + system + irq + softirq + steal) / TICKS, ours / TICKS


async def answer_all(
    running: Deployment, num_requests: int, num_tokens: int
) -> tuple[float, float, list[int]]:
    """(seconds from the first submit to the last end, cores that others took meanwhile, answers of each worker)."""
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
        all_before, ours_before = busy_seconds()
        begin = time.perf_counter()
        answered_by = await asyncio.gather(*(answer(number) for number in range(num_requests)))
        seconds = time.perf_counter() - begin
        all_after, ours_after = busy_seconds()
    others = (all_after - all_before) - (ours_after - ours_before)
    return seconds, max(others, 0) / seconds, sorted(answered_by.count(worker) for worker in set(answered_by))


def main(num_requests: int, num_tokens: int, num_slots: int, num_rounds: int, limit: float) -> int:
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two workers need two cores")
    took: dict[int, list[float]] = {1: [], 2: []}
    loads: list[float] = []
    with deployment(0, "--device", "cpu", "--threads", "1", "--slots", str(num_slots)) as running:
        start_pinned(running, 0)
        for _ in range(num_rounds):
            for num_workers, times in took.items():
                if num_workers == 2:
                    start_pinned(running, 1)
                seconds, others, shares = asyncio.run(answer_all(running, num_requests, num_tokens))
                times.append(seconds)
                loads.append(others)
                rate = num_requests * num_tokens / seconds
                print(
                    f"{num_workers} worker(s): {seconds:6.2f} s, {rate:6.0f} tokens/s, answers {shares}, others took {others:.2f} cores",
                    flush=True,
                )
            running.workers["worker1"].terminate()
            running.workers.pop("worker1").wait(60)
    ratios = [two / one for one, two in zip(took[1], took[2], strict=True)]
    quiet = [
        ratio for number, ratio in enumerate(ratios) if max(loads[2 * number : 2 * number + 2]) <= QUIET_CORES
    ]
    print(
        f"{num_requests} requests of {num_tokens} tokens, {num_slots} slots each; two workers' share of one's time by round: ",
        end="",
    )
    print(", ".join(f"{ratio:.2f}{'' if ratio in quiet else ' (not quiet)'}" for ratio in ratios))
    if not quiet:
        print("no round counts: others were at work in each")
        return 2
    ratio = statistics.median(quiet)
    print(f"median of the quiet rounds: {ratio:.2f} (roof 0.50, limit {limit:.2f})")
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
