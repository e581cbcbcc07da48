"""Reads the tensors of weight files, safetensors or `.bin` (weights only), mapped into memory and one at a time.

Knows nothing about what the tensors are for: a checkpoint's or an adapter's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from workers.models.config import CheckpointError
from workers.models.weight_file import read_directory


def stored_tensors(files: list[Path]) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """The tensors of these files one after another, mapped and not copied: (file, name, tensor).

    All files are checked before the first tensor is read. Raises CheckpointError when one cannot be read as weights
    alone.
    """
    for path in files:
        read_directory(path)
    for path in files:
        if path.suffix == ".safetensors":
            yield from _safetensors(path)
        else:
            yield from _bin_tensors(path)


def _safetensors(path: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield path, name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            path, f"the file cannot be read ({error})", "It may be incomplete: download it again"
        ) from error


def _bin_tensors(path: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            path,
            f"the file cannot be read as weights alone ({type(error).__name__}: {error})",
            "Download it again, or use the safetensors version",
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(path, "the file holds no table of tensors", "Download it again")
    for name, tensor in state.items():
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            yield path, name, tensor
