"""What `glmq top` makes of what the ledger says."""

from __future__ import annotations

import pytest
from rich.console import Console

from producer.cli.top import HISTORY, History, Sample, bar, duration, render, sparkline
from producer.ledger.calls import Backlog, Overview, WorkerStatus


def worker(name: str = "w1", **about: str) -> WorkerStatus:
    said = {
        "device": "cuda",
        "state": "ready",
        "running": "3",
        "slots": "8",
        "waiting": "1",
        "kv_usage": "0.95",
        "tokens_per_second": "120.0",
        "first_token": "0.02:9 2:1",
        "between_tokens": "0.03:100",
        "restarts": "0",
    }
    return WorkerStatus(name, 0.1, {**said, **about})


def backlog(**fields: object) -> Backlog:
    values: dict[str, object] = {
        "num_queued": (0, 0, 0, 0, 0, 4, 0, 0, 1, 0),
        "oldest_seconds": (0, 0, 0, 0, 0, 12.5, 0, 0, 3, 0),
        "num_running": 3,
        "num_overdue": 0,
        "num_conversations": 7,
        "num_dead": 0,
        "memory_used_bytes": 3 * 2**20,
        "memory_max_bytes": 0,
        "rejected": {},
    }
    return Backlog(**{**values, **fields})  # type: ignore[arg-type]


def shown(*workers: WorkerStatus, history: History | None = None, **fields: object) -> str:
    history = history or History()
    sample = Sample(Overview(num_queued=5, num_running=3, workers=list(workers)), backlog(**fields))
    history.add(sample)
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render("chatglm-6b", sample, history))
    return capture.get()


def test_the_queue_the_speed_and_the_latencies_are_shown() -> None:
    text = shown(worker(), worker("w2", tokens_per_second="80"))

    assert "5, the oldest for 12.5 s" in text
    assert "3 in 16 slots" in text
    assert "200" in text
    # 18 of 20 first tokens came within 20 ms, 2 within 2 s.
    assert "p95 1.8 s" in text
    assert "95%" in text
    assert "7 conversations" in text


def test_an_idle_deployment_has_no_latency_and_no_wait() -> None:
    text = shown(
        worker(first_token="", between_tokens="", tokens_per_second="0.0"),
        num_queued=(0,) * 10,
        oldest_seconds=(0,) * 10,
    )

    assert "oldest" not in text
    assert "first token     -" in text
    assert "nan" not in text


def test_no_worker_is_said_in_words() -> None:
    assert "no worker is alive" in shown()


def test_trouble_is_shown_only_when_there_is_some() -> None:
    assert "trouble" not in shown(worker())
    assert "2 leases overdue, 1 dead letters" in shown(worker(), num_overdue=2, num_dead=1)


def test_a_worker_of_another_version_is_shown_with_what_it_says() -> None:
    text = shown(WorkerStatus("old", 0.2, {"state": "ready", "tokens_per_second": "fast"}))

    assert "old" in text
    assert "?" in text


def test_history_is_bounded_and_forgets_workers_that_are_gone() -> None:
    history = History()
    for _ in range(2 * HISTORY):
        shown(worker(), worker("gone"), history=history)
    shown(worker(), history=history)

    assert len(history.speed) == HISTORY
    assert list(history.of_worker) == ["w1"]


@pytest.mark.parametrize(
    ("values", "line"), [([], ""), ([0, 0], "▁▁"), ([1, 8], "▂█"), ([0, 4, 8], "▁▅█"), ([5], "█")]
)
def test_a_sparkline_is_as_high_as_its_largest_value(values: list[float], line: str) -> None:
    assert sparkline(values) == line


@pytest.mark.parametrize(("share", "text"), [(0, "░░░░"), (0.5, "██░░"), (1, "████"), (7, "████")])
def test_a_bar_is_full_at_one(share: float, text: str) -> None:
    assert bar(share, width=4) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.5, "500 ms"),
        (12.34, "12.3 s"),
        (600, "10 min"),
        (7200, "2.0 h"),
    ],
)
def test_durations_have_a_unit_and_few_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
