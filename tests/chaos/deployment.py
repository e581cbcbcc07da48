"""A deployment that may be maltreated: a server and workers as processes of their own, started again when they die.

It knows how to start, find and hurt processes. What is asked of them, and what must come of it, others know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from producer.embedded import EmbeddedServer, ServerBinary
from producer.settings import Settings
from producer.tether import tethered

ROOT: Final = Path(__file__).parents[2]
START_SECONDS: Final = 90.0
LOOK_SECONDS: Final = 0.02
CONTEXT_LEN: Final = 1024
"""Tokens. A prompt is never cut, so a document's piece of 2,000 tokens would hold up everybody for a second on one core; the pieces of a
context of this length take a third of that."""
OPTIONS: Final = ("--threads", "1", "--context", str(CONTEXT_LEN))


class Broken(Exception):
    """The deployment does not do what the suite needs of it: a worker that cannot start, a server that is gone."""


class Server:
    """One server of a state directory, with AOF, that can be killed and started again at the same address."""

    def __init__(self, state_dir: Path, binary: ServerBinary | None = None) -> None:
        self.state_dir = state_dir
        self._binary = binary
        self._server = EmbeddedServer.start(state_dir, binary)

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def name(self) -> str:
        return self._server.server

    @property
    def pid(self) -> int:
        return self._server.pid

    def kill(self) -> None:
        """SIGKILL: what was not written to the append-only file yet is lost."""
        os.kill(self.pid, signal.SIGKILL)
        self._server.stop()

    def start(self) -> None:
        """Again, after `kill`."""
        self._server = EmbeddedServer.start(self.state_dir, self._binary)

    def stop(self) -> None:
        self._server.stop()


@dataclass
class Worker:
    """The place of one worker, and the process that has it now."""

    name: str
    settings: Settings
    options: tuple[str, ...]
    environ: Mapping[str, str]
    redis_url: str
    module: str = "workers"
    life: int = 0
    started_at: float = 0.0
    restart_seconds: list[float] = field(default_factory=list)
    """From start to ready, of each life."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def worker_id(self) -> str:
        """As it calls itself: another one in each life."""
        return f"{self.name}-{self.life}"

    @property
    def log_path(self) -> Path:
        return self.settings.state_dir / f"{self.worker_id}.log"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start it first"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self.life += 1
        self.started_at = time.monotonic()
        environ = {
            **os.environ,
            "REDIS_URL": self.redis_url,
            "GLMQ_NAMESPACE": self.settings.namespace,
            "GLMQ_STATE_DIR": str(self.settings.state_dir),
            "GLMQ_WORKER_ID": self.worker_id,
            "GLMQ_METRICS_PORT": "0",
            "GLMQ_LOG_FORMAT": "json",
            **self.environ,
        }
        with self.log_path.open("w") as log:
            self._process = subprocess.Popen(
                tethered([sys.executable, "-m", self.module, *self.options]),
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> list[dict[str, Any]]:
        """The lines of this life that are JSON."""
        lines: list[dict[str, Any]] = []
        for line in self.log_path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def num_ready(self) -> int:
        """How often this life's engine has become ready."""
        return self.log_path.read_text(errors="replace").count('"ready: ')

    async def wait_until_ready(self, number: int = 1) -> None:
        """Until its engine has become ready so many times. Raises Broken."""
        deadline = time.monotonic() + START_SECONDS
        while self.num_ready() < number:
            if not self.is_running or time.monotonic() > deadline:
                raise Broken(f"{self.worker_id} does not get ready:\n{self.log_path.read_text()[-3000:]}")
            await asyncio.sleep(LOOK_SECONDS)
        if number == 1:
            self.restart_seconds.append(time.monotonic() - self.started_at)

    def engine_pid(self) -> int:
        """Process id of its engine. Raises Broken when it has none just now."""
        try:
            tasks = list(Path(f"/proc/{self.process.pid}/task").iterdir())
            children = [child for task in tasks for child in (task / "children").read_text().split()]
        except OSError as error:
            raise Broken(f"{self.worker_id} is gone") from error
        if len(children) != 1:
            raise Broken(f"{self.worker_id} has {len(children)} children, not one engine")
        return int(children[0])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def wait_until_ended(self, seconds: float = 60.0) -> int:
        """Its exit code. Raises Broken."""
        deadline = time.monotonic() + seconds
        while self.is_running:
            if time.monotonic() > deadline:
                raise Broken(f"{self.worker_id} does not end:\n{self.log_path.read_text()[-3000:]}")
            await asyncio.sleep(LOOK_SECONDS)
        return self.process.wait()

    def end(self) -> None:
        if self.is_running:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self._process is not None:
            self._process.wait()


@dataclass
class Deployment:
    """A server, and workers by name. `settings` lead a client to it."""

    settings: Settings
    server: Server
    workers: dict[str, Worker]

    async def start_workers(self) -> None:
        for worker in self.workers.values():
            worker.start()
        await self.wait_until_ready()

    async def wait_until_ready(self) -> None:
        for worker in self.workers.values():
            await worker.wait_until_ready()

    async def renew(self, worker: Worker) -> None:
        """Start this worker again, which has ended, and wait until it is ready."""
        worker.start()
        await worker.wait_until_ready()

    def connection(self) -> Any:
        """To the server itself, past any proxy."""
        return redis.Redis.from_url(self.server.url, decode_responses=True, socket_timeout=5)

    def leftovers(self) -> list[str]:
        """What nobody should have left behind once all requests have ended."""
        keys, found = self.settings.keys, []
        with self.connection() as connection:
            for name, key in (("queue", keys.queue(self.settings.model)), ("lease", keys.leases)):
                found += [f"{name} of {request_id}" for request_id in connection.zrange(key, 0, -1)]
            for key in connection.scan_iter(keys.running("*"), count=1000):
                found += [f"{request_id} in {key}" for request_id in connection.smembers(key)]
        return found


@contextlib.asynccontextmanager
async def deployment(
    folder: Path,
    *,
    num_workers: int = 2,
    options: tuple[str, ...] = OPTIONS,
    module: str = "workers",
    binary: ServerBinary | None = None,
    environ: Mapping[str, str] | None = None,
    redis_url: str | None = None,
    worker_urls: Mapping[str, str] | None = None,
    server: Server | None = None,
    **settings: Any,
) -> AsyncIterator[Deployment]:
    """`num_workers` ready workers with these options and environment, in this folder. All processes end with it.

    module: what a worker runs. redis_url: by which everybody reaches the server, if not directly; worker_urls: by which a worker does, by its name. server: one that
    was started already. settings: of the clients.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = server or Server(folder / "server", binary)
    try:
        # Everything is judged at the end.
        settings = {"retention_seconds": 4 * 3600, **settings}
        known = Settings(redis_url=redis_url or server.url, state_dir=folder, **settings)
        workers = {
            name: Worker(
                name,
                known,
                options,
                environ or {},
                (worker_urls or {}).get(name) or redis_url or server.url,
                module,
            )
            for name in (f"worker{number}" for number in range(num_workers))
        }
        try:
            running = Deployment(known, server, workers)
            await running.start_workers()
            yield running
        finally:
            for worker in workers.values():
                worker.end()
    finally:
        server.stop()
