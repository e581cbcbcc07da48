"""`glmq status`: what waits, what runs, how fast; live at a terminal, once in a pipe."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from producer.client import Client
from producer.contract import GlmqError
from producer.ledger.calls import Overview

REFRESH_SECONDS = 0.5


def status(
    once: Annotated[bool, typer.Option("--once", help="Print once and end, also at a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print once, as JSON.")] = False,
) -> None:
    """Show the queue, the workers and their speed. Live at a terminal (Ctrl-C ends it), once in a pipe.

    Exit code 3 means that no worker is alive.
    """
    with Client() as client:
        overview = client.overview()
        if as_json:
            print(json.dumps(dataclasses.asdict(overview)))
        elif once or not sys.stdout.isatty():
            Console(highlight=False, soft_wrap=True).print(_render(client.model, overview))
        else:
            _watch(client, overview)
    if not overview.workers:
        raise typer.Exit(3)


def _watch(client: Client, overview: Overview) -> None:
    console = Console(highlight=False)
    with Live(_render(client.model, overview), auto_refresh=False, console=console) as live:
        try:
            while True:
                time.sleep(REFRESH_SECONDS)
                try:
                    live.update(_render(client.model, client.overview()), refresh=True)
                except GlmqError as error:
                    # A dashboard outlives the outage that it shows.
                    live.update(Text(str(error), style="bold red"), refresh=True)
        except KeyboardInterrupt:
            return


def _render(model: str, overview: Overview) -> RenderableType:
    speed = sum(float(worker.about.get("tokens_per_second", 0)) for worker in overview.workers)
    summary = Text(
        f"{model}: {overview.num_queued} queued, {overview.num_running} running, {speed:.0f} tokens/s"
    )
    if not overview.workers:
        return Group(
            summary, Text("no worker is alive: start one with `glmq up` or `glmq worker`", style="bold red")
        )
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("model", "device", "state", "running", "slots", "waiting", "tokens_per_second")
    for heading in ("worker", *columns, "KV cache", "silent"):
        table.add_column(heading.replace("tokens_per_second", "tokens/s"))
    for worker in sorted(overview.workers, key=lambda worker: worker.worker):
        values = [worker.about.get(column, "?") for column in columns]
        usage = f"{float(worker.about.get('kv_usage', 0)):.0%}"
        table.add_row(worker.worker, *values, usage, f"{worker.silent_seconds:.1f} s")
    return Group(summary, table)
