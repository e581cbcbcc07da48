"""Follows the events of many requests over one connection: pushes for speed, the requests' streams for truth.

A reader reads the stream from where it is, then follows the pushes; it reads the stream again when the subscription begins (what was pushed
before is lost to it), after a gap, and after a silence.
`StreamCursor` decides all of this without a connection; `Pushes` and `AsyncPushes` listen, with one thread or one task each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, NamedTuple, Protocol

import redis
import redis.asyncio

from producer.contract.errors import InvalidRequest, RedisUnavailable, StreamGone, UnknownRequest
from producer.contract.events import Event, Failed, Finished, Token, decode_event
from producer.contract.keys import Keys
from producer.ledger import AsyncLedger, Followed, Ledger, calls, connect, connect_async
from producer.ledger.calls import FINAL_STATES

_SILENT_SECONDS: Final = 1.0
"""After so long without a push the stream is read; doubled each time, until something new comes."""
_MAX_SILENT_SECONDS: Final = 8.0
_MAX_WAITING: Final = 1024
"""Pushes that wait for a slow reader of one request; it finds the others in the stream."""
_PING_SECONDS: Final = 5.0
"""A connection that is silent for so long is asked whether it still lives."""


class Push(NamedTuple):
    """One line of a push message."""

    previous_id: str
    entry_id: str
    event: str


def parse_push(message: str) -> Iterator[tuple[str, Push]]:
    """(request id, push) of each line."""
    for line in message.split("\n") if message else ():
        request_id, previous_id, entry_id, event = line.split("\t", 3)
        yield request_id, Push(previous_id, entry_id, event)


class StreamCursor:
    """Where one reader is in one request's events: gives each event once, in order, and knows when to read the stream.

    No I/O: fed with what was pushed and what was read. While `wants_read`, the owner reads the stream after `position`;
    otherwise it waits for a push, for `wait_seconds`.
    """

    def __init__(self, request_id: str, after: int = 0) -> None:
        """after: index of the last answer token that the reader has; 0: none, it gets all events."""
        if isinstance(after, bool) or not isinstance(after, int) or after < 0:
            raise InvalidRequest("after", f"{after!r} is not a token index", "Use 0 or the index of a token.")
        self.request_id = request_id
        self.is_done = False
        self.wants_read = True
        self.wait_seconds = _SILENT_SECONDS
        self._after = after
        self._at = (after, 0)

    @property
    def position(self) -> str:
        """Entry id after which the stream is to be read."""
        return f"{self._at[0]}-{self._at[1]}"

    def push(self, push: Push) -> list[Event]:
        """The new events of a push: one, or none if it is known already or if one before it is missing."""
        if self.wants_read or _place(push.entry_id) <= self._at:
            return []
        if _place(push.previous_id) > self._at:
            self.wants_read = True
            return []
        self.wait_seconds = _SILENT_SECONDS
        return [self._advance(push.entry_id, push.event)]

    def read(self, followed: Followed | None) -> list[Event]:
        """The new events of a read of the stream after `position`.

        Raises UnknownRequest, StreamGone, and InvalidRequest if the answer ended before the token index to start after.
        """
        self.wants_read = False
        if followed is None:
            raise UnknownRequest(self.request_id) if self._at == (0, 0) else StreamGone(self.request_id)
        events = [
            self._advance(entry.id, entry.event) for entry in followed.entries if _place(entry.id) > self._at
        ]
        if followed.state in FINAL_STATES and not self.is_done:
            last = _place(followed.last_id)
            if last <= self._at:
                raise InvalidRequest(
                    "after",
                    f"{self._after} is beyond the answer's {last[0]} tokens",
                    f"Use at most {last[0]}.",
                )
            raise StreamGone(self.request_id)
        if events:
            self.wait_seconds = _SILENT_SECONDS
        return events

    def interrupted(self) -> None:
        """Pushes may have been lost."""
        self.wants_read = True

    def silent(self) -> None:
        """No push came for `wait_seconds`."""
        self.wants_read = True
        self.wait_seconds = min(self.wait_seconds * 2, _MAX_SILENT_SECONDS)

    def _advance(self, entry_id: str, data: str) -> Event:
        place, event = _place(entry_id), decode_event(data)
        if isinstance(event, Token):
            if event.index - len(event.ids) > self._at[0]:
                # Entries are written without holes: somebody has trimmed the stream.
                raise StreamGone(self.request_id)
            event = event.after(self._at[0])
        self._at = place
        self.is_done = isinstance(event, Finished | Failed)
        return event


def _place(entry_id: str) -> tuple[int, int]:
    index, _, number = entry_id.partition("-")
    return int(index), int(number)


class Outage:
    """How long a reader waits for a Redis that went away."""

    def __init__(self, reconnect_seconds: float) -> None:
        self._reconnect_seconds = reconnect_seconds
        self._was_there = False
        self._since: float | None = None

    def over(self) -> None:
        """Redis has answered."""
        self._was_there = True
        self._since = None

    def pause(self, error: RedisUnavailable) -> float:
        """Seconds until the next try. Raises the error if Redis was never there, or is away for too long."""
        now = time.monotonic()
        self._since = self._since or now
        if not self._was_there or now - self._since > self._reconnect_seconds:
            raise error
        return 0.1


class _Inbox(Protocol):
    """Where the pushes of one reader of one request wait; None: some may be missing."""

    def put(self, push: Push | None, /) -> None: ...


class _Inboxes:
    """Who in this process follows which request."""

    def __init__(self) -> None:
        self._of: defaultdict[str, list[_Inbox]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(self, request_id: str, inbox: _Inbox) -> None:
        with self._lock:
            self._of[request_id].append(inbox)

    def remove(self, request_id: str, inbox: _Inbox) -> bool:
        """Whether it was the last one of this request."""
        with self._lock:
            inboxes = self._of[request_id]
            inboxes.remove(inbox)
            if not inboxes:
                del self._of[request_id]
            return not inboxes

    def deliver(self, message: str) -> None:
        for request_id, push in parse_push(message):
            for inbox in tuple(self._of.get(request_id, ())):
                inbox.put(push)

    def interrupt(self) -> None:
        with self._lock:
            inboxes = [inbox for those in self._of.values() for inbox in those]
        for inbox in inboxes:
            inbox.put(None)


class _ThreadInbox:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Push | None] = queue.SimpleQueue()
        self._is_full = False

    def put(self, push: Push | None) -> None:
        if self._is_full:
            return
        if self._queue.qsize() >= _MAX_WAITING:
            self._is_full, push = True, None
        self._queue.put(push)

    def get(self, timeout: float) -> Push | None:
        """The next push; None: some may be missing. Raises TimeoutError if nothing came in time."""
        try:
            push = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if push is None:
            # Cleared before the stream is read: what is dropped until here is in it.
            self._is_full = False
        return push


class Pushes:
    """Streams for threads. One thread of its own listens; it starts with the first stream."""

    def __init__(
        self, ledger: Ledger, redis_url: str, *, timeout_seconds: float, reconnect_seconds: float
    ) -> None:
        self._ledger = ledger
        self._redis_url = redis_url
        self._timeout_seconds = timeout_seconds
        self._reconnect_seconds = reconnect_seconds
        self._lock = threading.Lock()
        self._listener: _Listener | None = None

    def stream(self, request_id: str, after: int, *, timeout: float | None = None) -> Iterator[Event]:
        """The events of a request after a token index, to its last one. TimeoutError if that takes longer than `timeout`."""
        cursor = StreamCursor(request_id, after)
        deadline = None if timeout is None else time.monotonic() + timeout
        outage = Outage(self._reconnect_seconds)
        listener = self._listening()
        inbox = _ThreadInbox()
        listener.inboxes.add(request_id, inbox)
        try:
            while not cursor.is_done:
                left = _left(deadline, cursor.wait_seconds)
                if left <= 0:
                    raise _timed_out(request_id, timeout)
                if cursor.wants_read:
                    try:
                        [followed] = self._ledger.run(
                            calls.follow(listener.reader, [(request_id, cursor.position)])
                        )
                    except RedisUnavailable as error:
                        time.sleep(min(outage.pause(error), left))
                        continue
                    outage.over()
                    yield from cursor.read(followed)
                    continue
                try:
                    push = inbox.get(left)
                except TimeoutError:
                    cursor.silent()
                    continue
                if push is None:
                    cursor.interrupted()
                else:
                    yield from cursor.push(push)
        finally:
            if listener.inboxes.remove(request_id, inbox) and not cursor.is_done:
                # It would do no harm to stay registered, but for messages to nobody.
                with contextlib.suppress(RedisUnavailable):
                    self._ledger.run(calls.unfollow(listener.reader, request_id))

    def close(self) -> None:
        """Stop listening. Streams that are still read go on by reading alone."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None and listener.pid == os.getpid():
            listener.stop()

    def _listening(self) -> _Listener:
        with self._lock:
            # After a fork the thread is the parent's.
            if self._listener is None or self._listener.pid != os.getpid():
                self._listener = _Listener(self._redis_url, self._ledger.keys, self._timeout_seconds)
                self._listener.start()
            return self._listener


