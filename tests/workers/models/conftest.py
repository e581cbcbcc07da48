"""The golden models, and packed batches to run them on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from workers.models.batch import Batch
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.layout import AnyLayout, CausalLayout, Layout
from workers.models.loader import load_model
from workers.models.tokenizer import Tokenizer

GOLDEN_MODELS = ("chatglm-6b-tiny", "chatglm-6b-realvocab")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Golden:
    """One golden model: its folder, and what the original code computed with it."""

    folder: Path

    @cached_property
    def data(self) -> dict[str, Any]:
        return json.loads((self.folder / "golden_model.json").read_text(encoding="utf-8"))

    @cached_property
    def tokenizer_data(self) -> dict[str, Any]:
        return json.loads((self.folder / "golden_tokenizer.json").read_text(encoding="utf-8"))

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / "logits.safetensors", "pt") as file:
            return file.get_tensor(name)

    def columns(self, logits: torch.Tensor) -> torch.Tensor:
        """The columns of the vocabulary that the golden logits have."""
        with safe_open(self.folder / "logits.safetensors", "pt") as file:
            if "logits_vocab_ids" not in file.keys():  # noqa: SIM118
                return logits
            return logits[..., file.get_tensor("logits_vocab_ids").long()]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)

    @cached_property
    def processor(self) -> SentencePieceProcessor:
        """sentencepiece itself on the same file."""
        return SentencePieceProcessor(model_file=str(self.folder / "ice_text.model"))

    @cached_property
    def model(self) -> ChatGLM:
        return load_model(self.folder, dtype=torch.float32)

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_folder(self.folder)


_golden: dict[str, Golden] = {}


@pytest.fixture(scope="session", params=GOLDEN_MODELS)
def golden(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    return _golden.setdefault(request.param, Golden(golden_root / request.param))


GOLDEN2_MODELS = ("chatglm2-6b-tiny", "chatglm2-6b-realvocab")


@pytest.fixture(scope="session", params=GOLDEN2_MODELS)
def golden2(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    """Those of the second generation."""
    return _golden.setdefault(request.param, Golden(golden_root / request.param))


@pytest.fixture(scope="session", params=GOLDEN_MODELS + GOLDEN2_MODELS)
def any_golden(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    return _golden.setdefault(request.param, Golden(golden_root / request.param))


PackPrompts = Callable[[Sequence[Sequence[int]], ModelConfig], Batch]


@pytest.fixture(scope="session")
def pack_prompts() -> PackPrompts:
    """Prompts to a prefill without a cache."""

    def pack(prompts: Sequence[Sequence[int]], config: ModelConfig) -> Batch:
        ids = config.special_ids
        layouts: list[AnyLayout] = [
            CausalLayout()
            if config.model_type == "chatglm2"
            else Layout.of_prompt(prompt, bos_id=ids["bos"], gmask_id=ids["gmask"], mask_id=ids["mask"])
            for prompt in prompts
        ]
        lens = torch.tensor([len(prompt) for prompt in prompts])
        positions = [
            layout.positions(0, len(prompt)) for layout, prompt in zip(layouts, prompts, strict=True)
        ]
        return Batch(
            is_prefill=True,
            token_ids=torch.tensor([id_ for prompt in prompts for id_ in prompt]),
            positions=torch.tensor([[p for both in positions for p in both[row]] for row in (0, 1)]),
            slots=torch.zeros(int(lens.sum()), dtype=torch.int64),
            kv_lens=lens.int(),
            block_tables=torch.zeros((len(prompts), 1), dtype=torch.int32),
            query_starts=torch.cat([torch.zeros(1), lens.cumsum(0)]).int(),
            prefix_lens=torch.tensor([layout.prefix_len for layout in layouts], dtype=torch.int32),
            max_query_len=int(lens.max()),
        )

    return pack
