"""Is a continuation exact? Answers that are interrupted at every token and gone on with by prefill, against those that never were.

On the engine alone, without processes: thousands of interruptions in a minute. Greedily, and with seeds at temperature 0.9.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from ops.demo_model.held_out import all_wordings
from producer.contract import ChatRequest, SamplingParams
from tests.chaos.battle import Suite
from tests.chaos.strikes import Row
from tests.chaos.undisturbed import FLOAT_NOISE, Answer, Undisturbed
from workers.engine.speculation import Speculation
from workers.models.batch import Batch
from workers.prompts import Prompt

NUM_INTERRUPTIONS: Final = 2000
BATCH: Final = 8
LEAST_SHARE: Final = 0.999
"""Of interrupted answers that are the uninterrupted ones, whatever runs beside them."""


async def continuation(suite: Suite) -> list[Row]:
    """Every answer is interrupted at each of its tokens; beside the same others as before, and beside any others."""
    return await asyncio.to_thread(measure, suite.undisturbed, suite.seed, suite.times(NUM_INTERRUPTIONS))


def measure(undisturbed: Undisturbed, seed: int, num_interruptions: int) -> list[Row]:
    """A row for each way: so many interruptions in all, of answers in batches of eight."""
    rng = random.Random(f"{seed}:continuation")
    same, other = (
        Row("continuation, same batch", float("inf")),
        Row("continuation, other batch", float("inf")),
    )
    noise = 0.0
    while same.num_tries + other.num_tries < num_interruptions:
        prompts = [_draw(undisturbed, rng) for _ in range(BATCH)]
        generated, batch_noise = _generate_with_logits(undisturbed, prompts)
        noise = max(noise, batch_noise)
        answers = [undisturbed.answer_of(ids, reason) for ids, reason in generated]
        for number in range(1, max(len(answer.ids) for answer in answers)):
            _interrupt_all(undisturbed, prompts, answers, number, same)
        places = [
            (index, number) for index, answer in enumerate(answers) for number in range(1, len(answer.ids))
        ]
        rng.shuffle(places)
        for some in _chunks(places, BATCH):
            _interrupt_some(undisturbed, prompts, answers, some, other)
    for row in (same, other):
        row.num_streams = row.num_tries
        row.notes.append(
            f"{1 - row.num_differing / row.num_tries:.3%} of {row.num_tries} interrupted answers are the uninterrupted ones"
        )
    if same.num_differing:
        same.problems.append("beside the same others all must be the same")
    if other.num_differing > (1 - LEAST_SHARE) * other.num_tries:
        other.problems.append(f"less than {LEAST_SHARE:.1%} are the same")
    other.notes.append(
        f"logits of a decode and of a prefill differ by {noise:.1e} at most; {FLOAT_NOISE:.0e} counts as noise"
    )
    if noise > FLOAT_NOISE:
        other.problems.append("logits differ by more than what counts as float noise")
    return [same, other]


def _draw(undisturbed: Undisturbed, rng: random.Random) -> Prompt:
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 0.9)),
        top_p=rng.choice((0.7, 0.95)),
        seed=rng.getrandbits(62),
        min_new_tokens=rng.choice((0, 20)),
        max_new_tokens=48,
    )
    return undisturbed.prompts.build(ChatRequest(query=rng.choice(_WORDINGS), sampling=sampling))


_WORDINGS: Final = [example.prompt for example in all_wordings()]


def _interrupt_all(
    undisturbed: Undisturbed, prompts: Sequence[Prompt], answers: Sequence[Answer], number: int, row: Row
) -> None:
    """All of a batch after so many tokens, as when their worker dies, and gone on with together."""
    live = [index for index, answer in enumerate(answers) if len(answer.ids) > number]
    _compare(
        undisturbed,
        [prompts[index] for index in live],
        [answers[index] for index in live],
        [number] * len(live),
        row,
    )


def _interrupt_some(
    undisturbed: Undisturbed,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    places: Sequence[tuple[int, int]],
    row: Row,
) -> None:
    """Each at another token, gone on with beside others that are elsewhere."""
    _compare(
        undisturbed,
        [prompts[index] for index, _ in places],
        [answers[index] for index, _ in places],
        [number for _, number in places],
        row,
    )


def _compare(
    undisturbed: Undisturbed,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    numbers: Sequence[int],
    row: Row,
) -> None:
    heads = [list(answer.ids[:number]) for answer, number in zip(answers, numbers, strict=True)]
    for prompt, answer, (ids, _) in zip(prompts, answers, undisturbed.generate(prompts, heads), strict=True):
        row.num_tries += 1
        differences = undisturbed.differences(prompt, (), ids, answer)
        row.num_differing += bool(differences)
        row.num_beyond_noise += any(not difference.is_noise for difference in differences)
        row.notes += [str(difference) for difference in differences]


def _generate_with_logits(
    undisturbed: Undisturbed, prompts: Sequence[Prompt]
) -> tuple[list[tuple[list[int], str]], float]:
    """The answers, without drafts, and the greatest difference between a logit that the engine saw in a decode and the same one in a prefill."""
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, arguments: tuple[Batch, ...], logits: torch.Tensor) -> None:
        if not arguments[0].is_prefill:
            seen.append(logits)

    engine = undisturbed.engine
    # A step with drafts has several rows of a sequence. What is gone on with may be drafted: it must be the same.
    drafting, engine.speculation = engine.speculation, Speculation(0)
    hook = undisturbed.model.register_forward_hook(keep)
    try:
        generated = undisturbed.generate(prompts)
    finally:
        hook.remove()
        engine.speculation = drafting
    # Only while all of them run is it plain which row is whose.
    num_common = min(len(ids) for ids, _ in generated)
    greatest = 0.0
    for number in range(1, num_common, 4):
        for row, (prompt, (ids, _)) in enumerate(zip(prompts, generated, strict=True)):
            prefilled = undisturbed.logits(prompt.ids, [ids[:number]])[0]
            greatest = max(greatest, float((prefilled - seen[number - 1][row]).abs().max()))
    return generated, greatest


def _chunks(places: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for begin in range(0, len(places), size):
        yield places[begin : begin + size]
