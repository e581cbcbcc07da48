"""`glmq up`: everything that one machine needs to answer, in the foreground."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Collection, Sequence
from types import FrameType
from typing import Annotated

import typer

from producer.cli.worker import worker_command
from producer.contract import InvalidSetting, RedisUnavailable
from producer.embedded import EmbeddedServer
from producer.fleet import Fleet, WorkerPlan, cpu_plans, gpu_plans, num_cores
from producer.ledger import Ledger, calls
from producer.ledger.ledger import hide_password
from producer.settings import Settings

READY_TIMEOUT_SECONDS = 1.0
"""A Redis that hangs must not keep the fleet from its workers for longer."""


def up(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder of the checkpoint. Default: the bundled demo.")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="all|0,2", help="A worker on each of these GPUs.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="So many workers on the CPU, which share its cores.")
    ] = None,
) -> None:
    """Start a server if none runs, and workers: one, or one a GPU. What dies is started again. Ctrl-C drains and stops all of it.

    Further options are the worker's: see `glmq worker --help`.

    glmq up --checkpoint ./chatglm-6b --gpus all --slots 64
    """
    settings = Settings.from_environ()
    arguments = [*(("--checkpoint", checkpoint) if checkpoint else ()), *context.args]
    command = worker_command(*arguments)
    plans = _plans(gpus, workers, arguments)
    server, url = _server(settings)
    # A retry would only hold up the fleet, which asks again anyway.
    ledger = Ledger.at(url, settings.keys, timeout_seconds=READY_TIMEOUT_SECONDS, retries=0)
    try:
        # Else each worker would say by itself, after a second of loading, that there is no Redis.
        ledger.run(calls.overview(settings.model))
        fleet = Fleet(
            plans,
            command,
            lambda: _ready_pids(ledger, settings),
            environ=_environ(len(plans)),
            say=lambda line: print(line, flush=True),
            log=sys.stderr,
            on_all_ready=lambda: _say_what_next(settings),
        )
        _drain_on_signal(fleet)
        code = fleet.run()
    finally:
        ledger.close()
        if server is not None:
            server.stop()
    raise typer.Exit(code)


def _plans(gpus: str | None, workers: int | None, arguments: Sequence[str]) -> list[WorkerPlan]:
    """Which workers to start. Raises InvalidSetting."""
    if gpus is None and workers is None:
        return [WorkerPlan("worker")]
    if gpus is not None and workers is not None:
        raise InvalidSetting("--workers", "comes with --gpus, which has a worker on each", "Leave one out.")
    if _has_option(arguments, "--device"):
        raise InvalidSetting(
            "--device", "comes with --gpus or --workers, which give each its own", "Leave it out."
        )
    if gpus is not None:
        return gpu_plans(gpus, os.environ, _num_gpus)
    assert workers is not None
    is_given = bool(os.environ.get("GLMQ_THREADS")) or _has_option(arguments, "--threads")
    return cpu_plans(workers, None if is_given else max(num_cores() // workers, 1))


def _has_option(arguments: Sequence[str], option: str) -> bool:
    return any(argument.partition("=")[0] == option for argument in arguments)


def _num_gpus() -> int:
    """As the driver counts them; 0 without a driver."""
    try:
        import pynvml  # noqa: PLC0415  (comes with the worker's packages, and is needed only here)
    except ImportError as error:
        raise InvalidSetting(
            "--gpus", "the package nvidia-ml-py, which counts them, is not installed", "Install glmq[worker]."
        ) from error
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def _environ(num_workers: int) -> dict[str, str]:
    """What all workers are given: their output goes through us, so they cannot see for themselves that somebody is watching."""
    environ = dict(os.environ)
    if num_workers > 1 and sys.stderr.isatty() and not environ.get("GLMQ_LOG_FORMAT"):
        environ["GLMQ_LOG_FORMAT"] = "console"
    return environ


def _server(settings: Settings) -> tuple[EmbeddedServer | None, str]:
    """The server to use, and its URL; None for one that is given by REDIS_URL."""
    if settings.redis_url is not None:
        print(f"server: {hide_password(settings.redis_url)} (REDIS_URL)", flush=True)
        return None, settings.redis_url
    server = EmbeddedServer.start(settings.state_dir)
    origin = "started" if server.is_own else "runs already"
    print(
        f"server: {server.server} on 127.0.0.1:{server.port}, {origin}, data in {settings.state_dir}",
        flush=True,
    )
    return server, server.url


def _drain_on_signal(fleet: Fleet) -> None:
    def on_signal(_number: int, _frame: FrameType | None) -> None:
        fleet.drain()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)


def _ready_pids(ledger: Ledger, settings: Settings) -> Collection[int]:
    """Workers of this machine that say of themselves that they are ready."""
    try:
        overview = ledger.run(calls.overview(settings.model))
    except RedisUnavailable:
        return ()
    host = socket.gethostname()
    abouts = [worker.about for worker in overview.workers]
    return {
        int(about["pid"])
        for about in abouts
        if about.get("state") == "ready" and about.get("host") == host and about.get("pid", "").isdecimal()
    }


def _say_what_next(settings: Settings) -> None:
    print("ready. In another terminal, or another program:", flush=True)
    print('  glmq chat "新冠肺炎怎么预防"\n  glmq summarize FILE\n  glmq status', flush=True)
    if settings.redis_url is None:
        print("  (the server's address for other programs is in `glmq doctor`)", flush=True)
