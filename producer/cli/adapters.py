"""`glmq adapters`: which LoRA adapters the workers have; load and unload them while they serve."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from producer.adapters import REPLY_TIMEOUT_SECONDS, Adapters
from producer.client import Client
from producer.contract.control import Reply

NO_WORKER_EXIT = 3

app = typer.Typer(
    help="LoRA adapters of the running workers: list, load and unload them.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="What requests ask for: `glmq chat --adapter NAME`.")]
Model = Annotated[
    str | None, typer.Option(help="The workers of this model. Default: the deployment's (GLMQ_MODEL).")
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for each worker's reply.")]


@app.command("list")
def list_adapters(
    model: Model = None, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Show what each worker can answer with, and what of it is in memory.

    Exit code 3 means that no worker is alive.
    """
    with Client() as client:
        workers = Adapters(client, model).of_workers()
    if as_json:
        print(json.dumps([dataclasses.asdict(worker) for worker in workers]))
    elif workers:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("worker", "adapter", "state"):
            table.add_column(heading)
        for worker in workers:
            for name in worker.known:
                table.add_row(worker.worker, name, "loaded" if name in worker.loaded else "loads on use")
            if not worker.known:
                table.add_row(worker.worker, "-", "no adapters")
        Console(highlight=False, soft_wrap=True).print(table)
    if not workers:
        raise _no_worker()


@app.command("load")
def load(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            help="PEFT's folder (adapter_config.json, adapter_model.*), as the workers' machines see it."
        ),
    ],
    model: Model = None,
    timeout: Timeout = REPLY_TIMEOUT_SECONDS,
) -> None:
    """Let every worker answer with this adapter, now, and wait until each one has confirmed it.

    An adapter of that name is replaced; answers in progress finish with the old one. A worker that starts later does not
    know it: use its options --adapter or --adapters-dir for what shall last.

    glmq adapters load fitness ./fitness-lora
    """
    with Client() as client:
        _report(Adapters(client, model).load(name, path, timeout), f"{name} is loaded")


@app.command("unload")
def unload(name: Name, model: Model = None, timeout: Timeout = REPLY_TIMEOUT_SECONDS) -> None:
    """Let no request have this adapter any more. Answers in progress finish with it; its memory is free after the last."""
    with Client() as client:
        _report(Adapters(client, model).unload(name, timeout), f"{name} is unloaded")


def _report(replies: Iterable[Reply], done: str) -> None:
    """One line a worker. Exit code 1 when one has a problem, 3 when there is none."""
    num_replies = num_problems = 0
    for reply in replies:
        num_replies += 1
        num_problems += bool(reply.problem)
        told = reply.problem or f"{done}{f' ({reply.note})' if reply.note else ''}"
        print(f"{reply.worker}: {told}", flush=True)
    if not num_replies:
        raise _no_worker()
    if num_problems:
        raise typer.Exit(1)


def _no_worker() -> typer.Exit:
    print("no worker is alive: start one with `glmq up` or `glmq worker`")
    return typer.Exit(NO_WORKER_EXIT)
