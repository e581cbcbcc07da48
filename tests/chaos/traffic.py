"""What those who ask do, and what happens to what they send: readers come and go, tickets vanish or come twice, everybody cancels,
the queue is full, and a request kills whoever answers it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from producer.celery_settings import broker_key_prefix
from producer.contract import ChatRequest, Failed, Finished, QueueFull, SamplingParams
from producer.contract.tenants import QueueBounds
from tests.chaos.battle import Battle, Suite
from tests.chaos.deployment import OPTIONS
from tests.chaos.poisoned_engine import POISONS
from tests.chaos.readers import Stream
from tests.chaos.strikes import Row, Strike

UNDISTURBED_SECONDS: Final = 1.0
"""No reader waits longer for its next token when nothing happens to its own request."""


async def readers_leave(suite: Suite) -> list[Row]:
    """Readers go away after a few events and come back at the token that they have, or at an earlier one; others are slow."""
    async with suite.battle(concurrency=12, habits=("leaves", "leaves", "slow", "task", "thread")) as battle:
        strike = battle.strike(
            "readers leave, come back, or are slow", victims=None, bound=UNDISTURBED_SECONDS
        )
        strike.is_lasting = True
        for _ in range(suite.times(10)):
            await asyncio.sleep(2.0)
        strike.until = time.monotonic()
        found = await battle.verdicts()
        counts = {
            habit: sum(stream.habit == habit for stream in battle.readers.streams)
            for habit in ("leaves", "slow", "task", "thread")
        }
        found[0].num_tries = counts["leaves"] + counts["slow"]
        found[0].notes.append(f"streams by habit: {counts}")
        return found


async def tickets(suite: Suite) -> list[Row]:
    """Half of the tickets vanish from the broker's list, the others come three times."""
    async with suite.battle(concurrency=12, options=(*OPTIONS, "--slots", "3")) as battle:
        strike = battle.strike("tickets dropped and tripled", victims=None, bound=UNDISTURBED_SECONDS)
        strike.is_lasting = True
        keys, model = battle.deployment.settings.keys, battle.deployment.settings.model
        name = broker_key_prefix(battle.deployment.settings.namespace) + keys.celery_queue(model)
        num_dropped = num_doubled = 0
        with battle.deployment.connection() as connection:
            end = time.monotonic() + 15 * suite.scale
            while time.monotonic() < end or not (num_dropped and num_doubled):
                dropped, doubled = _raid(connection, name, battle)
                num_dropped, num_doubled = num_dropped + dropped, num_doubled + doubled
                await asyncio.sleep(0.02)
        strike.until = time.monotonic()
        found = await battle.verdicts()
        found[0].num_tries = num_dropped + num_doubled
        found[0].notes.append(f"{num_dropped} tickets were dropped, {num_doubled} came three times")
        return found


def _raid(connection: Any, name: str, battle: Battle) -> tuple[int, int]:
    """Takes what is on the list: each ticket is thrown away, or put back three times."""
    dropped = doubled = 0
    while (ticket := connection.rpop(name)) is not None and dropped + doubled < 100:
        if battle.rng.random() < 0.5:
            dropped += 1
        else:
            connection.lpush(name, ticket, ticket, ticket)
            doubled += 1
            break
    return dropped, doubled


async def cancel_storm(suite: Suite) -> list[Row]:
    """Half of all requests, running and queued, are cancelled at the same moment."""
    async with suite.battle(concurrency=4, options=(*OPTIONS, "--slots", "8")) as battle:
        for _ in range(suite.times(3)):
            streams = [await battle.load.submit(battle.workload.next()) for _ in range(48)]
            await battle.until_live(number=6)
            chosen = [
                stream for stream in streams if not stream.is_over.is_set() and battle.rng.random() < 0.5
            ]
            strike = battle.strike("cancel storm", victims=None, bound=UNDISTURBED_SECONDS)
            strike.streams = chosen
            for stream in chosen:
                stream.may_be_cancelled = True
            await asyncio.gather(*(battle.readers.client.cancel(stream.request_id) for stream in chosen))
            await asyncio.gather(*(_until_over(stream, 10.0) for stream in chosen))
            strike.until = time.monotonic()
            late = max((_seconds_to_end(stream, strike) for stream in chosen), default=0.0)
            battle.say(f"{len(chosen)} of {len(streams)} cancelled, the last one ended after {late:.2f} s")
        found = await battle.verdicts()
        for strike in battle.strikes:
            found[0].gaps += [(_seconds_to_end(stream, strike), strike.bound) for stream in strike.streams]
        num_cut = sum(
            isinstance(stream.end, Finished) and stream.end.reason == "cancelled"
            for stream in battle.readers.streams
        )
        found[0].notes.append(f"{num_cut} answers were cut by it")
        return found


