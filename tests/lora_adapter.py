"""Writes small LoRA adapters with random factors, as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    seed: int = 0,
    targets: Sequence[str] = ("query_key_value",),
    rank: int = 4,
    alpha: float = 8,
    strength: float = 0.3,
    as_bin: bool = False,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    **config: Any,
) -> Path:
    """An adapter for the linear layers of `shapes` whose names end in one of `targets`.

    tensors: others in place of (None: without) those of these names. config: further keys of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
        "lora_dropout": 0.1,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    state: dict[str, torch.Tensor | None] = {
        **random_factors(shapes, seed, targets, rank, strength),
        **(tensors or {}),
    }
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    if as_bin:
        torch.save(kept, folder / "adapter_model.bin")
    else:
        save_file(kept, folder / "adapter_model.safetensors")
    return folder


def random_factors(
    shapes: Mapping[str, tuple[int, int]], seed: int, targets: Sequence[str], rank: int, strength: float
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (outputs, inputs) in shapes.items():
        if layer.rpartition(".")[2] in targets:
            a, b = f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"
            state[a] = torch.randn(rank, inputs, generator=generator) * strength
            state[b] = torch.randn(outputs, rank, generator=generator) * strength
    return state
