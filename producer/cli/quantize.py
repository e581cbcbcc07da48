"""`glmq quantize`: the same as `python -m workers.quantize`, which has the options."""

from __future__ import annotations

import os
import sys

import typer

from producer.cli.worker import worker_command


def quantize(context: typer.Context) -> None:
    """Write an int8 or int4 version of a checkpoint, and say what it costs. See `glmq quantize --help`."""
    command = worker_command(*context.args, module="workers.quantize")
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  (its signals and exit code are this command's own)
