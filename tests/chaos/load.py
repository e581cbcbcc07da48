"""Keeps a deployment busy: so many answers at a time, or so many requests a second, until it is told to stop."""

from __future__ import annotations

import asyncio
import random
import uuid
from typing import Final

from producer.contract import Failed, RedisUnavailable, Request
from tests.chaos.readers import Readers, Stream
from tests.chaos.workload import Talk, Workload

MAX_OPEN: Final = 32
"""Requests in progress beyond which a paced load waits: the suite is about deaths, and a machine that cannot keep up shows only its slowness."""


class Load:
    """Asks what the workload draws. A submit that Redis did not answer is tried again, under the same idempotency key."""

    def __init__(self, readers: Readers, workload: Workload, seed: int) -> None:
        self.readers = readers
        self.workload = workload
        self._rng = random.Random(f"{seed}:load")
        self._is_stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._paced: list[asyncio.Task[None]] = []

    def start(self, *, concurrency: int) -> None:
        """So many requests at a time: the next one when one has ended."""
        self._tasks += [asyncio.create_task(self._ask_on()) for _ in range(concurrency)]

    def start_paced(self, *, number: int, per_second: float) -> None:
        """So many requests, at random instants, however long they take."""
        self._paced.append(asyncio.create_task(self._ask_paced(number, per_second)))
        self._tasks += self._paced

    def start_talks(self, number: int, num_turns: int = 5) -> None:
        """Conversations, each question when the one before is answered."""
        self._tasks += [asyncio.create_task(self._hold(self.workload.talk(num_turns))) for _ in range(number)]

    def start_documents(self, number: int) -> None:
        self._tasks += [asyncio.create_task(self._summarize()) for _ in range(number)]

    async def stop(self, seconds: float) -> None:
        """Ask nothing more, and wait at most so long until nobody waits who would have asked again."""
        self._is_stopping.set()
        if self._tasks:
            _, waiting = await asyncio.wait(self._tasks, timeout=seconds)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def all_asked(self) -> None:
        """Until everything that is paced has been asked."""
        await asyncio.gather(*self._paced)

    async def submit(self, request: Request) -> Stream:
        key = uuid.UUID(int=self._rng.getrandbits(128)).hex
        while True:
            try:
                return await self.readers.ask(request, idempotency_key=key)
            except RedisUnavailable:
                await asyncio.sleep(0.1)

    async def _ask_on(self) -> None:
        while not self._is_stopping.is_set():
            stream = await self.submit(self.workload.next())
            await stream.is_over.wait()

    async def _ask_paced(self, number: int, per_second: float) -> None:
        for _ in range(number):
            if self._is_stopping.is_set():
                return
            await self.submit(self.workload.next())
            await asyncio.sleep(self._rng.expovariate(per_second))
            while self.readers.num_waiting >= MAX_OPEN and not self._is_stopping.is_set():
                await asyncio.sleep(0.05)

    async def _hold(self, talk: Talk) -> None:
        for question in talk.questions:
            if self._is_stopping.is_set():
                return
            stream = await self.submit(question)
            await stream.is_over.wait()
            if isinstance(stream.end, Failed):
                return

    async def _summarize(self) -> None:
        stream = await self.submit(self.workload.document())
        await stream.is_over.wait()
