"""What a trained checkpoint is measured on: every question, and of each task examples that training never sees.

Held out are one wording of each question, values of facts and reports, and the random draws themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ops.demo_model.tasks import dialogs, mixture, questions, summaries
from ops.demo_model.tasks.example import Example, rounds

NUM_EXAMPLES = 300
SEED = 20_000
"""Far from the seeds of training."""


def all_questions() -> list[Example]:
    """The first wording of every question, without a history."""
    return [
        Example(topic.question.asks[0], topic.question.answer, "question")
        for language in questions.LANGUAGES
        for topic in questions.topics(language)
    ]


def all_wordings() -> list[Example]:
    """Every trained wording of every question."""
    return [
        Example(ask, topic.question.answer, "question")
        for language in questions.LANGUAGES
        for topic in questions.topics(language)
        for ask in topic.question.trained
    ]


def new_wordings() -> list[Example]:
    """The wording of every question that training never uses."""
    return [
        Example(topic.question.held_out, topic.question.answer, "question")
        for language in questions.LANGUAGES
        for topic in questions.topics(language)
        if topic.question.held_out
    ]


def all_follow_ups(new_wording: bool = False) -> list[Example]:
    """Every follow-up as the second question of a conversation, asked in its first or in its held-out wording."""
    return [
        Example(
            rounds(
                [(topic.question.asks[0], topic.question.answer)],
                (question.held_out if new_wording else None) or question.asks[0],
            ),
            question.answer,
            "follow_up",
        )
        for language in questions.LANGUAGES
        for topic in questions.topics(language)
        for question in topic.follow_ups
    ]


def _drawn(task: mixture.Task, held_out: bool) -> list[Example]:
    rng = random.Random(f"{SEED}:{task.__name__}:{held_out}")
    return [task(rng, "zh" if index % 2 else "en", held_out) for index in range(NUM_EXAMPLES)]


def evaluation_sets() -> dict[str, list[Example]]:
    """Name → examples."""
    sets: dict[str, Callable[[], list[Example]]] = {
        "questions": all_questions,
        "questions_all_wordings": all_wordings,
        "questions_new_wordings": new_wordings,
        "follow_ups": all_follow_ups,
        "follow_ups_new_wordings": lambda: all_follow_ups(new_wording=True),
    }
    found = {name: make() for name, make in sets.items()}
    for task in mixture.TASKS:
        name = task.__name__
        if task is dialogs.question:
            continue
        found[name] = _drawn(task, False)
        if task not in (dialogs.follow_up, summaries.any_text):
            found[f"{name}_held_out"] = _drawn(task, True)
    return found
