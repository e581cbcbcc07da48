"""How a worker starts, refuses to start, drains, and survives its engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from producer.celery_settings import celery_settings
from producer.client import Client
from producer.contract import Event, Finished, SamplingParams, Started, Token
from producer.embedded import EmbeddedServer
from producer.settings import Settings

pytestmark = [pytest.mark.journey, pytest.mark.timeout(180)]

NewWorker = Callable[..., Any]
Check = Callable[[list[Event]], Finished]


@pytest.fixture
def incomplete(checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the checkpoint without the files of this pattern."""

    def copy_without(pattern: str) -> Path:
        folder = tmp_path / "checkpoint"
        names = [path.name for path in checkpoint.glob(pattern)]
        assert names
        shutil.copytree(checkpoint, folder, ignore=lambda _folder, _names: names)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return folder

    return copy_without


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("*.model", "ice_text.model"), ("config.json", "config.json"), ("*model.*[ns]", "weights")],
)
def test_a_checkpoint_with_a_missing_file_stops_the_worker_with_its_name(
    new_worker: NewWorker, incomplete: Callable[[str], Path], pattern: str, said: str
) -> None:
    worker = new_worker(checkpoint=incomplete(pattern), ready=False)

    assert worker.process.wait(60) == 1
    assert "cannot start: " in worker.log
    assert said in worker.log
    assert "Unrecoverable" not in worker.log


def test_a_worker_without_redis_says_where_it_looked(new_worker: NewWorker) -> None:
    worker = new_worker(ready=False, REDIS_URL="")

    assert worker.process.wait(60) == 1
    assert "glmq up" in worker.log
    assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("variable", "value"), [("GLMQ_SLOTS", "many"), ("GLMQ_DEVICE", "tpu"), ("GLMQ_LEASE_SECONDS", "0.1")]
)
def test_a_bad_setting_stops_the_start_and_names_its_variable(
    new_worker: NewWorker, variable: str, value: str
) -> None:
    worker = new_worker(ready=False, **{variable: value})

    assert worker.process.wait(60) == 1
    assert f"cannot start: {variable}: " in worker.log
    assert "Traceback" not in worker.log


def test_the_worker_imports_no_torch() -> None:
    script = "import sys, workers.worker, workers.__main__; sys.exit('torch' in sys.modules)"

    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_the_celery_process_never_maps_torch(road: Any) -> None:
    """Not after it has answered, either."""
    with Client(road.settings) as client:
        client.chat("hello", sampling=SamplingParams(max_new_tokens=2, seed=1)).result(30)

    assert "torch" not in Path(f"/proc/{road.process.pid}/maps").read_text()
    assert "torch" in Path(f"/proc/{road.engine_pid()}/maps").read_text()


def test_a_drain_finishes_what_runs_and_leaves_the_rest_to_others(
    new_worker: NewWorker, settings: Settings, client: Client, check_stream: Check
) -> None:
    worker = new_worker("--slots", "2")
    sampling = SamplingParams(max_new_tokens=200, min_new_tokens=200, seed=1)
    submissions = [client.chat(f"question {number}", sampling=sampling) for number in range(5)]
    streams = [submission.stream() for submission in submissions]
    for stream in streams[:2]:
        next(event for event in stream if isinstance(event, Token))

    assert worker.end() == 0

    states = [submission.status().state for submission in submissions]
    assert states == ["done", "done", "queued", "queued", "queued"]
    assert client.overview().workers == []
    new_worker("--slots", "2")
    for submission in submissions[2:]:
        assert check_stream(list(submission.stream())).attempts == 1


def test_what_does_not_fit_the_grace_time_is_released_and_goes_on_elsewhere(
    new_worker: NewWorker, client: Client
) -> None:
    worker = new_worker("--grace-seconds", "0")
    sampling = SamplingParams(max_new_tokens=500, min_new_tokens=500, temperature=0.9, seed=7)
    submission = client.chat("a long story", sampling=sampling)
    stream = submission.stream()
    events = [next(stream) for _ in range(4)]

    assert worker.end() == 0
    assert submission.status().state == "queued"
    new_worker()
    events += stream

    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.attempts == 2
    assert [event.attempt for event in events if isinstance(event, Started)] == [1, 2]
    assert "".join(event.text for event in events if isinstance(event, Token)) == finished.text
    # And it is what one worker alone would have said.
    assert client.chat("a long story", sampling=sampling).result(60).text == finished.text


