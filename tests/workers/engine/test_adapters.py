"""Adapters in an engine: each sequence has its own from its first token to its last, whatever happens to the name."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lora_adapter import write_adapter
from workers.engine.client import EngineClient, EngineDied
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import (
    AdaptersChanged,
    Generate,
    LoadAdapter,
    Refused,
    Sampling,
    Step,
    UnloadAdapter,
)
from workers.models.config import ModelConfig
from workers.models.lora import TARGETS, AdapterError
from workers.models.tokenizer import Tokenizer

GREEDY = {"temperature": 0.0}
QUESTION = "感冒了怎么办"


class DrivenEngine:
    """An engine as its process drives it, and everything that it said."""

    def __init__(self, checkpoint: Path, **config: Any) -> None:
        fields = {"checkpoint": str(checkpoint), "device": "cpu", "block_size": 8, **config}
        self.engine = Engine.from_config(EngineConfig(**fields))
        self._tokenizer = Tokenizer.from_folder(checkpoint)
        self.answers: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.refused: dict[int, Refused] = {}
        self.changes: list[AdaptersChanged] = []

    def add(
        self,
        sequence_id: int,
        adapter: str | None,
        prompt: str | list[int] = QUESTION,
        emitted=(),
        **sampling: Any,
    ) -> None:
        self.answers[sequence_id] = []
        ids = self._tokenizer.build_prompt(prompt) if isinstance(prompt, str) else prompt
        fields = {"max_new_tokens": 12, "seed": sequence_id, "min_new_tokens": 12, **sampling}
        refused = self.engine.add(Generate(sequence_id, ids, Sampling(**fields), list(emitted), adapter))
        if refused is not None:
            self.refused[sequence_id] = refused

    def load(self, name: str, folder: Path, command_id: str = "load") -> AdaptersChanged:
        self.engine.adapters.load(LoadAdapter(name, str(folder), command_id))
        return self.answer_to(command_id)

    def unload(self, name: str) -> AdaptersChanged:
        self.engine.adapters.unload(UnloadAdapter(name, "unload"))
        return self.answer_to("unload")

    def answer_to(self, command_id: str) -> AdaptersChanged:
        """Settles, without a step, until the command is answered."""
        deadline = time.monotonic() + 10
        while not any(change.command_id == command_id for change in self.changes):
            assert time.monotonic() < deadline
            self.settle()
        (change,) = [change for change in self.changes if change.command_id == command_id]
        self.changes.clear()
        return change

    def settle(self) -> None:
        for message in self.engine.settle():
            if isinstance(message, Refused):
                self.refused[message.sequence_id] = message
            elif isinstance(message, AdaptersChanged):
                self.changes.append(message)

    def turn(self) -> bool:
        """What the process does between two looks for commands. False: there is nothing to do."""
        self.settle()
        if self.engine.has_work:
            step = self.engine.step()
            for sequence_id, token_id, reason in zip(
                step.sequence_ids, step.token_ids, step.finish_reasons, strict=True
            ):
                assert sequence_id not in self.ended
                self.answers[sequence_id].append(token_id)
                if reason:
                    self.ended.add(sequence_id)
            return True
        return self.engine.adapters.is_loading

    def run(self) -> dict[int, list[int]]:
        deadline = time.monotonic() + 60
        while self.turn():
            assert time.monotonic() < deadline
        return self.answers

    def run_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            self.turn()


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Adapters a to e, of different ranks and targets, and one that is broken."""
    config = ModelConfig.from_folder(tiny_checkpoint)
    hidden, inner = config.hidden_size, config.inner_hidden_size
    shapes = {}
    for index in range(config.num_layers):
        prefix = f"transformer.layers.{index}"
        shapes[f"{prefix}.attention.query_key_value"] = (3 * hidden, hidden)
        shapes[f"{prefix}.attention.dense"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.dense_h_to_4h"] = (inner, hidden)
        shapes[f"{prefix}.mlp.dense_4h_to_h"] = (hidden, inner)
    root = tmp_path_factory.mktemp("adapters")
    made = {
        name: write_adapter(root / name, shapes, seed=seed, rank=2 + 3 * seed, targets=TARGETS[: 1 + seed])
        for seed, name in enumerate("abcd")
    }
    made["broken"] = write_adapter(root / "broken", shapes, r=3)
    made["big"] = write_adapter(root / "big", shapes, rank=65)
    return made


@pytest.fixture
def new_engine(tiny_checkpoint) -> Iterator[Callable[..., DrivenEngine]]:
    engines = []

    def new(**config: Any) -> DrivenEngine:
        engine = DrivenEngine(tiny_checkpoint, **config)
        engines.append(engine)
        return engine

    yield new
    for engine in engines:
        if not engine.engine.has_work:
            blocks = engine.engine.scheduler.block_manager
            assert blocks.num_free_blocks == blocks.num_usable_blocks
            assert engine.engine.adapters.num_waiting == 0


def known(folders: dict[str, Path], names: str) -> dict[str, str]:
    return {name: str(folders[name]) for name in names}


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, folders) -> dict[str | None, list[int]]:
    """What QUESTION is answered with each adapter in an engine of its own, greedily; None: without one."""
    answers: dict[str | None, list[int]] = {}
    for name in (None, *"abcd"):
        engine = DrivenEngine(tiny_checkpoint, adapters=known(folders, name or ""))
        engine.add(1, name, **GREEDY)
        answers[name] = engine.run()[1]
    assert len(set(map(tuple, answers.values()))) == 5
    return answers


