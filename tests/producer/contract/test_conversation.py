"""What of a conversation goes into a prompt, and the rules of its requests."""

from __future__ import annotations

import pytest

from producer.contract import ChatRequest, FoldRequest, InvalidRequest, decode_request, encode_request
from producer.contract.conversation import (
    PromptMemory,
    check_conversation_id,
    new_conversation_id,
    num_fitting,
    prompt_budget,
)
from producer.ledger import calls


@pytest.mark.parametrize(
    ("max_new_tokens", "budget"), [(None, 1536), (256, 1792), (1024, 1024), (1025, 1024), (20_000, 1024)]
)
def test_a_prompt_leaves_room_for_the_answer(max_new_tokens: int | None, budget: int) -> None:
    assert prompt_budget(2048, max_new_tokens) == budget


@pytest.mark.parametrize(("budget", "num"), [(0, 0), (4, 0), (5, 1), (14, 1), (15, 2), (100, 3)])
def test_turns_fit_whole_or_not_at_all(budget: int, num: int) -> None:
    assert num_fitting([5, 10, 20], budget) == num


@pytest.mark.parametrize(
    ("covered", "first", "recent", "left_out"), [(0, 0, 10, 0), (4, 2, 8, 0), (4, 4, 6, 0), (4, 7, 3, 3)]
)
def test_turns_that_neither_the_summary_nor_the_prompt_has_are_left_out(
    covered: int, first: int, recent: int, left_out: int
) -> None:
    memory = PromptMemory(covered=covered, first=first, num_turns=10)
    assert (memory.num_recent, memory.num_left_out) == (recent, left_out)


def test_a_history_beside_a_conversation_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="conversation_id: comes with a history"):
        ChatRequest(query="q", history=[("a", "b")], conversation_id="c")
    assert ChatRequest(query="q", history=[], conversation_id="c").conversation_id == "c"


def test_ids_of_conversations_are_checked_alike_everywhere() -> None:
    assert check_conversation_id(new_conversation_id())
    for wrong in ("", " ", "-x", "a b", "x" * 129):
        with pytest.raises(InvalidRequest, match="conversation_id"):
            check_conversation_id(wrong)
        with pytest.raises(InvalidRequest, match="conversation_id"):
            ChatRequest(query="q", conversation_id=wrong)


def test_a_fold_travels_like_any_request_but_cannot_be_submitted() -> None:
    fold = FoldRequest(conversation_id="c", first=7, priority=8)
    assert decode_request(encode_request(fold)) == fold
    with pytest.raises(InvalidRequest, match="made by workers alone"):
        calls.submit(fold, model="m")
