"""What an engine promises: a sequence's tokens do not depend on what runs beside it, and every block comes back."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.config import CheckpointError

PROMPTS = [
    "你好",
    "感冒了怎么办",
    "Hello, how are you?",
    "What is the capital of France?",
    "请根据我的身高和体重，制定一个为期四周的训练计划：跑步、游泳、拉伸。" * 3,
    "深蹲的时候\n膝盖不要超过脚尖",
    "a",
    "It is easy, isn't it! " * 5,
]
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, {**SEEDED, "top_k": 0, "top_p": 1.0}])
def test_sixteen_together_say_what_each_says_alone(new_engine, sampling):
    together = new_engine()
    alone = new_engine()
    for index in range(16):
        length = {"max_new_tokens": 5 + 3 * index}
        together.add(index, PROMPTS[index % 8], **sampling, **length)
        alone.add(index, PROMPTS[index % 8], **sampling, **length)
        alone.run()
    assert together.run() == alone.answers
    assert len({tuple(answer[:5]) for answer in alone.answers.values()}) > 4


def test_sequences_with_different_sampling_run_together(new_engine):
    kinds = [
        GREEDY,
        SEEDED,
        {**SEEDED, "top_k": 0},
        {**SEEDED, "repetition_penalty": 1.3},
        {**GREEDY, "repetition_penalty": 1.3},
        {**SEEDED, "logit_bias": {300: 3.0, 400: 5.0}},
        {**SEEDED, "min_new_tokens": 6},
    ]
    together = new_engine()
    alone = new_engine()
    for index, kind in enumerate(kinds):
        together.add(index, PROMPTS[0], **kind)
        alone.add(index, PROMPTS[0], **kind)
        alone.run()
    assert together.run() == alone.answers
    assert alone.answers[0] != alone.answers[4]


def test_sixteen_together_take_less_than_half_of_the_time_of_one_after_another(new_engine):
    def seconds(is_together: bool) -> float:
        """Of this thread, which other processes do not disturb as they do a clock."""
        engine = new_engine()
        started = time.thread_time()
        for index in range(16):
            engine.add(index, PROMPTS[index % 8], max_new_tokens=24, **GREEDY)
            if not is_together:
                engine.run()
        engine.run()
        return time.thread_time() - started

    seconds(is_together=True)  # warm
    together, alone = (min(seconds(kind) for _ in range(5)) for kind in (True, False))
    print(f"{together / alone:.0%}")
    assert together < alone / 2


def test_sequences_that_come_later_join_those_that_run(new_engine):
    engine = new_engine()
    alone = new_engine()
    for index in range(8):
        alone.add(index, PROMPTS[index], **SEEDED)
        alone.run()
        engine.add(index, PROMPTS[index], **SEEDED)
        engine.step()
        engine.step()
    assert engine.run() == alone.answers


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, {**SEEDED, "repetition_penalty": 1.2}])
def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(new_engine, sampling):
    roomy = new_engine()
    tight = new_engine(num_blocks=14, context_len=96)
    for engine in (roomy, tight):
        for index in range(6):
            engine.add(index, PROMPTS[index % 4], max_new_tokens=40, **sampling)
        engine.run()
    assert tight.answers == roomy.answers
    assert tight.engine.scheduler.num_preemptions > 3
    assert roomy.engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, {**SEEDED, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("num_emitted", [1, 7, 19])
def test_a_continuation_says_what_an_uninterrupted_run_would_have_said(new_engine, sampling, num_emitted):
    whole = new_engine()
    whole.add(1, PROMPTS[2], seed=5, **sampling)
    answer = whole.run()[1]
    rest = new_engine()
    rest.add(9, PROMPTS[2], answer[:num_emitted], seed=5, **sampling)
    assert rest.run()[9] == answer[num_emitted:]


def test_the_same_seed_gives_the_same_answer_and_another_seed_another_one(new_engine):
    engine = new_engine()
    for index, seed in enumerate([3, 3, 4]):
        engine.add(index, PROMPTS[0], seed=seed, **SEEDED)
    engine.run()
    assert engine.answers[0] == engine.answers[1] != engine.answers[2]


def test_an_abort_frees_a_sequences_blocks_before_the_next_step(new_engine):
    engine = new_engine()
    engine.add(1, PROMPTS[0], max_new_tokens=50)
    engine.add(2, PROMPTS[4], max_new_tokens=50)
    engine.step()
    both = engine.num_used_blocks
    engine.engine.abort(2)
    step = engine.step()
    assert step.sequence_ids == [1]
    assert step.num_running == 1
    assert engine.num_used_blocks == 1 < both
    engine.engine.abort(2)
    engine.engine.abort(77)
    engine.run()
    assert len(engine.answers[1]) == 50


def test_an_aborted_sequence_that_waits_never_starts(new_engine):
    engine = new_engine(max_num_seqs=1)
    engine.add(1, PROMPTS[0])
    engine.add(2, PROMPTS[1])
    engine.step()
    engine.engine.abort(2)
    engine.run()
    assert engine.answers[2] == []


def test_no_block_is_lost_over_hundreds_of_sequences_and_aborts(new_engine):
    engine = new_engine(num_blocks=30, context_len=96, max_num_seqs=7, max_prefill_tokens=60)
    dice = random.Random(0)
    aborted = set()
    for sequence_id in range(300):
        engine.add(
            sequence_id,
            "".join(dice.choices("你好吗abc ", k=dice.randint(1, 40))),
            max_new_tokens=dice.randint(1, 20),
            temperature=dice.choice([0.0, 1.0]),
            repetition_penalty=dice.choice([1.0, 1.2]),
        )
        if dice.random() < 0.4:
            victim = dice.randint(0, sequence_id)
            if victim not in engine.finish_reasons:
                aborted.add(victim)
                engine.engine.abort(victim)
        for _ in range(dice.randint(0, 6)):
            if engine.engine.has_work:
                engine.step()
    engine.run()
    assert set(engine.answers) == aborted | set(engine.finish_reasons)
    assert engine.engine.scheduler.num_preemptions > 0
    owners = [block for sequence in engine.engine.scheduler.running for block in sequence.blocks]
    assert owners == []
    assert engine.num_used_blocks == 0


def test_an_answer_ends_with_the_end_token_or_at_its_length(new_engine):
    engine = new_engine()
    eos = engine.tokenizer.eos_id
    engine.add(1, PROMPTS[0], max_new_tokens=30, logit_bias={eos: 1000.0}, min_new_tokens=4)
    engine.add(2, PROMPTS[0], max_new_tokens=3, **GREEDY)
    engine.add(3, PROMPTS[0], max_new_tokens=1, logit_bias={eos: 1000.0})
    engine.run()
    assert engine.finish_reasons == {1: "stop", 2: "length", 3: "stop"}
    assert len(engine.answers[1]) == 5
    assert engine.answers[1][-1] == eos
    assert eos not in engine.answers[1][:-1]
    assert len(engine.answers[2]) == 3


def test_prompt_and_answer_together_end_at_the_context(new_engine):
    engine = new_engine(context_len=40)
    prompt = [*range(350, 380), engine.tokenizer.gmask_id, engine.tokenizer.bos_id]
    engine.add(1, prompt, max_new_tokens=100, logit_bias={engine.tokenizer.eos_id: -100.0})
    engine.run()
    assert (len(engine.answers[1]), engine.finish_reasons[1]) == (8, "length")


def test_a_cache_smaller_than_the_context_shortens_the_context(new_engine):
    engine = new_engine(num_blocks=5)
    assert engine.engine.context_len == 32
    assert engine.engine.ready(0.0).context_len == 32
    engine.add(1, PROMPTS[0], max_new_tokens=500, logit_bias={engine.tokenizer.eos_id: -100.0})
    engine.run()
    assert len(engine.tokenizer.build_prompt(PROMPTS[0])) + len(engine.answers[1]) == 32


def test_a_prompt_longer_than_the_context_is_refused_with_its_numbers(new_engine):
    engine = new_engine(context_len=40)
    special = [engine.tokenizer.gmask_id, engine.tokenizer.bos_id]
    refused = engine.refusal(1, [350] * 38 + special)
    assert refused.code == "context_exceeded"
    assert "40 tokens" in refused.message
    assert "Shorten" in refused.message
    assert not engine.engine.has_work
    engine.add(2, [350] * 37 + special, **GREEDY)
    engine.run()
    assert (len(engine.answers[2]), engine.finish_reasons[2]) == (1, "length")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt": [400, 401]}, "<sop>"),
        ({"prompt": []}, "<sop>"),
        ({"prompt": [10**9]}, "vocabulary"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"seed": 1 << 63}, "seed"),
        ({"emitted": [9] * 20}, "nothing is left"),
    ],
)
def test_a_sequence_that_cannot_run_is_refused_and_harms_nobody(new_engine, fields, word):
    engine = new_engine()
    engine.add(1, PROMPTS[0], **GREEDY)
    refused = engine.refusal(2, **{"prompt": PROMPTS[0], **fields})
    assert (refused.sequence_id, refused.code) == (2, "invalid_request")
    assert word in refused.message
    engine.run()
    assert len(engine.answers[1]) == 20


def test_an_id_that_is_taken_is_refused(new_engine):
    engine = new_engine()
    engine.add(1, PROMPTS[0])
    assert engine.refusal(1, PROMPTS[1]).code == "invalid_request"


def test_a_sequence_with_invalid_scores_does_not_touch_the_others(new_engine, tiny_parts, monkeypatch):
    alone = new_engine()
    alone.add(1, PROMPTS[0], **SEEDED)
    alone.run()
    # Each sequence is one row.
    engine = new_engine(speculation="off")
    model, _ = tiny_parts
    engine.add(1, PROMPTS[0], **SEEDED)
    engine.add(2, PROMPTS[1], **SEEDED)

    def forward(batch, cache):
        logits = type(model).forward(model, batch, cache)
        logits[1, 400] = torch.nan
        return logits

    monkeypatch.setattr(model, "forward", forward)
    engine.run()
    assert engine.answers[1] == alone.answers[1]
    assert engine.answers[2] == [5] * 20


GOLDEN_MODELS = ("chatglm-6b-tiny", "chatglm-6b-realvocab", "chatglm2-6b-tiny", "chatglm2-6b-realvocab")


@pytest.mark.parametrize("together", [True, False])
def test_greedy_answers_equal_the_originals(golden_root, drive, together):
    for name in GOLDEN_MODELS:
        folder = golden_root / name
        data = json.loads((folder / "golden_model.json").read_text(encoding="utf-8"))
        engine = Engine.from_config(EngineConfig(checkpoint=str(folder), device="cpu", num_threads=1))
        driven = drive(engine)
        for prompt in data["prompts"]:
            driven.add(
                prompt["index"], prompt["input_ids"], max_new_tokens=prompt["max_new_tokens"], temperature=0.0
            )
            if not together:
                driven.run()
        driven.run()
        for prompt in data["prompts"]:
            if prompt["greedy_min_margin"] >= 0.001:
                assert driven.answers[prompt["index"]] == prompt["greedy_new_ids"]
        reasons = [driven.finish_reasons[prompt["index"]] == "stop" for prompt in data["prompts"]]
        assert reasons == [prompt["stopped_by_eos"] for prompt in data["prompts"]]


def test_a_batch_and_a_long_prompt_continue_as_the_originals(golden_root, drive):
    for name in GOLDEN_MODELS:
        folder = golden_root / name
        data = json.loads((folder / "golden_model.json").read_text(encoding="utf-8"))
        engine = Engine.from_config(EngineConfig(checkpoint=str(folder), device="cpu", num_threads=1))
        driven = drive(engine)
        long = data["long_prompt"]
        driven.add(100, long["input_ids"], max_new_tokens=len(long["greedy_new_ids"]), temperature=0.0)
        width = len(data["batch"]["input_ids"][0])
        expected = {100: long["greedy_new_ids"]}
        for row, (prompt, sequence) in enumerate(
            zip(data["batch"]["input_ids"], data["batch"]["greedy_sequences"], strict=True)
        ):
            expected[row] = sequence[width:]
            ids = [id_ for id_ in prompt if id_ != engine.tokenizer.pad_id]
            driven.add(row, ids, max_new_tokens=len(expected[row]), temperature=0.0)
        answers = driven.run()
        for sequence_id, ids in expected.items():
            own = answers[sequence_id]
            # A row that has ended is padded in the original.
            assert own == ids[: len(own)]
            assert len(own) == len(ids) or own[-1] == engine.tokenizer.eos_id


def test_a_checkpoint_with_a_missing_file_does_not_start(tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"ice_text\.model"):
        Engine.from_config(EngineConfig(checkpoint=str(tmp_path), device="cpu"))