# --- together as alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"quantize": "int8", "activations": "full"},
        # Not with int8 activations: what rounds differently in a batch of another size may become another integer.
        {"quantize": "int4", "activations": "full"},
    ],
    ids=["float32", "int8", "int4"],
)
@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 0.95}], ids=["greedy", "seeded"])
def test_a_batch_of_base_and_adapters_gives_each_what_it_gets_alone(new_engine, folders, base, sampling):
    together = new_engine(adapters=known(folders, "abcd"), **base)
    apart = new_engine(adapters=known(folders, "abcd"), **base)
    prompts = [QUESTION, "Hello, how are you?", "你好"]
    for index in range(12):
        adapter = [None, "a", "b", "c"][index % 4]
        fields = {"prompt": prompts[index % 3], "max_new_tokens": 4 + index, "min_new_tokens": 0, **sampling}
        together.add(index, adapter, **fields)
        apart.add(index, adapter, **fields)
        apart.run()
    assert together.run() == apart.answers
    # Of one prompt, by its adapter.
    assert len({tuple(together.answers[index][:4]) for index in (0, 3, 6, 9)}) == 4


@pytest.mark.parametrize(
    "model", ["chatglm-6b-tiny", "chatglm-6b-realvocab", "chatglm2-6b-tiny", "chatglm2-6b-realvocab"]
)
@pytest.mark.parametrize("merge", [False, True])
def test_greedy_answers_equal_the_originals(golden_root, model, merge):
    folder = golden_root / model
    data = json.loads((folder / "golden_model.json").read_text(encoding="utf-8"))
    adapters = {"lora": str(folder / "lora")}
    engine = DrivenEngine(folder, dtype="float32", adapters=adapters, merge_adapter=merge, context_len=256)
    expected = {prompt["index"]: prompt["greedy_new_ids"] for prompt in data["lora"]["prompts"]}
    for index, ids in expected.items():
        prompt = data["prompts"][index]["input_ids"]
        engine.add(index, "lora", prompt, max_new_tokens=len(ids), min_new_tokens=0, **GREEDY)
    assert engine.run() == expected
    assert len(expected) == 3


