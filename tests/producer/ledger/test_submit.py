"""submit.lua and refuse.lua on the real server."""

from __future__ import annotations

import pytest

from producer.contract import (
    ChatRequest,
    Failed,
    IdempotencyConflict,
    InvalidRequest,
    SamplingParams,
    SummaryRequest,
    decode_request,
)
from producer.contract.keys import Keys
from producer.ledger import Ledger, calls


def submit(ledger: Ledger, request: ChatRequest | SummaryRequest, **options: str) -> calls.Submitted:
    return ledger.run(calls.submit(request, model="m", **options))


def test_a_submitted_request_waits_in_its_model_s_queue(ledger: Ledger) -> None:
    request_id, is_new = submit(ledger, ChatRequest(query="怎么预防感冒？", tenant="clinic", priority=2))

    status = ledger.run(calls.status(request_id))
    assert is_new
    assert (status.state, status.model, status.tenant, status.priority) == ("queued", "m", "clinic", 2)
    assert (status.place, status.attempt, status.num_tokens, status.worker) == (0, 0, 0, None)
    assert ledger.run(calls.overview("m")).num_queued == 1
    assert ledger.run(calls.overview("another")).num_queued == 0


def test_the_request_s_own_model_goes_before_the_default(ledger: Ledger) -> None:
    request_id, _ = submit(ledger, ChatRequest(query="q", model="chatglm2"))
    assert ledger.run(calls.status(request_id)).model == "chatglm2"


def test_a_missing_seed_is_drawn_once_and_kept_with_the_request(ledger: Ledger) -> None:
    first, _ = submit(ledger, ChatRequest(query="q"))
    second, _ = submit(ledger, ChatRequest(query="q"))
    given, _ = submit(ledger, ChatRequest(query="q", sampling=SamplingParams(seed=7)))

    seeds = [
        decode_request(ledger.run(calls.status(each)).request).sampling.seed
        for each in (first, second, given)
    ]
    assert None not in seeds
    assert seeds[0] != seeds[1]
    assert seeds[2] == 7


def test_the_same_idempotency_key_and_body_are_the_same_request(ledger: Ledger) -> None:
    # The seed that is drawn differs between the two, and does not count.
    first = submit(ledger, ChatRequest(query="q"), idempotency_key="order 7/a")
    again = submit(ledger, ChatRequest(query="q"), idempotency_key="order 7/a")

    assert again.request_id == first.request_id
    assert (first.is_new, again.is_new) == (True, False)
    assert ledger.run(calls.overview("m")).num_queued == 1


@pytest.mark.parametrize(
    "other",
    [
        ChatRequest(query="another"),
        SummaryRequest(text="q"),
        ChatRequest(query="q", priority=0),
        ChatRequest(query="q", sampling=SamplingParams(seed=3)),
    ],
)
def test_an_idempotency_key_with_a_different_body_is_a_conflict(
    ledger: Ledger, other: ChatRequest | SummaryRequest
) -> None:
    first = submit(ledger, ChatRequest(query="q"), idempotency_key="k")
    with pytest.raises(IdempotencyConflict, match="'k' was used for request") as caught:
        submit(ledger, other, idempotency_key="k")
    assert caught.value.request_id == first.request_id
    assert ledger.run(calls.overview("m")).num_queued == 1


def test_idempotency_keys_of_two_tenants_never_meet(ledger: Ledger) -> None:
    # Joined by colons, these two would be the same text.
    one = submit(ledger, ChatRequest(query="q", tenant="a:b"), idempotency_key="c")
    two = submit(ledger, ChatRequest(query="q", tenant="a"), idempotency_key="b:c")
    assert one.request_id != two.request_id
    assert two.is_new


def test_an_idempotency_key_is_kept_as_long_as_asked(ledger: Ledger, keys: Keys) -> None:
    call = calls.submit(ChatRequest(query="q"), model="m", idempotency_key="k", idempotency_seconds=5)
    ledger.run(call)
    assert 4000 < ledger.connection.pttl(keys.idempotency("default", "k")) <= 5000


def test_a_submit_whose_answer_was_lost_can_be_repeated(ledger: Ledger) -> None:
    call = calls.submit(ChatRequest(query="q"), model="m")
    first, second = ledger.run(call), ledger.run(call)
    assert first == second
    assert second.is_new
    assert ledger.run(calls.overview("m")).num_queued == 1


def test_a_given_id_that_is_known_is_not_queued_again(ledger: Ledger) -> None:
    first = submit(ledger, ChatRequest(query="q"), request_id="task-1")
    again = submit(ledger, ChatRequest(query="q"), request_id="task-1")
    assert (first.is_new, again.is_new) == (True, False)
    assert ledger.run(calls.overview("m")).num_queued == 1
    with pytest.raises(IdempotencyConflict):
        submit(ledger, ChatRequest(query="other"), request_id="task-1")


@pytest.mark.parametrize("request_id", ["", "a\tb", "a\nb", "a,b", "{other}", "x" * 129])
def test_an_id_that_could_not_travel_in_a_line_is_refused(ledger: Ledger, request_id: str) -> None:
    with pytest.raises(InvalidRequest, match=r"request_id: .* cannot be an id\. Use at most 128"):
        submit(ledger, ChatRequest(query="q"), request_id=request_id)


@pytest.mark.parametrize("key", ["", "x" * 257])
def test_an_idempotency_key_has_1_to_256_characters(ledger: Ledger, key: str) -> None:
    with pytest.raises(InvalidRequest, match="idempotency_key"):
        submit(ledger, ChatRequest(query="q"), idempotency_key=key)


def test_a_refused_request_has_one_event_that_says_why(ledger: Ledger, keys: Keys) -> None:
    failed = Failed(code="invalid_request", message="query: Field required. Give it a value.")
    call = calls.refuse("task-2", {"qury": "?"}, failed, model="m", retention_seconds=60)

    assert ledger.run(call) is True
    assert ledger.run(call) is False

    [followed] = ledger.run(calls.follow("", [("task-2", "0-0")]))
    assert followed is not None
    assert followed.state == "failed"
    assert calls.events(followed.entries) == [failed]
    assert ledger.run(calls.status("task-2")).request == '{"qury": "?"}'
    assert 0 < ledger.connection.ttl(keys.request("task-2")) <= 60
    assert 0 < ledger.connection.ttl(keys.events("task-2")) <= 60
    assert ledger.run(calls.overview("m")).num_queued == 0
