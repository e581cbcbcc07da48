"""The engine on a GPU: together as alone, running ahead, preemption, continuation, and nothing leaks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Sampling
from workers.engine.model_runner import Launched
from workers.engine.scheduler import Schedule
from workers.engine.speculation import FIRST_PAUSE
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.layout import Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CONFIG = ModelConfig(
    hidden_size=512,
    inner_hidden_size=2048,
    num_layers=3,
    num_heads=4,
    vocab_size=1024,
    max_sequence_length=512,
)


class Vocabulary:
    """What an engine wants of a tokenizer."""

    first_id, end_id, eos_id = 0, 1010, 1005

    def layout(self, ids: list[int]) -> Layout:
        return Layout.of_prompt(ids, bos_id=1004, gmask_id=1001, mask_id=1000)


@pytest.fixture(scope="module")
def new_engine() -> Callable[..., Engine]:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    torch.manual_seed(3)
    model = ChatGLM(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "layernorm" in name and name.endswith("weight")
            parameter.normal_(mean=float(is_norm), std=0.02 if parameter.ndim == 1 else 0.06)
    state = model.half().state_dict()

    def new(weights: str = "fp16", **config: Any) -> Engine:
        copy = ChatGLM(CONFIG).half()
        copy.load_state_dict(state)
        network = CudaChatGLM(CONFIG, ChatGLMWeights.from_model(copy, weights))
        fields = {
            "checkpoint": "x",
            "block_size": 16,
            "max_num_seqs": 64,
            "context_len": 512,
            "num_blocks": 600,
        }
        return Engine(network, Vocabulary(), EngineConfig(**{**fields, **config}))

    return new


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [*(rng.randrange(900) for _ in range(length - 2)), 1001, 1004]


def run(engine: Engine, answers: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    answers = {} if answers is None else answers
    while engine.has_work:
        step = engine.step()
        for sequence_id, token_id in zip(step.sequence_ids, step.token_ids, strict=True):
            answers.setdefault(sequence_id, []).append(token_id)
    blocks = engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_usable_blocks
    return answers


def share_equal(first: dict[int, list[int]], second: dict[int, list[int]]) -> float:
    """The share of answers that are the same, token for token."""
    assert first.keys() == second.keys()
    return sum(first[key] == second[key] for key in first) / len(first)


SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.95, "top_p": 0.7, "top_k": 50},
    {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
    {"temperature": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.9, "logit_bias": {7: 2.0, 8: 3.0}},
    {"temperature": 0.9, "min_new_tokens": 20},
]


@pytest.mark.parametrize("weights", ["fp16", "int4", "int8"])
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_sixty_together_say_what_each_says_alone(new_engine, weights: str, cache_dtype: str) -> None:
    # Sums are made in another order for other batch sizes, so that a close call may fall the other way: not every answer is
    # the same, but most are.
    together, alone = (new_engine(weights, cache_dtype=cache_dtype) for _ in range(2))
    separate: dict[int, list[int]] = {}
    for index in range(60):
        sampling = Sampling(max_new_tokens=8 + index % 30, seed=index, **SAMPLINGS[index % 6])
        message = Generate(index, prompt(index, 4 + index), sampling)
        assert together.add(message) is None
        assert alone.add(message) is None
        run(alone, separate)
    assert share_equal(run(together), separate) > 0.7


def test_a_preempted_or_continued_sequence_goes_on_where_it_was(new_engine) -> None:
    small, large = new_engine(num_blocks=24), new_engine()
    for index in range(12):
        sampling = Sampling(max_new_tokens=60, seed=index, min_new_tokens=60)
        for engine in (small, large):
            engine.add(Generate(index, prompt(index, 20 + index), sampling))
    preempted, whole = run(small), run(large)
    assert small.scheduler.num_preemptions > 3
    assert all(len(answer) == 60 for answer in preempted.values())
    assert share_equal(preempted, whole) > 0.6
    for index in range(12):
        sampling = Sampling(max_new_tokens=60, seed=index, min_new_tokens=60)
        large.add(Generate(index, prompt(index, 20 + index), sampling, whole[index][:25]))
    continued = run(large)
    assert share_equal(continued, {key: answer[25:] for key, answer in whole.items()}) > 0.6


def test_hundreds_of_adds_and_aborts_leave_memory_where_it_was(new_engine) -> None:
    engine = new_engine(num_blocks=80, max_num_seqs=16)
    rng = random.Random(7)

    def turmoil(first_id: int) -> None:
        for index in range(first_id, first_id + 300):
            kind = SAMPLINGS[rng.randrange(6)]
            sampling = Sampling(**{"max_new_tokens": rng.randint(1, 40), "seed": index, **kind})
            engine.add(Generate(index, prompt(index, rng.randint(3, 120)), sampling))
            for _ in range(rng.randrange(4)):
                if engine.has_work:
                    engine.step()
            if rng.random() < 0.3:
                engine.abort(rng.randrange(max(first_id, index - 20), index + 1))
        run(engine)

    turmoil(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    turmoil(1000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert engine.scheduler.num_preemptions > 0


REPETITIVE = [*range(100, 130), *range(100, 130), *range(100, 112)]


@pytest.mark.parametrize("weights", ["fp16", "int4"])
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_drafts_leave_the_answers_as_they_are(new_engine, weights: str, cache_dtype: str) -> None:
    plain = new_engine(weights, cache_dtype=cache_dtype, speculation="off")
    drafting = new_engine(weights, cache_dtype=cache_dtype)
    found: dict[int, list[int]] = {}
    without: dict[int, list[int]] = {}
    for index in range(48):
        # Sharp draws: a random network's answers soon repeat themselves.
        kind = {"temperature": [0.0, 0.1, 0.2][index % 3]}
        kind |= {"repetition_penalty": 1.3} if index % 8 == 7 else {}
        kind |= {"top_k": 0} if index % 8 == 5 else {}
        sampling = Sampling(max_new_tokens=60 + index, seed=index, **kind)
        message = Generate(index, [*REPETITIVE[index % 7 :], 1001, 1004], sampling)
        for engine, answers in ((plain, without), (drafting, found)):
            assert engine.add(message) is None
            # One, two and three at a time.
            if index % 6 in (0, 2, 5):
                run(engine, answers)
    assert drafting.speculation.num_accepted > 300
    assert plain.speculation.num_drafted == 0
    assert {key: len(answer) for key, answer in found.items()}.keys() == without.keys()
    assert share_equal(found, without) > 0.7
    # Wherever two answers part, it was a close call: most of all tokens are the same.
    same = sum(a == b for key in found for a, b in zip(found[key], without[key], strict=False))
    assert same / sum(map(len, without.values())) > 0.8


def test_drafts_that_cost_more_than_they_bring_pause_and_come_back(new_engine) -> None:
    plain, drafting = new_engine(speculation="off"), new_engine()
    launch, has_drafts, draft_seconds = drafting._runner.launch, [], 0.004

    def slowly(schedule: Schedule) -> Launched:
        if not schedule.is_prefill:
            has_drafts.append(schedule.drafts is not None)
        # As long as a large network's steps take, however many rows they have; with this small one, waiting for each
        # step's tokens costs more than drafts bring.
        time.sleep(0.004 if schedule.drafts is None else draft_seconds)
        return launch(schedule)

    drafting._runner.launch = slowly

    def say(first_id: int, count: int) -> float:
        """The share of steps with drafts, while so many answers come one after another, the same as without drafts."""
        del has_drafts[:]
        found: dict[int, list[int]] = {}
        without: dict[int, list[int]] = {}
        for index in range(first_id, first_id + count):
            sampling = Sampling(max_new_tokens=100, min_new_tokens=100, seed=index, temperature=0.0)
            message = Generate(index, [*REPETITIVE[index % 7 :], 1001, 1004], sampling)
            for engine, answers in ((plain, without), (drafting, found)):
                assert engine.add(message) is None
                run(engine, answers)
        assert share_equal(found, without) > 0.6
        return sum(has_drafts) / len(has_drafts)

    free = say(0, 8)
    assert free > 0.1
    # As if a step with drafts took longer than all that it brings.
    draft_seconds = 0.05
    paused = say(100, 12)
    print(f"{free:.0%} of the steps had drafts; {paused:.0%} while they were slow")
    assert paused < free / 2
    runs = "".join(".x"[one] for one in has_drafts).split("x")
    assert max(map(len, runs)) >= FIRST_PAUSE
    draft_seconds = 0.004
    assert say(200, 20) > 2 * paused
