"""Text that is built of frames and contents: `[Round 3]`, `问：` and `答：` belong to the prompt, what stands between them to a user.

A content cannot make a line that looks like a frame's: the newline before it becomes a space, and no other id changes. Works on
ids, after normalisation, so that no spelling gets around it. Knows no model's frames.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A piece of a prompt's text."""

    text: str
    is_frame: bool


def frame(text: str) -> Part:
    return Part(text, True)


def content(text: str) -> Part:
    return Part(text, False)


def joined(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)


LABEL_LEN = 16
"""Characters of a line that tell whether it looks like a frame's."""


def without_forged_lines(
    ids: list[int],
    parts: Sequence[Part],
    labels: re.Pattern[str],
    *,
    newline_id: int,
    space_id: int,
    text_of: Callable[[Sequence[int]], str],
) -> list[int] | None:
    """The ids of `joined(parts)`, with `space_id` for each newline of a content before a line that begins with a label.

    text_of: the text of ids. None if newlines and ids do not correspond one to one: then nothing is known.
    """
    owners = [part.is_frame for part in parts for _ in range(part.text.count("\n"))]
    if all(owners):
        return ids
    places = [place for place, id_ in enumerate(ids) if id_ == newline_id]
    if len(places) != len(owners):
        return None
    safe = list(ids)
    end = len(ids)
    # From the end: where a newline goes, the line before it grows by what followed.
    for place, is_frame in zip(reversed(places), reversed(owners), strict=True):
        # An id is one byte at least.
        line = safe[place + 1 : min(end, place + 1 + 4 * LABEL_LEN)]
        if not is_frame and labels.match(text_of(line).lstrip()):
            safe[place] = space_id
        else:
            end = place
    return safe


def flattened(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts without a newline in any content: for a tokenizer whose newlines cannot be told apart."""
    return (part if part.is_frame else part._replace(text=part.text.replace("\n", " ")) for part in parts)
