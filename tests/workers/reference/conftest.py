"""A checkpoint that carries its own code, as the original's folder does. The code is ours, after the published behaviour."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

CODE = Path(__file__).parent / "remote_code"
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        return
    skip = pytest.mark.skip(reason="the extra `reference` is not installed: it exists for Python 3.11 alone")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


def add_code(folder: Path) -> None:
    """Puts the code beside the weights, and its names into config.json."""
    for path in CODE.glob("*.py"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


@pytest.fixture(scope="session")
def checkpoint_with_code(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random checkpoint, with code."""
    folder = tmp_path_factory.mktemp("with-code") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    add_code(folder)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint that the test may spoil."""

    def copy(checkpoint: Path) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint, folder, copy_function=shutil.copyfile)
        return folder

    return copy
