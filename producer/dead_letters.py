"""Dead letters as their operator sees them: requests that took too many attempts down with them, listed, shown, tried again, dropped.

How a request becomes one is the workers' and the ledger's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from producer.contract.events import Event
from producer.contract.keys import CONVERSATION_SECONDS
from producer.ledger import AsyncLedger, DeadLetter, Ledger, calls


class DeadLetters:
    """The dead letters of one deployment, for code with threads."""

    def __init__(self, ledger: Ledger, *, conversation_seconds: float = CONVERSATION_SECONDS) -> None:
        """conversation_seconds: lifetime of a conversation that a retried letter begins."""
        self._ledger = ledger
        self._conversation_seconds = conversation_seconds

    def list(self) -> Iterator[DeadLetter]:
        """All of them, the latest first."""
        at: int | None = 0
        while at is not None:
            page = self._ledger.run(calls.dead_letters(at=at))
            yield from page.letters
            at = page.next

    def show(self, request_id: str) -> DeadLetter:
        """One of them. Raises UnknownRequest, NotDead."""
        return self._ledger.run(calls.dead_letter(request_id))

    def events(self, request_id: str) -> Sequence[Event]:
        """What its readers have seen, the last event included."""
        [followed] = self._ledger.run(calls.follow("", [(request_id, "0")]))
        return [] if followed is None else calls.events(followed.entries)

    def retry(self, request_id: str) -> None:
        """Queue it again, under its id; it goes on from its last token, and can be followed again. Its deadline does not count any more.

        Raises UnknownRequest, NotDead, ConversationBusy, and DocumentEnded for a piece of a text.
        """
        self._ledger.run(calls.retry_dead(request_id, conversation_seconds=self._conversation_seconds))

    def drop(self, request_id: str) -> None:
        """Let it expire like any request that has ended. Raises UnknownRequest, NotDead."""
        self._ledger.run(calls.drop_dead(request_id))


class AsyncDeadLetters:
    """The dead letters of one deployment, for code with an event loop. Methods as those of `DeadLetters`."""

    def __init__(self, ledger: AsyncLedger, *, conversation_seconds: float = CONVERSATION_SECONDS) -> None:
        self._ledger = ledger
        self._conversation_seconds = conversation_seconds

    async def list(self) -> AsyncIterator[DeadLetter]:
        at: int | None = 0
        while at is not None:
            page = await self._ledger.run(calls.dead_letters(at=at))
            for letter in page.letters:
                yield letter
            at = page.next

    async def show(self, request_id: str) -> DeadLetter:
        return await self._ledger.run(calls.dead_letter(request_id))

    async def retry(self, request_id: str) -> None:
        await self._ledger.run(calls.retry_dead(request_id, conversation_seconds=self._conversation_seconds))

    async def drop(self, request_id: str) -> None:
        await self._ledger.run(calls.drop_dead(request_id))
