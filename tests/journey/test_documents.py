"""Texts longer than the context, through real workers: pieces are shared, done once each, and end with their document."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops.demo_model.tasks import reports
from producer.client import Client, Submission
from producer.contract import Finished, Progress, SamplingParams, Started
from producer.ledger import calls
from workers.models.tokenizer import Tokenizer

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

NewWorker = Callable[..., Any]
GREEDY = SamplingParams(temperature=0.0, seed=1)


def text_of(checkpoint: Path, num_tokens: int) -> str:
    """Short reports, one a line, of about so many tokens together."""
    tokenizer, rng = Tokenizer.from_folder(checkpoint), random.Random(7)
    lines: list[str] = []
    while num_tokens > 0:
        lines.append(reports.draw(rng, "zh", False).text)
        num_tokens -= len(tokenizer.encode(lines[-1]))
    return "\n".join(lines)


def started(client: Client, request_id: str) -> list[Started]:
    """Who has begun to answer it, in order."""
    [followed] = client.ledger.run(calls.follow("", [(request_id, "0")]))
    assert followed is not None, request_id
    return [event for event in calls.events(followed.entries) if isinstance(event, Started)]


def pieces_of(client: Client, request_id: str) -> list[str]:
    levels = client.ledger.connection.hget(client.ledger.keys.request(request_id), "levels")
    return [
        f"{request_id}.{level}.{number}"
        for level, total in enumerate(str(levels).split(","), start=1)
        for number in range(1, int(total) + 1)
    ]


def done(client: Client, pieces: list[str]) -> set[str]:
    return {piece for piece in pieces if client.status(piece).state == "done"}


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


def test_a_long_text_is_summarized_with_progress_by_two_workers_each_piece_once(
    client: Client, new_worker: NewWorker, checkpoint: Path
) -> None:
    for _ in range(2):
        new_worker("--slots", "2", "--context", "1024")
    # ops/bench/documents.py does this with 30,000.
    text = text_of(checkpoint, 8_000)

    submission = client.summarize(text, max_length=64, sampling=GREEDY)
    events = list(submission.stream())

    finished = events[-1]
    assert isinstance(finished, Finished), finished
    pieces = pieces_of(client, submission.request_id)
    workers = Counter(event.worker for piece in pieces for event in started(client, piece))
    assert sum(workers.values()) == len(pieces) == finished.usage.pieces, "each was begun once"
    assert len(workers) == 2, "both took part"
    progress = [event for event in events if isinstance(event, Progress)]
    for level in {event.level for event in progress}:
        steps = [event for event in progress if event.level == level]
        assert [event.done for event in steps] == [*range(steps[0].total + 1)]
    assert finished.usage.piece_prompt_tokens >= 8_000
    assert len(started(client, submission.request_id)) == 1
    assert finished.attempts == 1


def begun(client: Client, text: str, at_least: int) -> tuple[Submission, list[str]]:
    """A document of which so many pieces are done, and not all."""
    submission = client.summarize(text, max_length=64, sampling=GREEDY)
    for event in submission.stream():
        assert isinstance(event, Progress), event
        if event.done >= at_least:
            assert event.done < event.total
            break
    return submission, pieces_of(client, submission.request_id)


def test_the_death_of_a_worker_costs_no_piece_that_is_done(
    client: Client, new_worker: NewWorker, checkpoint: Path
) -> None:
    dying, _ = (new_worker("--slots", "2", "--context", "512") for _ in range(2))
    submission, pieces = begun(client, text_of(checkpoint, 5_000), at_least=3)

    dying.end(signal.SIGKILL)
    finished_before = done(client, pieces)
    assert 3 <= len(finished_before) < len(pieces)

    finished = submission.result(120)
    assert {len(started(client, piece)) for piece in finished_before} == {1}
    unfinished = set(pieces) - finished_before
    assert sum(len(started(client, piece)) > 1 for piece in unfinished) <= 2, "only what it was at"
    assert finished.usage.pieces == len(pieces_of(client, submission.request_id))


def test_cancelling_a_document_stops_everything_within_a_second(
    client: Client, new_worker: NewWorker, checkpoint: Path
) -> None:
    worker = new_worker("--slots", "2", "--context", "512", GLMQ_LEASE_SECONDS="0.8")
    submission, pieces = begun(client, text_of(checkpoint, 8_000), at_least=2)

    begin = time.monotonic()
    submission.cancel()
    wait_until(lambda: not client.overview().num_queued and not client.overview().num_running, 1.0)
    # What it says of itself is up to a quarter of a lease old.
    wait_until(lambda: client.overview().workers[0].about["running"] == "0", 1.0)
    assert time.monotonic() - begin < 1

    assert {client.status(piece).state for piece in pieces} == {"done", "cancelled"}
    assert client.status(submission.request_id).state == "cancelled"
    assert client.chat("你好", sampling={"max_new_tokens": 2}).result(30).text
    assert worker.process.poll() is None
