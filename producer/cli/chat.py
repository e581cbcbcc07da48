"""`glmq chat`: one question, or a conversation at the prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from producer.cli import options
from producer.cli.answering import stream_answer
from producer.client import Client
from producer.contract import ChatRequest, ConversationBusy, QueueFull, RequestFailed
from producer.contract.conversation import new_conversation_id


def chat(
    query: Annotated[
        str | None, typer.Argument(help="The question; - reads it from standard input; none: a conversation.")
    ] = None,
    greedy: options.Greedy = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = None,
    adapter: options.Adapter = None,
    priority: options.Priority = 5,
    conversation: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Talk in this conversation, which remembers what was said; new ids begin one."
        ),
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose request and conversation it is.")] = "default",
    stats: options.Stats = False,
) -> None:
    """Ask one question, or hold a conversation. The answer streams as it comes; Ctrl-C cancels it.

    Without QUERY each line of standard input is one turn of a conversation, from the keyboard or from a pipe. It is kept,
    and can be gone on with by its id; an answer that was cancelled is no part of it. At the prompt, /new begins a new
    conversation and Ctrl-D ends. A QUERY alone remembers nothing and leaves nothing.

    glmq chat 新冠肺炎怎么预防
    cat question.txt | glmq chat -
    glmq chat --conversation anna 我叫什么名字？
    """
    request = ChatRequest(
        query=query if query and query != "-" else "?",
        sampling=options.sampling(
            greedy=greedy, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, top_p=top_p
        ),
        adapter=adapter,
        priority=priority,
        tenant=tenant,
        conversation_id=conversation,
    )
    with Client() as client:
        if query is None:
            converse(client, request, stats=stats)
            return
        if query == "-":
            request = request.replace(query=sys.stdin.read().strip())
        answer = stream_answer(client, request)
    if stats:
        print(answer, file=sys.stderr)
    if answer.finished.reason == "cancelled":
        raise typer.Exit(130)


def converse(client: Client, request: ChatRequest, *, stats: bool) -> None:
    """Turn after turn in the request's conversation, or in a new one, whose id goes to stderr."""
    if request.conversation_id is None:
        request = _in_new_conversation(request)
    for query in _queries():
        if query == "/new":
            request = _in_new_conversation(request)
            continue
        try:
            answer = stream_answer(client, request.replace(query=query))
        except (ConversationBusy, QueueFull, RequestFailed) as error:
            # The conversation goes on: a shorter question, or /new, may well be answered.
            print(f"glmq: {error}", file=sys.stderr)
            continue
        if stats:
            print(answer, file=sys.stderr)


def _in_new_conversation(request: ChatRequest) -> ChatRequest:
    conversation_id = new_conversation_id()
    print(f"conversation {conversation_id}", file=sys.stderr)
    return request.replace(conversation_id=conversation_id)


def _queries() -> Iterator[str]:
    """Lines that are not blank, with a prompt at a terminal and an echo of the question in a pipe."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401, PLC0415  (gives input() its line editing; not on every platform's pipe)

        print("One line a turn. Ctrl-C cancels an answer, /new begins anew, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line:
            if not at_terminal:
                print(f"> {line}", flush=True)
            yield line
