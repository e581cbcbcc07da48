"""Those who wait for answers: each follows one stream to its end and writes down what it saw, and when.

Some sit in an event loop, some in threads of their own, some go away in the middle and come back, some are slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, cast

from producer.client import AsyncClient, AsyncSubmission, Client
from producer.contract import Event, Failed, Finished, Progress, RedisUnavailable, Request, Started, Token
from producer.settings import Settings

Habit = Literal["task", "thread", "leaves", "slow"]
MAX_THREADS: Final = 64


class Heard(NamedTuple):
    """One event, and when it reached the reader (monotonic seconds)."""

    at: float
    event: Event


@dataclass(eq=False)
class Stream:
    """One request as its reader saw it."""

    request: Request
    request_id: str
    submitted: float
    habit: Habit = "task"
    heard: list[Heard] = field(default_factory=list)
    error: Exception | None = None
    """What the reader got instead of a last event."""
    may_fail: tuple[str, ...] = ()
    """Codes of failures that are right for this request."""
    may_be_cancelled: bool = False
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def end(self) -> Finished | Failed | None:
        last = self.heard[-1].event if self.heard else None
        return last if isinstance(last, Finished | Failed) else None

    @property
    def is_live(self) -> bool:
        """An answer that has begun and not ended."""
        return self.end is None and any(isinstance(heard.event, Token) for heard in self.heard)

    @property
    def num_tokens(self) -> int:
        return max((heard.event.index for heard in self.heard if isinstance(heard.event, Token)), default=0)

    @property
    def token_ids(self) -> list[int]:
        return [id_ for heard in self.heard if isinstance(heard.event, Token) for id_ in heard.event.ids]

    def worker_at(self, at: float) -> str | None:
        """Who was answering at this moment, as far as the reader was told; None: nobody yet, or nobody any more."""
        worker = None
        for heard in self.heard:
            if heard.at > at:
                return worker
            if isinstance(heard.event, Started):
                worker = heard.event.worker
            elif isinstance(heard.event, Progress | Finished | Failed):
                worker = None
        return worker if self.end is None else None


class Readers:
    """Submits and follows. All that they ever followed is in `streams`."""

    def __init__(
        self, settings: Settings, seed: int, *, habits: tuple[Habit, ...] = ("task", "task", "task", "thread")
    ) -> None:
        self.settings = settings
        self.streams: list[Stream] = []
        self._client = AsyncClient(settings)
        self._thread_client = Client(settings)
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="reader")
        self._habits = habits
        self._rng = random.Random(f"{seed}:readers")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def client(self) -> AsyncClient:
        return self._client

    async def ask(
        self, request: Request, *, habit: Habit | None = None, idempotency_key: str | None = None
    ) -> Stream:
        """Submit this request, and follow it from a task of its own. Raises what the client raises."""
        submitted = time.monotonic()
        submission = await self._client.submit(request, idempotency_key=idempotency_key)
        chosen = self._rng.choice(self._habits) if habit is None else habit
        stream = Stream(request, submission.request_id, submitted, chosen)
        self.streams.append(stream)
        task = asyncio.create_task(self._follow(stream, submission))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _follow(self, stream: Stream, submission: AsyncSubmission) -> None:
        """To the end. A stream that cannot be begun because Redis is away just now is begun again; one that has begun must go on by itself."""
        try:
            while True:
                try:
                    await self._read(stream, submission)
                except RedisUnavailable:
                    if stream.heard and stream.habit != "leaves":
                        raise
                    await asyncio.sleep(0.1)
                else:
                    break
        except Exception as error:  # noqa: BLE001 whatever it is, it is what the reader got
            stream.error = error
        finally:
            stream.is_over.set()

    async def _read(self, stream: Stream, submission: AsyncSubmission) -> None:
        match stream.habit:
            case "thread":
                await asyncio.get_running_loop().run_in_executor(self._threads, self._read_in_thread, stream)
            case "leaves":
                await self._come_and_go(stream, submission)
            case _:
                async for event in submission.stream():
                    stream.heard.append(Heard(time.monotonic(), event))
                    if stream.habit == "slow":
                        await asyncio.sleep(self._rng.uniform(0.05, 0.4))

    def _read_in_thread(self, stream: Stream) -> None:
        for event in self._thread_client.stream(stream.request_id):
            stream.heard.append(Heard(time.monotonic(), event))

    async def _come_and_go(self, stream: Stream, submission: AsyncSubmission) -> None:
        """Reads some events, goes away for a while, and comes back at the token after the last one it has, or at an earlier one."""
        while stream.end is None:
            patience = self._rng.randint(1, 12)
            # Whoever has lost a few of its last tokens asks for them again.
            after = max(stream.num_tokens - self._rng.choice((0, 0, 1, 5)), 0)
            self._forget_after(stream, after)
            stream_after = cast("AsyncGenerator[Event, None]", submission.stream(after))
            async with contextlib.aclosing(stream_after) as events:
                async for event in events:
                    stream.heard.append(Heard(time.monotonic(), event))
                    patience -= 1
                    if patience == 0:
                        break
            await asyncio.sleep(self._rng.uniform(0.0, 0.3))

    def _forget_after(self, stream: Stream, index: int) -> None:
        kept: list[Heard] = []
        for heard in stream.heard:
            if isinstance(heard.event, Token) and heard.event.index > index:
                begin = heard.event.index - len(heard.event.ids)
                if begin < index:
                    keep = index - begin
                    event = heard.event.model_copy(
                        update={
                            "index": index,
                            "ids": heard.event.ids[:keep],
                            "texts": heard.event.texts[:keep],
                        }
                    )
                    kept.append(Heard(heard.at, event))
                break
            kept.append(heard)
        if index == 0:
            kept = []
        stream.heard[:] = kept

    async def wait(self, patience: float) -> None:
        """Until every stream has ended, or for so many seconds nobody has heard anything: who still waits then has lost its answer."""
        waiting, heard, since = self._waiting(), self._num_heard(), time.monotonic()
        while waiting and time.monotonic() - since < patience:
            await asyncio.sleep(0.1)
            waiting = [stream for stream in waiting if not stream.is_over.is_set()]
            if (now := self._num_heard()) != heard:
                heard, since = now, time.monotonic()

    @property
    def num_waiting(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting())

    def _waiting(self) -> list[Stream]:
        return [stream for stream in self.streams if not stream.is_over.is_set()]

    def _num_heard(self) -> int:
        return sum(len(stream.heard) for stream in self.streams)

    def live(self, worker_ids: set[str] | None = None) -> list[Stream]:
        """Streams in the middle of an answer (by these workers)."""
        now = time.monotonic()
        return [
            stream
            for stream in self.streams[-500:]
            if stream.is_live and (worker_ids is None or stream.worker_at(now) in worker_ids)
        ]

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._thread_client.close()
        await self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
