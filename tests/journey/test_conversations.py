"""Conversations with real workers: folding keeps up, a killed worker costs no turn, and a prompt is the same after a takeover."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from producer.client import Client
from producer.contract import Finished, Token

pytestmark = pytest.mark.journey

GREEDY = {"temperature": 0.0, "max_new_tokens": 24}


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_many_turns_stay_within_the_context_and_are_folded(new_worker: Any, settings: Any) -> None:
    new_worker("--context", "512", "--slots", "4")
    with Client(settings) as client:
        usages = []
        for number in range(30):
            answer = client.chat(f"第{number}个问题：你好吗？", conversation_id="c", sampling=GREEDY).result(
                60
            )
            usages.append(answer.usage)
        assert max(usage.prompt_tokens for usage in usages) <= 512 - 24
        assert all(
            usage.summary_turns + usage.left_out_turns + usage.recent_turns >= number
            for number, usage in enumerate(usages)
        )
        turns = [turn.query for turn in client.conversations.turns("c")]
        assert turns == [f"第{number}个问题：你好吗？" for number in range(30)]

        def has_tried() -> bool:
            status = client.conversations.show("c").status
            # Random weights write no summary that could be accepted; trained ones do.
            return bool(status.covered or status.fold_failures)

        wait_until(has_tried)
        status = client.conversations.show("c").status
        assert bool(status.summary) == bool(status.covered)
        assert status.covered <= 30


def test_an_answer_survives_its_worker_and_becomes_one_turn(
    new_worker: Any, settings: Any, check_stream: Callable[..., Finished]
) -> None:
    first = new_worker(GLMQ_WORKER_ID="first")
    sampling = {"temperature": 0.9, "seed": 5, "max_new_tokens": 200, "min_new_tokens": 200}
    with Client(settings) as client:
        client.chat("你好", conversation_id="c", sampling=GREEDY).result(60)
        undisturbed = client.chat("你好", history=[_turn(client)], sampling=sampling).result(60)
        second = new_worker(GLMQ_WORKER_ID="second")
        wait_until(lambda: len(client.overview().workers) == 2)
        second.process.send_signal(signal.SIGSTOP)

        submission = client.chat("你好", conversation_id="c", sampling=sampling)
        events = []
        for event in submission.stream():
            events.append(event)
            if isinstance(event, Token) and len(events) == 3:
                first.process.kill()
                second.process.send_signal(signal.SIGCONT)
        assert [event.worker for event in events if event.type == "started"] == ["first", "second"]
        finished = check_stream([events[0], *(event for event in events[1:] if event.type != "started")])

        assert finished.text == undisturbed.text
        assert (finished.attempts, finished.usage.recent_turns) == (2, 1)
        assert len(list(client.conversations.turns("c"))) == 2


def _turn(client: Client) -> tuple[str, str]:
    (turn,) = client.conversations.turns("c")
    return turn.turn
