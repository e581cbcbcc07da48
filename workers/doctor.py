"""The worker's share of `glmq doctor`: prints one JSON object a check. `python -m workers.doctor [CHECKPOINT]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from workers.models.config import CheckpointError, ModelConfig
from workers.models.loader import weight_files
from workers.models.tokenizer import Tokenizer
from workers.settings import DEMO_CHECKPOINT


def checks(checkpoint: Path) -> Iterator[dict[str, str]]:
    """Objects with name, verdict (ok, warn or fail), found and, if something is to be done, remedy."""
    yield _torch()
    yield _checkpoint(checkpoint)


def _torch() -> dict[str, str]:
    found = torch.__version__
    if torch.cuda.is_available():
        return {"name": "torch", "verdict": "ok", "found": f"{found}, {torch.cuda.get_device_name(0)}"}
    return {"name": "torch", "verdict": "ok", "found": f"{found}, CPU with {torch.get_num_threads()} threads"}


def _checkpoint(folder: Path) -> dict[str, str]:
    """Its small files are read; of the weights, only that they are there."""
    try:
        config = ModelConfig.from_folder(folder)
        Tokenizer.from_folder(folder)
        files = weight_files(folder)
    except CheckpointError as error:
        return {"name": "checkpoint", "verdict": "fail", "found": str(error)}
    gib = sum(path.stat().st_size for path in files) / 2**30
    found = f"{folder.name}: {config.num_layers} layers of {config.hidden_size}, {gib:.2f} GiB in {len(files)} file(s)"
    return {"name": "checkpoint", "verdict": "ok", "found": found}


if __name__ == "__main__":
    for check in checks(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_CHECKPOINT):
        print(json.dumps(check, ensure_ascii=False), flush=True)
