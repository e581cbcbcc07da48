"""A checkpoint folder to a network with its weights. Executes nothing from the folder.

Reads safetensors (one file or an index) or `.bin` files (weights only), memory-mapped, one tensor at a time to its
device. Knows nothing about tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn

from workers.models.chatglm import ChatGLM
from workers.models.config import CheckpointError, Dtype, ModelConfig, read_json
from workers.models.layers import LinearFactory, plain_linear
from workers.models.lora import linear_shapes, read_adapter
from workers.models.stored_tensors import stored_tensors
from workers.models.weight_file import file_in_folder

SAFETENSORS_FILE: Final = "model.safetensors"
SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
BIN_FILE: Final = "pytorch_model.bin"
BIN_INDEX: Final = "pytorch_model.bin.index.json"

DTYPES: Final[dict[Dtype, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

# The constructor's own frequencies are used: the released code ignores these entries (CHATGLM.md A4).
_IGNORED_SUFFIX: Final = ".rotary_emb.inv_freq"


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    make_linear: LinearFactory = plain_linear,
    config: ModelConfig | None = None,
    adapter: Path | str | None = None,
) -> ChatGLM:
    """The network of the checkpoint in this folder, ready for inference on this device.

    `dtype`: of weights and computation; the stored one by default. `adapter`: the folder of a LoRA that is merged into
    the weights.
    Raises CheckpointError for a missing file, a missing tensor or one of a wrong shape, and names it; AdapterError, which
    is one, where the adapter is to blame.
    """
    folder = Path(folder)
    config = config or ModelConfig.from_folder(folder)
    # Nothing is allocated until a tensor has been read.
    with torch.device("meta"):
        model = ChatGLM(config, make_linear)
    expected = dict(model.state_dict(keep_vars=True))
    lora = None if adapter is None else read_adapter(adapter, linear_shapes(model))
    files = weight_files(folder)
    loaded: set[str] = set()
    for path, name, tensor in stored_tensors(files):
        if name.endswith(_IGNORED_SUFFIX) or name not in expected:
            continue
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                path,
                f"{name} has the shape {list(tensor.shape)}, but config.json makes it {list(expected[name].shape)}",
                "Take weights and config.json from the same release",
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                path, f"{name} has the dtype {tensor.dtype}", "Use the checkpoint with fp16 weights"
            )
        target_dtype = dtype or DTYPES[config.dtype]
        weights = tensor if lora is None else lora.merged(name, tensor, target_dtype)
        _assign(model, name, weights.to(device=device, dtype=target_dtype, copy=True))
        loaded.add(name)
    _tie(model, loaded)
    missing = sorted(expected.keys() - loaded)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            folder,
            f"the tensor {missing[0]}{more} is in none of its weight files",
            "Download the checkpoint again",
        )
    return model.requires_grad_(False).eval()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold this checkpoint's weights: one, or those that an index names.

    Raises CheckpointError when there are none, when one is missing, or when the index leads out of the folder.
    """
    for index_name, single_name in ((SAFETENSORS_INDEX, SAFETENSORS_FILE), (BIN_INDEX, BIN_FILE)):
        if (folder / single_name).is_file():
            return [file_in_folder(folder, single_name, folder)]
        if (folder / index_name).is_file():
            return _indexed_files(folder, folder / index_name)
    if not folder.is_dir():
        raise CheckpointError(folder, "there is no such folder", "Give the folder that has config.json")
    raise CheckpointError(
        folder,
        f"it has no weights: neither {SAFETENSORS_FILE} nor {BIN_FILE}, nor an index of several such files",
        "Download the checkpoint's weight files into it",
    )


def _indexed_files(folder: Path, index_path: Path) -> list[Path]:
    weight_map = read_json(index_path, "it lists the weight files").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            index_path, "weight_map is not a table of tensor names and file names", "Download it again"
        )
    return [file_in_folder(folder, name, index_path) for name in sorted(set(weight_map.values()))]


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if attribute in module._parameters:
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, attribute, tensor)


def _tie(model: ChatGLM, loaded: set[str]) -> None:
    """One tensor for the embedding and the head; where a file has both, the head's (CHATGLM.md A7)."""
    head, embedding = "lm_head.weight", "transformer.word_embeddings.weight"
    if not model.config.tie_word_embeddings:
        return
    if head in loaded:
        model.transformer.word_embeddings.weight = model.lm_head.weight
        loaded.add(embedding)
    elif embedding in loaded:
        model.lm_head.weight = model.transformer.word_embeddings.weight
        loaded.add(head)
