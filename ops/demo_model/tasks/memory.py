"""The rolling summary of a conversation: folding turns into it, and answering from it.

`SUMMARY_QUERY`, `fold_prompt` and `summary_text` are the forms that whoever keeps such a memory must use with this model.
"""

from __future__ import annotations

import random

from ops.demo_model.tasks import facts as user_facts
from ops.demo_model.tasks.conversation import Conversation, join_topics
from ops.demo_model.tasks.example import Example, Language, rounds

SUMMARY_QUERY: dict[Language, str] = {
    "zh": "请记住以下对话摘要",
    "en": "Please remember this summary of our conversation",
}
"""The question of the leading round whose answer is the summary."""

_FOLD: dict[Language, str] = {
    "zh": "请把新的对话并入摘要。\n摘要：{summary}\n对话：\n{turns}",
    "en": "Fold the new turns into the summary.\nSummary: {summary}\nTurns:\n{turns}",
}
_TURN: dict[Language, str] = {"zh": "问：{question}\n答：{answer}", "en": "Q: {question}\nA: {answer}"}
NO_SUMMARY: dict[Language, str] = {"zh": "无", "en": "none"}


def fold_prompt(summary: str, turns: list[tuple[str, str]], language: Language) -> str:
    """The query that asks for a new summary of the old one ("" for none) and these turns."""
    listed = "\n".join(_TURN[language].format(question=question, answer=answer) for question, answer in turns)
    return _FOLD[language].replace("{summary}", summary or NO_SUMMARY[language]).replace("{turns}", listed)


def summary_text(facts: user_facts.Facts, topics: list[str], language: Language) -> str:
    """What the model is trained to write: all facts in a fixed order, then the latest topics."""
    known = user_facts.clauses(facts, language)
    if language == "zh":
        text = f"用户{'，'.join(known)}。" if known else "用户还没有介绍自己。"
        return f"{text}聊过：{join_topics(topics, language)}。" if topics else text
    text = f"The user {', '.join(known)}." if known else "The user has not introduced themselves."
    return f"{text} Topics: {join_topics(topics, language)}." if topics else text


def remembered(summary: str, turns: list[tuple[str, str]], query: str, language: Language) -> str:
    """The prompt of a chat whose older part is known only by its summary."""
    return rounds([(SUMMARY_QUERY[language], summary), *turns], query)


def _told_before(rng: random.Random, language: Language, held_out: bool) -> Conversation:
    """A conversation with facts and topics that only a summary remembers."""
    talk = Conversation(rng, language)
    names = [kind.name for kind in user_facts.KINDS]
    if rng.random() < 0.85:
        talk.held_out = held_out
        talk.add_statement(only=tuple(rng.sample(names, rng.randint(1, len(names)))))
        talk.held_out = False
    for _ in range(rng.randint(0, 5)):
        talk.add_question()
    talk.turns.clear()
    return talk


def fold(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """An old summary and some turns become a new summary."""
    is_first = rng.random() < 0.25
    talk = Conversation(rng, language) if is_first else _told_before(rng, language, held_out)
    before = "" if is_first else summary_text(talk.facts, talk.topics, language)
    talk.last_topic = None
    if held_out:
        talk.held_out = True
        talk.add_statement()
        talk.held_out = False
    for _ in range(rng.choice((1, 2, 2, 3, 4, 4, 5, 6, 8, 12))):
        talk.add_any()
    return Example(
        fold_prompt(before, talk.turns, language), summary_text(talk.facts, talk.topics, language), "fold"
    )


def recall(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A question about a fact or the topics, known from the summary or from the turns after it."""
    talk = _told_before(rng, language, held_out)
    before = summary_text(talk.facts, talk.topics, language)
    for _ in range(rng.choice((0, 0, 1, 2, 3, 4, 6, 10, 16))):
        talk.add_any()
    talk.held_out = held_out
    turn = talk.add_topics_question() if rng.random() < 0.15 and not held_out else talk.add_fact_question()
    return Example(remembered(before, talk.turns[:-1], turn[0], language), turn[1], "recall")


def ask_after_summary(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """Any other turn after a summary: it must not disturb the answer."""
    talk = _told_before(rng, language, False)
    before = summary_text(talk.facts, talk.topics, language)
    talk.last_topic = None
    for _ in range(rng.choice((0, 0, 1, 2, 4, 8))):
        talk.add_any()
    talk.held_out = held_out
    draw = rng.random()
    turn = (
        talk.add_question() if draw < 0.5 else talk.add_statement() if draw < 0.75 else talk.add_follow_up()
    )
    return Example(remembered(before, talk.turns[:-1], turn[0], language), turn[1], "after_summary")