def test_an_adapter_that_is_merged_at_load_says_what_it_says_unmerged(new_engine, folders, alone):
    merged = new_engine(adapters=known(folders, "b"), merge_adapter=True)
    merged.add(1, "b", **GREEDY)
    merged.add(2, None, **GREEDY)
    merged.add(3, "a", **GREEDY)
    assert merged.run()[1] == merged.answers[2] == alone["b"]
    assert merged.refused[3].code == "unknown_adapter"
    assert merged.engine.ready(0).adapters == ["b"]


def test_an_adapter_changes_what_int8_activations_give(new_engine, folders):
    engine = new_engine(adapters=known(folders, "a"), quantize="int4")
    plain = new_engine(quantize="int4")
    for driven, adapters in ((engine, (None, "a")), (plain, (None,))):
        for index, adapter in enumerate(adapters):
            driven.add(index, adapter, **GREEDY)
        driven.run()
    assert engine.answers[0] == plain.answers[0] != engine.answers[1]


def test_a_preempted_sequence_keeps_its_adapter(new_engine, folders):
    roomy = new_engine(adapters=known(folders, "ab"))
    tight = new_engine(adapters=known(folders, "ab"), num_blocks=9)
    for engine in (roomy, tight):
        for index in range(4):
            engine.add(index, [None, "a", "b", "a"][index], max_new_tokens=24, min_new_tokens=24, **GREEDY)
        engine.run()
    assert tight.engine.scheduler.num_preemptions > 0
    assert tight.answers == roomy.answers


def test_a_continuation_goes_on_with_its_adapter(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "c"))
    engine.add(1, "c", emitted=alone["c"][:5], **GREEDY)
    assert engine.run()[1] == alone["c"][5:]


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_known_adapter_is_loaded_when_a_sequence_asks_for_it(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "ab"))
    ready = engine.engine.ready(0)
    assert (ready.adapters, ready.loaded_adapters) == (["a", "b"], [])
    engine.add(1, "a", **GREEDY)
    assert engine.run()[1] == alone["a"]
    assert engine.engine.adapters.loaded == ["a"]
    assert engine.changes[-1].loaded == ["a"]


def test_others_go_on_while_an_adapter_is_read(new_engine, folders, alone, monkeypatch):
    engine = new_engine(known_adapters=known(folders, "a"))
    is_slow = True

    def slow(folder, *args, **kwargs):
        while is_slow:
            time.sleep(0.001)
        return original(folder, *args, **kwargs)

    from workers.engine import adapters

    original = adapters.read_adapter
    monkeypatch.setattr(adapters, "read_adapter", slow)
    engine.add(1, "a", **GREEDY)
    engine.add(2, None, **GREEDY)
    engine.run_until(lambda: 2 in engine.ended)
    assert engine.answers == {1: [], 2: alone[None]}
    assert engine.engine.adapters.num_waiting == 1
    is_slow = False
    assert engine.run()[1] == alone["a"]


def test_an_adapter_can_be_loaded_while_sequences_run(new_engine, folders, alone):
    engine = new_engine()
    engine.add(1, None, **GREEDY)
    engine.turn()
    engine.add(2, "b", **GREEDY)
    assert engine.refused[2].code == "unknown_adapter"
    assert "known: none" in engine.refused[2].message

    assert engine.load("b", folders["b"]).problem == ""
    engine.add(3, "b", **GREEDY)

    answers = engine.run()
    assert (answers[1], answers[3]) == (alone[None], alone["b"])


@pytest.mark.parametrize(
    ("name", "problem"),
    [("broken", "lora_A.weight has the shape"), ("big", "rank is 65"), ("absent", "there is no such folder")],
)
def test_an_adapter_that_does_not_fit_is_a_problem_of_its_command_alone(
    new_engine, folders, alone, name, problem
):
    engine = new_engine(adapters=known(folders, "a"))
    change = engine.load("new", folders.get(name, folders["a"].parent / name))
    assert problem in change.problem
    assert (change.known, change.loaded) == (["a"], ["a"])
    engine.add(1, "a", **GREEDY)
    engine.add(2, "new")
    assert engine.run()[1] == alone["a"]
    assert engine.refused[2].code == "unknown_adapter"
    assert "known: a" in engine.refused[2].message


