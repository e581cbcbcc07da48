"""Submit requests, stream their answers, cancel them: for threads (`Client`) and for event loops (`AsyncClient`).

Knows the ledger, the tickets and the streams, and nothing of who answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from producer.contract.errors import RequestCancelled, RequestFailed
from producer.contract.events import Event, Failed, Finished
from producer.contract.requests import ChatRequest, Request, SummaryRequest
from producer.conversations import AsyncConversations, Conversations
from producer.dead_letters import AsyncDeadLetters, DeadLetters
from producer.embedded import find_server
from producer.ledger import (
    AsyncLedger,
    Call,
    Ledger,
    Overview,
    RequestStatus,
    State,
    Submitted,
    calls,
)
from producer.settings import Settings
from producer.streams import AsyncPushes, Pushes
from producer.tickets import Tickets


@dataclass(frozen=True, slots=True)
class Submission:
    """A request on its way. Its methods are the client's, for this request."""

    request_id: str
    is_new: bool
    """False: the same request was submitted before, with the same idempotency key."""
    _client: Client = field(repr=False, compare=False)

    def stream(self, after: int = 0) -> Iterator[Event]:
        return self._client.stream(self.request_id, after)

    def result(self, timeout: float | None = None) -> Finished:
        return self._client.result(self.request_id, timeout)

    def cancel(self) -> State:
        return self._client.cancel(self.request_id)

    def status(self) -> RequestStatus:
        return self._client.status(self.request_id)


