"""`glmq dead`: requests that were lost at too many attempts; what happened to each, and what is to become of it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from producer.client import Client
from producer.contract import Token
from producer.ledger import DeadLetter

app = typer.Typer(
    help="Dead letters: requests that were lost at too many attempts in a row.", no_args_is_help=True
)

Id = Annotated[str, typer.Argument(help="The request's id.")]
Ids = Annotated[list[str] | None, typer.Argument(help="The requests' ids.")]
All = Annotated[bool, typer.Option("--all", help="All that there are.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, one object a line.")]


@app.command("list")
def list_letters(as_json: AsJson = False) -> None:
    """Show the dead letters, the latest first."""
    with Client() as client:
        letters = list(client.dead_letters.list())
    if as_json:
        for letter in letters:
            print(json.dumps(_as_json(letter), ensure_ascii=False))
        return
    if not letters:
        print("no dead letters", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("request", "died", "model", "tenant", "kind", "attempts", "tokens", "what happened last"):
        table.add_column(heading, justify="right" if heading in ("attempts", "tokens") else "left")
    for letter in letters:
        table.add_row(
            letter.request_id,
            _when(letter.died_at),
            letter.model,
            letter.tenant,
            letter.kind,
            str(letter.attempts),
            str(letter.num_tokens),
            Text(letter.losses[-1].what if letter.losses else "?"),
        )
    Console(highlight=False, soft_wrap=True).print(table)


@app.command()
def show(request_id: Id, as_json: AsJson = False) -> None:
    """Show one: each lost attempt, the request, and the answer so far."""
    with Client() as client:
        letter = client.dead_letters.show(request_id)
        tokens = [event for event in client.dead_letters.events(request_id) if isinstance(event, Token)]
    answer = "".join(token.text for token in tokens)
    if as_json:
        print(json.dumps({**_as_json(letter), "answer": answer}, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        Text(
            f"{letter.request_id}: {letter.kind} of tenant {letter.tenant} for {letter.model}, submitted {_when(letter.submitted_at)}, "
            f"died {_when(letter.died_at)} at attempt {letter.attempts} after {letter.num_tokens} tokens"
        )
    )
    for loss in letter.losses:
        line = f"  {_when(loss.time)}  attempt {loss.attempt}, {loss.num_tokens} tokens, {loss.worker}: {loss.what}"
        console.print(Text(line))
    console.print(Text("\nthe request", "dim"))
    console.print(Text(json.dumps(json.loads(letter.request), ensure_ascii=False, indent=2)))
    if answer:
        console.print(Text("\nthe answer so far", "dim"))
        console.print(Text(answer))


@app.command()
def retry(request_ids: Ids = None, all_of_them: All = False) -> None:
    """Queue them again, under their ids: they go on from their last token. Their deadlines do not count any more."""
    with Client() as client:
        for request_id in _chosen(client, request_ids, all_of_them=all_of_them):
            client.dead_letters.retry(request_id)
            print(f"queued again: {request_id}")


@app.command()
def drop(request_ids: Ids = None, all_of_them: All = False) -> None:
    """Let them expire like any request that has ended."""
    with Client() as client:
        for request_id in _chosen(client, request_ids, all_of_them=all_of_them):
            client.dead_letters.drop(request_id)
            print(f"dropped: {request_id}")


def _chosen(client: Client, request_ids: list[str] | None, *, all_of_them: bool) -> list[str]:
    if bool(request_ids) == all_of_them:
        raise typer.BadParameter("give ids, or --all, and not both", param_hint="REQUEST_IDS")
    return request_ids or [letter.request_id for letter in client.dead_letters.list()]


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    return {**dataclasses.asdict(letter), "request": json.loads(letter.request)}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
