"""Examples of chat: single questions, follow-ups, facts told and asked for, and what lies outside.

It knows nothing about summaries of a conversation.
"""

from __future__ import annotations

import random

from ops.demo_model.tasks import questions
from ops.demo_model.tasks.conversation import Conversation
from ops.demo_model.tasks.example import Example, Language, rounds


def question(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """One question without a history."""
    topic = rng.choice(questions.topics(language))
    return Example(questions.ask_topic(rng, topic, held_out), topic.question.answer, "question")


def outside(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A question that the model must decline."""
    text = rng.choice(questions.outside(language)[1]) if held_out else questions.ask_outside(rng, language)
    return Example(text, questions.REFUSAL[language], "outside")


def follow_up(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A second question that needs the first; now and then with a few turns before or between."""
    talk = Conversation(rng, language)
    _grow(talk, rng.choice((0, 0, 0, 0, 1, 2, 4)))
    talk.add_topic_with_follow_up()
    draw = rng.random()
    if draw < 0.1:
        talk.add_statement()
    elif draw < 0.25:
        talk.add_follow_up()
    talk.held_out = held_out
    return _last(talk, "follow_up")


def statement(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """The user tells something; the answer repeats it."""
    talk = Conversation(rng, language)
    _grow(talk, rng.choice((0, 0, 0, 1, 2)))
    talk.held_out = held_out
    turn = talk.add_statement()
    return Example(rounds(talk.turns[:-1], turn[0]), turn[1], "statement")


def recollection(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A question about what the user told some turns ago."""
    talk = Conversation(rng, language)
    _grow(talk, rng.choice((0, 0, 1, 2)))
    talk.held_out = held_out
    talk.add_statement()
    talk.held_out = False
    _grow(talk, _num_turns(rng))
    talk.held_out = held_out
    turn = talk.add_topics_question() if rng.random() < 0.1 and not held_out else talk.add_fact_question()
    return Example(rounds(talk.turns[:-1], turn[0]), turn[1], "recollection")


def any_turn(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A known question after unrelated turns: the history must not confuse the answer."""
    talk = Conversation(rng, language)
    _grow(talk, 1 + _num_turns(rng))
    talk.held_out = held_out
    turn = talk.add_outside() if rng.random() < 0.2 and not held_out else talk.add_question()
    return Example(rounds(talk.turns[:-1], turn[0]), turn[1], "after_history")


def _last(talk: Conversation, task: str) -> Example:
    turn = talk.add_follow_up()
    return Example(rounds(talk.turns[:-1], turn[0]), turn[1], task)


def _grow(talk: Conversation, num_turns: int) -> None:
    for _ in range(num_turns):
        talk.add_any()


def _num_turns(rng: random.Random) -> int:
    """Mostly few turns, with a long tail that fills the context."""
    return rng.choice((0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 7, 10, 15, 22))
