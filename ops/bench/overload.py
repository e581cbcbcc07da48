"""Five times as many submissions as one worker can answer, for minutes: what is refused, what is promised, and what becomes of what is accepted.

    python -m ops.bench.overload --minutes 5

Starts a server and one worker of its own with the demo checkpoint, measures what the worker answers in a second, and then lets five times as many
clients a second arrive. A client submits one request with a deadline. If it is refused it comes back after `retry_after`, as often as it must; it leaves
for good when it is told a longer time than its deadline, or when it has waited longer than twice that. Exit code 1 if a bound is broken:

- Memory of Redis, worker and engine (resident): the last third of the time needs no more than 1.15 times the middle third.
- Every accepted request is answered within its deadline or fails with `deadline_exceeded`.
- `retry_after` is within a factor 2 of the truth at the median.

The truth about a refusal is the time until there was room for this client: until those had been let in who were refused before it, were promised
a place, and had not left, and then one more. It comes from the order of events alone, not from when the client came back; a promise that is too long
would show as room that nobody takes, so the queue's mean length stands beside it. What a client met who did as it was told is the second figure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ops.bench.deployment import Deployment, deployment
from producer.client import AsyncClient
from producer.contract import (
    ChatRequest,
    DeadlineUnmeetable,
    Failed,
    Finished,
    QueueFull,
    SamplingParams,
)
from producer.contract.tenants import QueueBounds
from producer.ledger import calls

SLOTS = 16
TIMES_CAPACITY = 5
RETENTION_SECONDS = 20
MAX_GROWTH = 1.15
LOOK_SECONDS = 5.0
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Visit:
    """One client, from its first submission to being accepted or leaving. Seconds on the driver's clock."""

    refused: list[tuple[float, float]] = field(default_factory=list)
    """(when, retry_after) each time."""
    accepted: float | None = None
    left: float | None = None


@dataclass
class Tally:
    """Everything that happened."""

    visits: list[Visit] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    late: list[float] = field(default_factory=list)
    """By how many seconds an accepted request was answered after its deadline."""
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    """(seconds, MiB of Redis, MiB of worker and engine)."""
    queued: list[int] = field(default_factory=list)
    num_submissions: int = 0


def request_of(draw: random.Random, number: int, deadline: float | None) -> ChatRequest:
    tokens = draw.randint(8, 48)
    sampling = SamplingParams(min_new_tokens=tokens, max_new_tokens=tokens + 1, temperature=0.0)
    return ChatRequest(
        query=f"第{number}个问题：怎样才能睡得更好？", sampling=sampling, deadline_seconds=deadline
    )


async def measure_capacity(running: Deployment, seconds: float) -> float:
    """Answers a second with every slot in use."""
    draw = random.Random(0)
    async with AsyncClient(running.settings) as client:
        begin = time.monotonic()
        ends: list[float] = []

        async def keep_asking() -> None:
            while time.monotonic() - begin < seconds:
                submission = await client.submit(request_of(draw, len(ends), None))
                await submission.result()
                ends.append(time.monotonic())

        await asyncio.gather(*(keep_asking() for _ in range(2 * SLOTS)))
        counted = [end for end in ends if begin + 2 < end < begin + seconds]
        return len(counted) / (seconds - 2)


async def visit(client: AsyncClient, request: ChatRequest, tally: Tally) -> None:
    """One client's life."""
    deadline = request.deadline_seconds or 0
    this = Visit()
    tally.visits.append(this)
    arrived = time.monotonic()
    while True:
        tally.num_submissions += 1
        try:
            submission = await client.submit(request)
        except (QueueFull, DeadlineUnmeetable) as error:
            now = time.monotonic()
            tally.outcomes[f"refused: {error.code}"] += 1
            this.refused.append((now, error.retry_after))
            if error.retry_after > deadline or now + error.retry_after > arrived + 2 * deadline:
                this.left = now
                tally.outcomes["left"] += 1
                return
            await asyncio.sleep(error.retry_after)
            continue
        this.accepted = time.monotonic()
        break
    ended = None
    async for event in submission.stream():
        ended = event
    seconds = time.monotonic() - this.accepted
    match ended:
        case Finished():
            tally.outcomes["answered"] += 1
            if seconds > deadline:
                tally.late.append(seconds - deadline)
        case Failed():
            tally.outcomes[f"failed: {ended.code}"] += 1
        case _:
            tally.outcomes["LOST"] += 1


async def watch(running: Deployment, client: AsyncClient, tally: Tally, begin: float) -> None:
    """One line every few seconds."""
    print(
        f"{'s':>5}{'Redis MiB':>11}{'worker MiB':>12}{'queued':>8}{'accepted':>10}{'submissions':>13}{'left':>8}{'retry_after p50':>17}"
    )
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        backlog = await client.ledger.run(calls.backlog(client.model))
        seconds = time.monotonic() - begin
        redis_mib = backlog.memory_used_bytes / 2**20
        worker_mib = sum(map(resident_mib, family(running.workers["worker0"].pid)))
        tally.memory.append((seconds, redis_mib, worker_mib))
        tally.queued.append(sum(backlog.num_queued))
        recent = [
            told
            for each in tally.visits
            for when, told in each.refused
            if when > time.monotonic() - LOOK_SECONDS
        ]
        told = f"{statistics.median(recent):.1f} s" if recent else "-"
        accepted = sum(each.accepted is not None for each in tally.visits)
        print(
            f"{seconds:5.0f}{redis_mib:11.1f}{worker_mib:12.1f}{tally.queued[-1]:8}{accepted:10}{tally.num_submissions:13}{tally.outcomes['left']:8}{told:>17}",
            flush=True,
        )


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, []))
    return found


def resident_mib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20
    except OSError:
        return 0.0