def test_a_second_signal_does_not_wait_for_running_requests(new_worker: NewWorker, client: Client) -> None:
    worker = new_worker("--grace-seconds", "600")
    submission = client.chat("x", sampling=SamplingParams(min_new_tokens=4096, seed=1))
    next(event for event in submission.stream() if isinstance(event, Token))

    worker.process.send_signal(signal.SIGINT)
    worker.wait_for_log("draining: 1 requests")
    begin = time.monotonic()
    assert worker.end(signal.SIGINT) == 0

    assert time.monotonic() - begin < 6
    assert submission.status().state == "queued"


def test_a_signal_while_the_model_loads_ends_the_worker(new_worker: NewWorker, settings: Settings) -> None:
    worker = new_worker(ready=False)
    with Client(settings) as client:
        deadline = time.monotonic() + 60
        while not client.overview().workers:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    assert worker.end() == 0
    assert "ready: " not in worker.log


def test_a_killed_engine_is_started_again_and_a_killed_worker_takes_its_engine_along(
    new_worker: NewWorker, client: Client
) -> None:
    worker = new_worker()
    sampling = SamplingParams(max_new_tokens=400, min_new_tokens=400, temperature=0.9, seed=7)
    submission = client.chat("a long story", sampling=sampling)
    stream = submission.stream()
    events = [next(stream) for _ in range(4)]

    os.kill(worker.engine_pid(), signal.SIGKILL)
    events += stream

    finished = events[-1]
    assert isinstance(finished, Finished)
    assert "".join(event.text for event in events if isinstance(event, Token)) == finished.text
    assert finished.attempts == 2
    assert client.chat("a long story", sampling=sampling).result(60).text == finished.text
    assert "the engine died" in worker.log

    # The other way round: a worker that is killed takes its engine along.
    engine = worker.engine_pid()

    worker.process.kill()
    worker.process.wait()

    deadline = time.monotonic() + 10
    while Path(f"/proc/{engine}/stat").exists() and " Z " not in Path(f"/proc/{engine}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_redis_that_dies_and_comes_back_costs_a_pause_and_no_token(
    new_worker: NewWorker, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "mortal"
    server = EmbeddedServer.start(folder)
    worker = new_worker(REDIS_URL=server.url)
    with Client(replace(settings, redis_url=server.url)) as client:
        sampling = SamplingParams(max_new_tokens=500, min_new_tokens=500, temperature=0.9, seed=7)
        submissions = [client.chat(f"question {number}", sampling=sampling) for number in range(3)]
        streams = [submission.stream() for submission in submissions]
        heads = [[next(stream) for _ in range(3)] for stream in streams]

        os.kill(server.pid, signal.SIGKILL)
        time.sleep(1)
        again = EmbeddedServer.start(folder)
        assert again.url == server.url

        for head, stream in zip(heads, streams, strict=True):
            events = head + list(stream)
            finished = events[-1]
            assert isinstance(finished, Finished)
            tokens = [event for event in events if isinstance(event, Token)]
            assert [token.index - len(token.ids) for token in tokens] == [0, *(t.index for t in tokens[:-1])]
            assert "".join(token.text for token in tokens) == finished.text
            assert finished.usage.completion_tokens == 500
        # The broker's connection comes back by itself too.
        assert client.chat("and now?", sampling=SamplingParams(max_new_tokens=2, seed=1)).result(30)
        assert worker.end() == 0
        assert "Unrecoverable" not in worker.log
    again.stop()


def test_a_task_that_is_revoked_with_terminate_is_cancelled(road: Any) -> None:
    app = Celery("revoker", set_as_current=False)
    app.conf.update(celery_settings(road.settings.redis_url, road.settings.namespace))
    sampling = {"min_new_tokens": 4096}
    queue = road.settings.keys.celery_queue(road.settings.model)
    with Client(road.settings) as client:
        task = app.send_task("glmq.chat", kwargs={"query": "x", "sampling": sampling}, queue=queue)
        deadline = time.monotonic() + 20
        while client.ledger.connection.hget(road.settings.keys.request(task.id), "state") != "running":
            assert time.monotonic() < deadline
            time.sleep(0.02)

        app.control.revoke(task.id, terminate=True)

        finished = list(client.stream(task.id))[-1]
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
    app.close()