async def _until_over(stream: Stream, seconds: float) -> None:
    try:
        await asyncio.wait_for(stream.is_over.wait(), seconds)
    except TimeoutError:
        return


def _seconds_to_end(stream: Stream, strike: Strike) -> float:
    """From the storm to the stream's end."""
    return (stream.heard[-1].at if stream.end else time.monotonic()) - strike.at


async def queue_full(suite: Suite) -> list[Row]:
    """Four times as many requests at once as the queue takes: what is refused is told when to come again, and what is accepted is
    answered although a worker dies in between."""
    max_queued = 12
    bounds = QueueBounds(max_queued=max_queued)
    async with suite.battle(concurrency=0, options=(*OPTIONS, "--slots", "3"), bounds=bounds) as battle:
        event = "queue at its bound, a worker killed"
        refusals: list[float] = []
        for _ in range(suite.times(2)):
            asked = [asyncio.create_task(_insist(battle, refusals)) for _ in range(4 * max_queued)]
            await battle.until_live(number=3)
            worker = battle.rng.choice(battle.workers)
            battle.strike(event, victims=[worker], bound=10.0)
            worker.process.kill()
            worker.process.wait()
            renewed = asyncio.create_task(battle.deployment.renew(worker))
            longest = 0
            while not all(task.done() for task in asked):
                overview = await battle.readers.client.overview()
                longest = max(longest, overview.num_queued)
                await asyncio.sleep(0.05)
            await asyncio.gather(*asked, renewed)
            # What a dead worker had comes back on top of what is queued.
            if longest > max_queued + 6:
                return [Row(event, 0.0, problems=[f"{longest} were queued, the bound is {max_queued}"])]
        found = await battle.verdicts()
        if not refusals:
            found[0].problems.append("nothing was refused: the queue was never full")
        else:
            found[0].notes.append(
                f"{len(refusals)} refusals, told to come again in {min(refusals):.2f} to {max(refusals):.2f} s"
            )
        return found


async def poison(suite: Suite) -> list[Row]:
    """Requests that kill whoever answers them, among others that do not: they become dead letters, and the others are answered."""
    async with suite.battle(module="tests.chaos.poisoned_worker") as battle:
        # It may take both engines down before anybody can know who did it, and at the second time those beside it are under suspicion.
        bound = 2 * max(seconds for worker in battle.workers for seconds in worker.restart_seconds) + 2.0
        for _ in range(suite.times(1)):
            for seed, poison in POISONS.items():
                await battle.until_live(number=4)
                strike = battle.strike("poison request", victims=None, bound=bound)
                sampling = SamplingParams(seed=seed, max_new_tokens=50, min_new_tokens=50)
                stream = await battle.load.submit(ChatRequest(query="毒", sampling=sampling))
                stream.may_fail = ("dead_letter",)
                await _until_over(stream, 60.0)
                strike.until = time.monotonic()
                battle.say(
                    f"{poison.name}: {stream.end.type if stream.end else 'no end'} after {strike.until - strike.at:.1f} s"
                )
                if not isinstance(stream.end, Failed):
                    return [
                        Row(strike.event, 0.0, problems=[f"{poison.name} is no dead letter: {stream.end}"])
                    ]
                await _until_all_serve(battle)
        found = await battle.verdicts()
        attempts = [
            stream.end.attempts for stream in battle.readers.streams if isinstance(stream.end, Finished)
        ]
        found[0].notes.append(f"the others needed up to {max(attempts)} attempts")
        return found


async def _until_all_serve(battle: Battle) -> None:
    """Each poison finds both workers at work again."""
    for worker in battle.workers:
        await battle.until_live(worker, 1, seconds=60.0)


async def _insist(battle: Battle, refusals: list[float]) -> None:
    """Submits, and when it is refused waits as long as it is told to."""
    request, key = battle.workload.next(), f"{battle.rng.getrandbits(64):x}"
    while True:
        try:
            await battle.readers.ask(request, idempotency_key=key)
        except QueueFull as error:
            refusals.append(error.retry_after)
            await asyncio.sleep(error.retry_after)
        else:
            return
