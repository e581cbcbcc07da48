"""Checkpoints that the reference backend must turn away before anything of them runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from workers.models.config import CheckpointError
from workers.reference.checkpoint import RemoteCodeRefused, check_kernels, load_reference


def test_it_refuses_code_that_nobody_has_called_trusted(checkpoint_with_code: Path) -> None:
    with pytest.raises(RemoteCodeRefused, match="runs the Python files of this folder"):
        load_reference(checkpoint_with_code, trust_remote_code=False)


def test_a_checkpoint_without_code_needs_the_native_backend(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"auto_map does not name .* use the native backend"):
        load_reference(tiny_checkpoint, trust_remote_code=True)


@pytest.mark.parametrize(
    ("file", "name"), [("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")]
)
@pytest.mark.parametrize(
    "value", ["someone/repository--modeling_chatglm.Model", "../modeling.Model", "os.path"]
)
def test_code_from_elsewhere_is_not_fetched(
    checkpoint_with_code: Path, copy_of: Callable[[Path], Path], file: str, name: str, value: str
) -> None:
    folder = copy_of(checkpoint_with_code)
    config = json.loads((folder / file).read_text())
    config["auto_map"][name] = [value, None] if name == "AutoTokenizer" else value
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{file}: .* no such file in the folder"):
        load_reference(folder, trust_remote_code=True)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0), (6, 0), (5, 2)])
def test_a_gpu_without_kernels_is_named_and_the_native_backend_recommended(
    capability: tuple[int, int],
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"NVIDIA X \(sm_{capability[0]}{capability[1]}\).*native backend"
    ):
        check_kernels("chatglm-6b", capability, "NVIDIA X")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9)])
def test_a_gpu_of_a_generation_with_kernels_is_taken(capability: tuple[int, int]) -> None:
    check_kernels("chatglm-6b", capability, "NVIDIA X")
