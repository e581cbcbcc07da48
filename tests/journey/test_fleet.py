"""`glmq up` with more than one worker: real engines that share the cores, one of them killed, all of them drained."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from producer.client import Client
from producer.contract import Event, Finished, SamplingParams, Token
from producer.settings import Settings

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from producer.cli import main; main()", "up"]
Check = Callable[[list[Event]], Finished]


class Up:
    """`glmq up` and what it has said: `said` the fleet's own lines, `log` its workers'."""

    def __init__(self, *options: str, settings: Settings, **environ: str) -> None:
        self.said: list[str] = []
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "REDIS_URL": settings.redis_url or "",
                "GLMQ_NAMESPACE": settings.namespace,
                "GLMQ_STATE_DIR": str(settings.state_dir),
                **environ,
            },
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.said)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.log)),
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        with pipe:
            lines.extend(pipe)

    @property
    def all_lines(self) -> str:
        return "".join([*self.said, *self.log])

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, "".join(self.said)):
            assert self.process.poll() is None, self.all_lines
            assert time.monotonic() < deadline, self.all_lines
            time.sleep(0.05)

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        for reader in self.readers:
            reader.join(10)
        return code


@pytest.fixture
def up(settings: Settings) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def new(*options: str, **environ: str) -> Up:
        started.append(Up(*options, settings=settings, **environ))
        return started[-1]

    yield new
    for each in started:
        if each.process.poll() is None:
            # Its workers are tethered to it.
            each.process.kill()
            each.process.wait()


def test_two_workers_share_the_work_survive_the_death_of_one_and_drain_together(
    up: Callable[..., Up], checkpoint: Path, client: Client, check_stream: Check
) -> None:
    fleet = up("--workers", "2", "--checkpoint", str(checkpoint), "--slots", "4", GLMQ_CONTEXT="4096")
    fleet.wait_for(r"cpu\d is ready: 2 of 2\nready\. ")
    before = {worker.about["pid"]: worker for worker in client.overview().workers}
    assert len(before) == 2
    sampling = SamplingParams(max_new_tokens=400, min_new_tokens=400, seed=1)
    streams = [client.chat(f"question {n}", sampling=sampling).stream() for n in range(8)]
    events = [[next(event for event in stream if isinstance(event, Token))] for stream in streams]
    # All eight have begun: each worker has as many of them as it has slots.
    victim = min(before)
    os.kill(int(victim), signal.SIGKILL)
    for head, stream in zip(events, streams, strict=True):
        head.extend(stream)

    assert [type(each[-1]) for each in events] == [Finished] * 8
    assert sorted({each[-1].attempts for each in events if isinstance(each[-1], Finished)}) == [1, 2]
    fleet.wait_for(r"cpu\d has ended \(killed by SIGKILL\); it is started again in 1 s")
    fleet.wait_for(r"cpu\d is ready again: 2 of 2")
    # The victim is remembered for a few seconds, in which nothing is heard of it.
    after = {worker.about["pid"] for worker in client.overview().workers} - {victim}
    assert len(after) == 2
    assert after & before.keys() == before.keys() - {victim}
    running = client.chat("one more", sampling=sampling).stream()
    head = [next(running), next(running)]

    assert fleet.end() == 0, fleet.all_lines

    assert check_stream(head + list(running)).usage.completion_tokens == 400
    assert {worker.about["pid"] for worker in client.overview().workers} <= {victim}
    assert re.search(r"draining: cpu0, cpu1\..*\n(cpu\d has stopped\n){2}$", "".join(fleet.said))
    assert {line[:15] for line in fleet.log if line.startswith("{")} == {'{"from":"cpu0",', '{"from":"cpu1",'}
    assert "Traceback" not in fleet.all_lines


def test_a_fleet_whose_workers_cannot_start_says_why_and_ends(up: Callable[..., Up], tmp_path: Path) -> None:
    fleet = up("--workers", "2", "--checkpoint", str(tmp_path / "nowhere"))

    assert fleet.process.wait(60) == 1
    for reader in fleet.readers:
        reader.join(10)

    said = "".join(fleet.said)
    assert re.search(r"cpu0 could not start \(exit code 1\): .*cannot start: .*nowhere", said)
    assert "cpu1 is not started again" in said
    assert "ready" not in said


@pytest.mark.parametrize(
    ("options", "environ", "problem"),
    [
        (("--gpus", "all", "--workers", "2"), {}, "--workers: comes with --gpus"),
        (("--workers", "2", "--device", "cpu"), {}, "--device: comes with"),
        (("--gpus", "all"), {"CUDA_VISIBLE_DEVICES": ""}, "--gpus: no GPU can be seen"),
        (("--gpus", "7"), {"CUDA_VISIBLE_DEVICES": "0,1"}, "--gpus: '7' is none of the 2"),
        ((), {"REDIS_URL": "redis://127.0.0.1:1/0"}, "Redis at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_started(
    up: Callable[..., Up], options: tuple[str, ...], environ: dict[str, str], problem: str
) -> None:
    fleet = up(*options, **environ)

    assert fleet.process.wait(60) == 1
    for reader in fleet.readers:
        reader.join(10)

    assert f"glmq: {problem}" in "".join(fleet.log)
    assert "Traceback" not in fleet.all_lines
