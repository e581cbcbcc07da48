"""`glmq evaluate`: the same as `python -m workers.evaluate`, which has the options."""

from __future__ import annotations

import os
import sys

import typer

from producer.cli.worker import worker_command


def evaluate(context: typer.Context) -> None:
    """Measure what int8 and int4 cost in quality, as a table and a picture. See `glmq evaluate --help`."""
    command = worker_command(*context.args, module="workers.evaluate")
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  (its signals and exit code are this command's own)
