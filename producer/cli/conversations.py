"""`glmq conversations`: list, show, export and forget what is remembered."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from producer.client import Client
from producer.contract.conversation import PromptMemory
from producer.conversations import Conversation
from producer.ledger import ConversationStatus

app = typer.Typer(
    help="Conversations and their summaries: list, show, export and forget them.", no_args_is_help=True
)

Id = Annotated[str, typer.Argument(metavar="ID", help="As `glmq chat` prints it, or as requests name it.")]
Tenant = Annotated[str, typer.Option(help="Whose conversation it is.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("list")
def list_conversations(
    tenant: Annotated[str, typer.Option(help="Whose conversations.")] = "default",
    everybody: Annotated[bool, typer.Option("--all", help="Those of all tenants.")] = False,
    as_json: Json = False,
) -> None:
    """List conversations, those with the latest turn first."""
    with Client() as client:
        found = list(client.conversations.list(None if everybody else tenant))
    if as_json:
        print(json.dumps([dataclasses.asdict(status) for status in found], ensure_ascii=False))
        return
    if not found:
        print("no conversations", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("conversation", "turns", "in the summary", "model", "last turn", "state"):
        table.add_column(heading)
    if everybody:
        table.add_column("tenant")
    for status in found:
        row = (
            status.conversation_id,
            str(status.num_turns),
            str(status.covered),
            status.model,
            _when(status.updated_at),
            _state(status),
        )
        table.add_row(*row, *([status.tenant] if everybody else []))
    _console().print(table)


@app.command("show")
def show(
    conversation_id: Id,
    num_turns: Annotated[int, typer.Option("--turns", min=0, help="How many of the last turns.")] = 10,
    tenant: Tenant = "default",
    as_json: Json = False,
) -> None:
    """Show the last turns, the summary of the older ones, and what the next question would be asked with."""
    with Client() as client:
        conversation = client.conversations.show(conversation_id, tenant=tenant, num_turns=num_turns)
    if as_json:
        fields = {
            **dataclasses.asdict(conversation.status),
            "first": conversation.first,
            "turns": [turn.model_dump() for turn in conversation.turns],
            "next_prompt": conversation.next_prompt and _as_json(conversation.next_prompt),
        }
        print(json.dumps(fields, ensure_ascii=False))
    else:
        _print(conversation)


@app.command("export")
def export(conversation_id: Id, tenant: Tenant = "default") -> None:
    """Write the whole conversation to standard output as JSON lines: what it is, every turn, the summary.

    glmq conversations export ID > conversation.jsonl
    """
    with Client() as client:
        status = client.conversations.show(conversation_id, tenant=tenant, num_turns=0).status
        _line(
            "conversation",
            id=status.conversation_id,
            tenant=status.tenant,
            model=status.model,
            created=status.created_at,
            updated=status.updated_at,
        )
        for index, turn in enumerate(client.conversations.turns(conversation_id, tenant=tenant)):
            _line(
                "turn",
                index=index,
                query=turn.query,
                answer=turn.answer,
                time=turn.time / 1000,
                request_id=turn.request_id,
            )
    if status.covered:
        _line("summary", text=status.summary, covered=status.covered)


@app.command("forget")
def forget(
    conversation_id: Id,
    tenant: Tenant = "default",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, at a terminal.")] = False,
) -> None:
    """Delete a conversation with all its turns and its summary. What is in progress in it is cancelled."""
    with Client() as client:
        num_turns = client.conversations.show(conversation_id, tenant=tenant, num_turns=0).status.num_turns
        if not yes and sys.stdin.isatty():
            typer.confirm(f"Forget {conversation_id} with its {num_turns} turns for good?", abort=True)
        client.conversations.forget(conversation_id, tenant=tenant)
    print(f"forgotten: {conversation_id}, {num_turns} turns")


def _print(conversation: Conversation) -> None:
    console, status = _console(), conversation.status
    console.print(
        Text(
            f"{status.conversation_id}: {status.num_turns} turns since {_when(status.created_at)}, model {status.model}, {_state(status)}"
        )
    )
    if status.covered:
        console.print(
            Text(f"\nsummary of the first {status.covered} turns ({status.summary_tokens} tokens)", "dim")
        )
        console.print(Text(status.summary))
    if conversation.first and conversation.turns:
        console.print(Text(f"\n... {conversation.first} turns before", "dim"))
    for number, turn in enumerate(conversation.turns, conversation.first + 1):
        console.print(Text(f"\n{number}  {_when(turn.time / 1000)}  {turn.tokens} tokens", "dim"))
        console.print(Text(f"> {turn.query}"))
        console.print(Text(turn.answer))
    console.print(Text(f"\n{describe(conversation.next_prompt)}", "dim"))


def describe(memory: PromptMemory | None) -> str:
    """What a prompt remembers, in a sentence."""
    if memory is None:
        return "the next prompt has the question alone"
    parts = []
    if memory.covered:
        parts.append(f"the summary of turns 1 to {memory.covered}")
    if memory.num_recent:
        parts.append(f"turns {memory.first + 1} to {memory.num_turns} word for word")
    text = f"the next prompt has {' and '.join(parts) or 'the question alone'}"
    if memory.num_left_out:
        text += f"; {memory.num_left_out} turns are left out until they are in a summary"
    return text


def _as_json(memory: PromptMemory) -> dict[str, int]:
    return {
        "summary_turns": memory.covered,
        "recent_turns": memory.num_recent,
        "left_out_turns": memory.num_left_out,
    }


def _state(status: ConversationStatus) -> str:
    states = [
        f"answering {status.busy}" if status.busy else "",
        "folding" if status.folding else "",
        f"folding failed {status.fold_failures} times" if status.fold_failures else "",
    ]
    return ", ".join(filter(None, states)) or "idle"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _line(kind: str, **fields: str | int | float) -> None:
    print(json.dumps({"type": kind, **fields}, ensure_ascii=False))


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
