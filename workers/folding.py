"""The older part of a conversation becomes a summary: when it is time for that, what the model is asked, which summaries are accepted.

A fold is a request of its own, less urgent than any answer. This module submits it after a turn and builds its prompt; the ledger
makes its answer the conversation's summary.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import RedisError

from producer.contract import (
    ChatRequest,
    Failed,
    Finished,
    FoldRequest,
    RedisUnavailable,
    SamplingParams,
    Turn,
)
from producer.contract.conversation import FoldMemory, num_fitting
from producer.ledger import Claim, Ledger, Recollected, calls
from workers.logs import get_logger
from workers.memory import Fenced, Remembering, RoundLengths
from workers.models.frames import Part, content, frame
from workers.prompts import Language, Prompt, Prompts, PromptTokenizer, Refusal, language_of

logger = get_logger(__name__)

DUE_SHARE: Final = 4
"""A fold is due when one in so many tokens of the context is taken by turns that no summary covers."""
FOLD_SHARE: Final = 2
"""It takes in at most one in so many: all of those, and some more where folding lags behind the questions."""
SUMMARY_SHARE: Final = 8
"""A summary has at most one in so many tokens of the context."""
MAX_TURNS: Final = 12
"""That one fold takes in: of more, a model forgets some."""
PRIORITY: Final = 8
RETRY_TEMPERATURE: Final = 0.7
"""A greedy fold would fail the same way again."""
MAX_PAUSE: Final = 7
"""Turns without a try after many failures in a row."""

_FOLD: Final = {
    "chinese": ("请把新的对话并入摘要。\n摘要：", "\n对话：\n", "问：", "\n答："),
    "english": ("Fold the new turns into the summary.\nSummary: ", "\nTurns:\n", "Q: ", "\nA: "),
}
"""Before the summary, before the turns, before a question, before an answer. The demo checkpoint is trained on these."""
NO_SUMMARY: Final = {"chinese": "无", "english": "none"}
FOLD_LABELS: Final = re.compile(r"(?:问|答|摘要|对话|Q|A|Summary|Turns)\s*[:：]", re.IGNORECASE)
"""How the lines of a fold begin."""

ELLIPSIS: Final = " … "


def fold_parts(summary: str, turns: Sequence[Turn], language: Language) -> list[Part]:
    """The query that asks for a new summary of the old one ("" for none) and these turns."""
    before_summary, before_turns, before_question, before_answer = _FOLD[language]
    parts = [frame(before_summary), content(summary or NO_SUMMARY[language]), frame(before_turns)]
    for number, turn in enumerate(turns):
        parts += [
            frame("\n" + before_question if number else before_question),
            content(turn.query),
            frame(before_answer),
            content(turn.answer),
        ]
    return parts


def due_fold(request: ChatRequest, remembering: Remembering) -> FoldRequest | None:
    """The fold to ask for once this question is answered, if it is time."""
    failures = remembering.fold_failures
    is_due = (
        remembering.uncovered_tokens >= remembering.memory.context_len // DUE_SHARE
        # With the turn that is being answered.
        or remembering.uncovered_turns + 1 >= MAX_TURNS
    )
    # After failures not with every turn: they cost as much as successes.
    if not is_due or remembering.memory.num_turns % (min(failures, MAX_PAUSE) + 1):
        return None
    return FoldRequest(
        conversation_id=request.conversation_id or "",
        tenant=request.tenant,
        model=request.model,
        first=remembering.covered,
        priority=PRIORITY,
        sampling=SamplingParams(temperature=RETRY_TEMPERATURE if failures else 0.0, seed=failures),
    )


class FoldPrompts:
    """Builds the prompts of folds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def build(self, prompts: Prompts, request: FoldRequest, claim: Claim) -> Prompt:
        """The prompt of this attempt, as the first one chose it.

        Raises Refusal (`nothing_to_fold`), Fenced, and what the ledger raises.
        """
        context_len = prompts.context_len
        found = self._ledger.run(
            calls.recollect(claim.request_id, max_turns=MAX_TURNS, max_bytes=context_len * 24, from_head=True)
        )
        if found.memory is None:
            if found.covered != request.first or not found.turns:
                raise _nothing()
            chosen = choose(prompts.tokenizer, found, context_len)
            kept = self._ledger.run(
                calls.remember(claim.request_id, claim.attempt, chosen.model_dump_json(), worker=claim.worker)
            )
            if kept is None:
                raise Fenced
            memory = FoldMemory.model_validate_json(kept)
        else:
            memory = FoldMemory.model_validate_json(found.memory)
        turns = [turn.turn for turn in found.turns[: memory.last - memory.first]]
        if len(turns) != memory.last - memory.first:
            raise _nothing()
        if len(turns) == 1:
            # More than one fit as they are.
            turns = [shortened(prompts.tokenizer, turns[0], context_len // FOLD_SHARE)]
        parts = fold_parts(memory.summary, turns, fold_language(memory.summary, turns))
        return prompts.framed(request, parts, FOLD_LABELS, context_len // SUMMARY_SHARE)


def choose(tokenizer: PromptTokenizer, found: Recollected, context_len: int) -> FoldMemory:
    """Which turns a fold takes in: the oldest that no summary covers, one at least, fewer after failures."""
    rounds = RoundLengths(tokenizer)
    lengths = [turn.tokens or rounds.of_turn(turn.turn) for turn in found.turns]
    num_turns = min(num_fitting(lengths, context_len // FOLD_SHARE), MAX_TURNS >> found.fold_failures)
    return FoldMemory(summary=found.summary, first=found.first, last=found.first + max(num_turns, 1))


def fold_language(summary: str, turns: Sequence[Turn]) -> Language:
    """A conversation keeps the language of its first summary."""
    return language_of(summary or "\n".join(f"{turn.query}\n{turn.answer}" for turn in turns))


def shortened(tokenizer: PromptTokenizer, turn: Turn, limit: int) -> Turn:
    """The turn, with its middle left out where question or answer is long, so that it has about `limit` tokens at most."""
    if RoundLengths(tokenizer).of_turn(turn) <= limit:
        return turn
    query = _shortened(tokenizer, turn.query, limit // 2)
    return Turn(query, _shortened(tokenizer, turn.answer, limit - len(tokenizer.build_prompt(query))))


def _shortened(tokenizer: PromptTokenizer, text: str, limit: int) -> str:
    keep = len(text)
    while keep and (num_tokens := len(tokenizer.build_prompt(_cut(text, keep)))) > limit:
        # In proportion, and a little less, so that it ends soon.
        keep = min(int(keep * limit / num_tokens), keep - 1)
    return _cut(text, max(keep, 1))


def _cut(text: str, keep: int) -> str:
    if keep >= len(text):
        return text
    return text[: (keep + 1) // 2] + ELLIPSIS + text[len(text) - keep // 2 :]


# --- the answer --------------------------------------------------------------------------------------------------------


_RUN: Final = 12
"""Characters of which a loop repeats itself."""
MIN_DISTINCT: Final = 0.4


def check_summary(finished: Finished) -> Failed | None:
    """What is wrong with a fold's answer, if it cannot be a summary; the old one stays then.

    One that was cut at its greatest length is one: what is at its end is lost, and refusing it would lose every later turn.
    """
    problem = None
    text = finished.text.strip()
    if not any(map(str.isalpha, text)) or text in NO_SUMMARY.values():
        problem = "it is empty"
    elif _is_loop(text):
        problem = "it repeats itself"
    if finished.reason == "cancelled" or problem is None:
        return None
    return Failed(
        code="summary_rejected",
        message=f"The new summary was not accepted: {problem}. The old one stays, and a later turn tries again.",
    )


def _is_loop(text: str) -> bool:
    runs = [text[start : start + _RUN] for start in range(len(text) - _RUN + 1)]
    return len(runs) > 4 * _RUN and len(set(runs)) < MIN_DISTINCT * len(runs)


# --- asking for it -----------------------------------------------------------------------------------------------------


class Folding:
    """Submits folds, from a thread of its own: whoever ends a turn does not wait for it."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        model: str,
        retention_seconds: float,
        on_queued: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._model = model
        self._retention_seconds = retention_seconds
        self._on_queued = on_queued
        self._due: queue.SimpleQueue[tuple[FoldRequest, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="folding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._due.put(None)
        if self._thread.is_alive():
            self._thread.join(5)

    def submit(self, fold: FoldRequest, answered: str) -> None:
        """Queue this fold after the request `answered` has become a turn. A fold that is lost is made after a later turn."""
        self._due.put((fold, answered))

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            fold, answered = due
            call = calls.fold(
                fold,
                # Two workers that end the same turn ask for the same fold.
                request_id=f"{answered[:120]}.fold",
                model=fold.model or self._model,
                retention_seconds=self._retention_seconds,
            )
            try:
                is_queued = self._ledger.run(call)
            except (RedisUnavailable, RedisError) as error:
                logger.info("a fold was not queued, a later turn makes it: %s", error, request_id=answered)
                continue
            if is_queued:
                self._on_queued()


def _nothing() -> Refusal:
    return Refusal("nothing_to_fold", "The conversation is gone, or its summary covers these turns already.")
