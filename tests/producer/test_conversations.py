"""Conversations through the clients: what is listed, shown, exported and forgotten."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from producer.client import AsyncClient, Client
from producer.contract import ChatRequest, ConversationBusy, Finished, FoldRequest, UnknownConversation, Usage
from producer.contract.conversation import FoldMemory, PromptMemory
from producer.ledger import calls
from producer.settings import Settings
from tests.producer.conftest import MODEL

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


def talk(worker: HandWorker, num_turns: int, *, tokens: int = 100, conversation_id: str = "c") -> None:
    """So many turns of so many tokens each, in a model of 2,048 tokens."""
    for number in range(num_turns):
        request_id = worker.submit(ChatRequest(query=f"q{number}", conversation_id=conversation_id))
        claim = worker.claim()
        assert claim is not None
        worker.start(claim)
        memory = PromptMemory(question_tokens=tokens - 10, context_len=2048)
        worker.ledger.run(calls.remember(request_id, claim.attempt, memory.model_dump_json()))
        finished = Finished(reason="stop", text=f"a{number}", usage=Usage(completion_tokens=10))
        assert worker.ledger.run(calls.finish(request_id, claim.attempt, finished))


def fold(worker: HandWorker, first: int, last: int) -> None:
    request = FoldRequest(conversation_id="c", first=first)
    assert worker.ledger.run(calls.fold(request, request_id=f"fold{first}", model=MODEL))
    claim = worker.claim()
    assert claim is not None
    memory = FoldMemory(first=first, last=last).model_dump_json()
    worker.ledger.run(calls.remember(claim.request_id, claim.attempt, memory))
    finished = Finished(reason="stop", text="so far", usage=Usage(completion_tokens=80))
    worker.ledger.run(calls.finish(claim.request_id, claim.attempt, finished))


def test_a_conversation_is_shown_with_its_last_turns(client: Client, worker: HandWorker) -> None:
    talk(worker, 12)
    shown = client.conversations.show("c", num_turns=3)

    assert (shown.status.num_turns, shown.first) == (12, 9)
    assert [turn.turn for turn in shown.turns] == [("q9", "a9"), ("q10", "a10"), ("q11", "a11")]
    assert client.conversations.show("c", num_turns=0).turns == []
    assert client.conversations.show("c", num_turns=100).first == 0


def test_what_the_next_prompt_would_have_is_said(client: Client, worker: HandWorker) -> None:
    talk(worker, 30)
    memory = client.conversations.show("c").next_prompt
    assert memory is not None
    assert (memory.covered, memory.num_recent, memory.num_left_out) == (0, 15, 15)

    fold(worker, 0, 12)
    memory = client.conversations.show("c").next_prompt
    assert memory is not None
    assert (memory.covered, memory.num_recent, memory.num_left_out) == (12, 14, 4)
    assert memory.summary == "so far"


def test_before_the_first_answer_nothing_is_known_of_prompts(client: Client, worker: HandWorker) -> None:
    worker.submit(ChatRequest(query="q", conversation_id="c"))
    shown = client.conversations.show("c")
    assert (shown.next_prompt, shown.turns) == (None, [])
    assert shown.status.busy is not None


def test_every_turn_is_exported_once_and_in_order(
    client: Client, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.conversations.PAGE", 4)
    for num_more, num_turns in ((8, 8), (1, 9)):
        talk(worker, num_more)
        assert len(list(client.conversations.turns("c"))) == num_turns
    assert [turn.query for turn in client.conversations.turns("c")][:8] == [f"q{n}" for n in range(8)]


def test_conversations_are_listed_until_they_are_forgotten(client: Client, worker: HandWorker) -> None:
    talk(worker, 1)
    talk(worker, 1, conversation_id="d")
    assert {status.conversation_id for status in client.conversations.list()} == {"c", "d"}
    assert list(client.conversations.list("somebody")) == []

    client.conversations.forget("c")
    assert [status.conversation_id for status in client.conversations.list(None)] == ["d"]
    for unknown in (client.conversations.show, client.conversations.forget):
        with pytest.raises(UnknownConversation, match="nothing is known about 'c'"):
            unknown("c")
    with pytest.raises(UnknownConversation):
        list(client.conversations.turns("c"))


def test_a_conversation_of_another_tenant_is_unknown(client: Client, worker: HandWorker) -> None:
    talk(worker, 1)
    with pytest.raises(UnknownConversation):
        client.conversations.show("c", tenant="somebody")


def test_the_setting_says_how_long_a_conversation_is_kept(settings: Settings, worker: HandWorker) -> None:
    with Client(replace(settings, conversation_seconds=77.0)) as client:
        client.chat("q", conversation_id="c")
        with pytest.raises(ConversationBusy):
            client.chat("q", conversation_id="c")
    claim = worker.claim()
    assert claim is not None
    worker.answer(claim, "a")
    assert 70 < worker.ledger.connection.ttl(settings.keys.turns("default:c")) <= 77


def test_an_event_loop_has_the_same(settings: Settings, worker: HandWorker) -> None:
    talk(worker, 3)

    async def look() -> tuple[list[str], int, list[str]]:
        async with AsyncClient(settings) as client:
            listed = [status.conversation_id async for status in client.conversations.list()]
            shown = await client.conversations.show("c", num_turns=2)
            turns = [turn.query async for turn in client.conversations.turns("c")]
            await client.conversations.forget("c")
            with pytest.raises(UnknownConversation):
                await client.conversations.show("c")
            return listed, shown.first, turns

    assert asyncio.run(look()) == (["c"], 1, ["q0", "q1", "q2"])
