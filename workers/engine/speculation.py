"""Guesses what a sequence says next by copying what followed the same few tokens earlier, in its prompt or its answer.

Only a sequence that has just copied some tokens in a row gets a draft, and one whose drafts fail has to copy for longer
first. Exact, because a draft is never more than a guess: a token counts only if the sampler has drawn it. Knows token ids, no
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import pairwise
from typing import Final

from workers.engine.sequence import Sequence

NUM_EQUAL: Final = 3
"""So many tokens in a row must have come before for a guess at the next."""
MOST_STREAK: Final = 32
"""Tokens that a sequence must have copied after its drafts have failed again and again."""
MAX_SEQUENCES: Final = 8
"""With more of them running, a step's time is no longer the weights', and rows that are drawn in vain cost."""
MAX_DRAFT: Final = 7
"""With the token before it, as many rows as one product of the tensor cores takes."""
MAX_LONG_DRAFT: Final = 15
LONG_DRAFT_STREAK: Final = 12
LEAST_TIMED: Final = 8
"""Steps of each kind that are timed before they are compared."""
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
"""Steps without drafts, once they did not pay; doubled each time."""


class PromptLookup:
    """One sequence's guesses. `follow` is told all its tokens, `guess` says what may come next."""

    __slots__ = ("_behind", "_num_seen", "_source", "needed", "streak")

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        """The place behind the last occurrence of NUM_EQUAL tokens."""
        self._num_seen = 0
        self._source: int | None = None
        """The place of the token that the next one is guessed to be."""
        self.streak = 0
        """Tokens in a row that were copied from there, as far as is known."""
        self.needed = NUM_EQUAL
        """A draft is made from such a streak on."""

    def follow(self, token_ids: list[int]) -> None:
        """These are the sequence's tokens now: those of before, and some more."""
        if not self._num_seen:
            self._index(token_ids)
        for place in range(self._num_seen, len(token_ids)):
            self._add(token_ids, place)
        self._num_seen = len(token_ids)

    def guess(self, token_ids: list[int], count: int) -> list[int]:
        """Up to so many tokens; none while the sequence does not copy."""
        if self._source is None or self.streak < self.needed:
            return []
        return token_ids[self._source : self._source + count]

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """What has become of a draft."""
        if num_accepted == 0:
            self.needed = min(2 * self.needed, MOST_STREAK)
        elif 2 * num_accepted >= num_drafted:
            self.needed = max(self.needed // 2, NUM_EQUAL)

    def _index(self, token_ids: list[int]) -> None:
        """All but the last token at once, which is several times as fast."""
        count = len(token_ids) - 1
        if count > NUM_EQUAL:
            grams = zip(*(token_ids[offset:count] for offset in range(NUM_EQUAL)), strict=False)
            self._behind.update(zip(grams, range(NUM_EQUAL, count), strict=False))
            self._num_seen = count

    def _add(self, token_ids: list[int], place: int) -> None:
        if self._source is not None and token_ids[self._source] == token_ids[place]:
            self.streak += 1
            self._source += 1
        else:
            self.streak, self._source = 0, None
        if place >= NUM_EQUAL:
            self._behind[tuple(token_ids[place - NUM_EQUAL : place])] = place
        end = place + 1
        if self._source is None and end >= NUM_EQUAL:
            self._source = self._behind.get(tuple(token_ids[end - NUM_EQUAL : end]))
            self.streak = 0 if self._source is None else NUM_EQUAL


class _Pace:
    """Tokens a second of one sequence, over the last steps of a kind."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._tokens = self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.num_steps += 1
        # Older steps fade: contexts grow, and others come and go.
        self._tokens = 0.9 * self._tokens + tokens
        self._seconds = 0.9 * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0


class Speculation:
    """Which sequences of an engine get drafts, and how long ones.

    Steps with and without are timed: where rows cost what tokens bring, as on a CPU with a large network, drafts pause.
    """

    def __init__(self, max_rows: int) -> None:
        """max_rows: the tokens that one step can check, all sequences together; below 2 there are no drafts."""
        self._max_rows = max_rows
        self.num_drafted = 0
        self.num_accepted = 0
        """Since the engine started."""
        self._with, self._without = _Pace(), _Pace()
        self._next_pause = FIRST_PAUSE
        self._num_paused = 0

    def is_useful(self, running: Seq[Sequence]) -> bool:
        """Whether tokens that are drawn in vain would cost little."""
        return self._max_rows > 1 and 0 < len(running) <= MAX_SEQUENCES

    def follow(self, sequence: Sequence) -> None:
        """It has got tokens, while a draft would be useful."""
        if may_draft(sequence):
            if sequence.lookup is None:
                sequence.lookup = PromptLookup()
            sequence.lookup.follow(sequence.token_ids)

    def is_likely(self, running: Seq[Sequence]) -> bool:
        """Whether the next step should wait for this one's tokens, because some sequence copies."""
        return (
            self.is_useful(running)
            and not self._num_paused
            and any(
                sequence.lookup is not None and sequence.lookup.streak >= sequence.lookup.needed
                for sequence in running
            )
        )

    def drafts(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """What each of these sequences, all of whose tokens are known, may say next; empty where nobody knows."""
        count = self._max_rows // max(len(sequences), 1) - 1
        return [self._draft(sequence, count) for sequence in sequences]

    def _draft(self, sequence: Sequence, count: int) -> list[int]:
        lookup = sequence.lookup
        if lookup is None:
            return []
        longest = MAX_LONG_DRAFT if lookup.streak >= LONG_DRAFT_STREAK else MAX_DRAFT
        # The step gives one token more than the draft has.
        room = sequence.max_len - len(sequence.token_ids) - 1
        return lookup.guess(sequence.token_ids, max(min(count, longest, room), 0))

    def time(self, seconds: float, num_sequences: int, num_tokens: int, *, has_drafts: bool) -> None:
        """A decode of these took so long and gave so many tokens."""
        if not 0 < num_sequences <= MAX_SEQUENCES:
            return
        pace = self._with if has_drafts else self._without
        pace.add(num_tokens / num_sequences, seconds)
        if not has_drafts:
            self._num_paused = max(self._num_paused - 1, 0)
        elif min(self._with.num_steps, self._without.num_steps) >= LEAST_TIMED:
            if self._with.tokens_per_s < self._without.tokens_per_s:
                self._num_paused, self._next_pause = (
                    self._next_pause,
                    min(2 * self._next_pause, LONGEST_PAUSE),
                )
                self._with = _Pace()
            elif self._with.num_steps % LEAST_TIMED == 0:
                self._next_pause = FIRST_PAUSE

    def judge(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """What has become of a sequence's draft."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if num_drafted and sequence.lookup is not None:
            sequence.lookup.judge(num_drafted, num_accepted)


def may_draft(sequence: Sequence) -> bool:
    """A penalty depends on the tokens before, so that the draws of one step would depend on each other."""
    sampling = sequence.sampling
    return sampling.repetition_penalty == 1.0 and not sampling.logit_bias


def accepted(draft: Seq[int], drawn: Seq[int]) -> Iterator[int]:
    """The tokens that count: those drawn behind nothing but tokens of the draft that were drawn too.

    drawn: what the sampler has drawn after the sequence's last token, and after each of the draft's.
    """
    yield drawn[0]
    for guess, (before, after) in zip(draft, pairwise(drawn), strict=True):
        if guess != before:
            return
        yield after
