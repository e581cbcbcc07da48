"""Engines on small models, driven by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Refused, Sampling, Step
from workers.models.config import ModelConfig
from workers.models.loader import load_model
from workers.models.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class DrivenEngine:
    """An engine, and what its steps gave so far."""

    engine: Engine
    tokenizer: Tokenizer
    answers: dict[int, list[int]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)

    def add(
        self, sequence_id: int, prompt: str | list[int], emitted: Iterable[int] = (), **sampling: Any
    ) -> None:
        """Takes a sequence in; fails the test when the engine refuses it."""
        assert self.refusal(sequence_id, prompt, emitted, **sampling) is None
        self.answers[sequence_id] = []

    def refusal(
        self, sequence_id: int, prompt: str | list[int], emitted: Iterable[int] = (), **sampling: Any
    ) -> Refused | None:
        prompt_ids = self.tokenizer.build_prompt(prompt) if isinstance(prompt, str) else prompt
        fields = {"max_new_tokens": 20, "seed": sequence_id, **sampling}
        return self.engine.add(Generate(sequence_id, prompt_ids, Sampling(**fields), list(emitted)))

    def step(self) -> Step:
        step = self.engine.step()
        for sequence_id, token_id, reason in zip(
            step.sequence_ids, step.token_ids, step.finish_reasons, strict=True
        ):
            assert sequence_id not in self.finish_reasons
            self.answers[sequence_id].append(token_id)
            if reason:
                self.finish_reasons[sequence_id] = reason
        return step

    def run(self) -> dict[int, list[int]]:
        """Steps until nothing is left; the answers of all sequences."""
        while self.engine.has_work:
            self.step()
        return self.answers

    @property
    def num_used_blocks(self) -> int:
        blocks = self.engine.scheduler.block_manager
        return blocks.num_usable_blocks - blocks.num_free_blocks


@pytest.fixture(scope="session")
def drive() -> Callable[[Engine], DrivenEngine]:
    """An engine of the test's own, driven like the others."""
    return lambda engine: DrivenEngine(engine, engine.tokenizer)


NewEngine = Callable[..., DrivenEngine]


@pytest.fixture(scope="session")
def tiny_parts(tiny_checkpoint) -> tuple[Any, Tokenizer]:
    config = ModelConfig.from_folder(tiny_checkpoint)
    return load_model(tiny_checkpoint, config=config), Tokenizer.from_folder(tiny_checkpoint, config)


@pytest.fixture
def new_engine(tiny_checkpoint, tiny_parts) -> Iterator[NewEngine]:
    """Engines over the tiny model; every one must have all its blocks back when the test has run it dry."""
    engines: list[DrivenEngine] = []

    def new(**config: Any) -> DrivenEngine:
        fields = {"checkpoint": str(tiny_checkpoint), "device": "cpu", "block_size": 8, **config}
        model, tokenizer = tiny_parts
        engine = DrivenEngine(Engine(model, tokenizer, EngineConfig(**fields)), tokenizer)
        engines.append(engine)
        return engine

    yield new
    for engine in engines:
        if not engine.engine.has_work:
            assert engine.num_used_blocks == 0
