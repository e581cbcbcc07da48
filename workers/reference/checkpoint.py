"""A checkpoint loaded with its own code: AutoTokenizer, AutoModel and quantize, as the model card shows.

Executes Python files of the checkpoint's folder, and refuses to unless told that they are trusted. Fetches nothing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from workers.models.config import CONFIG_FILE, CheckpointError, read_json

TRANSFORMERS: Final = "4.30.2"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"


class NotInstalled(ValueError):
    """The extra `reference` is missing."""


class RemoteCodeRefused(ValueError):
    """The reference runs code of the checkpoint, and nobody has said that it is trusted."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(
            f"{folder}: the reference backend runs the Python files of this folder with all your rights, and that has "
            "not been allowed. Read them, then say --trust-remote-code; or use the native backend, which runs nothing "
            "from a checkpoint"
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """The checkpoint's own model and tokenizer."""

    model: Any
    """With generate() and chat()."""
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> torch.Tensor:
        """One that no form of the model quantizes."""
        weight: torch.Tensor = next(
            parameter for name, parameter in self.model.named_parameters() if "norm" in name
        )
        return weight


def load_reference(
    folder: Path | str,
    *,
    trust_remote_code: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Reference:
    """The model and tokenizer in this folder, loaded by the folder's own code.

    `dtype`: None is the model card's, half on a GPU and float on a CPU. `bits`: 4 or 8 to call its quantize().
    Raises RemoteCodeRefused; CheckpointError when the folder has no code, or its code fails.
    """
    folder, device = Path(folder).absolute(), torch.device(device)
    if not trust_remote_code:
        raise RemoteCodeRefused(folder)
    fields = read_json(folder / CONFIG_FILE, "config.json comes with every checkpoint")
    _check_code(folder, fields)
    if device.type == "cuda" and (bits or fields.get("quantization_bit")):
        check_kernels(folder, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    _prepare_transformers()
    import transformers  # noqa: PLC0415  (an extra, and it must see the environment that was prepared)

    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
        model = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    except Exception as error:
        raise CheckpointError(
            folder,
            f"its own code could not load it ({_in_short(error)})",
            f"It was written for transformers {TRANSFORMERS}; the native backend does not need it",
        ) from error
    model = model.to(dtype or (torch.float16 if device.type == "cuda" else torch.float32))
    if bits:
        model = _quantize(folder, model, bits, device)
    model = model.to(device).eval()
    return Reference(model, tokenizer)


def check_kernels(folder: Path | str, capability: tuple[int, int], name: str) -> None:
    """Raises CheckpointError for a GPU that the original's int8 and int4 kernels cannot run on (CHATGLM.md C).

    cpm_kernels has binaries for compute capability 6.1 to 8.6 and nothing that could be compiled for another: a binary
    runs on later GPUs of its own generation alone.
    """
    if (6, 1) <= capability < (9, 0):
        return
    major, minor = capability
    raise CheckpointError(
        folder,
        f"the original's quantized layers need cpm_kernels, which has no kernels for {name} (sm_{major}{minor}): "
        "they were built for sm_61 to sm_86",
        "Use the native backend (leave out --backend reference), which runs int8 and int4 here, or the reference "
        "without quantization",
    )


def _check_code(folder: Path, fields: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the classes that config.json and tokenizer_config.json name are in the folder itself."""
    _check_classes(folder, CONFIG_FILE, fields.get("auto_map"), ("AutoConfig", "AutoModel"))
    remedy = "it comes with the checkpoint's own code"
    classes = read_json(folder / TOKENIZER_CONFIG_FILE, remedy).get("auto_map")
    if isinstance(classes, dict) and isinstance(classes.get("AutoTokenizer"), list):
        # (slow, fast): there is no fast one.
        classes = {"AutoTokenizer": next(iter(classes["AutoTokenizer"]), None)}
    _check_classes(folder, TOKENIZER_CONFIG_FILE, classes, ("AutoTokenizer",))


def _check_classes(folder: Path, file: str, classes: object, names: Sequence[str]) -> None:
    if not isinstance(classes, dict) or not all(isinstance(classes.get(name), str) for name in names):
        raise CheckpointError(
            folder / file,
            f"auto_map does not name the classes of {' and '.join(names)}",
            "The reference backend needs the checkpoint with its own code: use the native backend for this one",
        )
    for name in names:
        module, _, _ = classes[name].partition(".")
        # "repository--module" would be fetched from somewhere else.
        if not module.isidentifier() or not (folder / f"{module}.py").is_file():
            raise CheckpointError(
                folder / file,
                f"auto_map names {classes[name]!r} for {name}, and there is no such file in the folder",
                "Put the checkpoint's own .py files beside config.json, or use the native backend",
            )


def _prepare_transformers() -> None:
    """Before transformers is imported: it fetches nothing, and keeps its copies of the code in a folder of this process.

    Raises NotInstalled, which says what to install.
    """
    if "transformers" in sys.modules:
        return
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotInstalled(
            f"{' and '.join(missing)} not installed: the reference backend needs the extra glmq[reference], "
            "which exists for Python 3.11"
        )
    copies = tempfile.TemporaryDirectory(prefix="glmq-reference-")
    _COPIES.append(copies)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_MODULES_CACHE=copies.name,
        TOKENIZERS_PARALLELISM="false",
    )


_COPIES: Final[list[tempfile.TemporaryDirectory[str]]] = []
"""Kept alive, and removed when the process ends."""


def _quantize(folder: Path, model: Any, bits: int, device: torch.device) -> Any:
    """The original packs int4 on a GPU alone, and its int8 needs one too."""
    try:
        return model.to(device).quantize(bits)
    except Exception as error:
        raise CheckpointError(
            folder,
            f"its own quantize({bits}) failed on {device} ({_in_short(error)})",
            "The original's needs an NVIDIA GPU from sm_61 to sm_86: use the native backend, which quantizes anywhere",
        ) from error


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
