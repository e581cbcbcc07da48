"""Adapters on a GPU: in a prefill and in a captured decode each sequence gets its own, over every form of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lora_adapter import write_adapter
from tests.soak import MixedLoad, soak
from workers.engine.adapters import Adapters
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import (
    AdaptersChanged,
    Generate,
    LoadAdapter,
    Sampling,
    UnloadAdapter,
)
from workers.models.adapter_bank import AdapterBank, GroupedRows, MaskedRows
from workers.models.batch import Batch, KVCache
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.layout import Layout
from workers.models.lora import TARGETS, linear_shapes, read_adapter

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
    # With one tensor for both a random network repeats its input, whatever its adapter.
    tie_word_embeddings=False,
)
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "min_new_tokens": 12}


class Vocabulary:
    """What an engine wants of a tokenizer."""

    first_id, end_id, eos_id = 0, 1010, 1005

    def layout(self, ids: list[int]) -> Layout:
        return Layout.of_prompt(ids, bos_id=1004, gmask_id=1001, mask_id=1000)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = ChatGLM(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "layernorm" in name and name.endswith("weight")
            parameter.normal_(mean=float(is_norm), std=0.02 if parameter.ndim == 1 else 0.06)
    return {name: tensor.clone() for name, tensor in model.half().state_dict().items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with torch.device("meta"):
        shapes = linear_shapes(ChatGLM(CONFIG))
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(
            root / name, shapes, seed=seed, rank=rank, targets=TARGETS[:num_targets], strength=0.12
        )
        for seed, (name, rank, num_targets) in enumerate([("a", 8, 1), ("b", 20, 4), ("c", 3, 2)])
    }


def network_of(state: dict[str, torch.Tensor], weights: str, bank: AdapterBank | None = None) -> Any:
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    model = ChatGLM(CONFIG).half()
    model.load_state_dict(state)
    return CudaChatGLM(CONFIG, ChatGLMWeights.from_model(model, weights), bank=bank)


def new_bank(num_slots: int = 4) -> AdapterBank:
    return AdapterBank(ChatGLM(CONFIG).half(), num_slots, dtype=torch.half, device="cuda")


NewEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def new_engine(state: dict[str, torch.Tensor]) -> NewEngine:
    def new(weights: str = "fp16", *, num_adapters: int = 4, **config: Any) -> Engine:
        bank = new_bank(num_adapters)
        fields = {
            "checkpoint": "x",
            "block_size": 16,
            "max_num_seqs": 64,
            "context_len": 512,
            "num_blocks": 600,
        }
        network = network_of(state, weights, bank)
        return Engine(network, Vocabulary(), EngineConfig(**{**fields, **config}), Adapters(bank))

    return new


def prompt(seed: int, length: int = 12) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [*torch.randint(900, (length - 2,), generator=generator).tolist(), 1001, 1004]


Answers = dict[int, list[int]]


def turn(engine: Engine, answers: Answers) -> list[Any]:
    """One step, and what belongs between two; what the engine said besides tokens."""
    said = engine.settle()
    if engine.has_work:
        step = engine.step()
        for sequence_id, token_id in zip(step.sequence_ids, step.token_ids, strict=True):
            answers.setdefault(sequence_id, []).append(token_id)
    return said


def run(engine: Engine, answers: Answers | None = None) -> tuple[Answers, list[Any]]:
    answers = {} if answers is None else answers
    said: list[Any] = []
    deadline = time.monotonic() + 60
    while engine.has_work or engine.adapters.is_loading:
        assert time.monotonic() < deadline
        said += turn(engine, answers)
    blocks = engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_usable_blocks
    return answers, said


def share_equal(first: Answers, second: Answers) -> float:
    assert first.keys() == second.keys()
    return sum(first[key] == second[key] for key in first) / len(first)


def prefill(prompts: list[list[int]], slots: list[int]) -> Batch:
    lens = torch.tensor([len(ids) for ids in prompts])
    layouts = [Vocabulary().layout(ids) for ids in prompts]
    positions = [layout.positions(0, len(ids)) for layout, ids in zip(layouts, prompts, strict=True)]
    return Batch(
        is_prefill=True,
        token_ids=torch.tensor([id_ for ids in prompts for id_ in ids]).cuda(),
        positions=torch.tensor([[p for both in positions for p in both[row]] for row in (0, 1)]).cuda(),
        slots=torch.arange(int(lens.sum())).cuda() + 16,
        kv_lens=lens.int().cuda(),
        block_tables=torch.zeros(len(prompts), 1, dtype=torch.int32).cuda(),
        query_starts=torch.cat([torch.zeros(1), lens.cumsum(0)]).int().cuda(),
        prefix_lens=torch.tensor([layout.prefix_len for layout in layouts], dtype=torch.int32).cuda(),
        max_query_len=int(lens.max()),
        max_kv_len=int(lens.max()),
        adapter_slots=torch.tensor(slots).repeat_interleave(lens).cuda() if any(slots) else None,
    )


def empty_cache() -> KVCache:
    shape = (CONFIG.num_layers, 64, CONFIG.num_heads, 16, CONFIG.head_dim)
    return KVCache(*(torch.zeros(shape, dtype=torch.half, device="cuda") for _ in range(2)))


@torch.inference_mode()
def test_a_mixed_prefill_gives_each_prompt_what_its_merged_weights_give(state, folders) -> None:
    bank = new_bank()
    adapters = {
        slot: read_adapter(folders[name], bank.shapes) for slot, name in ((1, "a"), (2, "b"), (4, "c"))
    }
    for slot, adapter in adapters.items():
        bank.load(slot, adapter)
    network = network_of(state, "fp16", bank)
    slots = [0, 2, 1, 4, 2, 0]
    prompts = [prompt(index, 5 + 7 * index) for index in range(6)]
    mixed = network(prefill(prompts, slots), empty_cache())

    for index, slot in enumerate(slots):
        merged = state
        if slot:
            merged = {name: adapters[slot].merged(name, tensor, torch.half) for name, tensor in state.items()}
        expected = network_of(merged, "fp16")(prefill([prompts[index]], [0]), empty_cache())[0]
        error = (mixed[index] - expected).float().norm() / expected.float().norm()
        assert error < 5e-3, (index, slot, error)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4", "fp8"])
def test_many_adapters_together_say_what_each_says_alone(new_engine, folders, weights: str) -> None:
    together, alone = new_engine(weights), new_engine(weights)
    for engine in (together, alone):
        for name, folder in folders.items():
            engine.adapters.load_now(name, folder)
    separate: Answers = {}
    for index in range(48):
        message = Generate(
            index, prompt(index % 12), Sampling(seed=1, **GREEDY), adapter=[None, "a", "b", "c"][index // 12]
        )
        assert together.add(message) is None
        assert alone.add(message) is None
        run(alone, separate)
    answers, _ = run(together)
    # Sums are made in another order for other batch sizes, so that a close call may fall the other way. With e4m3 weights a
    # large batch has e4m3 activations as well, which is another result.
    assert share_equal(answers, separate) > (0.3 if weights == "fp8" else 0.7)
    by_adapter = [{index: answers[index + 12 * number] for index in range(12)} for number in range(4)]
    for number in range(3):
        assert share_equal(by_adapter[number], by_adapter[number + 1]) < 0.2


def test_graphs_are_captured_anew_when_the_adapters_memory_has_moved(new_engine, folders) -> None:
    engine = new_engine()
    engine.adapters.load_now("a", folders["a"])
    ask = [Generate(index, prompt(index), Sampling(seed=1, **GREEDY), adapter="a") for index in range(5)]
    base = [Generate(100 + index, prompt(index), Sampling(seed=1, **GREEDY)) for index in range(5)]
    for message in [*ask, *base]:
        engine.add(message)
    before, _ = run(engine)

    engine.adapters.load(LoadAdapter("b", str(folders["b"]), "1"))  # of a larger rank, for more layers
    _, said = run(engine)
    assert [(one.command_id, one.problem) for one in said if isinstance(one, AdaptersChanged)] == [("1", "")]
    for message in [*ask, *base]:
        engine.add(message)
    engine.add(Generate(200, prompt(0), Sampling(seed=1, **GREEDY), adapter="b"))
    after, _ = run(engine)

    assert after.pop(200) not in (before[0], before[100])
    assert share_equal(after, before) > 0.7


def test_adapters_come_and_go_while_sequences_run(new_engine, folders) -> None:
    engine = new_engine(num_adapters=2)
    alone = new_engine(num_adapters=3)
    for name, folder in folders.items():
        engine.adapters.know(name, folder)
        alone.adapters.load_now(name, folder)
    expected: Answers = {}
    answers: Answers = {}
    for index in range(30):
        message = Generate(index, prompt(index), Sampling(seed=1, **GREEDY), adapter="abc"[index % 3])
        assert engine.add(message) is None
        alone.add(message)
        run(alone, expected)
        for _ in range(3):
            turn(engine, answers)
    engine.adapters.unload(UnloadAdapter("a", "2"))
    run(engine, answers)
    assert share_equal(answers, expected) > 0.7
    assert engine.adapters.names == ["b", "c"]


def test_a_mixed_load_loses_nobody_and_leaves_memory_where_it_was(new_engine, folders) -> None:
    """`make soak` is its longer form."""
    engine = new_engine(num_adapters=2, num_blocks=90, max_num_seqs=24)
    load = MixedLoad(
        engine,
        lambda length, rng: prompt(rng.randrange(1 << 30), length),
        folders,
        max_prompt_len=60,
        max_new_tokens=90,
        crowds=(1, 2, 8, 24, 36),
    )
    soak(load, 20)
    assert engine.speculation.num_accepted > 0


def test_masked_rows_equal_grouped_ones_at_full_size() -> None:
    torch.manual_seed(1)
    a = torch.randn(9, 16, 4096, device="cuda", dtype=torch.half) / 64
    b = torch.randn(9, 16, 12288, device="cuda", dtype=torch.half) / 16
    a[0] = b[0] = 0
    x = torch.randn(255, 4096, device="cuda", dtype=torch.half)
    y = torch.randn(255, 12288, device="cuda", dtype=torch.half)
    slots = torch.randint(9, (255,), device="cuda")
    masked = MaskedRows(slots, 8).add(y.clone(), x, a, b, [])
    expected = GroupedRows(slots.cpu()).add(
        y.cpu().float(), x.cpu().float(), a.cpu().float(), b.cpu().float(), [0] + [16] * 8
    )
    assert ((masked.cpu().float() - expected).norm() / expected.norm()).item() < 2e-3
