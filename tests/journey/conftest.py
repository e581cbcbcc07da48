"""A real server, a real worker process and a real client. The shared worker starts once for the whole session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from producer.client import Client
from producer.contract import Event, Finished, Token
from producer.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """The bundled demo; where it has not been trained, a small model of random weights."""
    demo = ROOT / "workers" / "models" / "demo"
    if (demo / "config.json").exists():
        return demo
    folder: Path = request.getfixturevalue("tiny_checkpoint")
    return folder


@dataclass
class WorkerProcess:
    """`python -m workers` with its log."""

    settings: Settings
    checkpoint: Path
    log_path: Path
    options: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "workers")
    """What Python runs."""

    def __post_init__(self) -> None:
        environ = {
            **os.environ,
            "REDIS_URL": self.settings.redis_url or "",
            "GLMQ_NAMESPACE": self.settings.namespace,
            "GLMQ_STATE_DIR": str(self.settings.state_dir),
            "GLMQ_THREADS": "1",
            # Long enough for answers that a test has time to interrupt, whatever the checkpoint's own is.
            "GLMQ_CONTEXT": "4096",
            **self.environ,
        }
        command = [sys.executable, *self.program, "--checkpoint", str(self.checkpoint), *self.options]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for_log(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert self.process.poll() is None, f"the worker ended:\n{self.log}"
            assert time.monotonic() < deadline, f"{text!r} is not in:\n{self.log}"
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM, seconds: float = 40) -> int:
        """Send the signal and wait. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the worker did not end:\n{self.log}")

    def engine_pid(self) -> int:
        """Process id of its engine, the only child that it has."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        (child,) = [child for task in tasks for child in (task / "children").read_text().split()]
        return int(child)


@pytest.fixture
def new_worker(
    checkpoint: Path, settings: Settings, tmp_path: Path
) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts workers of the test's own deployment; ends them, however the test ends."""
    workers: list[WorkerProcess] = []

    def new(
        *options: str,
        ready: bool = True,
        checkpoint: Path = checkpoint,
        program: tuple[str, ...] = ("-m", "workers"),
        **environ: str,
    ) -> WorkerProcess:
        log_path = tmp_path / f"worker-{len(workers)}.log"
        worker = WorkerProcess(settings, checkpoint, log_path, options, environ, program)
        workers.append(worker)
        if ready:
            worker.wait_for_log("ready: ")
        return worker

    yield new
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


@pytest.fixture(scope="session")
def road(
    redis_url: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    """The session's worker, with 64 slots; its `settings` lead a client to it."""
    folder = tmp_path_factory.mktemp("road")
    namespace = f"road-{uuid.uuid4().hex[:8]}"
    settings = Settings(redis_url=redis_url, namespace=namespace, state_dir=folder)
    worker = WorkerProcess(settings, checkpoint, folder / "worker.log", ("--slots", "64"))
    worker.wait_for_log("ready: ")
    yield worker
    assert worker.end() == 0, worker.log
    assert "Traceback" not in worker.log, worker.log


@pytest.fixture
def road_client(road: WorkerProcess) -> Iterator[Client]:
    with Client(road.settings) as client:
        yield client


@pytest.fixture
def check_stream() -> Callable[[list[Event]], Finished]:
    """Every token once, in order, and all of them together the answer. Returns the last event."""

    def check(events: list[Event]) -> Finished:
        started, *tokens, finished = events
        assert started.type == "started"
        assert isinstance(finished, Finished), finished
        index = 0
        for token in tokens:
            assert isinstance(token, Token)
            assert token.index - len(token.ids) == index
            index = token.index
        assert "".join(token.text for token in tokens if isinstance(token, Token)) == finished.text
        assert finished.usage.completion_tokens == index
        return finished

    return check