async def overload(running: Deployment, rate: float, seconds: float, deadline: float) -> Tally:
    """Clients arrive at random, `rate` a second on the average; all have ended when it returns."""
    draw = random.Random(1)
    tally = Tally()
    async with AsyncClient(running.settings) as client:
        begin = time.monotonic()
        watching = asyncio.create_task(watch(running, client, tally, begin))
        visiting = set()
        arrival = begin
        number = 0
        while (arrival := arrival + draw.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(arrival - time.monotonic(), 0))
            number += 1
            task = asyncio.create_task(visit(client, request_of(draw, number, deadline), tally))
            visiting.add(task)
            task.add_done_callback(visiting.discard)
        watching.cancel()
        await asyncio.gather(*visiting)
    return tally


def truths(visits: list[Visit]) -> list[tuple[float, float]]:
    """(retry_after, truth) of every refusal whose truth came out: see the module's docstring."""
    acceptances = sorted(each.accepted for each in visits if each.accepted is not None)
    # In the line from its first refusal until it is let in or leaves.
    joined = [
        (each.refused[0][0], each.accepted or each.left)
        for each in visits
        if each.refused and each.refused[0][0] != each.left
    ]
    enters = sorted(when for when, _ in joined)
    leaves = sorted(until for _, until in joined if until is not None)
    found = []
    for each in visits:
        if not each.refused or each.refused[0][0] == each.left:
            # Told a time that it would not wait: nobody kept a place for it.
            continue
        when, told = each.refused[0]
        ahead = bisect_right(enters, when) - 1 - bisect_right(leaves, when)
        index = bisect_right(acceptances, when) + ahead
        if index < len(acceptances):
            found.append((told, acceptances[index] - when))
    return found


def ratio_report(name: str, pairs: list[tuple[float, float]]) -> float:
    """Told over true, at the median; 1 is exact."""
    ratios = sorted(told / max(true, 0.001) for told, true in pairs)
    middle = statistics.median(ratios)
    within = sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios)
    print(
        f"{name}: median ratio {middle:.2f}, {within:.0%} within a factor 2, told {statistics.median(told for told, _ in pairs):.1f} s, "
        f"true {statistics.median(true for _, true in pairs):.1f} s at the median, {len(pairs)} refusals"
    )
    return middle


def growth(samples: list[float]) -> float:
    """The greatest of the last third over the greatest of the middle third."""
    third = len(samples) // 3
    return max(samples[2 * third :]) / max(samples[third : 2 * third])


def main(minutes: float, deadline: float, max_queued: int, capacity_seconds: float) -> int:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one worker of {SLOTS} slots")
    with deployment(1, "--device", "cpu", "--threads", "1", "--slots", str(SLOTS)) as running:
        running.settings = replace(
            running.settings,
            retention_seconds=RETENTION_SECONDS,
            bounds=QueueBounds(max_queued=max_queued, tenant_max_queued=0),
        )
        capacity = asyncio.run(measure_capacity(running, capacity_seconds))
        rate = TIMES_CAPACITY * capacity
        print(
            f"capacity {capacity:.1f} answers/s; {rate:.0f} clients/s for {minutes:g} min, deadline {deadline:g} s, at most {max_queued} queued"
        )
        tally = asyncio.run(overload(running, rate, 60 * minutes, deadline))
    print("\n" + ", ".join(f"{number} {outcome}" for outcome, number in sorted(tally.outcomes.items())))
    checks: list[tuple[str, bool]] = []

    def check(what: str, is_kept: Callable[[], bool]) -> None:
        checks.append((what, is_kept()))

    redis_growth, worker_growth = (growth([each[column] for each in tally.memory]) for column in (1, 2))
    check(
        f"memory of Redis grew {redis_growth:.2f} times (bound {MAX_GROWTH})",
        lambda: redis_growth <= MAX_GROWTH,
    )
    check(
        f"memory of the worker grew {worker_growth:.2f} times (bound {MAX_GROWTH})",
        lambda: worker_growth <= MAX_GROWTH,
    )
    accepted = sum(each.accepted is not None for each in tally.visits)
    ended = tally.outcomes["answered"] + tally.outcomes["failed: deadline_exceeded"]
    check(f"{accepted} accepted, {ended} answered or failed deadline_exceeded", lambda: accepted == ended)
    # The stream's last entry reaches the reader some time after the worker has ended the request.
    check(
        f"{len(tally.late)} answered after their deadline, by {max(tally.late, default=0):.2f} s at most (bound 1.00)",
        lambda: max(tally.late, default=0) <= 1,
    )
    middle = ratio_report("retry_after against the truth", truths(tally.visits))
    check(
        f"retry_after at the median {middle:.2f} times the truth (bound 0.5 to 2)", lambda: 0.5 <= middle <= 2
    )
    met = [
        (told, each.accepted - when)
        for each in tally.visits
        if each.accepted
        for when, told in each.refused[:1]
    ]
    ratio_report("retry_after against what clients met who did as they were told", met)
    first = sum(len(each.refused) == 1 for each in tally.visits if each.accepted and each.refused)
    print(
        f"let in at the first return: {first / max(len(met), 1):.0%}; queue {statistics.fmean(tally.queued):.0f} of {max_queued} on the average"
    )
    for what, is_kept in checks:
        print(f"{'kept  ' if is_kept else 'BROKEN'}  {what}")
    return 0 if all(is_kept for _, is_kept in checks) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--deadline", type=float, default=20.0, help="seconds")
    parser.add_argument("--max-queued", type=int, default=200, help="GLMQ_MAX_QUEUED")
    parser.add_argument("--capacity-seconds", type=float, default=10.0, help="for measuring the capacity")
    options = parser.parse_args()
    sys.exit(main(options.minutes, options.deadline, options.max_queued, options.capacity_seconds))
