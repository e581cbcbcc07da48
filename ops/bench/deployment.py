"""A deployment of its own for a benchmark: an embedded server and workers, in a temporary folder, ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from producer.embedded import EmbeddedServer
from producer.settings import Settings

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


@dataclass
class Deployment:
    """Settings for a client, and the workers by name."""

    settings: Settings
    options: tuple[str, ...]
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    num_started: int = 0

    def start_worker(self, name: str) -> None:
        """Start one, under a new id. It serves when `wait_until_ready` has returned."""
        self.num_started += 1
        environ = {
            **os.environ,
            "REDIS_URL": self.settings.redis_url or "",
            "GLMQ_STATE_DIR": str(self.settings.state_dir),
            "GLMQ_WORKER_ID": f"{name}-{self.num_started}",
            "GLMQ_METRICS_PORT": "0",
        }
        log = (self.settings.state_dir / f"{name}-{self.num_started}.log").open("w")
        with log:
            self.workers[name] = subprocess.Popen(
                [sys.executable, "-m", "workers", *self.options],
                cwd=ROOT,
                env=environ,
                stdout=log,
                stderr=log,
            )

    def log_of(self, name: str) -> str:
        return (self.settings.state_dir / f"{name}-{self.num_started}.log").read_text()

    def wait_until_ready(self, name: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "ready: " not in self.log_of(name):
            if self.workers[name].poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"worker {name} did not start:\n{self.log_of(name)}")
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        self.workers[name].kill()
        self.workers[name].wait()


@contextmanager
def deployment(num_workers: int, *options: str) -> Iterator[Deployment]:
    """A server and so many ready workers, `python -m workers` with these options. SIGTERM ends the program, and them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryDirectory(prefix="glmq-bench-") as folder,
        EmbeddedServer.start(Path(folder)) as server,
    ):
        running = Deployment(Settings(redis_url=server.url, state_dir=Path(folder)), options)
        try:
            for number in range(num_workers):
                running.start_worker(f"worker{number}")
                running.wait_until_ready(f"worker{number}")
            yield running
        finally:
            for process in running.workers.values():
                process.terminate()
            for process in running.workers.values():
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
