"""From an engine's settings to its network: on which device, in which dtype, in which form the weights are.

Knows nothing about sequences or the cache.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import torch

from workers.engine.config import EngineConfig, QuantizeSetting
from workers.models import linear_onnxruntime
from workers.models.config import ModelConfig
from workers.models.loader import DTYPES, Pack, load_model
from workers.models.network import Network
from workers.models.quantization import Bits

logger = logging.getLogger(__name__)

BITS: Final[dict[QuantizeSetting, Bits | None]] = {"none": None, "int8": 8, "int4": 4, "fp8": None}


def load_network(
    config: EngineConfig, model_config: ModelConfig, *, adapter: Path | str | None = None
) -> Network:
    """The network of the config's checkpoint. `adapter`: merged into its weights.

    Raises CheckpointError, or ValueError for a device or a package that is not there.
    """
    device = find_device(config.device)
    if config.quantize == "fp8" and device.type != "cuda":
        raise ValueError(f"quantize is fp8, which a {device.type} has not. Use int8 or int4")
    return load_model(
        config.checkpoint,
        dtype=_compute_dtype(config, model_config, device),
        device=device,
        config=model_config,
        adapter=adapter,
        quantize_bits=BITS[config.quantize],
        # An e4m3 head is made with the other e4m3 layers, once the network is on its kernels.
        quantize_head=config.quantize_head and config.quantize != "fp8",
        pack=_pack(config, device),
    )


def _compute_dtype(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    # Few CPUs compute in half precision, and none of them fast.
    return torch.float32 if device.type == "cpu" else DTYPES[model_config.dtype]


def _pack(config: EngineConfig, device: torch.device) -> Pack | None:
    """What quantized layers run on; None: as they are stored, exactly."""
    if device.type != "cpu" or config.activations == "full":
        return None
    if linear_onnxruntime.is_available():
        return linear_onnxruntime.pack
    problem = "activations is int8, but the package onnxruntime is not installed"
    if config.activations == "int8":
        raise ValueError(f"{problem}. Install it (pip install onnxruntime), or use activations full")
    return None


def find_device(name: str) -> torch.device:
    """The device that a setting means. Raises ValueError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but torch finds no GPU. Use cpu, or install the driver")
    return torch.device(name)
