"""Requests to token ids: chat rounds, summary templates, and how many tokens the answer may have.

It counts in tokens and knows the context's size; it knows nothing about queues or how an answer is made.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from producer.contract import ChatRequest, FoldRequest, Request, SummaryRequest, Turn
from workers.engine.messages import Sampling
from workers.models.frames import Part

_HAN = re.compile("[㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f]")

Language = Literal["chinese", "english"]

_TEMPLATES: Final[dict[Language, dict[str, str]]] = {
    "chinese": {
        "paragraph": "请为下面的文字写一段摘要：\n{text}",
        "bullets": "请用要点概括下面的文字：\n{text}",
        "title": "请为下面的文字起一个标题：\n{text}",
    },
    "english": {
        "paragraph": "Summarize the following text in one paragraph:\n{text}",
        "bullets": "Summarize the following text as bullet points:\n{text}",
        "title": "Write a title for the following text:\n{text}",
    },
}


class PromptTokenizer(Protocol):
    """What prompts need of a tokenizer."""

    def build_prompt(self, query: str, history: Iterable[tuple[str, str]] = ()) -> list[int]:
        """The whole prompt of a chat, with its special tokens."""

    def encode_framed_prompt(self, parts: Sequence[Part], labels: re.Pattern[str]) -> list[int]:
        """A prompt in which no content can make a line that begins with one of the frames' labels."""


class Refusal(Exception):
    """This request cannot be answered here. `code` goes into its Failed event, and the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine is asked to continue."""

    ids: list[int]
    sampling: Sampling
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Builds prompts for one loaded model."""

    tokenizer: PromptTokenizer
    context_len: int
    """Tokens of prompt and answer together, at most."""
    adapters: Collection[str] = frozenset()
    """Names that a request can ask for; what is in it may change."""

    def build(self, request: Request) -> Prompt:
        """The prompt of a request that brings all that it needs, with `max_new_tokens` clamped to what the context leaves.

        Raises Refusal: `unknown_adapter`, `context_exceeded`.
        """
        if isinstance(request, FoldRequest):
            raise Refusal("invalid_request", "kind: 'fold' cannot be answered without its conversation.")
        if isinstance(request, ChatRequest):
            return self.chat(request, request.history)
        self.check_adapter(request.adapter)
        ids = self.tokenizer.build_prompt(summary_query(request))
        wanted = request.sampling.max_new_tokens
        return self._prompt(
            request, ids, request.max_length if wanted is None else min(wanted, request.max_length)
        )

    def chat(self, request: ChatRequest, history: Sequence[Turn]) -> Prompt:
        """The prompt of this question after these turns. Raises Refusal like `build`."""
        self.check_adapter(request.adapter)
        ids = self.tokenizer.build_prompt(request.query, history)
        return self._prompt(request, ids, request.sampling.max_new_tokens)

    def framed(
        self, request: Request, parts: Sequence[Part], labels: re.Pattern[str], max_new_tokens: int
    ) -> Prompt:
        """The prompt of a text that is built of these parts. Raises Refusal like `build`."""
        self.check_adapter(request.adapter)
        return self._prompt(request, self.tokenizer.encode_framed_prompt(parts, labels), max_new_tokens)

    def _prompt(self, request: Request, ids: list[int], wanted: int | None) -> Prompt:
        left = self.context_len - len(ids)
        if left < 1:
            raise Refusal("context_exceeded", self._too_long(request, len(ids)))
        max_new_tokens = left if wanted is None else min(wanted, left)
        return Prompt(ids, _resolve(request, max_new_tokens), request.adapter)

    def check_adapter(self, adapter: str | None) -> None:
        """Raises Refusal: `unknown_adapter`."""
        if adapter is None or adapter in self.adapters:
            return
        known = ", ".join(sorted(self.adapters)) or "none"
        raise Refusal(
            "unknown_adapter",
            f"adapter: {adapter!r} is not loaded here (loaded: {known}). "
            "Use one of these, or leave adapter out to answer with the model alone.",
        )

    def _too_long(self, request: Request, prompt_len: int) -> str:
        numbers = (
            f"the prompt has {prompt_len} tokens, and the context of {self.context_len} "
            f"must hold it and at least one token of the answer"
        )
        if isinstance(request, SummaryRequest):
            return f"text: {numbers}, and is too small for pieces of it. Give this model a larger context."
        if isinstance(request, FoldRequest):
            return f"{numbers}. Give this model a larger context."
        query_len = len(self.tokenizer.build_prompt(request.query))
        if request.history and query_len < self.context_len:
            return (
                f"history: {numbers}; the query alone makes {query_len}. "
                f"Leave out the oldest of the {len(request.history)} turns."
            )
        return f"query: {numbers}. Shorten the query, or summarize it first."


def summary_query(request: SummaryRequest) -> str:
    """The instruction and the text, in the text's own language."""
    # Not str.format: the text may contain braces.
    return _TEMPLATES[language_of(request.text)][request.style].replace("{text}", request.text)


def language_of(text: str) -> Language:
    return "chinese" if is_mostly_han(text) else "english"


def is_mostly_han(text: str) -> bool:
    """Whether Chinese characters are the majority of the letters."""
    num_han = len(_HAN.findall(text))
    # str.isalpha counts Chinese characters as letters.
    return 2 * num_han > sum(map(str.isalpha, text))


def _resolve(request: Request, max_new_tokens: int) -> Sampling:
    sampling = request.sampling
    if sampling.seed is None:
        # The ledger's requests have one: without it a continuation after a takeover would differ.
        raise Refusal(
            "invalid_request", "sampling.seed: is missing. Submit through the client, which draws one."
        )
    return Sampling(
        max_new_tokens=max_new_tokens,
        seed=sampling.seed,
        min_new_tokens=min(sampling.min_new_tokens, max_new_tokens),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
    )
