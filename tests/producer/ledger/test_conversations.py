"""A conversation in the ledger: one answer at a time, each finished one a turn exactly once, summaries by compare-and-set."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from producer.contract import ChatRequest, ConversationBusy, Finished, FoldRequest, UnknownConversation, Usage
from producer.contract.conversation import FoldMemory, PromptMemory
from producer.contract.keys import Keys, conversation_name
from producer.ledger import Claim, ConversationStatus, Ledger, calls
from tests.producer.conftest import MODEL

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

HOME = "home"


def ask(query: str, conversation_id: str = HOME, **fields: object) -> ChatRequest:
    return ChatRequest(query=query, conversation_id=conversation_id, **fields)


def status(ledger: Ledger, tenant: str = "default") -> ConversationStatus:
    return ledger.run(calls.conversation(tenant, HOME)).status


def archived(ledger: Ledger) -> list[tuple[str, str]]:
    return [turn.turn for turn in ledger.run(calls.conversation("default", HOME, count=1000)).turns]


def take(worker: HandWorker) -> Claim:
    claim = worker.claim()
    assert claim is not None
    worker.start(claim)
    return claim


def talk(worker: HandWorker, *turns: tuple[str, str]) -> None:
    """These turns, each asked and answered."""
    for query, answer in turns:
        worker.submit(ask(query))
        worker.answer(take_unstarted(worker), answer)


def take_unstarted(worker: HandWorker) -> Claim:
    claim = worker.claim()
    assert claim is not None
    return claim


def queue_fold(worker: HandWorker, first: int, request_id: str) -> bool:
    request = FoldRequest(conversation_id=HOME, first=first, priority=8)
    return worker.ledger.run(calls.fold(request, request_id=request_id, model=MODEL))


def remember(worker: HandWorker, claim: Claim, first: int, last: int) -> None:
    memory = FoldMemory(first=first, last=last).model_dump_json()
    assert worker.ledger.run(calls.remember(claim.request_id, claim.attempt, memory)) == memory


# --- one answer at a time ------------------------------------------------------------------------------------------------


def test_a_second_question_is_refused_while_the_first_waits_or_runs(worker: HandWorker) -> None:
    request_id = worker.submit(ask("q1"))

    with pytest.raises(ConversationBusy, match=request_id):
        worker.submit(ask("q2"))
    claim = take(worker)
    with pytest.raises(ConversationBusy, match=request_id) as refused:
        worker.submit(ask("q2"))

    assert (refused.value.conversation_id, refused.value.request_id) == (HOME, request_id)
    assert worker.finish(claim, "a1")
    worker.submit(ask("q2"))


def test_the_retry_of_a_submit_is_not_its_own_obstacle(worker: HandWorker, ledger: Ledger) -> None:
    call = calls.submit(ask("q"), model=MODEL, idempotency_key="k")
    first = ledger.run(call)
    assert ledger.run(call).request_id == first.request_id
    again = ledger.run(calls.submit(ask("q"), model=MODEL, idempotency_key="k"))
    assert again == (first.request_id, False)


def test_a_refused_question_does_not_use_up_its_idempotency_key(worker: HandWorker, ledger: Ledger) -> None:
    worker.submit(ask("q1"))
    with pytest.raises(ConversationBusy):
        ledger.run(calls.submit(ask("q2"), model=MODEL, idempotency_key="k"))
    worker.answer(take_unstarted(worker), "a1")
    assert ledger.run(calls.submit(ask("q2"), model=MODEL, idempotency_key="k")).is_new


def test_conversations_and_tenants_do_not_wait_for_each_other(worker: HandWorker, ledger: Ledger) -> None:
    worker.submit(ask("q"))
    worker.submit(ask("q", "office"))
    worker.submit(ask("q", tenant="acme"))
    assert status(ledger).busy != status(ledger, "acme").busy


def test_names_of_tenants_and_conversations_cannot_be_confused() -> None:
    assert conversation_name("a:b", "c") != conversation_name("a", "b:c")


def test_a_request_whose_trace_is_gone_is_no_obstacle(worker: HandWorker, keys: Keys, ledger: Ledger) -> None:
    request_id = worker.submit(ask("q1"))
    ledger.connection.delete(keys.request(request_id))
    worker.submit(ask("q2"))


# --- turns -------------------------------------------------------------------------------------------------------------


def test_finished_answers_are_turns_in_their_order(worker: HandWorker, ledger: Ledger) -> None:
    texts = [('你好 "q"\n/\\', "a\u0000\u2028é"), ("q2", "🙂"), ("q3", "a3")]
    talk(worker, *texts)

    assert archived(ledger) == texts
    assert status(ledger).num_turns == 3
    assert status(ledger).busy is None


def test_a_turn_is_kept_once_whatever_is_repeated(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger
) -> None:
    worker.submit(ask("q"))
    slow = take(worker)
    assert ledger.run(calls.release(slow.request_id, slow.attempt))
    claim = take(other_worker)

    assert worker.finish(slow, "late") is False
    assert other_worker.finish(claim, "a")
    assert other_worker.finish(claim, "a")

    assert archived(ledger) == [("q", "a")]


@pytest.mark.parametrize("end", ["fail", "cancel running", "cancel queued", "deadline"])
def test_an_answer_that_was_not_finished_is_no_turn(worker: HandWorker, ledger: Ledger, end: str) -> None:
    talk(worker, ("q1", "a1"))
    request_id = worker.submit(ask("q2", deadline_seconds=0.001 if end == "deadline" else None))
    if end == "cancel queued":
        ledger.run(calls.cancel(request_id))
    elif end == "deadline":
        time.sleep(0.01)
        assert worker.claim() is None
    else:
        claim = take(worker)
        worker.fail(claim, "x") if end == "fail" else worker.finish(claim, "a", "cancelled")

    assert archived(ledger) == [("q1", "a1")]
    assert status(ledger).busy is None


def test_a_conversation_whose_first_answer_failed_is_none(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    worker.submit(ask("q1"))
    worker.fail(take(worker), "x")
    with pytest.raises(UnknownConversation):
        status(ledger)
    assert ledger.connection.zcard(keys.conversations) == 0


def test_a_turn_counts_the_tokens_of_question_and_answer(worker: HandWorker, ledger: Ledger) -> None:
    worker.submit(ask("q"))
    claim = take(worker)
    memory = PromptMemory(question_tokens=9, context_len=2048).model_dump_json()
    ledger.run(calls.remember(claim.request_id, claim.attempt, memory))
    finished = Finished(reason="stop", text="a", usage=Usage(completion_tokens=4))
    ledger.run(calls.finish(claim.request_id, claim.attempt, finished))

    [turn] = ledger.run(calls.conversation("default", HOME, count=1)).turns
    assert (turn.tokens, turn.request_id) == (13, claim.request_id)
    assert status(ledger).context_len == 2048


# --- lifetime ------------------------------------------------------------------------------------------------------------


def test_a_conversation_expires_after_its_last_turn_and_not_while_it_is_answered(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    redis, name = ledger.connection, conversation_name("default", HOME)
    worker.submit(ask("q1"), conversation_seconds=50.0)
    assert redis.ttl(keys.conversation(name)) == -1
    worker.answer(take_unstarted(worker), "a1")
    for key in (keys.conversation(name), keys.turns(name)):
        assert 45 < redis.ttl(key) <= 50

    worker.submit(ask("q2"), conversation_seconds=0.05)
    assert redis.ttl(keys.turns(name)) == -1
    worker.answer(take_unstarted(worker), "a2")
    time.sleep(0.1)

    assert ledger.run(calls.conversations()).conversations == []
    assert redis.zcard(keys.conversations) == 0
    with pytest.raises(UnknownConversation):
        status(ledger)


def test_conversations_are_listed_by_tenant_the_latest_first(worker: HandWorker, ledger: Ledger) -> None:
    for conversation_id, tenant in (("a", "acme"), ("b", "acme"), ("c", "acmeplus")):
        worker.submit(ask("q", conversation_id, tenant=tenant))
        worker.answer(take_unstarted(worker), "a")
        time.sleep(0.002)

    listed = ledger.run(calls.conversations("acme")).conversations
    assert [(one.conversation_id, one.num_turns) for one in listed] == [("b", 1), ("a", 1)]
    everybody = ledger.run(calls.conversations()).conversations
    assert [one.conversation_id for one in everybody] == ["c", "b", "a"]


def test_pages_of_a_list_join_without_a_gap(worker: HandWorker, ledger: Ledger) -> None:
    for number in range(5):
        worker.submit(ask("q", f"c{number}"))
    at, seen = 0, []
    while at is not None:
        at, page = ledger.run(calls.conversations("default", at=at, num_looked_at=2))
        seen += [one.conversation_id for one in page]
    assert sorted(seen) == [f"c{number}" for number in range(5)]


# --- memory ------------------------------------------------------------------------------------------------------------


def test_the_last_turns_are_read_within_the_given_bounds(worker: HandWorker, ledger: Ledger) -> None:
    talk(worker, *((f"q{i}", "a" * 100) for i in range(40)))
    request_id = worker.submit(ask("now"))

    def tail(max_turns: int, max_bytes: int) -> tuple[int, list[str]]:
        found = ledger.run(calls.recollect(request_id, max_turns=max_turns, max_bytes=max_bytes))
        assert (found.memory, found.num_turns) == (None, 40)
        return found.first, [turn.query for turn in found.turns]

    assert tail(1000, 10**6) == (0, [f"q{i}" for i in range(40)])
    assert tail(18, 10**6) == (22, [f"q{i}" for i in range(22, 40)])
    first, queries = tail(1000, 5000)
    assert queries == [f"q{i}" for i in range(first, 40)]
    assert 15 < len(queries) < 30
    assert tail(1000, 10) == (40, [])


def test_what_was_remembered_first_decides_what_later_attempts_read(
    worker: HandWorker, ledger: Ledger
) -> None:
    talk(worker, ("q0", "a"), ("q1", "a"), ("q2", "a"))
    worker.submit(ask("now"))
    first = take(worker)
    kept = PromptMemory(summary="s", covered=1, first=1, num_turns=3).model_dump_json()
    assert ledger.run(calls.remember(first.request_id, first.attempt, kept)) == kept
    ledger.run(calls.release(first.request_id, first.attempt))
    second = take(worker)

    assert ledger.run(calls.remember(second.request_id, first.attempt, "{}")) is None
    other = PromptMemory(first=0, num_turns=3).model_dump_json()
    assert ledger.run(calls.remember(second.request_id, second.attempt, other, worker="another")) is None
    assert ledger.run(calls.remember(second.request_id, second.attempt, other, worker=second.worker)) == kept
    found = ledger.run(calls.recollect(second.request_id, max_turns=0, max_bytes=0))
    assert found.memory == kept
    assert (found.first, [turn.query for turn in found.turns]) == (1, ["q1", "q2"])


# --- folding -------------------------------------------------------------------------------------------------------------


def test_a_fold_sets_the_summary_and_what_it_covers(worker: HandWorker, ledger: Ledger) -> None:
    talk(worker, *((f"q{i}", "a") for i in range(4)))
    assert queue_fold(worker, 0, "f1")
    assert status(ledger).folding == "f1"
    claim = take(worker)
    found = ledger.run(calls.recollect("f1", max_turns=3, max_bytes=10**6, from_head=True))
    assert [turn.query for turn in found.turns] == ["q0", "q1", "q2"]
    remember(worker, claim, 0, 3)
    assert worker.finish(claim, "three questions")

    now = status(ledger)
    assert (now.summary, now.covered, now.folding) == ("three questions", 3, None)
    assert queue_fold(worker, 3, "f2")
    found = ledger.run(calls.recollect("f2", max_turns=9, max_bytes=10**6, from_head=True))
    assert (found.first, found.summary, [turn.query for turn in found.turns]) == (
        3,
        "three questions",
        ["q3"],
    )


def test_there_is_one_fold_at_a_time_and_only_from_where_the_summary_ends(
    worker: HandWorker, ledger: Ledger
) -> None:
    talk(worker, ("q0", "a"), ("q1", "a"))
    assert queue_fold(worker, 1, "f0") is False
    assert queue_fold(worker, 0, "f1")
    assert queue_fold(worker, 0, "f2") is False
    assert queue_fold(worker, 0, "f1") is False
    ledger.run(calls.cancel("f1"))

    assert status(ledger).fold_failures == 1
    assert queue_fold(worker, 0, "f2")
    assert ledger.run(calls.overview(MODEL)).num_queued == 1


@pytest.mark.parametrize("end", ["failed", "cancelled", "without memory"])
def test_a_fold_that_fails_leaves_the_old_summary(worker: HandWorker, ledger: Ledger, end: str) -> None:
    talk(worker, ("q0", "a"))
    queue_fold(worker, 0, "f1")
    claim = take(worker)
    if end != "without memory":
        remember(worker, claim, 0, 1)
    worker.fail(claim, "x") if end == "failed" else worker.finish(
        claim, "s", "cancelled" if end == "cancelled" else "stop"
    )

    now = status(ledger)
    assert (now.summary, now.covered, now.folding, now.fold_failures) == ("", 0, None, 1)


def test_a_fold_of_a_worker_that_lost_it_changes_nothing(
    worker: HandWorker, other_worker: HandWorker, ledger: Ledger
) -> None:
    talk(worker, ("q0", "a"), ("q1", "a"))
    queue_fold(worker, 0, "f1")
    slow = take(worker)
    remember(worker, slow, 0, 1)
    ledger.run(calls.release(slow.request_id, slow.attempt))
    claim = take(other_worker)

    assert worker.finish(slow, "old") is False
    assert status(ledger).covered == 0
    assert other_worker.finish(claim, "new")
    assert (status(ledger).summary, status(ledger).covered) == ("new", 1)


def test_a_success_forgets_the_failures(worker: HandWorker, ledger: Ledger) -> None:
    talk(worker, ("q0", "a"))
    queue_fold(worker, 0, "f1")
    worker.fail(take(worker), "x")
    queue_fold(worker, 0, "f2")
    claim = take(worker)
    remember(worker, claim, 0, 1)
    worker.finish(claim, "s")
    assert status(ledger).fold_failures == 0


def test_folding_does_not_make_a_conversation_busy(worker: HandWorker, ledger: Ledger) -> None:
    talk(worker, ("q0", "a"))
    queue_fold(worker, 0, "f1")
    worker.submit(ask("q1"))
    assert worker.claim().request_id != "f1"  # type: ignore[union-attr]


# --- forgetting ------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_forgotten_conversation(worker: HandWorker, ledger: Ledger, keys: Keys) -> None:
    talk(worker, ("secret", "a"), ("secret", "a"))
    for number in range(2):
        queue_fold(worker, number, f"f{number}")
        claim = take(worker)
        remember(worker, claim, number, number + 1)
        worker.finish(claim, "secret")
    ledger.run(calls.forget("default", HOME))

    # What a tenant has used, and how fast the queue drains, are numbers.
    counters = {keys.load(MODEL), keys.usage(MODEL, "default")}
    assert set(ledger.connection.keys(f"{keys.prefix}*")) <= counters
    with pytest.raises(UnknownConversation):
        ledger.run(calls.forget("default", HOME))


def test_an_answer_in_progress_is_cancelled_and_does_not_bring_the_conversation_back(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    talk(worker, ("q0", "a"))
    queue_fold(worker, 0, "f1")
    request_id = worker.submit(ask("q1"))
    claim = take(worker)
    ledger.run(calls.forget("default", HOME))

    assert ledger.run(calls.status("f1")).state == "cancelled"
    assert ledger.run(calls.status(request_id)).is_cancel_asked
    assert worker.finish(claim, "a1")
    assert 0 < ledger.connection.ttl(keys.request(request_id)) <= 10
    with pytest.raises(UnknownConversation):
        status(ledger)


def test_an_id_that_was_forgotten_can_be_used_again(worker: HandWorker, ledger: Ledger) -> None:
    worker.submit(ask("old"))
    old = take(worker)
    ledger.run(calls.forget("default", HOME))
    worker.submit(ask("new"))
    assert worker.finish(old, "old answer")
    worker.answer(take_unstarted(worker), "new answer")
    assert archived(ledger) == [("new", "new answer")]
