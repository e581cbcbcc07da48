"""The yardstick of the chaos suite: it must notice a token that is wrong, and forgive one that float noise can choose."""

from __future__ import annotations

import pytest
import torch

from producer.contract import ChatRequest, SamplingParams
from tests.chaos.undisturbed import FLOAT_NOISE, Answer, Undisturbed
from workers.prompts import Prompt


def _asked(undisturbed: Undisturbed, **sampling: object) -> tuple[Prompt, Answer]:
    fields = {"temperature": 0.0, "seed": 7, "min_new_tokens": 12, "max_new_tokens": 12, **sampling}
    request = ChatRequest(query="hello", sampling=SamplingParams(**fields))
    [answer] = undisturbed.answers([request])
    return undisturbed.prompts.build(request), answer


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_does_not_differ_from_itself(undisturbed: Undisturbed, temperature: float) -> None:
    prompt, answer = _asked(undisturbed, temperature=temperature)

    assert undisturbed.differences(prompt, (), answer.ids, answer) == []


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_token_that_the_model_would_not_choose_is_one_difference_beyond_noise(
    undisturbed: Undisturbed, temperature: float
) -> None:
    prompt, answer = _asked(undisturbed, temperature=temperature)
    logits = undisturbed.logits(prompt.ids, [answer.ids[:4]])[0]
    unlikely = int(logits[undisturbed.tokenizer.first_id : undisturbed.tokenizer.end_id].argmin())
    head = [*answer.ids[:4], unlikely + undisturbed.tokenizer.first_id]
    [(changed, _)] = undisturbed.generate([prompt], [head])

    [difference] = undisturbed.differences(prompt, (), changed, answer)

    assert (difference.index, difference.expected, difference.actual) == (5, answer.ids[4], head[4])
    assert not difference.is_noise


def test_an_answer_that_is_cut_or_too_long_differs_beyond_noise(undisturbed: Undisturbed) -> None:
    prompt, answer = _asked(undisturbed)

    [cut] = undisturbed.differences(prompt, (), answer.ids[:-1], answer)
    [longer] = undisturbed.differences(prompt, (), [*answer.ids, answer.ids[0]], answer)

    assert (cut.actual, longer.expected) == (None, None)
    assert not cut.is_noise
    assert not longer.is_noise


@pytest.mark.parametrize(("distance", "is_noise"), [(FLOAT_NOISE / 4, True), (FLOAT_NOISE * 200, False)])
def test_a_near_tie_is_noise_only_as_near_as_float_noise(
    undisturbed: Undisturbed, distance: float, is_noise: bool
) -> None:
    plain, _ = _asked(undisturbed)
    logits = undisturbed.logits(plain.ids, [[]])[0][
        undisturbed.tokenizer.first_id : undisturbed.tokenizer.end_id
    ]
    (best, second), (first_place, second_place) = (part.tolist() for part in torch.topk(logits, 2))
    other = second_place + undisturbed.tokenizer.first_id
    # The second is lifted to just below the best.
    prompt, answer = _asked(undisturbed, logit_bias={other: best - second - distance})
    assert answer.ids[0] == first_place + undisturbed.tokenizer.first_id
    [(changed, _)] = undisturbed.generate([prompt], [[other]])

    difference = undisturbed.differences(prompt, (), changed, answer)[0]

    assert (difference.index, difference.actual) == (1, other)
    assert difference.top_two == pytest.approx(distance, rel=0.3)
    assert difference.is_noise == is_noise
