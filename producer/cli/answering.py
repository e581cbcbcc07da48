"""Streams one answer to stdout as it comes, and measures it. Used by every command that asks for text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from producer.client import Client
from producer.contract import Event, Failed, Finished, Request, RequestFailed, Token, Usage


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer with what the caller saw of its speed. Seconds, from submit, on the caller's clock."""

    finished: Finished
    first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first: how fast it flows once it has begun."""
        flowing = self.total_seconds - self.first_token_seconds
        return max(0, self.finished.usage.completion_tokens - 1) / flowing if flowing > 0 else 0.0

    def __str__(self) -> str:
        usage = self.finished.usage
        return (
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, first after {self.first_token_seconds * 1e3:.0f} ms, "
            f"then {self.tokens_per_second:.0f} tokens/s ({self.finished.reason}){_memory(usage)}{_pieces(usage)}"
        )


def _memory(usage: Usage) -> str:
    """What the prompt had of a conversation."""
    parts = [f"the last {usage.recent_turns} turns"] if usage.recent_turns else []
    if usage.summary_turns:
        parts.insert(0, f"a summary of the first {usage.summary_turns}")
    text = f", with {' and '.join(parts)}" if parts else ""
    return f"{text}; {usage.left_out_turns} turns left out" if usage.left_out_turns else text


def _pieces(usage: Usage) -> str:
    """What a text took that was too long for the context."""
    if not usage.pieces:
        return ""
    tokens = f"{usage.piece_prompt_tokens} + {usage.piece_completion_tokens} tokens"
    return f"; before that {usage.pieces} pieces with {tokens}"


def stream_answer(
    client: Client, request: Request, on_event: Callable[[Event], None] = lambda _: None
) -> Answer:
    """Submits, prints the text as it comes, ends the line. Ctrl-C cancels the answer and returns what came until then.

    on_event: is told of each event before anything of it is printed. Raises RequestFailed if there is no answer.
    """
    begin = time.perf_counter()
    first: float | None = None
    index = 0
    request_id = client.submit(request).request_id
    while True:
        try:
            for event in client.stream(request_id, after=index):
                on_event(event)
                match event:
                    case Token():
                        first = first or time.perf_counter() - begin
                        index = event.index
                        write(event.text)
                    case Failed():
                        raise RequestFailed(request_id, event.code, event.message)
                    case Finished():
                        write("\n")
                        total = time.perf_counter() - begin
                        return Answer(event, first or total, total)
        except KeyboardInterrupt:
            # The stream still ends with a Finished event, which says how far the answer came.
            client.cancel(request_id)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
