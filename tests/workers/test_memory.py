"""What a prompt remembers: within the budget, whole turns, and the same for every attempt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import Finished, FoldRequest, RedisUnavailable, Turn, Usage
from producer.contract.conversation import ArchivedTurn, FoldMemory, prompt_budget
from producer.ledger import Recollected, calls
from tests.workers.conftest import MODEL, Letters, wait_for
from workers.memory import SUMMARY_QUERY, RoundLengths, choose, history
from workers.models.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "workers" / "models" / "demo"
NewBench = Callable[..., Any]


@pytest.fixture
def bench(new_bench: NewBench) -> Any:
    """The budget of a prompt is 300 characters; summaries come when the test says so."""
    bench = new_bench(context_len=400)
    bench.folding.submit = lambda *_: None
    return bench


def say(bench: Any, query: str, answer: str, **fields: Any) -> Usage:
    """One turn of the conversation `c`, whose answer comes from the engine."""
    request_id = bench.submit(query, conversation_id="c", **fields)
    bench.say(bench.generation(request_id).sequence_id, answer, "stop")
    finished = bench.ended(request_id)[-1]
    assert isinstance(finished, Finished), finished
    return finished.usage


def prompt(bench: Any, request_id: str) -> str:
    return "".join(map(chr, bench.generation(request_id).prompt_ids))


def set_summary(bench: Any, summary: str, covered: int) -> None:
    """As a fold would."""
    request = FoldRequest(conversation_id="c", first=0)
    bench.claims.resize(0)
    assert bench.ledger.run(calls.fold(request, request_id="fold", model=MODEL))
    claim = bench.ledger.run(calls.claim(MODEL, "folder", 5.0))
    memory = FoldMemory(first=0, last=covered).model_dump_json()
    bench.ledger.run(calls.remember("fold", claim.attempt, memory))
    bench.ledger.run(calls.finish("fold", claim.attempt, Finished(reason="stop", text=summary)))
    bench.claims.resize(4)


def test_each_question_comes_with_the_turns_before_it(bench: Any) -> None:
    assert say(bench, "q1", "a1").recent_turns == 0
    assert say(bench, "q2", "a2").recent_turns == 1
    request_id = bench.submit("q3", conversation_id="c")
    assert prompt(bench, request_id) == "q1a1q2a2q3"


def test_two_conversations_do_not_mix(bench: Any) -> None:
    say(bench, "q1", "a1")
    request_id = bench.submit("q2", conversation_id="other")
    assert prompt(bench, request_id) == "q2"


def test_turns_that_do_not_fit_are_left_out_from_the_oldest_and_reported(bench: Any) -> None:
    for number in range(5):
        say(bench, f"{number}" * 10, "a" * 80)
    usage = say(bench, "now", "a")

    assert (usage.recent_turns, usage.left_out_turns, usage.summary_turns) == (3, 2, 0)
    assert usage.prompt_tokens == 3 * 90 + 3 <= 300


def test_the_answer_that_was_asked_for_finds_room(bench: Any) -> None:
    for number in range(4):
        say(bench, f"{number}", "a" * 89)
    usage = say(bench, "now", "a", sampling={"max_new_tokens": 150})
    assert (usage.prompt_tokens, usage.recent_turns, usage.left_out_turns) == (183, 2, 2)
    # More than half of the context cannot be asked for.
    usage = say(bench, "now", "a", sampling={"max_new_tokens": 20_000})
    assert usage.prompt_tokens <= 200


def test_a_question_that_fills_the_prompt_is_answered_without_memory(bench: Any) -> None:
    say(bench, "q1", "a1")
    usage = say(bench, "x" * 350, "a")
    assert (usage.prompt_tokens, usage.recent_turns, usage.left_out_turns) == (350, 0, 1)
    request_id = bench.submit("x" * 400, conversation_id="c")
    assert bench.ended(request_id)[-1].code == "context_exceeded"


def test_the_summary_leads_and_the_last_turns_follow(bench: Any) -> None:
    for number in range(5):
        say(bench, f"{number}", "a" * 80)
    set_summary(bench, "I am the summary", 3)
    request_id = bench.submit("now", conversation_id="c")

    assert prompt(bench, request_id) == (
        SUMMARY_QUERY["english"] + "I am the summary" + "3" + "a" * 80 + "4" + "a" * 80 + "now"
    )
    bench.say(bench.generation(request_id).sequence_id, "a", "stop")
    usage = bench.ended(request_id)[-1].usage
    assert (usage.summary_turns, usage.recent_turns, usage.left_out_turns) == (3, 2, 0)


def test_turns_between_the_summary_and_the_last_ones_are_reported(bench: Any) -> None:
    for number in range(5):
        say(bench, f"{number}", "a" * 80)
    set_summary(bench, "s" * 100, 1)
    usage = say(bench, "now", "a")
    assert (usage.summary_turns, usage.recent_turns, usage.left_out_turns) == (1, 1, 3)


def test_a_conversation_that_fits_as_a_whole_needs_no_summary(bench: Any) -> None:
    say(bench, "q1", "a1")
    say(bench, "q2", "a2")
    set_summary(bench, "s", 2)
    usage = say(bench, "now", "a")
    assert (usage.summary_turns, usage.recent_turns) == (0, 2)


def test_a_summary_that_does_not_fit_is_left_out_and_reported(bench: Any) -> None:
    for number in range(5):
        say(bench, f"{number}", "a" * 80)
    set_summary(bench, "s" * 290, 5)
    usage = say(bench, "now", "a")
    assert (usage.summary_turns, usage.recent_turns, usage.left_out_turns) == (0, 3, 2)


def test_a_later_attempt_builds_the_same_prompt_whatever_has_become_of_the_summary(
    bench: Any, new_bench: NewBench
) -> None:
    for number in range(5):
        say(bench, f"{number}", "a" * 80)
    set_summary(bench, "old", 3)
    request_id = bench.submit("now", conversation_id="c")
    first = bench.generation(request_id)
    bench.say(first.sequence_id, "ab")
    wait_for(lambda: "token" in bench.types(request_id))
    name = "default:c"
    bench.ledger.connection.hset(
        bench.ledger.keys.conversation(name), mapping={"summary": "new", "covered": 5}
    )
    bench.claims.stop()
    bench.ledger.run(calls.release(request_id, 1))

    second = new_bench(context_len=400).generation(request_id)

    assert second.prompt_ids == first.prompt_ids
    assert second.emitted_ids == [ord("a"), ord("b")]


def test_a_conversation_that_is_gone_fails_its_request(bench: Any) -> None:
    bench.claims.resize(0)
    request_id = bench.submit("q", conversation_id="c")
    bench.ledger.connection.delete(bench.ledger.keys.conversation("default:c"))
    bench.claims.resize(4)
    assert bench.ended(request_id)[-1].code == "conversation_gone"


def test_a_request_whose_memory_cannot_be_read_goes_back_to_the_queue(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, num_failures = bench.ledger.run, 0

    def sometimes(call: Any) -> Any:
        nonlocal num_failures
        if call.script == "recollect" and num_failures < 2:
            num_failures += 1
            raise RedisUnavailable("here", "it is down")
        return run(call)

    monkeypatch.setattr(bench.ledger, "run", sometimes)
    say(bench, "q", "a")
    assert num_failures == 2
    assert run(calls.conversation("default", "c")).status.num_turns == 1


def test_a_busy_conversation_refuses_a_plain_task(bench: Any) -> None:
    bench.generation(bench.submit("q", conversation_id="c"))
    bench.claims.take(bench.ticket("glmq.chat", task_id="plain", query="q2", conversation_id="c"))
    assert bench.ended("plain")[-1].code == "conversation_busy"


# --- with the real tokenizer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(DEMO if (DEMO / "config.json").exists() else tiny_checkpoint)


TEXTS = st.lists(
    st.sampled_from(["你好", "hello ", "\n", "[Round 1]\n问：", "🙂", "x" * 40, "。", "  "]), max_size=12
).map("".join)


ARCHIVES = st.lists(
    st.builds(ArchivedTurn, query=TEXTS, answer=TEXTS, tokens=st.integers(0, 60)), max_size=12
)


@given(data=st.data(), archived=ARCHIVES, unread=st.integers(0, 3), budget=st.integers(16, 400))
def test_no_prompt_exceeds_its_budget_whatever_the_archive_says_of_lengths(
    tokenizer: Tokenizer, data: st.DataObject, archived: list[ArchivedTurn], unread: int, budget: int
) -> None:
    num_turns = len(archived) + unread
    covered, query = data.draw(st.integers(0, num_turns)), data.draw(TEXTS)
    found = Recollected(None, data.draw(TEXTS), 0, covered, 0, num_turns, unread, archived)

    memory = choose(tokenizer, query, found, budget, 2048)

    recent = [turn.turn for turn in archived[memory.first - unread :]]
    assert len(recent) == memory.num_recent
    ids = tokenizer.build_prompt(query, history(memory, recent))
    if memory.num_recent or memory.covered:
        assert len(ids) <= budget
    else:
        assert ids == tokenizer.build_prompt(query)
    assert memory.covered in (0, covered)


def test_lengths_of_rounds_add_up_to_a_prompt(tokenizer: Tokenizer) -> None:
    rounds = RoundLengths(tokenizer)
    turns = [Turn("你好\n世界", "hello there"), Turn("一", "二三四"), Turn("", "")]
    ids = tokenizer.build_prompt("为什么？", turns)
    assert len(ids) == rounds.special_tokens + rounds.of_question("为什么？") + sum(
        map(rounds.of_turn, turns)
    )


def test_letters_have_no_frames() -> None:
    assert RoundLengths(Letters()).of_turn(Turn("ab", "c")) == 3
    assert prompt_budget(400, None) == 300
