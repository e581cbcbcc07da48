"""From a producer through Redis to a worker, and back as a stream."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from producer.client import AsyncClient, Client
from producer.contract import (
    ChatRequest,
    Event,
    Finished,
    RequestCancelled,
    RequestFailed,
    SamplingParams,
    Token,
)
from producer.ledger import calls
from producer.tickets import Tickets

pytestmark = [pytest.mark.journey, pytest.mark.timeout(180)]

Check = Callable[[list[Event]], Finished]

ENDLESS = SamplingParams(min_new_tokens=4096, seed=1)
"""Keeps the engine busy until somebody cancels it."""


@pytest.fixture
def client(road_client: Client) -> Client:
    return road_client


def test_a_chat_streams_from_the_producer_to_the_engine_and_back(client: Client, check_stream: Check) -> None:
    submission = client.chat("你好", sampling=SamplingParams(max_new_tokens=32, seed=3))

    finished = check_stream(list(submission.stream()))

    assert finished.reason in ("stop", "length")
    assert finished.usage.prompt_tokens > 2
    assert 0 < finished.usage.completion_tokens <= 32


def test_a_summary_streams_like_a_chat(client: Client, check_stream: Check) -> None:
    submission = client.summarize("Drink water. Sleep well.", max_length=16, sampling=SamplingParams(seed=3))

    finished = check_stream(list(submission.stream()))

    assert 0 < finished.usage.completion_tokens <= 16


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(client: Client) -> None:
    sampling = SamplingParams(max_new_tokens=40, temperature=0.9, seed=11)
    alone = client.chat("How do I sleep better?", sampling=sampling).result(60)

    company = [client.chat(f"question {number}", sampling=sampling) for number in range(10)]
    again = client.chat("How do I sleep better?", sampling=sampling).result(60)

    assert again.text == alone.text
    for submission in company:
        submission.result(60)


def test_a_stop_text_ends_an_answer(client: Client) -> None:
    whole = client.chat("你好", sampling=SamplingParams(max_new_tokens=60, temperature=0, seed=1)).result(60)
    stop = whole.text[len(whole.text) // 2 :][:2]

    sampling = SamplingParams(max_new_tokens=60, temperature=0, seed=1, stop=(stop,))
    cut = client.chat("你好", sampling=sampling).result(60)

    assert cut.reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)].rstrip()


def test_two_hundred_streams_at_once_are_each_complete_and_in_order(
    client: Client, check_stream: Check
) -> None:
    submissions = [
        client.chat(f"第{number}个问题", sampling=SamplingParams(max_new_tokens=24, seed=number))
        for number in range(200)
    ]

    with ThreadPoolExecutor(200) as readers:
        streams = list(readers.map(lambda submission: list(submission.stream()), submissions))

    for submission, events in zip(submissions, streams, strict=True):
        assert check_stream(events) == submission.result(10)


def test_a_running_request_that_is_cancelled_ends_with_its_text_so_far(client: Client) -> None:
    submission = client.chat("hello", sampling=ENDLESS)
    events = submission.stream()
    texts = []
    while len(texts) < 5:
        event = next(events)
        if isinstance(event, Token):
            texts.append(event.text)

    begin = time.monotonic()
    assert submission.cancel() == "running"
    for event in events:
        if isinstance(event, Token):
            texts.append(event.text)
        else:
            assert isinstance(event, Finished)
            assert event.reason == "cancelled"
            assert event.text == "".join(texts)

    assert time.monotonic() - begin < 3
    with pytest.raises(RequestCancelled):
        submission.result(5)


def test_a_queued_request_that_is_cancelled_never_starts(client: Client) -> None:
    # All 64 slots are taken, so that it has to wait.
    running = [client.chat("busy", sampling=ENDLESS, priority=0) for _ in range(64)]
    try:
        queued = client.chat("never", priority=9)
        time.sleep(0.3)
        assert queued.cancel() == "queued"

        (finished,) = queued.stream()
        assert isinstance(finished, Finished)
        assert (finished.reason, finished.text, finished.attempts) == ("cancelled", "", 0)
        assert queued.status().attempt == 0
    finally:
        for submission in running:
            submission.cancel()
    for submission in running:
        with pytest.raises(RequestCancelled):
            submission.result(10)


def test_a_lost_ticket_costs_about_a_second(client: Client, check_stream: Check) -> None:
    request = ChatRequest(query="nobody was told", sampling=SamplingParams(max_new_tokens=4, seed=1))
    begin = time.monotonic()
    submitted = client.ledger.run(calls.submit(request, model=client.model))

    finished = check_stream(list(client.stream(submitted.request_id)))

    assert time.monotonic() - begin < 4
    assert finished.timings.queue_seconds < 2


def test_a_ticket_that_comes_twice_changes_nothing(client: Client, check_stream: Check) -> None:
    tickets = Tickets(client.redis_url, client.settings.keys)
    submission = client.chat("twice", sampling=SamplingParams(max_new_tokens=8, seed=1))
    for _ in range(3):
        assert tickets.send(client.model)

    assert check_stream(list(submission.stream())).attempts == 1
    # The spare ones found nothing to do and have freed their slots.
    assert client.chat("next", sampling=SamplingParams(max_new_tokens=2, seed=1)).result(10)
    tickets.close()


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"adapter": "poetry"}, "unknown_adapter", "'poetry' is not loaded"),
        ({"query": "字" * 20_000}, "context_exceeded", "the context of"),
        ({"history": [("q" * 40_000, "a")]}, "context_exceeded", "history: "),
    ],
)
def test_a_request_that_cannot_be_answered_fails_with_what_to_do(
    client: Client, fields: dict[str, Any], code: str, text: str
) -> None:
    request = client.chat(**{"query": "hello", **fields})

    with pytest.raises(RequestFailed) as failed:
        request.result(30)

    assert failed.value.code == code
    assert text in failed.value.message
    assert request.status().state == "failed"


def test_a_reader_that_comes_back_goes_on_from_its_last_token(client: Client) -> None:
    submission = client.chat("hello", sampling=SamplingParams(max_new_tokens=30, min_new_tokens=30, seed=5))
    whole = submission.result(30)

    def tokens(after: int) -> Iterator[Token]:
        return (event for event in client.stream(submission.request_id, after) if isinstance(event, Token))

    all_texts = [text for token in tokens(0) for text in token.texts]
    for after in (1, 7, 29, 30):
        assert "".join(text for token in tokens(after) for text in token.texts) == "".join(all_texts[after:])
    assert "".join(all_texts) == whole.text


def test_the_worker_tells_what_it_does(client: Client) -> None:
    submission = client.chat("busy", sampling=ENDLESS)
    try:
        deadline = time.monotonic() + 10
        while True:
            (worker,) = client.overview().workers
            if worker.about["running"] == "1" and float(worker.about["tokens_per_second"]) > 0:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert worker.about["state"] == "ready"
        assert worker.about["slots"] == "64"
    finally:
        submission.cancel()


def test_many_clients_in_many_threads_share_one_worker(
    client: Client, road: Any, check_stream: Check
) -> None:
    """Each client has a reader of its own; none gets another's events."""
    problems: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            with Client(road.settings) as own:
                sampling = SamplingParams(max_new_tokens=10, seed=number)
                check_stream(list(own.chat(f"question {number}", sampling=sampling).stream()))
        except BaseException as error:  # noqa: BLE001  (reported below, by the test's own thread)
            problems.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert problems == []


def test_one_event_loop_may_follow_more_requests_than_it_has_connections(
    road: Any, check_stream: Check
) -> None:
    async def ask(client: AsyncClient, number: int) -> list[Event]:
        submission = await client.chat(f"q{number}", sampling=SamplingParams(max_new_tokens=3, seed=number))
        return [event async for event in submission.stream()]

    async def ask_all() -> list[list[Event]]:
        async with AsyncClient(road.settings) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(150)))

    for events in asyncio.run(ask_all()):
        check_stream(events)


def test_the_log_has_ids_and_no_text_of_a_user(client: Client, road: Any) -> None:
    submission = client.chat(
        "my secret is Rumpelstilzchen", sampling=SamplingParams(max_new_tokens=4, seed=1)
    )
    finished = submission.result(30)

    road.wait_for_log(f'"request_id":"{submission.request_id}"', 5)
    (line,) = (json.loads(line) for line in road.log.splitlines() if submission.request_id in line)
    assert (line["event"], line["reason"]) == ("answered", finished.reason)
    assert "Rumpelstilzchen" not in road.log
