"""Code for a checkpoint's folder, as the original has it there: our own writing, after the published behaviour."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CODE = {
    "ice_text.model": Path(__file__).parent / "workers" / "reference" / "remote_code",
    "tokenizer.model": Path(__file__).parent / "workers" / "reference" / "remote_code_chatglm2",
}
"""By the file of the tokenizer, which tells the two generations apart."""
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


def add_code(folder: Path) -> None:
    """Puts the code beside the weights, and its names into config.json."""
    (code,) = (code for name, code in CODE.items() if (folder / name).exists())
    for path in code.glob("*.py"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
