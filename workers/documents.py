"""Summaries of texts that are too long for the context: cut into pieces, these summarized, the summaries summarized, level by level.

The pieces are requests of their own; while they are on their way the document waits in the ledger, which queues it again when the
last one is done. So nobody here waits, and whoever claims it next goes on: with another level, or with its own answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from producer.contract import Finished, SummaryRequest
from producer.ledger import Claim, Ledger, calls
from workers.memory import Fenced
from workers.prompts import Language, Prompt, Prompts, Refusal, language_of, summary_query
from workers.splitting import pack, sentences

PIECE_SHARE: Final = 8
"""The summary of a piece has at most one in so many tokens of the context."""
ANSWER_SHARE: Final = 4
"""A text fits if all the tokens that its summary may have are left to it, or one in so many of the context."""
MIN_ROOM: Final = 2
"""A piece has at least so many times the tokens of its summary; otherwise there would be no end of levels."""


class Waiting(Exception):
    """The request waits for its pieces now, and is not this worker's any more."""


class CancelAsked(Exception):
    """The answer is not wanted any more."""


class Documents:
    """Builds the prompts of summaries."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def build(self, prompts: Prompts, request: SummaryRequest, claim: Claim) -> Prompt:
        """The prompt of the summary itself: of the text, or of the summaries of its pieces, in the request's style.

        Raises Waiting if it needs pieces first, CancelAsked, Fenced, Refusal, and what the ledger raises.
        """
        units = self._summaries(claim) if claim.pieces.levels else [request.text]
        text = "".join(units)
        whole = request.model_copy(update={"text": text})
        # An attempt that has begun to answer is gone on with as it began.
        if claim.emitted_ids or fits(prompts, whole):
            return prompts.build(whole)
        prompts.check_adapter(request.adapter)
        texts = pieces(prompts, units if claim.pieces.levels else sentences(text))
        if not texts or len(texts) == 1 or (claim.pieces.levels and len(texts) >= len(units)):
            # The context has no room for more than that.
            return prompts.build(whole)
        self._split(prompts, request, claim, texts)
        raise Waiting

    def _summaries(self, claim: Claim) -> list[str]:
        """Of the last level's pieces, those that say something."""
        levels = claim.pieces.levels
        ends = self._ledger.run(calls.pieces(claim.request_id, level=len(levels), number=levels[-1]))
        summaries = []
        for number, end in enumerate(ends, start=1):
            if not isinstance(end, Finished):
                raise Refusal(
                    "internal_error",
                    f"The summary of piece {len(levels)}.{number} is not there. Submit the text again.",
                )
            if summary := end.text.strip():
                summaries.append(f"{summary}\n")
        if not summaries:
            raise Refusal(
                "empty_summary",
                "The model had nothing to say about any piece of the text. Check that the text is one.",
            )
        return summaries

    def _split(self, prompts: Prompts, request: SummaryRequest, claim: Claim, texts: Sequence[str]) -> None:
        # What the caller wants of the answer, its ends above all, is not said of its pieces.
        sampling = request.sampling.model_copy(
            update={"max_new_tokens": None, "min_new_tokens": 0, "stop": ()}
        )
        priority = min(request.priority + 1, 9)
        split = self._ledger.run(
            calls.split(
                claim.request_id,
                claim.attempt,
                level=len(claim.pieces.levels) + 1,
                priority=priority,
                worker=claim.worker,
                pieces=[
                    SummaryRequest(
                        text=text,
                        max_length=piece_summary_len(prompts),
                        sampling=sampling,
                        model=request.model,
                        adapter=request.adapter,
                        tenant=request.tenant,
                        priority=priority,
                    )
                    for text in texts
                ],
            )
        )
        match split.outcome:
            case "waiting":
                return
            case "fenced":
                raise Fenced
            case "cancel_asked":
                raise CancelAsked
            case "id_taken":
                raise Refusal(
                    "invalid_request",
                    f"request_id: {split.taken_id!r}, which its piece would have, is another request's. Submit it under another id.",
                )


def fits(prompts: Prompts, request: SummaryRequest) -> bool:
    """Whether the text can be summarized as it is."""
    wanted = request.max_length
    if request.sampling.max_new_tokens is not None:
        wanted = min(wanted, request.sampling.max_new_tokens)
    return (
        _prompt_len(prompts, request) + min(wanted, prompts.context_len // ANSWER_SHARE)
        <= prompts.context_len
    )


_SHORT: Final[dict[Language, str]] = {"chinese": "文", "english": "a"}


def piece_summary_len(prompts: Prompts) -> int:
    """Tokens of the summary of a piece, at most."""
    return max(prompts.context_len // PIECE_SHARE, 8)


def pieces(prompts: Prompts, units: Sequence[str]) -> list[str]:
    """Sentences or summaries, joined to as few texts as can be summarized one by one. None: the context is too small for that."""
    templates = {language: _prompt_len(prompts, _paragraph(text)) for language, text in _SHORT.items()}

    def count(text: str) -> int:
        return _prompt_len(prompts, _paragraph(text)) - templates[language_of(text)]

    summary_len = piece_summary_len(prompts)
    room = prompts.context_len - summary_len - max(templates.values())
    return pack(units, count, room) if room >= MIN_ROOM * summary_len else []


def _paragraph(text: str) -> SummaryRequest:
    return SummaryRequest.model_construct(text=text, style="paragraph")


def _prompt_len(prompts: Prompts, request: SummaryRequest) -> int:
    return len(prompts.tokenizer.build_prompt(summary_query(request)))
