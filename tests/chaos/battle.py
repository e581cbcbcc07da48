"""One run of the suite: a deployment under load, blows at random instants, and what came of every stream."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from producer.embedded import ServerBinary
from tests.chaos.deployment import Broken, Deployment, Worker, deployment
from tests.chaos.load import Load
from tests.chaos.readers import Habit, Readers
from tests.chaos.strikes import Row, Strike, rows
from tests.chaos.undisturbed import Undisturbed
from tests.chaos.verdicts import Kept, judge
from tests.chaos.workload import Workload

END_SECONDS: Final = 60.0
"""When for so long no reader has heard anything, those that still wait have lost their answers."""


@dataclass
class Battle:
    """A deployment, those who ask it, and what was done to it so far."""

    deployment: Deployment
    readers: Readers
    workload: Workload
    load: Load
    rng: random.Random
    undisturbed: Undisturbed
    say: Callable[[str], None]
    strikes: list[Strike] = field(default_factory=list)

    @property
    def workers(self) -> list[Worker]:
        return list(self.deployment.workers.values())

    def strike(self, event: str, *, victims: list[Worker] | None, bound: float) -> Strike:
        """Write down that this happens now, to these workers (None: to everybody)."""
        ids = None if victims is None else frozenset(worker.worker_id for worker in victims)
        strike = Strike(event, ids, bound)
        self.strikes.append(strike)
        return strike

    async def until_live(self, worker: Worker | None = None, number: int = 1, seconds: float = 30.0) -> None:
        """Until so many answers are in progress (in this worker's hands), and then for a random moment. Raises Broken."""
        deadline = time.monotonic() + seconds
        while len(self.readers.live(None if worker is None else {worker.worker_id})) < number:
            if time.monotonic() > deadline:
                raise Broken(f"no {number} answers are in progress after {seconds} s")
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.rng.uniform(0.0, 0.3))

    async def verdicts(self) -> list[Row]:
        """Ask nothing more, wait for every answer, and judge. A row for each kind of strike."""
        await asyncio.gather(self.load.stop(END_SECONDS), self.readers.wait(END_SECONDS))
        await self.readers.wait(END_SECONDS)
        leftovers = await self._leftovers()
        with self.deployment.connection() as connection:
            kept = Kept(connection, self.deployment.settings.keys)
            verdicts = await asyncio.to_thread(judge, self.readers.streams, kept, self.undisturbed)
        found = rows(self.strikes, verdicts)
        found[-1].problems += [*leftovers, *self._dead()]
        num_tokens = sum(stream.num_tokens for stream in self.readers.streams)
        self.say(f"{len(self.readers.streams)} streams, {num_tokens} tokens judged")
        return found

    def _dead(self) -> list[str]:
        """Every worker that died at the suite's hands was started again; any other should not have died."""
        return [
            f"{worker.worker_id} ended by itself with exit code {worker.process.returncode}:\n{worker.log_path.read_text()[-2000:]}"
            for worker in self.workers
            if not worker.is_running
        ]

    async def _leftovers(self) -> list[str]:
        """What is still queued, leased or running although all have ended; the end of a stream comes just before."""
        for _ in range(50):
            leftovers = self.deployment.leftovers()
            if not leftovers:
                break
            await asyncio.sleep(0.1)
        return leftovers


@dataclass
class Suite:
    """What all battles have in common."""

    folder: Path
    seed: int
    undisturbed: Undisturbed
    workload_size: int = 300
    binary: ServerBinary | None = None
    scale: float = 1.0
    """Tries of an event, relative to its usual number."""
    say: Callable[[str], None] = print
    num_kills: int = 300
    num_requests: int = 5000
    seconds: float = 1500.0
    """Of the kills."""
    _num_battles: int = 0

    def times(self, usual: int) -> int:
        return max(round(usual * self.scale), 1)

    @contextlib.asynccontextmanager
    async def battle(
        self, *, concurrency: int = 8, habits: tuple[Habit, ...] | None = None, **options: Any
    ) -> AsyncIterator[Battle]:
        """A new deployment; `concurrency` answers are kept in progress. options: of `deployment`."""
        self._num_battles += 1
        seed = self.seed + self._num_battles
        folder = self.folder / f"battle{self._num_battles}"
        async with deployment(folder, binary=self.binary, **options) as running:
            readers = Readers(running.settings, seed, **({} if habits is None else {"habits": habits}))
            workload = Workload(self.seed, pool_size=self.workload_size)
            load = Load(readers, workload, seed)
            load.start(concurrency=concurrency)
            rng = random.Random(f"{seed}:battle")
            try:
                yield Battle(running, readers, workload, load, rng, self.undisturbed, self.say)
            finally:
                await readers.close()
