"""queue.lua and claim.lua on the real server: whose turn it is, and what is counted for that."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from producer.contract import (
    ChatRequest,
    DeadlineUnmeetable,
    Failed,
    Finished,
    SamplingParams,
    SummaryRequest,
    Usage,
)
from producer.contract.keys import Keys
from producer.contract.tenants import QueueBounds, QueueOrder
from producer.ledger import Claim, Ledger, calls

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker

MODEL = "chatglm-6b"
NO_AGEING = QueueOrder(ageing_claims=0)


def ask(tenant: str = "default", **fields: Any) -> ChatRequest:
    return ChatRequest(query="q", tenant=tenant, **fields)


def take(ledger: Ledger, order: QueueOrder = NO_AGEING) -> Claim:
    claim = ledger.run(calls.claim(MODEL, "worker-1", 5.0, order))
    assert claim is not None
    return claim


def tenant_of(claim: Claim) -> str:
    return str(json.loads(claim.request).get("tenant", "default"))


def priority_of(claim: Claim) -> int:
    return int(json.loads(claim.request).get("priority", 5))


def finish(ledger: Ledger, claim: Claim, tokens: int, prompt_tokens: int = 0) -> None:
    """With so many answer tokens, whose events the test spares itself."""
    usage = Usage(prompt_tokens=prompt_tokens + tokens, completion_tokens=0)
    assert ledger.run(
        calls.finish(claim.request_id, claim.attempt, Finished(reason="stop", text="", usage=usage))
    )


def usage_of(ledger: Ledger, keys: Keys, tenant: str = "default") -> dict[str, float]:
    fields: dict[str, str] = ledger.connection.hgetall(keys.usage(MODEL, tenant))  # type: ignore[assignment]
    return {name: float(value) for name, value in fields.items()}


def check_counts(ledger: Ledger, keys: Keys) -> None:
    """Everything that is counted is what counting it anew gives."""
    connection: Any = ledger.connection
    requests = [connection.hgetall(key) for key in connection.scan_iter(f"{keys.prefix}request:*")]
    tenants = {request["tenant"] for request in requests}
    queued = [request for request in requests if request["state"] == "queued"]
    running = [request for request in requests if request["state"] == "running"]
    assert connection.zcard(keys.queue(MODEL)) == len(queued)
    load = connection.hgetall(keys.load(MODEL))
    for priority in range(10):
        expected = sum(int(each["tokens"]) for each in queued if int(each["priority"]) == priority)
        assert int(load.get(f"tokens:{priority}", 0)) == expected
    assert connection.zcard(keys.deadlines) == sum("deadline" in each for each in queued)
    expected_shares = set()
    for tenant in tenants:
        own = usage_of(ledger, keys, tenant)
        its = [each for each in queued if each["tenant"] == tenant]
        assert own.get("queued", 0) == len(its)
        assert own.get("queued_tokens", 0) == sum(int(each["tokens"]) for each in its)
        assert own.get("running", 0) == sum(each["tenant"] == tenant for each in running)
        for priority in range(10):
            at_priority = sum(int(each["priority"]) == priority for each in its)
            assert connection.zcard(keys.queued(MODEL, priority, tenant)) == at_priority
            if at_priority and "held" not in own:
                expected_shares.add(f"{priority}|{tenant}")
    assert set(connection.zrange(keys.shares(MODEL), 0, -1)) == expected_shares


# --- shares -----------------------------------------------------------------------------------------------------------


def test_two_backlogged_tenants_take_turns_however_many_the_one_has_sent(
    worker: HandWorker, ledger: Ledger
) -> None:
    for _ in range(30):
        worker.submit(ask("flood"))
    for _ in range(10):
        worker.submit(ask("quiet"))
    taken = [tenant_of(take(ledger)) for _ in range(20)]
    assert Counter(taken) == {"flood": 10, "quiet": 10}
    assert taken[:2] in (["flood", "quiet"], ["quiet", "flood"])


def test_shares_are_of_tokens_and_not_of_requests(worker: HandWorker, ledger: Ledger) -> None:
    for _ in range(40):
        worker.submit(ask("long", sampling=SamplingParams(max_new_tokens=256)))
        worker.submit(ask("short", sampling=SamplingParams(max_new_tokens=1)))
    tokens: Counter[str] = Counter()
    for _ in range(40):
        claim = take(ledger)
        used = 300 if tenant_of(claim) == "long" else 50
        tokens[tenant_of(claim)] += used
        finish(ledger, claim, used)
    assert 0.45 < tokens["long"] / tokens.total() < 0.55


def test_weights_divide_the_tokens(worker: HandWorker, ledger: Ledger, keys: Keys) -> None:
    ledger.run(calls.set_tenant("paying", '{"weight": 3}', []))
    for _ in range(100):
        worker.submit(ask("paying"))
        worker.submit(ask("free"))
    draw = random.Random(7)
    tokens: Counter[str] = Counter()
    for _ in range(100):
        claim = take(ledger)
        used = draw.randint(20, 400)
        tokens[tenant_of(claim)] += used
        finish(ledger, claim, used)
    assert tokens["paying"] / tokens.total() == pytest.approx(0.75, abs=0.05)
    check_counts(ledger, keys)


def test_what_an_answer_really_took_counts_once_it_has_ended(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    worker.submit(ask(sampling=SamplingParams(max_new_tokens=200)))
    claim = take(ledger)
    estimate = usage_of(ledger, keys)["time"]
    assert 200 < estimate < 260

    finish(ledger, claim, 12, prompt_tokens=7)

    usage = usage_of(ledger, keys)
    assert (usage["time"], usage["used"]) == (19, 19)


def test_a_request_that_failed_before_its_first_token_costs_its_tenant_nothing(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    worker.submit(ask())
    claim = take(ledger)
    assert worker.fail(claim, "context_exceeded")
    assert usage_of(ledger, keys)["time"] == 0


def test_an_attempt_after_a_release_is_not_charged_again(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ask())
    claim = take(ledger)
    once = usage_of(ledger, keys)["time"]
    for _ in range(3):
        ledger.run(calls.release(request_id, claim.attempt))
        check_counts(ledger, keys)
        claim = take(ledger)
    assert usage_of(ledger, keys)["time"] == once > 0
    finish(ledger, claim, 10)
    assert usage_of(ledger, keys)["time"] == 10
    check_counts(ledger, keys)


def test_nobody_saves_up_a_share_by_being_away(worker: HandWorker, ledger: Ledger) -> None:
    for _ in range(60):
        worker.submit(ask("steady"))
    for _ in range(20):
        finish(ledger, take(ledger), 100)
    for _ in range(30):
        worker.submit(ask("away"))

    taken = [tenant_of(take(ledger)) for _ in range(20)]

    # With what it did not use meanwhile, the next twenty would all be its own.
    assert Counter(taken) == {"steady": 10, "away": 10}


def test_a_tenant_that_had_the_machine_to_itself_owes_nobody_for_it(
    worker: HandWorker, ledger: Ledger
) -> None:
    for _ in range(20):
        worker.submit(ask("early"))
        finish(ledger, take(ledger), 300)
    for _ in range(10):
        worker.submit(ask("late"))
        worker.submit(ask("early"))
    assert Counter(tenant_of(take(ledger)) for _ in range(10)) == {"early": 5, "late": 5}


def test_a_tenant_s_own_requests_keep_their_order(worker: HandWorker, ledger: Ledger) -> None:
    order = []
    for number in range(12):
        order.append(worker.submit(ask("a" if number % 2 else "b")))
    taken = [take(ledger) for _ in order]
    for tenant in "ab":
        own = [claim.request_id for claim in taken if tenant_of(claim) == tenant]
        assert own == [request_id for request_id in order if request_id in own]


def test_priority_goes_before_shares(worker: HandWorker, ledger: Ledger) -> None:
    for _ in range(5):
        worker.submit(ask("a", priority=3))
        worker.submit(ask("b", priority=4))
    taken = [take(ledger) for _ in range(10)]
    assert [tenant_of(claim) for claim in taken] == ["a"] * 5 + ["b"] * 5


def test_what_a_tenant_had_at_one_priority_counts_at_the_others(worker: HandWorker, ledger: Ledger) -> None:
    for _ in range(4):
        worker.submit(ask("a", priority=3))
    for _ in range(10):
        worker.submit(ask("a"))
        worker.submit(ask("b"))
    taken = [tenant_of(take(ledger)) for _ in range(12)]
    assert taken[:4] == ["a"] * 4
    assert Counter(taken) == {"a": 6, "b": 6}


def test_names_that_meet_in_a_key_are_still_two_tenants(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    for tenant in ("a", "a:b", "a/b", "5@a"):
        worker.submit(ask(tenant))
    assert {tenant_of(take(ledger)) for _ in range(4)} == {"a", "a:b", "a/b", "5@a"}
    check_counts(ledger, keys)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_tenant_at_its_limit_waits_and_others_pass(worker: HandWorker, ledger: Ledger, keys: Keys) -> None:
    order = QueueOrder(tenant_max_running=2, ageing_claims=0)
    for _ in range(5):
        worker.submit(ask("greedy", priority=0))
    worker.submit(ask("modest", priority=9))

    first, second, third = (take(ledger, order) for _ in range(3))

    assert [tenant_of(claim) for claim in (first, second, third)] == ["greedy", "greedy", "modest"]
    assert ledger.run(calls.claim(MODEL, "worker-1", 5.0, order)) is None
    check_counts(ledger, keys)
    finish(ledger, second, 1)
    assert tenant_of(take(ledger, order)) == "greedy"
    assert ledger.run(calls.claim(MODEL, "worker-1", 5.0, order)) is None
    check_counts(ledger, keys)


@pytest.mark.parametrize("end", ["finish", "fail", "release", "reap", "cancel"])
def test_whatever_ends_a_run_makes_room_at_the_limit(
    worker: HandWorker, ledger: Ledger, keys: Keys, end: str
) -> None:
    order = QueueOrder(tenant_max_running=1)
    worker.submit(ask())
    worker.submit(ask())
    claim = ledger.run(calls.claim(MODEL, "worker-1", 0.001, order))
    assert claim is not None
    assert ledger.run(calls.claim(MODEL, "worker-1", 5.0, order)) is None
    match end:
        case "finish":
            finish(ledger, claim, 1)
        case "fail":
            worker.fail(claim, "internal_error")
        case "release":
            ledger.run(calls.release(claim.request_id, claim.attempt))
        case "reap":
            time.sleep(0.01)
            assert ledger.run(calls.reap()) == [claim.request_id]
        case "cancel":
            ledger.run(calls.cancel(claim.request_id))
            worker.finish(claim, "", reason="cancelled")
    check_counts(ledger, keys)
    assert ledger.run(calls.claim(MODEL, "worker-1", 5.0, order)) is not None
    check_counts(ledger, keys)


def test_workers_are_called_when_a_held_tenant_may_go_on(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    order = QueueOrder(tenant_max_running=1)
    for _ in range(2):
        worker.submit(ask())
    claim = take(ledger, order)
    ledger.run(calls.renew("worker-1", [(claim.request_id, claim.attempt)], 5.0))
    with ledger.connection.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(keys.control("worker-1"))
        listener.get_message(timeout=1)
        finish(ledger, claim, 1)
        message = listener.get_message(timeout=1) or listener.get_message(timeout=1)
    assert message is not None
    assert message["data"] == "look"


def test_a_limit_of_a_tenant_s_own_goes_before_the_default(worker: HandWorker, ledger: Ledger) -> None:
    ledger.run(calls.set_tenant("one", '{"max_running": 1}', []))
    ledger.run(calls.set_tenant("any", '{"max_running": 0}', []))
    for _ in range(4):
        worker.submit(ask("one"))
        worker.submit(ask("any"))
    order = QueueOrder(tenant_max_running=2)
    taken = Counter(tenant_of(take(ledger, order)) for _ in range(5))
    assert taken == {"one": 1, "any": 4}
    assert ledger.run(calls.claim(MODEL, "worker-1", 5.0, order)) is None


# --- ageing -----------------------------------------------------------------------------------------------------------


def test_the_least_urgent_progresses_under_a_flood_of_more_urgent_ones(
    worker: HandWorker, ledger: Ledger
) -> None:
    order = QueueOrder(ageing_seconds=0.05, ageing_claims=8)
    old = [worker.submit(ask(priority=9)) for _ in range(3)]
    time.sleep(0.06)
    taken = []
    for _ in range(40):
        worker.submit(ask(priority=0))
        taken.append(take(ledger, order).request_id)
    places = [taken.index(request_id) for request_id in old]
    assert [later - earlier for earlier, later in itertools.pairwise(places)] == [8, 8]
    assert places[0] < 8


def test_what_has_not_waited_long_enough_does_not_go_first(worker: HandWorker, ledger: Ledger) -> None:
    order = QueueOrder(ageing_seconds=60, ageing_claims=2)
    worker.submit(ask(priority=9))
    for _ in range(10):
        worker.submit(ask(priority=0))
    assert [priority_of(take(ledger, order)) for _ in range(11)] == [0] * 10 + [9]


def test_of_several_aged_priorities_the_one_that_waits_longest_goes_first(
    worker: HandWorker, ledger: Ledger
) -> None:
    order = QueueOrder(ageing_seconds=0.001, ageing_claims=2)
    for priority in (7, 9, 8):
        worker.submit(ask(priority=priority))
        time.sleep(0.005)
    for _ in range(6):
        worker.submit(ask(priority=0))
    taken = [priority_of(take(ledger, order)) for _ in range(6)]
    assert [priority for priority in taken if priority] == [7, 9, 8]


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_request_deep_in_the_queue_ends_at_its_deadline(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    for _ in range(20):
        worker.submit(ask(priority=0))
    deep = worker.submit(ask(priority=9, deadline_seconds=0.02))
    time.sleep(0.03)

    # The reaper comes by.
    ledger.run(calls.reap())

    assert ledger.run(calls.status(deep)).state == "failed"
    [followed] = ledger.run(calls.follow("", [(deep, "0-0")]))
    assert followed is not None
    [event] = calls.events(followed.entries)
    assert isinstance(event, Failed)
    assert event.code == "deadline_exceeded"
    check_counts(ledger, keys)


def test_a_running_request_whose_worker_is_away_ends_with_its_lease_once_its_time_is_over(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    request_id = worker.submit(ask(deadline_seconds=0.02))
    assert worker.claim(lease_seconds=0.01) is not None
    time.sleep(0.03)
    ledger.run(calls.reap())
    assert ledger.run(calls.status(request_id)).state == "failed"
    check_counts(ledger, keys)


# --- everything together ----------------------------------------------------------------------------------------------


def test_the_counts_agree_after_whatever_happens_to_requests(
    worker: HandWorker, ledger: Ledger, keys: Keys
) -> None:
    draw = random.Random(3)
    order = QueueOrder(tenant_max_running=3, ageing_seconds=0.01, ageing_claims=4)
    claims: list[Claim] = []
    known: list[str] = []
    for step in range(600):
        match draw.randrange(9):
            case 0 | 1 | 2:
                deadline = draw.choice([None, None, 0.01, 60])
                request = ask(draw.choice("abc"), priority=draw.randrange(10), deadline_seconds=deadline)
                with contextlib.suppress(DeadlineUnmeetable):
                    known.append(worker.submit(request))
            case 3 | 4:
                lease = draw.choice([0.001, 60.0])
                if claim := ledger.run(calls.claim(MODEL, "worker-1", lease, order)):
                    claims.append(claim)
            case 5 if claims:
                claim = claims.pop(draw.randrange(len(claims)))
                ledger.run(calls.finish(claim.request_id, claim.attempt, Finished(reason="stop", text="")))
            case 6 if claims:
                claim = claims.pop(draw.randrange(len(claims)))
                ledger.run(calls.release(claim.request_id, claim.attempt))
            case 7 if known:
                ledger.run(calls.cancel(draw.choice(known)))
            case 8:
                ledger.run(calls.reap())
        if step % 20 == 0:
            check_counts(ledger, keys)
    check_counts(ledger, keys)


def test_a_document_s_pieces_are_counted_in_its_stead(worker: HandWorker, ledger: Ledger, keys: Keys) -> None:
    text = "很长的文章。" * 3000
    request_id = worker.submit(SummaryRequest(text=text))
    claim = take(ledger)
    whole = usage_of(ledger, keys)["time"]
    assert whole > 10_000
    pieces = [SummaryRequest(text=text[:600], max_length=64) for _ in range(3)]
    ledger.run(calls.split(request_id, claim.attempt, level=1, priority=6, pieces=pieces))
    assert usage_of(ledger, keys)["time"] == 0
    check_counts(ledger, keys)

    for _ in pieces:
        finish(ledger, take(ledger), 80)
        check_counts(ledger, keys)
    assert usage_of(ledger, keys)["used"] == 240

    reduced = take(ledger)
    assert reduced.request_id == request_id
    charged = usage_of(ledger, keys)["time"]
    finish(ledger, reduced, 100)
    after = usage_of(ledger, keys)
    assert after["used"] == 340
    assert charged - 5000 < after["time"] < charged
    check_counts(ledger, keys)


def test_many_tenants_with_long_queues_do_not_slow_a_claim(ledger: Ledger, keys: Keys) -> None:
    """Measured on a small queue and on a large one in the same moment, so that a busy machine does not matter."""

    def fill(model: str, tenants: int, each: int) -> None:
        for tenant in range(tenants):
            for _ in range(each):
                ledger.run(calls.submit(ask(f"t{tenant}"), model=model, bounds=_UNBOUNDED))

    fill("small", 2, 100)
    fill("large", 200, 25)
    spent: dict[str, list[float]] = {"small": [], "large": []}
    for _ in range(150):
        for model, times in spent.items():
            begin = time.perf_counter()
            assert ledger.run(calls.claim(model, "w", 60.0)) is not None
            times.append(time.perf_counter() - begin)
    small, large = (sorted(times)[len(times) // 2] for times in spent.values())
    assert large < 2 * small + 0.0005


_UNBOUNDED = QueueBounds(0, 0, 0, 0)