def test_a_known_adapter_that_turns_out_broken_refuses_those_who_asked_for_it(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "a") | {"x": str(folders["broken"])})
    for sequence_id, adapter in ((1, "x"), (2, "a"), (3, "x")):
        engine.add(sequence_id, adapter, **GREEDY)
    engine.run()
    assert engine.answers[2] == alone["a"]
    assert {id_: refused.code for id_, refused in engine.refused.items()} == {
        1: "invalid_adapter",
        3: "invalid_adapter",
    }
    assert "adapter_config.json make it" in engine.refused[1].message
    engine.add(1, None, **GREEDY)
    assert engine.run()[1] == alone[None]


def test_a_name_can_be_given_to_another_folder_while_it_answers(new_engine, folders, alone):
    engine = new_engine(adapters={"mine": str(folders["a"])})
    engine.add(1, "mine", **GREEDY)
    engine.turn()

    change = engine.load("mine", folders["b"])
    engine.add(2, "mine", **GREEDY)

    assert (change.problem, change.known, change.loaded) == ("", ["mine"], ["mine"])
    answers = engine.run()
    assert (answers[1], answers[2]) == (alone["a"], alone["b"])
    assert engine.engine.adapters.loaded == ["mine"]


def test_an_engine_without_room_says_what_to_do(new_engine, folders):
    engine = new_engine(max_adapters=0)
    assert "--max-adapters" in engine.load("a", folders["a"]).problem
    engine.add(1, "a")
    assert engine.refused[1].code == "unknown_adapter"

    merged = new_engine(adapters=known(folders, "a"), merge_adapter=True)
    assert "merged" in merged.load("b", folders["b"]).problem
    assert "merged" in merged.unload("a").problem


def test_a_bad_adapter_stops_the_start_and_is_named(tiny_checkpoint, folders):
    with pytest.raises(AdapterError, match=r"broken.*lora_A\.weight"):
        DrivenEngine(tiny_checkpoint, adapters={"x": str(folders["broken"])})
    with pytest.raises(AdapterError, match=r"broken.*lora_A\.weight"):
        DrivenEngine(tiny_checkpoint, adapters={"x": str(folders["broken"])}, merge_adapter=True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_adapters": -1}, "max_adapters"),
        ({"max_adapter_rank": 0}, "max_adapter_rank"),
        ({"merge_adapter": True}, "merge_adapter"),
        ({"adapters": {"a": "x", "b": "y"}, "merge_adapter": True}, "merge_adapter"),
        ({"adapters": {"a": "x", "b": "y"}, "max_adapters": 1}, "max_adapters"),
    ],
)
def test_settings_that_contradict_each_other_are_named(fields, named):
    with pytest.raises(ValueError, match=named):
        EngineConfig(checkpoint="x", **fields)


# --- the limit -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_adapter_makes_room(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "abcd"), max_adapters=2)
    for sequence_id, (adapter, loaded) in enumerate(
        [("a", ["a"]), ("b", ["a", "b"]), ("a", ["b", "a"]), ("c", ["a", "c"]), ("b", ["c", "b"])]
    ):
        engine.add(sequence_id, adapter, **GREEDY)
        assert engine.run()[sequence_id] == alone[adapter]
        assert engine.engine.adapters.loaded == loaded


def test_an_adapter_with_sequences_is_not_evicted(new_engine, folders, alone):
    engine = new_engine(adapters=known(folders, "a"), known_adapters=known(folders, "bc"), max_adapters=2)
    engine.add(1, "a", max_new_tokens=60, min_new_tokens=60, **GREEDY)
    for sequence_id, adapter in ((2, "b"), (3, "c"), (4, "b")):
        engine.add(sequence_id, adapter, **GREEDY)
        engine.run_until(lambda id_=sequence_id: id_ in engine.ended)
        assert engine.answers[sequence_id] == alone[adapter]
    assert 1 not in engine.ended
    assert engine.run()[1][:12] == alone["a"]


