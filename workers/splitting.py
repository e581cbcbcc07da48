"""Cuts a text into pieces of a bounded number of tokens: at the ends of sentences, Chinese and English ones.

Joined, the pieces are the text again, but for pieces of white space alone. Knows nothing about models: the caller counts the tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Final

CountTokens = Callable[[str], int]

_CLOSING: Final = r"[\"'”’」』）》】\])]*"
_END: Final = re.compile(
    # Chinese marks end a sentence wherever they stand; English ones before white space.
    rf"(?:[。！？；]|…+|⋯+)[。！？；…⋯!?]*{_CLOSING}\s*|[.!?]+{_CLOSING}(?:\s+|\Z)|\n[^\S\n]*\n\s*"
)
_ABBREVIATION: Final = re.compile(
    # A title, a reference, or a letter alone (an initial, `U.S.`, `e.g.`), before its full stop.
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|Rev|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Hon|St|Jr|Sr|Mt|vs|cf|al|etc|approx|ca|"
    r"No|Nos|Fig|Figs|Eq|Eqs|Sec|Ch|Vol|vol|pp|ed|eds|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)"
    r"|(?<![A-Za-z])(?!I\b)[A-Za-z])$"
)
_WEAKER: Final = (
    re.compile(r"\n\s*"),
    re.compile(r"[，、：,;:](?:\s+|(?<=[，、：]))"),
    re.compile(r"\s+"),
)
"""Where a sentence is cut that is too long by itself, best first."""
_LOOKBACK: Final = 16
"""Characters before a full stop that can make it an abbreviation's."""
_PRECISION: Final = 64
"""A hard cut may come by one in so many characters too early."""


def sentences(text: str) -> list[str]:
    """The text's sentences, each with the white space behind it. A blank line ends one, too."""
    return _cut_after(text, _ends(text))


def split(text: str, count: CountTokens, limit: int) -> list[str]:
    """Pieces of at most `limit` tokens each, of about the same size, none of them blank.

    Raises ValueError if a single character has more.
    """
    return pack(sentences(text), count, limit)


def pack(units: Sequence[str], count: CountTokens, limit: int) -> list[str]:
    """Joins neighbouring texts to as few pieces of at most `limit` tokens as that takes, then evens them out.

    A text that is too long by itself is cut. Raises ValueError if a single character is too long.
    """
    sized = [(unit, size) for whole in units for unit, size in _fitting(whole, count, limit, _WEAKER)]
    num_pieces = len(_join(sized, count, limit, limit))
    total = sum(size for _, size in sized)
    # Joined as tightly as possible the last piece may be a single sentence, and would weigh as much as a whole piece.
    even = _join(sized, count, -(-total // max(num_pieces, 1)), limit)
    return even if len(even) <= num_pieces else _join(sized, count, limit, limit)


def _join(sized: Sequence[tuple[str, int]], count: CountTokens, target: int, limit: int) -> list[str]:
    pieces: list[str] = []
    piece, piece_size = "", 0
    num_seams = 0
    """Joins since the piece was counted as a whole: each may have made its tokens one more than the sum, or fewer."""
    for unit, size in sized:
        joined_size = piece_size + size
        if piece and piece_size < target and joined_size + num_seams >= limit:
            joined_size, num_seams = count(piece + unit), -1
        if piece and (piece_size >= target or joined_size > limit):
            pieces.append(piece)
            piece, piece_size, num_seams = unit, size, 0
        else:
            piece, piece_size, num_seams = piece + unit, joined_size, num_seams + bool(piece)
    return [each for each in (*pieces, piece) if each.strip()]


def _fitting(
    text: str, count: CountTokens, limit: int, marks: Sequence[re.Pattern[str]]
) -> Iterator[tuple[str, int]]:
    """The text with its size, cut at these marks if it is too long."""
    size = count(text)
    if size <= limit:
        yield text, size
    elif marks:
        for part in _cut_after(text, (mark.end() for mark in marks[0].finditer(text))):
            yield from _fitting(part, count, limit, marks[1:])
    else:
        yield from _cut_hard(text, count, limit)


def _cut_hard(text: str, count: CountTokens, limit: int) -> Iterator[tuple[str, int]]:
    """Cuts between two characters, each time nearly as late as possible."""
    at = 0
    while at < len(text):
        low, high = 0, limit
        while high < len(text) - at and count(text[at : at + high]) <= limit:
            low, high = high, 2 * high
        high = min(high, len(text) - at)
        if count(text[at : at + high]) <= limit:
            low = high
        while high - low > 1 + low // _PRECISION:
            middle = (low + high) // 2
            if count(text[at : at + middle]) <= limit:
                low = middle
            else:
                high = middle
        # Not between a letter and the mark above it.
        while low > 1 and unicodedata.combining(text[at + low : at + low + 1] or " "):
            low -= 1
        if low == 0:
            raise ValueError(f"{text[at]!r} alone has more than {limit} tokens")
        yield text[at : at + low], count(text[at : at + low])
        at += low


def _ends(text: str) -> Iterator[int]:
    for mark in _END.finditer(text):
        if mark.group()[0] != "." or not _goes_on(text, mark):
            yield mark.end()


def _goes_on(text: str, mark: re.Match[str]) -> bool:
    """Whether the sentence goes on behind this full stop."""
    following = text[mark.end() : mark.end() + 1]
    if following.islower():
        return True
    before = text[max(mark.start() - _LOOKBACK, 0) : mark.start()]
    return not mark.group().startswith("..") and _ABBREVIATION.search(before) is not None


def _cut_after(text: str, ends: Iterator[int]) -> list[str]:
    begin, parts = 0, []
    for end in ends:
        if end > begin:
            parts.append(text[begin:end])
            begin = end
    return [*parts, text[begin:]] if begin < len(text) else parts