class _Listener(threading.Thread):
    """Receives the pushes for this process and hands them to the inboxes; subscribes again whenever the connection is lost."""

    def __init__(self, redis_url: str, keys: Keys, timeout_seconds: float) -> None:
        super().__init__(name="glmq-pushes", daemon=True)
        self.reader = uuid.uuid4().hex
        self.inboxes = _Inboxes()
        self.pid = os.getpid()
        # No retries: a reconnect must be seen, because what was pushed meanwhile is lost.
        self._connection: Any = connect(redis_url, timeout_seconds=timeout_seconds, retries=0)
        self._channel = keys.push(self.reader)
        self._is_stopping = threading.Event()

    def run(self) -> None:
        pause = 0.05
        while not self._is_stopping.is_set():
            try:
                with self._connection.pubsub() as pubsub:
                    pubsub.subscribe(self._channel)
                    for message in self._messages(pubsub):
                        if message["type"] == "message":
                            self.inboxes.deliver(message["data"])
                        elif message["type"] == "subscribe":
                            pause = 0.05
                            # Also the first time: a stream does not wait for this before it reads.
                            self.inboxes.interrupt()
            except redis.RedisError:
                self._is_stopping.wait(pause)
                pause = min(pause * 2, 1.0)

    def _messages(self, pubsub: Any) -> Iterator[dict[str, Any]]:
        heard_at, is_asked = time.monotonic(), False
        while not self._is_stopping.is_set():
            message = pubsub.get_message(timeout=1.0)
            now = time.monotonic()
            if message is not None:
                heard_at, is_asked = now, False
                yield message
            elif now - heard_at > 2 * _PING_SECONDS:
                raise redis.ConnectionError("no answer to a ping")
            elif now - heard_at > _PING_SECONDS and not is_asked:
                is_asked = True
                pubsub.ping()

    def stop(self) -> None:
        self._is_stopping.set()
        with contextlib.suppress(redis.RedisError):
            # Wakes it up; without Redis it wakes up by itself within a second.
            self._connection.publish(self._channel, "")
        if threading.current_thread() is not self:
            self.join(5.0)
        self._connection.close()


