"""What a prompt remembers of its conversation: the summary as a leading round, then as many of the last turns as fit, whole.

What was chosen is kept with the request, so that an attempt after a takeover builds the same prompt. Knows nothing about how a
summary comes about (`folding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from producer.contract import ChatRequest, Turn
from producer.contract.conversation import ArchivedTurn, PromptMemory, fit, prompt_budget
from producer.ledger import Claim, Ledger, Recollected, calls
from workers.prompts import Prompt, Prompts, PromptTokenizer, Refusal, language_of

SUMMARY_QUERY: Final = {
    "chinese": "请记住以下对话摘要",
    "english": "Please remember this summary of our conversation",
}
"""The question of the leading round whose answer is the summary. The demo checkpoint is trained on it."""

MIN_TURN_TOKENS: Final = 8
"""A round has at least so many: no prompt holds more turns than its tokens divided by this."""
MAX_BYTES_A_TOKEN: Final = 24
"""Turns are read up to so many bytes of JSON a token of the prompt; text of more bytes a token is white space."""


class Fenced(Exception):
    """Another attempt has the request."""


@dataclass(frozen=True, slots=True)
class Remembering:
    """The prompt of a question in a conversation, and how far the summary lags behind."""

    prompt: Prompt
    memory: PromptMemory
    covered: int
    """Turns that the conversation's summary covers now; the prompt's may be older."""
    fold_failures: int
    uncovered_turns: int
    uncovered_tokens: int
    """Of those turns that were read, and the question."""


class Memory:
    """Builds the prompts of questions that belong to a conversation."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def build(self, prompts: Prompts, request: ChatRequest, claim: Claim) -> Remembering:
        """The prompt of this attempt.

        Raises Refusal (`conversation_gone`, and what `Prompts.chat` raises), Fenced, and what the ledger raises.
        """
        budget = prompt_budget(prompts.context_len, request.sampling.max_new_tokens)
        found = self._ledger.run(
            calls.recollect(
                claim.request_id,
                max_turns=budget // MIN_TURN_TOKENS,
                max_bytes=budget * MAX_BYTES_A_TOKEN,
            )
        )
        if not found.is_known:
            raise _gone()
        if found.memory is None:
            memory = choose(prompts.tokenizer, request.query, found, budget, prompts.context_len)
            kept = self._ledger.run(
                calls.remember(claim.request_id, claim.attempt, memory.model_dump_json(), worker=claim.worker)
            )
            if kept is None:
                raise Fenced
            memory = PromptMemory.model_validate_json(kept)
        else:
            memory = PromptMemory.model_validate_json(found.memory)
        recent = found.turns[max(memory.first - found.first, 0) :]
        if len(recent) != memory.num_recent:
            # Its archive was forgotten, and another conversation goes by its name.
            raise _gone()
        uncovered = found.turns[max(found.covered - found.first, 0) :]
        return Remembering(
            prompts.chat(request, history(memory, [turn.turn for turn in recent])),
            memory,
            covered=found.covered,
            fold_failures=found.fold_failures,
            uncovered_turns=found.num_turns - found.covered,
            uncovered_tokens=sum(turn.tokens for turn in uncovered) + memory.question_tokens,
        )


def choose(
    tokenizer: PromptTokenizer, query: str, found: Recollected, budget: int, context_len: int
) -> PromptMemory:
    """What goes into the prompt of this question: at most `budget` tokens, unless the question alone has more.

    Turns have been counted when they were archived, and not necessarily by this tokenizer, so the prompt is counted as a whole
    before it counts as chosen.
    """
    rounds = RoundLengths(tokenizer)
    question_tokens = rounds.of_question(query)
    turns_len = [turn.tokens or rounds.of_turn(turn.turn) for turn in found.turns]
    summary_tokens = rounds.of_turn(Turn(summary_query(found.summary), found.summary)) if found.covered else 0
    covered, num_recent = fit(
        turns_len,
        found.num_turns,
        covered=found.covered,
        summary_tokens=summary_tokens,
        budget=budget - question_tokens - rounds.special_tokens,
    )
    while True:
        memory = PromptMemory(
            summary=found.summary if covered else "",
            covered=covered,
            first=found.num_turns - num_recent,
            num_turns=found.num_turns,
            question_tokens=question_tokens,
            context_len=context_len,
        )
        recent = found.turns[len(found.turns) - num_recent :]
        excess = len(tokenizer.build_prompt(query, history(memory, _turns(recent)))) - budget
        if excess <= 0 or not (num_recent or covered):
            return memory
        if not num_recent:
            covered = 0
            continue
        while num_recent and excess > 0:
            excess -= max(turns_len[len(turns_len) - num_recent], 1)
            num_recent -= 1


def history(memory: PromptMemory, recent: list[Turn]) -> list[Turn]:
    """The rounds before the question."""
    if not memory.covered:
        return recent
    return [Turn(summary_query(memory.summary), memory.summary), *recent]


def summary_query(summary: str) -> str:
    """The question that a summary answers, in its language."""
    return SUMMARY_QUERY[language_of(summary)]


class RoundLengths:
    """How many tokens rounds add to a prompt, up to the digits of their numbers."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._one = self._len("", 1)
        self._frame = self._len("", 2) - self._one
        self.special_tokens = len(tokenizer.build_prompt(""))

    def of_turn(self, turn: Turn) -> int:
        return len(self._tokenizer.build_prompt("", [turn])) - self._one + self._frame

    def of_question(self, query: str) -> int:
        """As the last round of a prompt, without special tokens."""
        return self._len(query, 1) - self._frame - self.special_tokens

    def _len(self, query: str, num_empty: int) -> int:
        return len(self._tokenizer.build_prompt(query, [("", "")] * num_empty))


def _turns(archived: list[ArchivedTurn]) -> list[Turn]:
    return [turn.turn for turn in archived]


def _gone() -> Refusal:
    return Refusal(
        "conversation_gone",
        "conversation_id: the conversation was forgotten, or expired, before its answer was begun. Begin a new one.",
    )
