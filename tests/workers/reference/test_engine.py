"""The reference engine in its process: what the native one says it says too, and nothing runs that was not allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_code import add_code
from workers.engine.client import ENGINE_MODULE, EngineClient, EngineDied
from workers.engine.config import EngineConfig
from workers.engine.messages import (
    Abort,
    AdaptersChanged,
    Generate,
    LoadAdapter,
    Refused,
    Sampling,
    Step,
    UnloadAdapter,
)
from workers.models.loader import load_model
from workers.models.tokenizer import Tokenizer

REFERENCE = "workers.reference.process"
READY_SECONDS = 100
"""torch and transformers take their time to be imported on a busy machine."""

pytestmark = pytest.mark.timeout(300)


def engine_of(
    checkpoint: Path, *, module: str = REFERENCE, trust_remote_code: bool = True, **options: Any
) -> EngineClient:
    config = EngineConfig(
        checkpoint=str(checkpoint),
        num_threads=1,
        device="cpu",
        dtype="float32",
        trust_remote_code=trust_remote_code,
        **options,
    )
    return EngineClient(config, module=module)


def next_step(engine: EngineClient) -> Step:
    message = engine.receive(30)
    assert isinstance(message, Step), message
    return message


def answer_of(engine: EngineClient, message: Generate) -> tuple[list[int], str]:
    """(tokens, finish reason)"""
    engine.send(message)
    token_ids: list[int] = []
    while True:
        step = next_step(engine)
        # The native engine may give several tokens of a sequence in one step.
        assert set(step.sequence_ids) == {message.sequence_id}
        token_ids += step.token_ids
        if step.finish_reasons[-1]:
            return token_ids, step.finish_reasons[-1]


@pytest.fixture(scope="module")
def engine(checkpoint_with_code: Path) -> Iterator[EngineClient]:
    with engine_of(checkpoint_with_code) as engine:
        ready = engine.wait_until_ready(READY_SECONDS)
        assert (ready.device, ready.dtype, ready.context_len) == ("cpu", "float32", 512)
        yield engine


@pytest.fixture(scope="module")
def prompts(checkpoint_with_code: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(checkpoint_with_code)
    return [
        tokenizer.build_prompt("感冒了怎么办？"),
        tokenizer.build_prompt(
            "And then?", [("How do I squat?", "Keep your back straight."), ("嗯", "好的")]
        ),
    ]


@pytest.fixture(scope="module")
def golden_with_code(golden_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "tiny"
    shutil.copytree(golden_root / "chatglm-6b-tiny", folder, copy_function=shutil.copyfile)
    add_code(folder)
    return folder


@pytest.fixture(scope="module")
def golden_engine(golden_with_code: Path) -> Iterator[EngineClient]:
    with engine_of(golden_with_code) as engine:
        engine.wait_until_ready(READY_SECONDS)
        yield engine


def test_it_says_what_the_native_engine_says(
    engine: EngineClient, checkpoint_with_code: Path, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_new_tokens=24, seed=0, temperature=0)
    with engine_of(checkpoint_with_code, module=ENGINE_MODULE) as native:
        native.wait_until_ready(READY_SECONDS)
        for index, prompt_ids in enumerate(prompts):
            message = Generate(index, prompt_ids, sampling)
            assert answer_of(engine, message) == answer_of(native, message)


def test_a_continuation_draws_what_would_have_come_next(
    engine: EngineClient, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_new_tokens=16, seed=5, temperature=1.5, top_p=1.0, top_k=0)
    whole, _ = answer_of(engine, Generate(1, prompts[0], sampling))
    assert len(whole) > 6
    rest, _ = answer_of(engine, Generate(2, prompts[0], sampling, emitted_ids=whole[:6]))
    assert whole[:6] + rest == whole


def test_sequences_are_answered_one_after_another(engine: EngineClient, prompts: list[list[int]]) -> None:
    sampling = Sampling(max_new_tokens=4, seed=0, min_new_tokens=4)
    for sequence_id in (1, 2, 3):
        engine.send(Generate(sequence_id, prompts[0], sampling))
    steps = [next_step(engine) for _ in range(12)]
    assert [step.sequence_ids for step in steps] == [[1]] * 4 + [[2]] * 4 + [[3]] * 4
    assert steps[-1].finish_reasons == ["length"]
    assert (steps[-1].num_running, steps[-1].num_waiting) == (0, 0)


def test_an_aborted_sequence_makes_way_for_the_next(engine: EngineClient, prompts: list[list[int]]) -> None:
    engine.send(Generate(1, prompts[0], Sampling(max_new_tokens=200, min_new_tokens=200, seed=0)))
    engine.send(Generate(2, prompts[0], Sampling(max_new_tokens=200, min_new_tokens=200, seed=0)))
    engine.send(Generate(3, prompts[0], Sampling(max_new_tokens=1, seed=0)))
    assert next_step(engine).sequence_ids == [1]
    engine.send(Abort(2))
    engine.send(Abort(1))
    step = next_step(engine)
    while step.sequence_ids == [1]:  # what was said before the abort was read
        step = next_step(engine)
    assert step.sequence_ids == [3]


def test_a_bias_and_a_minimum_are_kept_to(
    engine: EngineClient, checkpoint_with_code: Path, prompts: list[list[int]]
) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint_with_code)
    likely_end = {tokenizer.eos_id: 100.0}
    ended, reason = answer_of(
        engine, Generate(1, prompts[0], Sampling(max_new_tokens=9, seed=0, logit_bias=likely_end))
    )
    assert (ended, reason) == ([tokenizer.eos_id], "stop")
    sampling = Sampling(max_new_tokens=9, seed=0, logit_bias=likely_end, min_new_tokens=5)
    ended, reason = answer_of(engine, Generate(2, prompts[0], sampling))
    assert (len(ended), reason) == (6, "stop")


def test_a_sequence_that_cannot_be_run_is_refused(engine: EngineClient, prompts: list[list[int]]) -> None:
    engine.send(Generate(1, [7] * 600, Sampling(max_new_tokens=4, seed=0)))
    refused = engine.receive(10)
    assert isinstance(refused, Refused)
    assert refused.code == "context_exceeded"
    engine.send(Generate(2, prompts[0], Sampling(max_new_tokens=4, seed=0), adapter="doctor"))
    refused = engine.receive(10)
    assert isinstance(refused, Refused)
    assert refused.code == "unknown_adapter"


def test_code_of_the_checkpoint_does_not_run_unless_it_is_trusted(
    checkpoint_with_code: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoint_with_code, folder)
    trace = tmp_path / "it-ran"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(trace)!r}, 'w')\n" + path.read_text())
    with (
        engine_of(folder, trust_remote_code=False) as engine,
        pytest.raises(EngineDied, match="trust-remote-code"),
    ):
        engine.wait_until_ready(READY_SECONDS)
    load_model(folder)
    assert not trace.exists()
    with engine_of(folder) as engine:
        engine.wait_until_ready(READY_SECONDS)
    assert trace.exists()


def test_with_one_seed_it_draws_what_the_original_drew(
    golden_engine: EngineClient, golden_with_code: Path
) -> None:
    golden = json.loads((golden_with_code / "golden_model.json").read_text())
    for index, drawn in enumerate(golden["sampled"]):
        sampling = Sampling(
            max_new_tokens=len(drawn["new_ids"]),
            seed=drawn["torch_manual_seed"],
            **{name: drawn[name] for name in ("temperature", "top_p", "top_k")},
        )
        prompt_ids = golden["prompts"][drawn["prompt"]]["input_ids"]
        assert answer_of(golden_engine, Generate(index, prompt_ids, sampling))[0] == drawn["new_ids"]


def test_adapters_come_and_go_between_answers(golden_engine: EngineClient, golden_with_code: Path) -> None:
    golden = json.loads((golden_with_code / "golden_model.json").read_text())
    prompt = golden["prompts"][0]
    sampling = Sampling(max_new_tokens=len(prompt["greedy_new_ids"]), seed=0, temperature=0)
    adapter = str(golden_with_code / "lora")
    engine = golden_engine

    def answer(sequence_id: int, adapter: str | None = None) -> list[int]:
        return answer_of(engine, Generate(sequence_id, prompt["input_ids"], sampling, adapter=adapter))[0]

    assert answer(1) == prompt["greedy_new_ids"]
    engine.send(LoadAdapter("doctor", adapter, command_id="a"))
    assert engine.receive(30) == AdaptersChanged(known=["doctor"], loaded=["doctor"], command_id="a")
    with_adapter = answer(2, "doctor")
    assert with_adapter != prompt["greedy_new_ids"]
    assert answer(3) == prompt["greedy_new_ids"]
    assert answer(4, "doctor") == with_adapter
    engine.send(LoadAdapter("doctor", str(golden_with_code), command_id="b"))
    changed = engine.receive(30)
    assert isinstance(changed, AdaptersChanged)
    assert "adapter_config.json" in changed.problem
    assert answer(5, "doctor") == with_adapter
    engine.send(UnloadAdapter("doctor", command_id="c"))
    assert engine.receive(30) == AdaptersChanged(known=[], loaded=[], command_id="c")
    engine.send(Generate(6, prompt["input_ids"], sampling, adapter="doctor"))
    refused = engine.receive(30)
    assert isinstance(refused, Refused)
    assert refused.code == "unknown_adapter"
    assert answer(7) == prompt["greedy_new_ids"]


def test_a_merged_adapter_answers_for_everybody(golden_engine: EngineClient, golden_with_code: Path) -> None:
    golden = json.loads((golden_with_code / "golden_model.json").read_text())
    prompt_ids = golden["prompts"][0]["input_ids"]
    sampling = Sampling(max_new_tokens=12, seed=0, temperature=0)
    adapters = {"doctor": str(golden_with_code / "lora")}
    golden_engine.send(LoadAdapter("doctor", adapters["doctor"]))
    assert isinstance(golden_engine.receive(30), AdaptersChanged)
    unmerged, _ = answer_of(golden_engine, Generate(1, prompt_ids, sampling, adapter="doctor"))
    with engine_of(golden_with_code, adapters=adapters, merge_adapter=True) as engine:
        assert engine.wait_until_ready(READY_SECONDS).adapters == ["doctor"]
        for adapter in (None, "doctor"):
            assert answer_of(engine, Generate(1, prompt_ids, sampling, adapter=adapter))[0] == unmerged


def test_it_answers_quantized_as_the_native_engine_does_in_full_precision(
    checkpoint_with_code: Path, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_new_tokens=12, seed=0, temperature=0)
    with (
        engine_of(checkpoint_with_code, quantize="int4") as reference,
        engine_of(checkpoint_with_code, module=ENGINE_MODULE, quantize="int4", activations="full") as native,
    ):
        for engine in (reference, native):
            engine.wait_until_ready(READY_SECONDS)
        for index, prompt_ids in enumerate(prompts):
            message = Generate(index, prompt_ids, sampling)
            assert answer_of(reference, message) == answer_of(native, message)
