"""The checkpoint's own code behind the same queue: a reader cannot tell it from the native engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from producer.client import Client
from producer.contract import ChatRequest, Finished, SamplingParams, Token, Turn

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.journey,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="the extra `reference` is not installed"
    ),
]
NewWorker = Callable[..., Any]
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
REQUESTS = [
    ChatRequest(query="感冒了怎么办？", sampling=GREEDY),
    ChatRequest(
        query="And then?", history=(Turn("What is the capital of France?", "It is Paris."),), sampling=GREEDY
    ),
]


def answer_of(client: Client, request_id: str) -> Finished:
    events = list(client.stream(request_id))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert "".join(event.text for event in events if isinstance(event, Token)) == finished.text
    return finished


def test_both_backends_give_the_same_answers(
    checkpoint_with_code: Path, new_worker: NewWorker, client: Client
) -> None:
    reference = new_worker("--backend", "reference", "--trust-remote-code", checkpoint=checkpoint_with_code)
    # All at once: it takes them one at a time, and nobody waits in vain.
    request_ids = [client.submit(request).request_id for request in REQUESTS * 2]
    theirs = [answer_of(client, request_id) for request_id in request_ids]
    assert [one.text for one in theirs[:2]] == [one.text for one in theirs[2:]]
    assert reference.end() == 0, reference.log
    new_worker("--dtype", "float32", checkpoint=checkpoint_with_code)
    for request, one in zip(REQUESTS, theirs, strict=False):
        ours = answer_of(client, client.submit(request).request_id)
        assert (ours.text, ours.reason, ours.usage) == (one.text, one.reason, one.usage)


def test_a_cancelled_answer_makes_way(
    checkpoint_with_code: Path, new_worker: NewWorker, client: Client
) -> None:
    new_worker("--backend", "reference", "--trust-remote-code", checkpoint=checkpoint_with_code)
    sampling = SamplingParams(temperature=0, max_new_tokens=400, min_new_tokens=400)
    long = client.submit(ChatRequest(query="你好", sampling=sampling)).request_id
    stream = client.stream(long)
    next(event for event in stream if isinstance(event, Token))
    client.cancel(long)
    assert answer_of(client, client.submit(REQUESTS[0]).request_id).text


def test_untrusted_code_stops_the_worker_before_anything_runs(
    checkpoint_with_code: Path, copy_of: Callable[[Path], Path], new_worker: NewWorker
) -> None:
    folder = copy_of(checkpoint_with_code)
    trace = folder / "it-ran"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(trace)!r}, 'w')\n" + path.read_text())
    worker = new_worker("--backend", "reference", checkpoint=folder, ready=False)
    assert worker.process.wait(60) == 1
    assert "--trust-remote-code" in worker.log
    assert not trace.exists()
