"""`glmq up`: everything that one machine needs to answer, in the foreground."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Annotated

import typer

from producer.cli.worker import worker_command
from producer.embedded import EmbeddedServer
from producer.ledger import Ledger, calls
from producer.ledger.ledger import hide_password
from producer.settings import Settings

LOOK_SECONDS = 0.05


def up(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder of the checkpoint. Default: the bundled demo.")
    ] = None,
) -> None:
    """Start a server if none runs, and a worker; say how to talk to them. Ctrl-C drains and stops both.

    Further options are the worker's: see `glmq worker --help`.

    glmq up --checkpoint ./chatglm-6b --slots 64
    """
    settings = Settings.from_environ()
    server, url = _server(settings)
    arguments = [*(("--checkpoint", checkpoint) if checkpoint else ()), *context.args]
    # In this terminal's foreground too: Ctrl-C reaches the worker as it reaches us.
    process = subprocess.Popen(worker_command(*arguments))  # noqa: S603
    _drain_with_us(process)
    ledger = Ledger.at(url, settings.keys)
    try:
        if _is_ready(ledger, settings, process):
            print("ready. In another terminal, or another program:", flush=True)
            print('  glmq chat "新冠肺炎怎么预防"\n  glmq summarize FILE\n  glmq status', flush=True)
            if settings.redis_url is None:
                print("  (the server's address for other programs is in `glmq doctor`)", flush=True)
        code = process.wait()
    finally:
        ledger.close()
        if server is not None:
            server.stop()
    raise typer.Exit(code)


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


def _drain_with_us(process: subprocess.Popen[bytes]) -> None:
    """A signal for us is one for the worker. Its exit ends us."""
    is_terminal = sys.stdin.isatty()

    def pass_on(number: int, _frame: object) -> None:
        # At a terminal the worker has got this Ctrl-C itself; a second one would end it without draining.
        if process.poll() is None and not (number == signal.SIGINT and is_terminal):
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)


def _is_ready(ledger: Ledger, settings: Settings, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the worker says of itself that it is ready, or has ended."""
    while process.poll() is None:
        overview = ledger.run(calls.overview(settings.model))
        for worker in overview.workers:
            if worker.about.get("pid") == str(process.pid) and worker.about.get("state") == "ready":
                return True
        time.sleep(LOOK_SECONDS)
    return False