class Client:
    """For code with threads. One a process is enough, and safe to share; close it, or use it as a context manager.

    Every method raises RedisUnavailable if Redis does not answer.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """settings: None for those of the environment. Raises InvalidSetting, and RedisUnavailable if there is no server to find."""
        self.settings = settings or Settings.from_environ()
        self.redis_url = find_server(self.settings)
        timeout = self.settings.redis_timeout_seconds
        self.ledger = Ledger.at(self.redis_url, self.settings.keys, timeout_seconds=timeout)
        self.conversations = Conversations(self.ledger)
        self.dead_letters = DeadLetters(self.ledger, conversation_seconds=self.settings.conversation_seconds)
        self._tickets = Tickets(self.redis_url, self.settings.keys)
        self._pushes = Pushes(
            self.ledger,
            self.redis_url,
            timeout_seconds=timeout,
            reconnect_seconds=self.settings.reconnect_seconds,
        )

    @property
    def model(self) -> str:
        """The model of requests that name none."""
        return self.settings.model

    def submit(self, request: Request, *, idempotency_key: str | None = None) -> Submission:
        """Queue a request. Repeated with the same key and the same body it is the same request.

        Raises IdempotencyConflict if the tenant has used the key for a different body, ConversationBusy while another answer of
        its conversation is in progress, QueueFull when there is no room for it (the error's `retry_after` says when there will be), and
        DeadlineUnmeetable when its turn would come after its deadline.
        """
        submitted = self.ledger.run(_submit(self.settings, request, idempotency_key))
        self._tickets.send(request.model or self.model)
        return Submission(submitted.request_id, submitted.is_new, self)

    def chat(self, query: str, *, idempotency_key: str | None = None, **fields: Any) -> Submission:
        """Submit a ChatRequest with these fields."""
        return self.submit(ChatRequest(query=query, **fields), idempotency_key=idempotency_key)

    def summarize(self, text: str, *, idempotency_key: str | None = None, **fields: Any) -> Submission:
        """Submit a SummaryRequest with these fields."""
        return self.submit(SummaryRequest(text=text, **fields), idempotency_key=idempotency_key)

    def stream(self, request_id: str, after: int = 0) -> Iterator[Event]:
        """The events of a request, to its Finished or Failed; each once, in order, also across lost connections.

        after: index of the last token that the reader has, to go on behind it; 0 begins with Started. Raises UnknownRequest
        or StreamGone if there is nothing (any more) to read.
        """
        return self._pushes.stream(request_id, after)

    def result(self, request_id: str, timeout: float | None = None) -> Finished:
        """Wait for the whole answer, `timeout` seconds at most (then TimeoutError; the request goes on).

        Raises RequestFailed, RequestCancelled, UnknownRequest, StreamGone.
        """
        for event in self._pushes.stream(request_id, 0, timeout=timeout):
            if isinstance(event, Finished | Failed):
                return _outcome(request_id, event)
        raise AssertionError("a stream ends with Finished or Failed")

    def cancel(self, request_id: str) -> State:
        """Ask for the end of a request; answers its state before. Its stream ends with a Finished, reason cancelled.

        One that has ended already stays as it is. Raises UnknownRequest.
        """
        return self.ledger.run(calls.cancel(request_id))

    def status(self, request_id: str) -> RequestStatus:
        """How far a request is. Raises UnknownRequest."""
        return self.ledger.run(calls.status(request_id))

    def overview(self) -> Overview:
        """What the deployment does now: the default model's queue, and the workers."""
        return self.ledger.run(calls.overview(self.model))

    def close(self) -> None:
        """Give all connections back."""
        self._pushes.close()
        self._tickets.close()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class AsyncSubmission:
    """A request on its way. Its methods are the client's, for this request."""

    request_id: str
    is_new: bool
    """False: the same request was submitted before, with the same idempotency key."""
    _client: AsyncClient = field(repr=False, compare=False)

    def stream(self, after: int = 0) -> AsyncIterator[Event]:
        return self._client.stream(self.request_id, after)

    async def result(self, timeout: float | None = None) -> Finished:
        return await self._client.result(self.request_id, timeout)

    async def cancel(self) -> State:
        return await self._client.cancel(self.request_id)

    async def status(self) -> RequestStatus:
        return await self._client.status(self.request_id)


class AsyncClient:
    """For an event loop, and to be used in one only. The methods are those of `Client`, awaited.

    Nothing in it blocks the loop: Celery, which knows no asyncio, sends its tickets from a thread of its own.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """settings: None for those of the environment. Raises InvalidSetting, and RedisUnavailable if there is no server to find."""
        self.settings = settings or Settings.from_environ()
        self.redis_url = find_server(self.settings)
        timeout = self.settings.redis_timeout_seconds
        self.ledger = AsyncLedger.at(self.redis_url, self.settings.keys, timeout_seconds=timeout)
        self.conversations = AsyncConversations(self.ledger)
        self.dead_letters = AsyncDeadLetters(
            self.ledger, conversation_seconds=self.settings.conversation_seconds
        )
        self._tickets = Tickets(self.redis_url, self.settings.keys)
        self._ticket_thread = ThreadPoolExecutor(1, thread_name_prefix="glmq-tickets")
        self._pushes = AsyncPushes(
            self.ledger,
            self.redis_url,
            timeout_seconds=timeout,
            reconnect_seconds=self.settings.reconnect_seconds,
        )

    @property
    def model(self) -> str:
        """The model of requests that name none."""
        return self.settings.model

    async def submit(self, request: Request, *, idempotency_key: str | None = None) -> AsyncSubmission:
        """See `Client.submit`."""
        submitted = await self.ledger.run(_submit(self.settings, request, idempotency_key))
        await asyncio.get_running_loop().run_in_executor(
            self._ticket_thread, self._tickets.send, request.model or self.model
        )
        return AsyncSubmission(submitted.request_id, submitted.is_new, self)

    async def chat(self, query: str, *, idempotency_key: str | None = None, **fields: Any) -> AsyncSubmission:
        """Submit a ChatRequest with these fields."""
        return await self.submit(ChatRequest(query=query, **fields), idempotency_key=idempotency_key)

    async def summarize(
        self, text: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> AsyncSubmission:
        """Submit a SummaryRequest with these fields."""
        return await self.submit(SummaryRequest(text=text, **fields), idempotency_key=idempotency_key)

    def stream(self, request_id: str, after: int = 0) -> AsyncIterator[Event]:
        """See `Client.stream`."""
        return self._pushes.stream(request_id, after)

    async def result(self, request_id: str, timeout: float | None = None) -> Finished:
        """See `Client.result`."""
        async for event in self._pushes.stream(request_id, 0, timeout=timeout):
            if isinstance(event, Finished | Failed):
                return _outcome(request_id, event)
        raise AssertionError("a stream ends with Finished or Failed")

    async def cancel(self, request_id: str) -> State:
        """See `Client.cancel`."""
        return await self.ledger.run(calls.cancel(request_id))

    async def status(self, request_id: str) -> RequestStatus:
        """See `Client.status`."""
        return await self.ledger.run(calls.status(request_id))

    async def overview(self) -> Overview:
        """See `Client.overview`."""
        return await self.ledger.run(calls.overview(self.model))

    async def close(self) -> None:
        """Give all connections back."""
        await self._pushes.close()
        await asyncio.to_thread(self._ticket_thread.shutdown)
        self._tickets.close()
        await self.ledger.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _submit(settings: Settings, request: Request, idempotency_key: str | None) -> Call[Submitted]:
    return calls.submit(
        request,
        model=settings.model,
        idempotency_key=idempotency_key,
        retention_seconds=settings.retention_seconds,
        idempotency_seconds=settings.idempotency_seconds,
        conversation_seconds=settings.conversation_seconds,
        bounds=settings.bounds,
    )


def _outcome(request_id: str, event: Finished | Failed) -> Finished:
    if isinstance(event, Failed):
        raise RequestFailed(request_id, event.code, event.message)
    if event.reason == "cancelled":
        raise RequestCancelled(request_id, event.text)
    return event
