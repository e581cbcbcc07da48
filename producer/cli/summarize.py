"""`glmq summarize`: a file or standard input."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from producer.cli import options
from producer.cli.answering import stream_answer
from producer.client import Client
from producer.contract import InvalidRequest, SummaryRequest


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
    """Summarize a text, in its own language. Ctrl-C cancels.

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
    with Client() as client:
        answer = stream_answer(client, request)
    if stats:
        print(answer, file=sys.stderr)
    if answer.finished.reason == "cancelled":
        raise typer.Exit(130)


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
