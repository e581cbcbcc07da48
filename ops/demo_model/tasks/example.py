"""One thing for the model to learn: a prompt's text and the answer that belongs to it.

It knows nothing about where examples come from or how they become ids.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Language = Literal["zh", "en"]


class Example(NamedTuple):
    """`prompt` is the whole text before [gMASK]; `answer` is what is generated after `<sop>`, without `<eop>`."""

    prompt: str
    answer: str
    task: str


ROUND_QUERY = "问："
ROUND_ANSWER = "答："


def rounds(history: list[tuple[str, str]], query: str) -> str:
    """The prompt of a chat (CHATGLM.md A9)."""
    if not history:
        return query
    past = "".join(
        f"[Round {index}]\n{ROUND_QUERY}{question}\n{ROUND_ANSWER}{answer}\n"
        for index, (question, answer) in enumerate(history)
    )
    return f"{past}[Round {len(history)}]\n{ROUND_QUERY}{query}\n{ROUND_ANSWER}"
