"""What a conversation consists of, and which part of it goes into a prompt. Pure: it counts in tokens that others have counted.

A conversation is its archive (every finished turn, word for word) and a rolling summary that stands for the first so many turns.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from producer.contract.errors import InvalidRequest
from producer.contract.requests import Name, Turn

ANSWER_SHARE = 4
"""A request that names no `max_new_tokens` leaves one in so many tokens of the context to the answer."""
MAX_ANSWER_SHARE = 2
"""And one that asks for more than this share gets this share: otherwise 20,000, which clients send, would leave no memory."""

_name: TypeAdapter[str] = TypeAdapter(Name)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class ArchivedTurn(_Kept):
    """One finished exchange, as the archive keeps it."""

    query: str
    answer: str
    request_id: str = ""
    """The request that it came from."""
    time: int = 0
    """When it ended: Unix time in ms, on Redis' clock."""
    tokens: int = 0
    """About what it adds to a prompt, as counted by the model that answered it."""

    @property
    def turn(self) -> Turn:
        return Turn(self.query, self.answer)


class PromptMemory(_Kept):
    """What the prompt of a request consists of besides the question. Kept with the request: every attempt builds the same."""

    summary: str = ""
    covered: int = 0
    """The summary stands for turns 0 to this one, exclusive. 0: there is none in the prompt."""
    first: int = 0
    """Turns from this index on are in the prompt word for word."""
    num_turns: int = 0
    """Turns that the conversation had then."""
    question_tokens: int = 0
    """What the question will add to later prompts as part of its turn, without its answer."""
    context_len: int = 0

    @property
    def num_recent(self) -> int:
        return self.num_turns - self.first

    @property
    def num_left_out(self) -> int:
        """Turns that the prompt lacks altogether."""
        return max(self.first - self.covered, 0)


class FoldMemory(_Kept):
    """What a fold consists of: this summary, and turns `first` to `last`, exclusive."""

    summary: str = ""
    first: int
    last: int


def new_conversation_id() -> str:
    return uuid.uuid4().hex


def check_conversation_id(conversation_id: str) -> str:
    """The id, if it can be one. Raises InvalidRequest."""
    try:
        return _name.validate_python(conversation_id)
    except ValidationError as error:
        raise InvalidRequest(
            "conversation_id",
            f"{conversation_id[:128]!r} cannot be an id",
            "Use at most 128 letters, digits and . _ : / @ -, a letter or digit first.",
        ) from error


def prompt_budget(context_len: int, max_new_tokens: int | None) -> int:
    """Tokens that a prompt with memory may have, so that the answer finds room."""
    if max_new_tokens is None:
        return context_len - context_len // ANSWER_SHARE
    return context_len - min(max_new_tokens, context_len // MAX_ANSWER_SHARE)


def fit(
    tokens_of_turns: Sequence[int], num_turns: int, *, covered: int, summary_tokens: int, budget: int
) -> tuple[int, int]:
    """What goes into so many tokens: turns that a summary stands for (0: no summary), and how many of the last turns.

    tokens_of_turns: of the last turns, oldest first, of `num_turns` that there are. A conversation that fits as a whole needs no
    summary; else the summary has precedence, because the last turns would otherwise crowd out all that was before.
    """
    num_recent = num_fitting(reversed(tokens_of_turns), budget)
    if num_recent == num_turns or not covered or summary_tokens > budget:
        return 0, num_recent
    return covered, num_fitting(reversed(tokens_of_turns), budget - summary_tokens)


def num_fitting(tokens_of_turns: Iterable[int], budget: int) -> int:
    """How many whole turns fit into so many tokens, taken in this order until the first that does not."""
    num = 0
    for tokens in tokens_of_turns:
        budget -= tokens
        if budget < 0:
            break
        num += 1
    return num
