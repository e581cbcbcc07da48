"""`glmq verify`: the same as `python -m workers.verify`, which has the options."""

from __future__ import annotations

import os
import sys

import typer

from producer.cli.worker import worker_command


def verify(context: typer.Context) -> None:
    """Compare a checkpoint's tokenizer, prompts, logits and answers here with what its own code says. See `glmq verify --help`."""
    command = worker_command(*context.args, module="workers.verify")
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  (its signals and exit code are this command's own)