def test_more_adapters_than_slots_all_get_their_turn(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "abcd"), max_adapters=1)
    for sequence_id in range(8):
        engine.add(sequence_id, "abcd"[sequence_id % 4], **GREEDY)
    answers = engine.run()
    assert answers == {sequence_id: alone["abcd"[sequence_id % 4]] for sequence_id in range(8)}


def test_a_stream_of_requests_for_one_adapter_does_not_keep_another_out(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "ab"), max_adapters=1)
    engine.add(0, "a", **GREEDY)
    engine.turn()
    engine.add(1, "b", **GREEDY)
    for sequence_id in range(2, 100):
        if 1 in engine.ended:
            break
        engine.add(sequence_id, "a", **GREEDY)
        for _ in range(5):
            engine.turn()
            time.sleep(0.001)
    assert engine.answers[1] == alone["b"]
    engine.run()
    assert all(answer == alone["a"] for id_, answer in engine.answers.items() if id_ != 1)


def test_who_no_longer_waits_gives_the_promised_slot_back(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "ab"), max_adapters=1)
    engine.add(1, "a", max_new_tokens=200, min_new_tokens=200, **GREEDY)
    engine.run_until(lambda: engine.answers[1])
    engine.add(2, "b", **GREEDY)
    for _ in range(20):
        engine.turn()
        time.sleep(0.002)
    engine.add(3, "a", **GREEDY)
    engine.turn()
    assert engine.engine.adapters.num_waiting == 2

    engine.engine.abort(2)

    engine.run_until(lambda: 3 in engine.ended)
    assert engine.answers[3] == alone["a"]
    assert engine.answers[2] == []
    assert 1 not in engine.ended


def test_a_command_whose_adapter_finds_no_slot_is_obeyed_later(new_engine, folders, alone):
    engine = new_engine(adapters=known(folders, "a"), max_adapters=1)
    engine.add(1, "a", max_new_tokens=40, min_new_tokens=40, **GREEDY)
    engine.turn()
    change = engine.load("b", folders["b"])
    assert (change.problem, change.known, change.loaded) == ("", ["a", "b"], ["a"])
    engine.add(2, "b", **GREEDY)
    assert engine.run()[2] == alone["b"]


# --- unloading -------------------------------------------------------------------------------------------------------


def test_an_unloaded_adapter_is_kept_by_the_sequences_that_have_it(new_engine, folders, alone):
    engine = new_engine(adapters=known(folders, "ab"), max_adapters=2)
    engine.add(1, "a", **GREEDY)
    engine.turn()

    change = engine.unload("a")
    engine.add(2, "a", **GREEDY)

    assert (change.problem, change.num_sequences, change.known, change.loaded) == ("", 1, ["b"], ["b"])
    assert engine.refused[2].code == "unknown_adapter"
    assert engine.run()[1] == alone["a"]
    assert engine.load("c", folders["c"]).loaded == ["b", "c"]  # its slot is free


def test_an_unloaded_adapter_is_still_loaded_for_those_who_waited_for_it(new_engine, folders, alone):
    engine = new_engine(known_adapters=known(folders, "a"))
    engine.add(1, "a", **GREEDY)
    assert engine.unload("a").num_sequences == 1
    assert engine.run()[1] == alone["a"]
    assert engine.engine.adapters.loaded == []


def test_unloading_what_is_not_known_names_what_is(new_engine, folders):
    engine = new_engine(adapters=known(folders, "ab"))
    assert "known: a, b" in engine.unload("c").problem
    assert engine.unload("a").problem == ""
    assert "known: b" in engine.unload("a").problem


