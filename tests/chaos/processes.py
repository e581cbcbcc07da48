"""What happens to processes: workers and engines are killed, stopped for a while, and asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Final

from tests.chaos.battle import Battle, Suite
from tests.chaos.deployment import Broken, Worker
from tests.chaos.strikes import Row

TAKEOVER_SECONDS: Final = 3.0
DRAIN_SECONDS: Final = 1.0
STOP_SECONDS: Final = 10.0
KILL_WORKER: Final = "kill -9 of a worker"
KILL_ENGINE: Final = "kill -9 of an engine"


async def kill_worker(battle: Battle, worker: Worker) -> None:
    battle.strike(KILL_WORKER, victims=[worker], bound=TAKEOVER_SECONDS)
    worker.process.kill()
    worker.process.wait()
    await battle.deployment.renew(worker)


async def kill_engine(
    battle: Battle, worker: Worker, event: str = KILL_ENGINE, bound: float | None = TAKEOVER_SECONDS
) -> None:
    """bound: None for the engine's own restart time and a second."""
    pid, num_ready = worker.engine_pid(), worker.num_ready()
    strike = battle.strike(event, victims=[worker], bound=bound or 0.0)
    os.kill(pid, signal.SIGKILL)
    await worker.wait_until_ready(num_ready + 1)
    if bound is None:
        strike.bound = time.monotonic() - strike.at + 1.0


async def kills(suite: Suite) -> list[Row]:
    """Workers and engines die at random instants, one at a time, while thousands of requests come in; conversations and documents
    among them. The next kill waits until both workers are ready, and then for a random while."""
    pace = suite.seconds / suite.num_kills
    async with suite.battle(concurrency=0) as battle:
        num_talks, num_documents = suite.num_requests // 100, suite.num_requests // 250
        number = suite.num_requests - 5 * num_talks - num_documents
        battle.load.start_paced(number=number, per_second=suite.num_requests / suite.seconds)
        special = asyncio.create_task(_specials(battle, num_talks, num_documents, suite.seconds))
        begin = time.monotonic()
        # Half of each kind, in any order.
        kinds = [number % 2 == 0 for number in range(suite.num_kills)]
        battle.rng.shuffle(kinds)
        for done, is_worker in enumerate(kinds):
            # What the last kill took is made up for, so that the kills come to their end when the requests do.
            left = begin + pace * (done + 1) - time.monotonic()
            await asyncio.sleep(battle.rng.uniform(0.2, max(2 * left, 0.4)))
            worker = battle.rng.choice(battle.workers)
            with contextlib.suppress(Broken):
                await battle.until_live(worker, seconds=3.0)
            if is_worker:
                await kill_worker(battle, worker)
            else:
                await kill_engine(battle, worker)
            if (done + 1) % 10 == 0:
                num_over = sum(stream.is_over.is_set() for stream in battle.readers.streams)
                battle.say(
                    f"{done + 1} kills, {num_over} of {len(battle.readers.streams)} answers, {time.monotonic() - begin:.0f} s"
                )
        await special
        await battle.load.all_asked()
        found = await battle.verdicts()
        restarts = [seconds for worker in battle.workers for seconds in worker.restart_seconds]
        found[0].notes.append(f"a worker's restart took {min(restarts):.1f} to {max(restarts):.1f} s")
        return found


async def _specials(battle: Battle, num_talks: int, num_documents: int, seconds: float) -> None:
    """Conversations and documents, spread over the time."""
    number = max(num_talks, 1)
    for place in range(number):
        if num_talks:
            battle.load.start_talks(1)
        if num_documents and place * num_documents // number != (place + 1) * num_documents // number:
            battle.load.start_documents(1)
        await asyncio.sleep(seconds / number * 0.95)


async def stopped_worker(suite: Suite) -> list[Row]:
    """SIGSTOP for 10 s: the worker's leases run out, another goes on, and what the stopped one says when it wakes up is fenced."""
    async with suite.battle() as battle:
        for _ in range(suite.times(3)):
            worker = battle.rng.choice(battle.workers)
            await battle.until_live(worker, 2)
            strike = battle.strike("SIGSTOP of a worker for 10 s", victims=[worker], bound=TAKEOVER_SECONDS)
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(STOP_SECONDS)
            worker.signal(signal.SIGCONT)
            strike.until = time.monotonic()
            await asyncio.sleep(1.0)
        return await battle.verdicts()


async def stopped_engine(suite: Suite) -> list[Row]:
    """SIGSTOP of the engine for 10 s, which is less than the time after which it counts as stuck: its streams pause for so long."""
    async with suite.battle() as battle:
        for _ in range(suite.times(3)):
            worker = battle.rng.choice(battle.workers)
            await battle.until_live(worker, 2)
            pid = worker.engine_pid()
            strike = battle.strike(
                "SIGSTOP of an engine for 10 s", victims=[worker], bound=STOP_SECONDS + 1.0
            )
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            strike.until = time.monotonic()
            await asyncio.sleep(1.0)
        return await battle.verdicts()


async def terminated(suite: Suite) -> list[Row]:
    """SIGTERM: the worker drains, and what does not fit its grace time goes to another at once."""
    async with suite.battle(environ={"GLMQ_GRACE_SECONDS": "1"}) as battle:
        for _ in range(suite.times(5)):
            worker = battle.rng.choice(battle.workers)
            await battle.until_live(worker, 2)
            await drain(battle, worker, "SIGTERM of a worker")
        return await battle.verdicts()


async def rolling_restart(suite: Suite) -> list[Row]:
    """All workers are renewed, one after the other, while requests come in; with the default grace time."""
    async with suite.battle() as battle:
        for _ in range(suite.times(2)):
            for worker in battle.workers:
                await battle.until_live(worker, 1)
                await drain(battle, worker, "rolling restart")
        return await battle.verdicts()


async def drain(battle: Battle, worker: Worker, event: str) -> None:
    """SIGTERM, and the worker is started again once it has ended. Raises Broken if it did not end well."""
    strike = battle.strike(event, victims=[worker], bound=DRAIN_SECONDS)
    worker.signal(signal.SIGTERM)
    code = await worker.wait_until_ended()
    strike.until = time.monotonic()
    if code != 0:
        raise Broken(f"{worker.worker_id} ended with {code}")
    await battle.deployment.renew(worker)


async def single_engine(suite: Suite) -> list[Row]:
    """One worker alone loses its engine: its readers wait until it is up again."""
    async with suite.battle(num_workers=1) as battle:
        [worker] = battle.workers
        for _ in range(suite.times(3)):
            await battle.until_live(worker, 2)
            await kill_engine(battle, worker, "kill -9 of the only engine", None)
            await battle.until_live(worker, 2)
        return await battle.verdicts()


async def all_workers(suite: Suite) -> list[Row]:
    """Every worker dies at the same time: the answers wait until one is back."""
    async with suite.battle() as battle:
        for _ in range(suite.times(2)):
            await battle.until_live(number=4)
            strike = battle.strike("kill -9 of all workers", victims=battle.workers, bound=0.0)
            for worker in battle.workers:
                worker.process.kill()
            for worker in battle.workers:
                worker.process.wait()
            await battle.deployment.start_workers()
            # What was started meanwhile may only reap when the dead ones' leases have run out.
            strike.bound = time.monotonic() - strike.at + 1.0
            await battle.until_live(number=4)
        return await battle.verdicts()
