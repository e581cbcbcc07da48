"""What is asked while things break: chats, summaries, conversations and documents, greedy and sampled, short and long; from one seed.

Requests come from a pool, so that the undisturbed answer of each is made once. It knows nothing about who answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from ops.demo_model.held_out import all_wordings
from ops.demo_model.tasks import reports
from ops.demo_model.tasks.conversation import Conversation
from producer.contract import ChatRequest, Request, SamplingParams, SummaryRequest, Turn

LONG_SHARE: Final = 0.5
"""Of chats: answers that go on for 100 tokens and more, so that something can happen to them."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation: questions that are asked one after the other, each when the one before is answered."""

    conversation_id: str
    questions: tuple[ChatRequest, ...]


class Workload:
    """Draws requests. Two with the same seed draw the same."""

    def __init__(self, seed: int, *, pool_size: int = 300, max_tokens: int = 300) -> None:
        self._rng = random.Random(f"{seed}:workload")
        self._max_tokens = max_tokens
        self._wordings = [example.prompt for example in all_wordings()]
        self._num_talks = 0
        self.pool: list[Request] = [self._draw() for _ in range(pool_size)]

    def next(self) -> Request:
        """A request of the pool."""
        return self._rng.choice(self.pool)

    def talk(self, num_turns: int) -> Talk:
        """A conversation of so many questions, few enough that all turns stay in the prompt word for word."""
        self._num_talks += 1
        conversation_id = f"talk-{self._num_talks}"
        conversation = Conversation(self._rng, self._rng.choice(("zh", "en")))
        queries = [conversation.add_any()[0] or "?" for _ in range(num_turns)]
        return Talk(
            conversation_id,
            tuple(
                ChatRequest(query=query, conversation_id=conversation_id, sampling=self._sampling(20, 80))
                for query in queries
            ),
        )

    def document(self, num_chars: int = 2200) -> SummaryRequest:
        """A text that is too long for the demo checkpoint's context."""
        lines: list[str] = []
        while sum(map(len, lines)) < num_chars:
            lines.append(reports.draw(self._rng, "zh").text)
        return SummaryRequest(text="\n".join(lines), max_length=96, sampling=self._sampling(0, 96))

    def long(self, num_tokens: int) -> ChatRequest:
        """A chat whose answer has exactly so many tokens."""
        sampling = self._sampling(num_tokens, num_tokens)
        return ChatRequest(query=self._rng.choice(self._wordings), sampling=sampling)

    def _draw(self) -> Request:
        kind = self._rng.random()
        if kind < 0.2:
            report = reports.draw(self._rng, self._rng.choice(("zh", "en")))
            style = self._rng.choice(("paragraph", "bullets", "title"))
            return SummaryRequest(text=report.text, style=style, sampling=self._sampling(0, 128))
        history: tuple[Turn, ...] = ()
        if kind < 0.35:
            talk = Conversation(self._rng, self._rng.choice(("zh", "en")))
            history = tuple(Turn(*talk.add_any()) for _ in range(self._rng.randint(1, 3)))
        query = self._rng.choice(self._wordings)
        return ChatRequest(query=query, history=history, sampling=self._sampling(*self._lengths()))

    def _lengths(self) -> tuple[int, int]:
        if self._rng.random() >= LONG_SHARE:
            return 0, 128
        least = self._rng.randint(100, self._max_tokens)
        return least, least + 20

    def _sampling(self, min_new_tokens: int, max_new_tokens: int) -> SamplingParams:
        """Half greedy, half at temperature 0.9, both with a seed; a few with a repetition penalty or a stop string."""
        chance = self._rng.random()
        return SamplingParams(
            temperature=0.0 if chance < 0.5 else 0.9,
            top_p=0.95 if chance > 0.7 else 0.7,
            seed=self._rng.getrandbits(62),
            min_new_tokens=min(min_new_tokens, max_new_tokens),
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.2 if 0.4 < chance < 0.6 else 1.0,
            stop=("。",) if chance > 0.95 and not min_new_tokens else (),
        )
