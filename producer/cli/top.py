"""`glmq top`: queue, workers, speed and latencies as they change. Reads the ledger alone: nothing has to scrape."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from producer.client import Client
from producer.contract import GlmqError
from producer.contract.latencies import decode_counts, quantile
from producer.ledger import calls
from producer.ledger.calls import Backlog, Overview, WorkerStatus

HISTORY: Final = 60
"""Samples that a sparkline shows."""
_BARS: Final = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a deployment."""

    overview: Overview
    backlog: Backlog


@dataclass
class History:
    """What the last samples said, of the deployment and of each worker."""

    queued: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    speed: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    of_worker: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        workers = sample.overview.workers
        self.queued.append(sum(sample.backlog.num_queued))
        self.speed.append(sum(_number(worker, "tokens_per_second") for worker in workers))
        for name in self.of_worker.keys() - {worker.worker for worker in workers}:
            del self.of_worker[name]
        for worker in workers:
            speeds = self.of_worker.setdefault(worker.worker, deque(maxlen=HISTORY))
            speeds.append(_number(worker, "tokens_per_second"))


def top(
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and end, also at a terminal.")] = False,
) -> None:
    """Watch a deployment: what waits and for how long, tokens/s, time to the first token and between tokens (median and 95th
    percentile of the last minute), KV cache, workers. Ctrl-C ends it. In a pipe it prints once.

    It asks Redis and needs no Prometheus.
    """
    with Client() as client:
        history = History()
        frame = _frame(client, history)
        if once or not sys.stdout.isatty():
            Console(highlight=False, soft_wrap=True).print(frame)
            return
        with Live(frame, auto_refresh=False, screen=True, console=Console(highlight=False)) as live:
            try:
                while True:
                    time.sleep(interval)
                    live.update(_frame(client, history), refresh=True)
            except KeyboardInterrupt:
                return


def _frame(client: Client, history: History) -> RenderableType:
    try:
        sample = Sample(client.overview(), client.ledger.run(calls.backlog(client.model)))
    except GlmqError as error:
        if not history.speed:
            raise
        # Who watches outlives the outage that is watched.
        return Text(str(error), style="bold red")
    history.add(sample)
    return render(client.model, sample, history)


def render(model: str, sample: Sample, history: History) -> RenderableType:
    """One screen."""
    return Group(_summary(model, sample, history), Text(), _workers(sample, history))


def _summary(model: str, sample: Sample, history: History) -> RenderableType:
    overview, backlog = sample.overview, sample.backlog
    slots = sum(int(_number(worker, "slots")) for worker in overview.workers)
    oldest = f", the oldest for {duration(max(backlog.oldest_seconds))}" if any(backlog.num_queued) else ""
    memory = f"{backlog.memory_used_bytes / 2**20:.0f} MiB"
    if backlog.memory_max_bytes:
        memory += f" of {backlog.memory_max_bytes / 2**20:.0f}"
    rows: list[tuple[str, str, Iterable[float]]] = [
        ("queued", f"{sum(backlog.num_queued)}{oldest}", history.queued),
        ("running", f"{overview.num_running} in {slots} slots", ()),
        ("tokens/s", f"{history.speed[-1]:.0f}", history.speed),
        ("first token", latency(overview.workers, "first_token"), ()),
        ("between tokens", latency(overview.workers, "between_tokens"), ()),
        ("redis", f"{memory}, {backlog.num_conversations} conversations", ()),
    ]
    if backlog.num_overdue or backlog.num_dead:
        rows.append(("trouble", f"{backlog.num_overdue} leases overdue, {backlog.num_dead} dead letters", ()))
    table = Table(
        box=None, pad_edge=False, show_header=False, title=Text(model, style="bold"), title_justify="left"
    )
    table.add_column(style="dim")
    for _ in range(2):
        table.add_column()
    for name, value, values in rows:
        table.add_row(name, value, Text(sparkline(list(values)), style="green"))
    return table


def _workers(sample: Sample, history: History) -> RenderableType:
    if not sample.overview.workers:
        return Text("no worker is alive: start one with `glmq up` or `glmq worker`", style="bold red")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("worker", "device", "state", "running", "waiting", "KV cache", "first token", "restarts"):
        table.add_column(heading)
    table.add_column("tokens/s", justify="right")
    table.add_column("")
    for worker in sorted(sample.overview.workers, key=lambda worker: worker.worker):
        state = worker.about.get("state", "?")
        usage = _number(worker, "kv_usage")
        speeds = list(history.of_worker[worker.worker])
        table.add_row(
            worker.worker,
            worker.about.get("device", "?"),
            Text(state, style="" if state == "ready" else "yellow"),
            f"{worker.about.get('running', '?')} of {worker.about.get('slots', '?')}",
            worker.about.get("waiting", "?"),
            Text(f"{bar(usage)} {usage:4.0%}", style="yellow" if usage > 0.9 else ""),
            latency([worker], "first_token"),
            worker.about.get("restarts", "?"),
            f"{speeds[-1]:.0f}",
            Text(sparkline(speeds[-20:]), style="green"),
        )
    return table


def latency(workers: Iterable[WorkerStatus], name: str) -> str:
    """Median and 95th percentile of what all these workers measured in the last minute."""
    counts = decode_counts(worker.about.get(name, "") for worker in workers)
    median, high = quantile(counts, 0.5), quantile(counts, 0.95)
    if median is None or high is None:
        return "-"
    return f"{duration(median)}, p95 {duration(high)}"


def sparkline(values: Sequence[float]) -> str:
    """One character a value, the largest as high as the line."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[min(int(value / highest * len(_BARS)), len(_BARS) - 1)] for value in values)


def bar(share: float, width: int = 10) -> str:
    """A share from 0 to 1 as a bar."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)


def duration(seconds: float) -> str:
    """With about three digits and a unit."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(worker: WorkerStatus, name: str) -> float:
    """Zero for what a worker of another version does not say."""
    try:
        return float(worker.about.get(name) or 0)
    except ValueError:
        return 0.0