def test_a_load_that_was_overtaken_by_an_unload_says_so(new_engine, folders):
    engine = new_engine()
    engine.engine.adapters.load(LoadAdapter("a", str(folders["a"]), "load"))
    engine.engine.adapters.unload(UnloadAdapter("a", "unload"))
    assert "unloaded before" in engine.answer_to("load").problem
    assert engine.engine.adapters.names == []


def test_aborting_frees_the_adapter(new_engine, folders):
    engine = new_engine(adapters=known(folders, "a"))
    engine.add(1, "a", max_new_tokens=200, min_new_tokens=200)
    engine.turn()
    engine.engine.abort(1)
    assert engine.unload("a").num_sequences == 0
    assert not engine.turn()


# --- anything in any order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_each_answer_is_that_of_its_adapter_and_nothing_is_lost(
    new_engine, folders, alone, seed
):
    chance = random.Random(seed)
    engine = new_engine(
        known_adapters=known(folders, "abcd"), max_adapters=chance.choice([1, 2, 3]), max_num_seqs=6
    )
    expected: dict[int, list[int]] = {}
    names = dict.fromkeys("abcd", True)
    for sequence_id in range(60):
        adapter = chance.choice([None, *"abcd"])
        engine.add(sequence_id, adapter, **GREEDY)
        if adapter is None or names[adapter]:
            expected[sequence_id] = alone[adapter]
        else:
            assert engine.refused.pop(sequence_id).code == "unknown_adapter"
        for _ in range(chance.randrange(6)):
            engine.turn()
        event, name = chance.randrange(10), chance.choice("abcd")
        if event == 0:
            engine.engine.abort(sequence_id)
            expected.pop(sequence_id, None)
        elif event == 1:
            assert bool(engine.unload(name).problem) is not names[name]
            names[name] = False
        elif event == 2:
            assert engine.load(name, folders[name]).problem == ""
            names[name] = True
    engine.run()

    assert engine.refused == {}
    for sequence_id, answer in expected.items():
        assert engine.answers[sequence_id] == answer, sequence_id
    adapters = engine.engine.adapters
    slots = sorted([*adapters._free_slots, *(adapter.slot for adapter in adapters._loaded)])
    assert slots == list(range(1, adapters.bank.num_slots + 1))
    assert all(adapter.is_idle for adapter in adapters._loaded)


# --- in its process --------------------------------------------------------------------------------------------------


def test_an_idle_engine_process_obeys_and_answers(tiny_checkpoint, folders):
    config = EngineConfig(
        checkpoint=str(tiny_checkpoint), device="cpu", num_threads=1, adapters=known(folders, "a")
    )
    with EngineClient(config) as client:
        ready = client.wait_until_ready(60)
        assert (ready.adapters, ready.loaded_adapters) == (["a"], ["a"])
        client.send(LoadAdapter("b", str(folders["b"]), "1"))
        assert client.receive(10) == AdaptersChanged(["a", "b"], ["a", "b"], "1")
        client.send(UnloadAdapter("a", "2"))
        assert client.receive(10) == AdaptersChanged(["b"], ["b"], "2")
        prompt = Tokenizer.from_folder(tiny_checkpoint).build_prompt(QUESTION)
        client.send(Generate(1, prompt, Sampling(max_new_tokens=1, seed=1), adapter="a"))
        refused = client.receive(10)
        assert isinstance(refused, Refused)
        assert refused.code == "unknown_adapter"
        client.send(Generate(2, prompt, Sampling(max_new_tokens=1, seed=1), adapter="b"))
        assert isinstance(client.receive(10), Step)


def test_an_engine_process_that_cannot_load_its_adapter_says_why(tiny_checkpoint, folders):
    config = EngineConfig(
        checkpoint=str(tiny_checkpoint), device="cpu", adapters={"x": str(folders["broken"])}
    )
    with EngineClient(config) as client, pytest.raises(EngineDied, match=r"lora_A\.weight has the shape"):
        client.wait_until_ready(60)
