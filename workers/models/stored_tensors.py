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


def stored_tensors(
    files: list[Path], first: tuple[str, ...] = ()
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """The tensors of these files one after another, mapped and not copied: (file, name, tensor).

    `first`: modules whose tensors come before the others of their file. All files are checked before the first tensor is read. Raises CheckpointError when one cannot be read as weights
    alone.
    """
    for path in files:
        read_directory(path)
    for path in files:
        if path.suffix == ".safetensors":
            yield from _safetensors(path, first)
        else:
            yield from _bin_tensors(path)


def stored_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file that `stored_tensors` has read, mapped apart from what that gave."""
    return next(tensor for _, found, tensor in stored_tensors([path]) if found == name)


# Pages of a mapped file count as memory of the process until it is unmapped, so files are mapped anew again and again.
_BYTES_OF_A_MAPPING = 96 << 20


def _safetensors(path: Path, first: tuple[str, ...]) -> Iterator[tuple[Path, str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys(), key=lambda name: name.rpartition(".")[0] not in first)
        while names:
            num_bytes = 0
            with safe_open(path, framework="pt") as file:
                while names and num_bytes < _BYTES_OF_A_MAPPING:
                    tensor = file.get_tensor(name := names.pop(0))
                    num_bytes += tensor.nbytes
                    yield path, name, tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            path, f"the file cannot be read ({error})", "It may be incomplete: download it again"
        ) from error


def _bin_tensors(path: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    names = list(_bin_state(path))
    while names:
        state, num_bytes = _bin_state(path), 0
        while names and num_bytes < _BYTES_OF_A_MAPPING:
            tensor = state[name := names.pop(0)]
            num_bytes += tensor.nbytes
            yield path, name, tensor


def _bin_state(path: Path) -> dict[str, torch.Tensor]:
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
    return {
        name: tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
