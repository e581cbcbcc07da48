"""`glmq worker`: the same as `python -m workers`, which has the options."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer

from producer.contract import InvalidSetting


def worker_command(*arguments: str, module: str = "workers") -> list[str]:
    """How to start a worker, or another program of its package, with this interpreter. The producer does not import it.

    Raises InvalidSetting where the worker's packages are not installed.
    """
    if missing := missing_packages():
        raise InvalidSetting("glmq worker", f"{', '.join(missing)} not installed", "Install glmq[worker].")
    return [sys.executable, "-m", module, *arguments]


def missing_packages() -> list[str]:
    """Of those that a worker cannot do without."""
    needed = ("workers", "torch", "sentencepiece", "msgspec")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def worker(context: typer.Context) -> None:
    """Run one worker in the foreground: one engine on one GPU (or the CPU). `glmq worker --help` shows its options.

    SIGTERM or Ctrl-C drains: no new requests are taken, running ones finish within the grace time.
    """
    command = worker_command(*context.args)
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  (a worker's signals and exit code are this command's own)
