"""What a reader of an answer sees: Started, Token..., then Finished or Failed; Progress before, if its text came in pieces. Versioned JSON.

Every event has a place in the request's Redis stream, and that place is its id, `<token index>-<n>`:

- `Token`: `<index>-0`, where index counts answer tokens from 1; an event of several tokens has the index of its last.
- `Started`: `<tokens emitted before>-<attempt>`, so that the first one is `0-1` and one after a takeover follows the token
  that it continues from.
- `Progress`: `0-<n>`.
- `Finished`, `Failed`: `<tokens emitted>-<attempt + 1>`.

Where the entry before has this place already, the number after the dash is the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic_core import to_json

CONTRACT_VERSION: Final = 1


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    version: Literal[1] = CONTRACT_VERSION


class Usage(BaseModel):
    """Tokens counted by the model's own tokenizer."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt_tokens: int = 0
    completion_tokens: int = 0
    summary_turns: int = 0
    """The conversation's first so many turns were in the prompt as a summary."""
    recent_turns: int = 0
    """Its last so many turns were in the prompt word for word; the summary may cover some of them as well."""
    left_out_turns: int = 0
    """So many turns between the two were not in the prompt: the summary does not cover them yet."""
    pieces: int = 0
    """A text too long for the context was summarized in so many pieces, those of summaries included."""
    piece_prompt_tokens: int = 0
    """Of all pieces together, and not counted in `prompt_tokens`."""
    piece_completion_tokens: int = 0


class Timings(BaseModel):
    """Seconds, measured by the worker that finished the request; waiting is measured on Redis' clock."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    queue_seconds: float = 0.0
    """From submit to the first claim."""
    first_token_seconds: float = 0.0
    """From the claim to the first token."""
    total_seconds: float = 0.0
    """From the claim to the end."""


class Progress(_Event):
    """How far the pieces are of a text that is too long for the context."""

    type: Literal["progress"] = "progress"
    level: int
    """1: pieces of the text itself; 2: of their summaries, and so on. How many levels there will be, nobody knows before."""
    done: int
    total: int
    """Pieces of this level."""


class Started(_Event):
    """A worker has claimed the request. Comes again, with a higher attempt, after a takeover."""

    type: Literal["started"] = "started"
    attempt: int
    worker: str
    prompt_tokens: int = 0


class Token(_Event):
    """One or more answer tokens. Texts of all events, joined, are the answer."""

    type: Literal["token"] = "token"
    index: int
    """Index of the last token in it; the first answer token is 1."""
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """One text a token; empty while a character is incomplete or may still be rewritten."""

    @property
    def text(self) -> str:
        """The text that these tokens add to the answer."""
        return "".join(self.texts)

    def after(self, index: int) -> Self:
        """This event without the tokens up to and including `index`, for a reader that resumes there."""
        keep = self.index - index
        return (
            self
            if keep >= len(self.ids)
            else self.model_copy(update={"ids": self.ids[-keep:], "texts": self.texts[-keep:]})
        )


@dataclass(slots=True)
class NewTokens:
    """What becomes a Token: as a worker has made it, so that there is nothing to be validated."""

    index: int
    """Index of the last of them, from 1."""
    ids: Sequence[int]
    texts: Sequence[str]


class Finished(_Event):
    """The answer is complete, or was cut for the reason given."""

    type: Literal["finished"] = "finished"
    reason: Literal["stop", "length", "cancelled"]
    text: str
    """The whole answer, decoded at once: equal to the joined texts of the tokens."""
    usage: Usage = Usage()
    timings: Timings = Timings()
    attempts: int = 1


class Failed(_Event):
    """There is no answer. `code` is for programs, `message` says what to do."""

    type: Literal["failed"] = "failed"
    code: str
    message: str


Event = Progress | Started | Token | Finished | Failed

_adapter: TypeAdapter[Event] = TypeAdapter(
    Annotated[Event, Field(discriminator="type")], config=ConfigDict(hide_input_in_errors=True)
)


def encode_event(event: Event) -> str:
    """The event as one line of compact JSON (no raw newline or tab in it)."""
    return to_json(event).decode()


def encode_tokens(tokens: Token | NewTokens) -> str:
    """The Token as `encode_event` writes it."""
    ids = ",".join(map(str, tokens.ids))
    texts = ",".join(map(encode_basestring, tokens.texts))
    return f'{{"version":{CONTRACT_VERSION},"type":"token","index":{tokens.index},"ids":[{ids}],"texts":[{texts}]}}'


def decode_event(data: str | bytes) -> Event:
    """The event in this JSON; raises pydantic's ValidationError if it is none."""
    return _adapter.validate_json(data)
