"""Who goes first, measured on a real worker with the demo checkpoint: shares of tokens between tenants, and what priority and age are worth.

    python -m ops.bench.fairness

Starts a server and one worker of its own. Everything is read from the ledger, on Redis' clock. Beside each figure stands the bound that the project
has set itself; exit code 1 if one is broken.

- Shares count prompt and answer tokens of the requests that ended while both tenants had something in the queue.
- Tenants' requests differ in length, and end by a `min_new_tokens` that the estimate at the door does not know: it takes all for equally long.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

from ops.bench.deployment import deployment
from producer.client import Client
from producer.contract import ChatRequest, Finished, SamplingParams, UnknownRequest
from producer.contract.tenants import TenantSettings
from producer.ledger import calls
from producer.tenants import Tenants

SLOTS = 8
AGEING_SECONDS = 3.0
"""So short that ageing plays its part in what is measured of priority 0."""


@dataclass(frozen=True)
class Answered:
    """One request. Seconds on Redis' clock."""

    tenant: str
    priority: int
    tokens: int
    submitted: float
    claimed: float
    ended: float


def request_of(tenant: str, draw: random.Random, longest: int, priority: int = 5) -> ChatRequest:
    tokens = draw.randint(longest // 4, longest)
    sampling = SamplingParams(min_new_tokens=tokens, max_new_tokens=tokens + 1, temperature=0.0)
    return ChatRequest(
        query=f"怎样才能睡得更好？（{tokens}）", tenant=tenant, priority=priority, sampling=sampling
    )


def look(client: Client, request_id: str) -> Answered | None:
    """What became of it; None while it is not answered."""
    status = client.status(request_id)
    if status.ended_at is None or status.claimed_at is None:
        return None
    [followed] = client.ledger.run(calls.follow("", [(request_id, "0-0")]))
    assert followed is not None
    ended = calls.events(followed.entries)[-1]
    assert isinstance(ended, Finished), ended
    tokens = ended.usage.prompt_tokens + ended.usage.completion_tokens
    return Answered(
        status.tenant, status.priority, tokens, status.submitted_at, status.claimed_at, status.ended_at
    )


def wait_for(client: Client, ids: list[str]) -> list[Answered]:
    """All of these, answered."""
    answered = []
    for request_id in ids:
        while (found := look(client, request_id)) is None:
            time.sleep(0.05)
        answered.append(found)
    return answered


def share(client: Client, submissions: list[ChatRequest], of: str) -> tuple[float, int, float]:
    """(share of `of` in the tokens, tokens, seconds) of the time in which every tenant had something in the queue."""
    ids = [client.submit(request).request_id for request in submissions]
    answered = wait_for(client, ids)
    last_claims: dict[str, float] = {}
    for each in answered:
        last_claims[each.tenant] = max(last_claims.get(each.tenant, 0), each.claimed)
    end, begin = min(last_claims.values()), min(each.claimed for each in answered)
    tokens: Counter[str] = Counter()
    for each in answered:
        if each.ended <= end:
            tokens[each.tenant] += each.tokens
    return tokens[of] / tokens.total(), tokens.total(), end - begin


def measure_arrivals(client: Client) -> bool:
    """Two tenants of equal weight, one of which sends nine times as much as the other, and longer requests."""
    draw = random.Random(1)
    submissions = [request_of("many", draw, 64) for _ in range(540)] + [
        request_of("few", draw, 32) for _ in range(60)
    ]
    draw.shuffle(submissions)
    part, tokens, seconds = share(client, submissions, "few")
    return report(
        f"equal weights, 10 % of the arrivals ({tokens} tokens in {seconds:.1f} s)",
        f"{part:.1%} of the tokens",
        "at least 45 %",
        is_kept=part >= 0.45,
    )


def measure_weights(client: Client) -> bool:
    Tenants(client).set("three", TenantSettings(weight=3))
    draw = random.Random(2)
    submissions = [request_of(tenant, draw, 48) for _ in range(200) for tenant in ("three", "one")]
    part, tokens, seconds = share(client, submissions, "three")
    return report(
        f"weights 3:1 ({tokens} tokens in {seconds:.1f} s)",
        f"{part:.1%} of the tokens",
        "75 % ± 5",
        is_kept=abs(part - 0.75) <= 0.05,
    )


def measure_urgent(client: Client) -> bool:
    """Priority 0, one at a time, while the queue is full of 5s, some of them aged."""
    draw = random.Random(3)
    ids = [client.submit(request_of("batch", draw, 64)).request_id for _ in range(400)]
    time.sleep(AGEING_SECONDS)
    urgent = []
    for _ in range(15):
        submission = client.submit(request_of("person", draw, 16, priority=0))
        urgent.append(submission.request_id)
        submission.result()
    assert look(client, ids[-1]) is None, "the queue was empty before the last urgent one came"
    waits = [each.claimed - each.submitted for each in wait_for(client, urgent)]
    for request_id in ids:
        client.cancel(request_id)
    ran = []
    for request_id in ids:
        status = client.status(request_id)
        if status.state == "done" and status.claimed_at and status.ended_at:
            ran.append(status.ended_at - status.claimed_at)
    return report(
        f"priority 0 behind 5s ({len(waits)} times; the longest answer ran {max(ran):.2f} s)",
        f"waits {max(waits):.2f} s at most",
        "one running answer",
        is_kept=max(waits) <= max(ran),
    )


def measure_flood(client: Client) -> bool:
    """Priority 9 while more priority 0 comes than the worker can answer."""
    draw = random.Random(4)
    flood: list[str] = []
    is_over = threading.Event()

    def keep_flooding() -> None:
        with Client(client.settings) as own:
            while not is_over.is_set():
                if sum(own.ledger.run(calls.backlog(own.model)).num_queued) < 4 * SLOTS:
                    flood.extend(
                        own.submit(request_of("impatient", draw, 32, priority=0)).request_id
                        for _ in range(SLOTS)
                    )
                is_over.wait(0.02)

    thread = threading.Thread(target=keep_flooding)
    thread.start()
    try:
        while client.ledger.run(calls.backlog(client.model)).num_queued[0] < 2 * SLOTS:
            time.sleep(0.01)
        lowest = [client.submit(request_of("patient", draw, 16, priority=9)).request_id for _ in range(5)]
        answered = wait_for(client, lowest)
        queued = client.ledger.run(calls.backlog(client.model)).num_queued
    finally:
        is_over.set()
        thread.join()
    for request_id in flood:
        client.cancel(request_id)
    passed = 0
    for request_id in flood:
        try:
            claimed_at = client.status(request_id).claimed_at
            passed += claimed_at is not None and claimed_at > answered[0].submitted
        except UnknownRequest:
            continue
    claims = ", ".join(f"{each.claimed - each.submitted:.1f}" for each in answered)
    return report(
        f"priority 9 under a flood of 0 (ageing {AGEING_SECONDS:g} s; {passed} passed it, {queued[0]} waited at the end)",
        f"begun after {claims} s",
        "all begun",
        is_kept=queued[0] > 0,
    )


def report(what: str, found: str, bound: str, *, is_kept: bool) -> bool:
    print(f"{what}: {found} (bound: {bound}){'' if is_kept else '  BROKEN'}", flush=True)
    return is_kept


def main() -> int:
    os.environ["GLMQ_AGEING_SECONDS"] = str(AGEING_SECONDS)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one worker of {SLOTS} slots")
    with (
        deployment(1, "--device", "cpu", "--threads", "1", "--slots", str(SLOTS)) as running,
        Client(running.settings) as client,
    ):
        client.chat("你好").result()
        kept = [
            measure(client) for measure in (measure_arrivals, measure_weights, measure_urgent, measure_flood)
        ]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