class _TaskInbox:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Push | None] = asyncio.Queue()
        self._is_full = False

    def put(self, push: Push | None) -> None:
        if self._is_full:
            return
        if self._queue.qsize() >= _MAX_WAITING:
            self._is_full, push = True, None
        self._queue.put_nowait(push)

    async def get(self, timeout: float) -> Push | None:
        """The next push; None: some may be missing. Raises TimeoutError if nothing came in time."""
        try:
            push = self._queue.get_nowait()
        except asyncio.QueueEmpty:
            async with asyncio.timeout(timeout):
                push = await self._queue.get()
        if push is None:
            self._is_full = False
        return push


class AsyncPushes:
    """Streams for an event loop. One task of its own listens; it starts with the first stream."""

    def __init__(
        self, ledger: AsyncLedger, redis_url: str, *, timeout_seconds: float, reconnect_seconds: float
    ) -> None:
        self._ledger = ledger
        self._reconnect_seconds = reconnect_seconds
        self._connection: Any = connect_async(redis_url, timeout_seconds=timeout_seconds, retries=0)
        self._reader = uuid.uuid4().hex
        self._inboxes = _Inboxes()
        self._task: asyncio.Task[None] | None = None

    async def stream(
        self, request_id: str, after: int, *, timeout: float | None = None
    ) -> AsyncIterator[Event]:
        """The events of a request after a token index, to its last one. TimeoutError if that takes longer than `timeout`."""
        cursor = StreamCursor(request_id, after)
        deadline = None if timeout is None else time.monotonic() + timeout
        outage = Outage(self._reconnect_seconds)
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="glmq-pushes")
        inbox = _TaskInbox()
        self._inboxes.add(request_id, inbox)
        try:
            while not cursor.is_done:
                left = _left(deadline, cursor.wait_seconds)
                if left <= 0:
                    raise _timed_out(request_id, timeout)
                if cursor.wants_read:
                    try:
                        [followed] = await self._ledger.run(
                            calls.follow(self._reader, [(request_id, cursor.position)])
                        )
                    except RedisUnavailable as error:
                        await asyncio.sleep(min(outage.pause(error), left))
                        continue
                    outage.over()
                    for event in cursor.read(followed):
                        yield event
                    continue
                try:
                    push = await inbox.get(left)
                except TimeoutError:
                    cursor.silent()
                    continue
                if push is None:
                    cursor.interrupted()
                else:
                    for event in cursor.push(push):
                        yield event
        finally:
            if self._inboxes.remove(request_id, inbox) and not cursor.is_done:
                with contextlib.suppress(RedisUnavailable):
                    await self._ledger.run(calls.unfollow(self._reader, request_id))

    async def close(self) -> None:
        """Stop listening."""
        task, self._task = self._task, None
        while task is not None and not task.done():
            # More than once: redis-py loses a cancellation that arrives while it connects.
            task.cancel()
            await asyncio.wait([task], timeout=0.05)
        await self._connection.aclose()

    async def _listen(self) -> None:
        pause = 0.05
        while True:
            try:
                async with self._connection.pubsub() as pubsub:
                    await pubsub.subscribe(self._ledger.keys.push(self._reader))
                    async for message in _async_messages(pubsub):
                        if message["type"] == "message":
                            self._inboxes.deliver(message["data"])
                        elif message["type"] == "subscribe":
                            pause = 0.05
                            self._inboxes.interrupt()
            except redis.RedisError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)


async def _async_messages(pubsub: Any) -> AsyncIterator[dict[str, Any]]:
    heard_at, is_asked = time.monotonic(), False
    while True:
        message = await pubsub.get_message(timeout=1.0)
        now = time.monotonic()
        if message is not None:
            heard_at, is_asked = now, False
            yield message
        elif now - heard_at > 2 * _PING_SECONDS:
            raise redis.ConnectionError("no answer to a ping")
        elif now - heard_at > _PING_SECONDS and not is_asked:
            is_asked = True
            await pubsub.ping()


def _left(deadline: float | None, at_most: float) -> float:
    return at_most if deadline is None else min(at_most, deadline - time.monotonic())


def _timed_out(request_id: str, timeout: float | None) -> TimeoutError:
    return TimeoutError(
        f"request {request_id} did not end within {timeout} s; it goes on, cancel it if it is not wanted"
    )
