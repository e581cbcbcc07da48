"""What the model is trained on, and how often: every task with its weight.

A new task is a function `(rng, language, held_out) -> Example` and one line here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ops.demo_model.tasks import dialogs, memory, summaries
from ops.demo_model.tasks.example import Example, Language

Task = Callable[[random.Random, Language, bool], Example]

TASKS: dict[Task, float] = {
    dialogs.question: 26,
    dialogs.outside: 5,
    dialogs.follow_up: 9,
    dialogs.statement: 6,
    dialogs.recollection: 9,
    dialogs.any_turn: 5,
    memory.fold: 12,
    memory.recall: 8,
    memory.ask_after_summary: 3,
    summaries.report: 9,
    summaries.several_reports: 4,
    summaries.summaries: 1.5,
    summaries.any_text: 5,
}
CHINESE_SHARE = 0.55


def draw(rng: random.Random) -> Example:
    """One training example."""
    task = rng.choices(list(TASKS), list(TASKS.values()))[0]
    return task(rng, "zh" if rng.random() < CHINESE_SHARE else "en", False)
