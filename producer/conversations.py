"""Conversations as their owner sees them: listed, shown, exported turn by turn, forgotten.

Talking in one is a ChatRequest with its id; what is done with the turns is the workers' business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from producer.contract.conversation import ArchivedTurn, PromptMemory, fit, prompt_budget
from producer.ledger import AsyncLedger, ConversationStatus, ConversationTurns, Ledger, calls

PAGE = 200
"""Turns that are read at a time."""
MIN_TURN_TOKENS = 8
"""So that enough of the last turns are read to say which of them a prompt can hold."""
ROUND_TOKENS = 20
"""About what the summary's round has besides the summary."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with its last turns."""

    status: ConversationStatus
    first: int
    """Index of the first of `turns`."""
    turns: list[ArchivedTurn]
    next_prompt: PromptMemory | None
    """What a short question would be asked with, by the token counts that were kept. None before the first answer."""


class Conversations:
    """The conversations of one deployment, for code with threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def list(self, tenant: str | None = "default") -> Iterator[ConversationStatus]:
        """A tenant's conversations, those with the latest turn first; None: everybody's."""
        at: int | None = 0
        while at is not None:
            page = self._ledger.run(calls.conversations(tenant, at=at))
            yield from page.conversations
            at = page.next

    def show(self, conversation_id: str, *, tenant: str = "default", num_turns: int = 10) -> Conversation:
        """A conversation with its last turns. Raises UnknownConversation."""
        status = self._ledger.run(calls.conversation(tenant, conversation_id)).status
        count = max(num_turns, _num_turns_to_read(status))
        return _shown(
            self._ledger.run(calls.conversation(tenant, conversation_id, first=-count, count=count)),
            num_turns,
        )

    def turns(self, conversation_id: str, *, tenant: str = "default") -> Iterator[ArchivedTurn]:
        """Every turn, oldest first. Raises UnknownConversation, also when it is forgotten meanwhile."""
        first = 0
        while True:
            page = self._ledger.run(calls.conversation(tenant, conversation_id, first=first, count=PAGE))
            yield from page.turns
            first += len(page.turns)
            if first >= page.status.num_turns:
                return

    def forget(self, conversation_id: str, *, tenant: str = "default") -> None:
        """Delete it with all its turns, and cancel what is in progress in it. Raises UnknownConversation."""
        self._ledger.run(calls.forget(tenant, conversation_id))


class AsyncConversations:
    """The methods of `Conversations`, awaited."""

    def __init__(self, ledger: AsyncLedger) -> None:
        self._ledger = ledger

    async def list(self, tenant: str | None = "default") -> AsyncIterator[ConversationStatus]:
        """See `Conversations.list`."""
        at: int | None = 0
        while at is not None:
            page = await self._ledger.run(calls.conversations(tenant, at=at))
            for status in page.conversations:
                yield status
            at = page.next

    async def show(
        self, conversation_id: str, *, tenant: str = "default", num_turns: int = 10
    ) -> Conversation:
        """See `Conversations.show`."""
        status = (await self._ledger.run(calls.conversation(tenant, conversation_id))).status
        count = max(num_turns, _num_turns_to_read(status))
        return _shown(
            await self._ledger.run(calls.conversation(tenant, conversation_id, first=-count, count=count)),
            num_turns,
        )

    async def turns(self, conversation_id: str, *, tenant: str = "default") -> AsyncIterator[ArchivedTurn]:
        """See `Conversations.turns`."""
        first = 0
        while True:
            page = await self._ledger.run(
                calls.conversation(tenant, conversation_id, first=first, count=PAGE)
            )
            for turn in page.turns:
                yield turn
            first += len(page.turns)
            if first >= page.status.num_turns:
                return

    async def forget(self, conversation_id: str, *, tenant: str = "default") -> None:
        """See `Conversations.forget`."""
        await self._ledger.run(calls.forget(tenant, conversation_id))


def _num_turns_to_read(status: ConversationStatus) -> int:
    return (status.context_len or 0) // MIN_TURN_TOKENS


def _shown(found: ConversationTurns, num_turns: int) -> Conversation:
    status, first, turns = found
    next_prompt = None
    if status.context_len is not None:
        covered, num_recent = fit(
            [turn.tokens for turn in turns],
            status.num_turns,
            covered=status.covered,
            summary_tokens=status.summary_tokens + ROUND_TOKENS,
            budget=prompt_budget(status.context_len, None) - ROUND_TOKENS,
        )
        next_prompt = PromptMemory(
            summary=status.summary if covered else "",
            covered=covered,
            first=status.num_turns - num_recent,
            num_turns=status.num_turns,
            context_len=status.context_len,
        )
    hidden = max(len(turns) - num_turns, 0)
    return Conversation(status, first + hidden, turns[hidden:], next_prompt)
