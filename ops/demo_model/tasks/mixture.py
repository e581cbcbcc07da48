"""What the model is trained on, and how often: every task with its weight.

A new task is a function `(rng, language, held_out) -> Example` and one line here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ops.demo_model.tasks import copying, dialogs, memory, summaries
from ops.demo_model.tasks.example import Example, Language

Task = Callable[[random.Random, Language, bool], Example]

TASKS: dict[Task, float] = {
    dialogs.question: 20,
    dialogs.outside: 6,
    dialogs.follow_up: 7,
    dialogs.statement: 9,
    dialogs.recollection: 8,
    dialogs.any_turn: 3,
    memory.fold: 14,
    memory.recall: 8,
    memory.ask_after_summary: 3,
    summaries.report: 12,
    summaries.several_reports: 4,
    summaries.summaries: 2,
    summaries.any_text: 6,
    copying.repeat: 3,
    copying.look_up: 3,
}
CHINESE_SHARE = 0.55

WARM_TASKS = (copying.repeat, copying.look_up, dialogs.statement, summaries.report)
WARM_WEIGHT = 20.0
"""Of each of them at the very start. Copying comes first, because nothing but questions can be learned without it."""


def draw(rng: random.Random, warmth: float = 0.0) -> Example:
    """One training example; `warmth` goes from 1 at the start of the training to 0."""
    weights = [weight + warmth * WARM_WEIGHT * (task in WARM_TASKS) for task, weight in TASKS.items()]
    task = rng.choices(list(TASKS), weights)[0]
    return task(rng, "zh" if rng.random() < CHINESE_SHARE else "en", False)
