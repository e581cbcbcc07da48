"""An answer's token ids to its text, piece by piece: what has been given out is never taken back.

All pieces and `finish()`, joined, are exactly `tokenizer.process_response(tokenizer.decode(ids))`. To that end everything
is held back that a later token can still change. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from workers.models.tokenizer import (
    MARKS,
    TRAINING_TIME,
    TRAINING_TIME_TEXT,
    PieceJoiner,
    Tokenizer,
    clean_up_spaces,
    is_cjk,
    widen_marks,
)

# What `clean_up_spaces` may still rewrite begins with a space, and only these can follow up to its last character but one:
# each rule ends in another character. Some rules match once others have deleted spaces, so there may be more spaces.
_OPEN_SPACES: Final = re.compile(r" [ 'nvr]*\Z")
_OPEN_TIME: Final = re.compile(
    "(?:" + "|".join(re.escape(TRAINING_TIME[:end]) for end in range(1, len(TRAINING_TIME))) + r")\Z"
)
_NOT_PLAIN: Final = re.compile(r"[\s,!:;?\[]")
"""Without these no rule applies, unless something is held back."""


class StreamDetokenizer:
    """The text of one answer as it comes.

    With stop strings the text ends before the one whose end comes first; white space that would end the answer is left out.
    `emitted_ids` are tokens whose text was given out before, by an earlier attempt: the pieces go on where those ended.
    """

    __slots__ = (
        "_cleans_up_spaces",
        "_is_leading",
        "_joiner",
        "_last",
        "_marks_pending",
        "_spaces_pending",
        "_stop",
        "_text_pending",
        "_widens_marks",
        "is_stopped",
    )

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), emitted_ids: Iterable[int] = ()
    ) -> None:
        self._joiner = PieceJoiner(tokenizer)
        self._cleans_up_spaces = tokenizer.cleans_up_spaces
        self._widens_marks = tokenizer.widens_marks
        self._stop = tuple(stop)
        self._spaces_pending = ""
        """Decoded text that `clean_up_spaces` may still rewrite."""
        self._is_leading = True
        """Nothing but white space has come."""
        self._marks_pending = ""
        """Cleaned text that may still be rewritten: a mark without its right neighbour, a beginning of [[训练时间]]."""
        self._last = ""
        """The character before it, which was given on as it is."""
        self._text_pending = ""
        """Final text, but perhaps a stop string's beginning, or white space at the answer's end."""
        self.is_stopped = False
        """A stop string has come: the text is complete, whatever tokens follow."""
        for id_ in emitted_ids:
            self.add(id_)

    def add(self, id_: int) -> str:
        """The text that has become certain with this token; "" while there is none.

        Raises ValueError for an id that is no token.
        """
        text = self._joiner.add(id_)
        if not text or self.is_stopped:
            return ""
        if not (
            self._stop
            or self._spaces_pending
            or self._marks_pending
            or self._text_pending
            or self._is_leading
            or _NOT_PLAIN.search(text)
        ):
            self._last = text[-1]
            return text
        return self._end(self._rewrite_marks(self._rewrite_spaces(text)))

    def finish(self) -> str:
        """The text that was still held back, once no more tokens come. It belongs to the last token."""
        if self.is_stopped:
            return ""
        text = self._rewrite_spaces(self._joiner.finish(), is_last=True)
        return self._end(self._rewrite_marks(text, is_last=True), is_last=True)

    def _rewrite_spaces(self, text: str, *, is_last: bool = False) -> str:
        """`clean_up_spaces`, and no white space at the beginning."""
        text = self._spaces_pending + text
        self._spaces_pending = ""
        if self._cleans_up_spaces and " " in text:
            if not is_last and (match := _OPEN_SPACES.search(text)):
                self._spaces_pending = match[0]
                text = text[: match.start()]
            text = clean_up_spaces(text)
        if self._is_leading:
            text = text.lstrip()
            self._is_leading = not text
        return text

    def _rewrite_marks(self, text: str, *, is_last: bool = False) -> str:
        """[[训练时间]] replaced, and marks beside a Chinese character widened."""
        text = self._marks_pending + text
        if not text:
            return ""
        self._marks_pending = ""
        if "[" in text:
            text = text.replace(TRAINING_TIME, TRAINING_TIME_TEXT)
            if not is_last and (match := _OPEN_TIME.search(text)):
                # A mark before it is decided all the same: neither "[" nor what may replace it is a Chinese character.
                self._marks_pending = match[0]
                text = text[: match.start()]
        if not text or not self._widens_marks:
            return text
        if not (is_last or self._marks_pending) and text[-1] in MARKS:
            before = text[-2] if len(text) > 1 else self._last
            if not is_cjk(before):
                self._marks_pending = text[-1]
                text = text[:-1]
                if not text:
                    return ""
        last, self._last = self._last, text[-1]
        return widen_marks(last + text)[len(last) :]

    def _end(self, text: str, *, is_last: bool = False) -> str:
        """The answer's end: before a stop string, and without white space."""
        text = self._text_pending + text
        self._text_pending = ""
        if not text:
            return ""
        if self._stop:
            ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
            if ends:
                self.is_stopped = True
                return text[: min(ends)[1]].rstrip()
        if is_last:
            return text.rstrip()
        certain = text[: len(text) - self._open_stop_len(text)].rstrip()
        self._text_pending = text[len(certain) :]
        return certain

    def _open_stop_len(self, text: str) -> int:
        """Length of the longest end of this text that is the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
