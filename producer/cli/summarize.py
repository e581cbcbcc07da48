"""`glmq summarize`: a file or standard input."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from producer.cli import options
from producer.cli.answering import stream_answer
from producer.client import Client
from producer.contract import Event, InvalidRequest, Progress, SummaryRequest


class Style(StrEnum):
    PARAGRAPH = "paragraph"
    BULLETS = "bullets"
    TITLE = "title"


def summarize(
    file: Annotated[str, typer.Argument(help="A text file in UTF-8; - reads standard input.")],
    style: Annotated[Style, typer.Option(help="What the summary looks like.")] = Style.PARAGRAPH,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of the summary, at most.")] = 256,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of always taking the most likely token.")
    ] = False,
    seed: options.Seed = None,
    adapter: options.Adapter = None,
    priority: options.Priority = 5,
    stats: options.Stats = False,
) -> None:
    """Summarize a text of any length, in its own language. Ctrl-C cancels.

    One that is too long for the model's context is summarized in pieces; at a terminal a bar shows how far they are.

    glmq summarize report.txt
    git log -20 | glmq summarize - --style bullets
    """
    request = SummaryRequest(
        text=_read(file),
        style=style.value,
        max_length=max_length,
        sampling=options.sampling(greedy=not sample, seed=seed),
        adapter=adapter,
        priority=priority,
    )
    with Client() as client, PiecesBar(Console(stderr=True)) as bar:
        answer = stream_answer(client, request, bar.show)
    if stats:
        print(answer, file=sys.stderr)
    if answer.finished.reason == "cancelled":
        raise typer.Exit(130)


class PiecesBar:
    """Shows how far the pieces of a long text are, until the summary itself begins. Shows nothing in a pipe."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # Ctrl-C leaves its line as it is; the answer goes to stdout, which rich must not take.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID | None = None

    def show(self, event: Event) -> None:
        """The next event of the answer."""
        if not isinstance(event, Progress):
            self._bar.stop()
            return
        what = "pieces" if event.level == 1 else f"summaries, level {event.level}"
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(what)
        self._bar.update(self._task, description=what, completed=event.done, total=event.total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(
            "file", f"{file} cannot be read ({error.strerror})", "Give a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            "file", f"{file} is not UTF-8 ({error})", "Convert it, for example with iconv."
        ) from error
