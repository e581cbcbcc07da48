"""A checkpoint folder to a network with its weights, in whatever form they are stored. Executes nothing from the folder.

Reads safetensors (one file or an index) or `.bin` files (weights only), memory-mapped, one tensor at a time to its
device. Knows nothing about tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import torch
from torch import nn

from workers.models.chatglm import ChatGLM
from workers.models.chatglm2 import ChatGLM2
from workers.models.config import CONFIG_FILE, CheckpointError, Dtype, ModelConfig, read_json
from workers.models.linear import QuantizedEmbedding, QuantizedLinear, StoredLinear, set_module
from workers.models.lora import Adapter, linear_shapes, read_adapter
from workers.models.network import Network
from workers.models.quantization import Bits, quantize, stored_values
from workers.models.stored_tensors import stored_tensor, stored_tensors
from workers.models.weight_file import file_in_folder, read_directory

SAFETENSORS_FILE: Final = "model.safetensors"
SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
BIN_FILE: Final = "pytorch_model.bin"
BIN_INDEX: Final = "pytorch_model.bin.index.json"

DTYPES: Final[dict[Dtype, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

# The constructor's own frequencies are used: the released code ignores these entries (CHATGLM.md A4, B4).
_IGNORED_SUFFIX: Final = ".inv_freq"
_SCALE_SUFFIX: Final = ".weight_scale"

Forms = dict[str, Bits]
"""The bits of the layers that have integer weights, by the layer's path."""
Pack = Callable[[QuantizedLinear], nn.Module]
"""Puts a quantized layer into the form that runs, and may empty it."""


def new_network(config: ModelConfig) -> Network:
    """The network of this config with arbitrary parameters."""
    return ChatGLM2(config) if config.model_type == "chatglm2" else ChatGLM(config)


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    adapter: Path | str | None = None,
    quantize_bits: Bits | None = None,
    quantize_head: bool = False,
    pack: Pack | None = None,
) -> Network:
    """The network of the checkpoint in this folder, ready for inference on this device.

    `dtype`: of weights and computation; the stored one by default. `adapter`: the folder of a LoRA that is merged into
    the weights. `quantize_bits`: of the linear layers, where the checkpoint has them in floating point; `quantize_head`: the
    head, too, in 8 bits. `pack`: called with each quantized linear layer as soon as it is complete.
    Raises CheckpointError for a missing file, a missing tensor or one of a wrong shape, and names it; AdapterError, which
    is one, where the adapter is to blame.
    """
    folder = Path(folder)
    config = config or ModelConfig.from_folder(folder)
    # Nothing is allocated until a tensor has been read.
    with torch.device("meta"):
        model = new_network(config)
    lora = None if adapter is None else read_adapter(adapter, linear_shapes(model))
    files = weight_files(folder)
    names = {name: entry.shape for path in files for name, entry in read_directory(path).items()}
    stored = stored_forms(model, names, folder)
    forms = _wanted_forms(model, stored, folder, quantize_bits, quantize_head=quantize_head)
    if lora is not None and stored:
        raise CheckpointError(
            folder,
            "its weights are quantized, and an adapter cannot be merged into integers",
            "Run the adapter beside them, or merge it while quantizing: glmq quantize SRC DST --adapter PATH",
        )
    with torch.device("meta"):
        try:
            put_quantized(model, forms)
        except ValueError as error:
            raise CheckpointError(folder / CONFIG_FILE, str(error), "Use 8 bits") from error
    device = torch.device(device)
    keeps_half = bool(forms) and device.type == "cpu"
    if keeps_half:
        _widen_head_when_used(model)
    loading = _Loading(model, device, dtype or DTYPES[config.dtype], lora, pack, keeps_half=keeps_half)
    # Of two tensors that are one, the head's counts (CHATGLM.md A7).
    unused = model.embedding if config.tie_word_embeddings and f"{model.head}.weight" in names else None
    # What head and embedding share is packed beside its integers: least memory is needed while there is nothing else.
    for path, name, tensor in stored_tensors(files, first=(model.head, model.embedding)):
        if name.rpartition(".")[0] != unused:
            loading.take(path, name, tensor)
    loading.finish(folder)
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


# --- which layers have integer weights -------------------------------------------------------------------------------


def stored_forms(model: Network, shapes: dict[str, tuple[int, ...]], folder: Path) -> Forms:
    """The layers that these stored tensors (name → shape) have integers for.

    Raises CheckpointError where they do not fit together or contradict config.json's `quantization_bit`.
    """
    forms: Forms = {}
    for path, (outputs, inputs) in _quantizable(model).items():
        if path + _SCALE_SUFFIX not in shapes:
            continue
        shape = shapes.get(f"{path}.weight")
        if shape == (outputs, inputs):
            forms[path] = 8
        elif shape == (outputs, inputs // 2) and inputs % 2 == 0:
            forms[path] = 4
        else:
            raise CheckpointError(
                folder,
                f"{path}.weight has the shape {list(shape or ())}, but with a scale it must be {[outputs, inputs]} in int8 "
                f"or {[outputs, inputs // 2]} in int4",
                "Take weights and config.json from the same release",
            )
    for path in linear_shapes(model):
        if (found := forms.get(path, 0)) != model.config.quantization_bit:
            raise CheckpointError(
                folder / CONFIG_FILE,
                f"quantization_bit is {model.config.quantization_bit}, but {path} is stored in "
                + (f"{found} bits" if found else "floating point, or not at all"),
                "Take weights and config.json from the same release",
            )
    return forms


def _quantizable(model: Network) -> dict[str, tuple[int, int]]:
    """Layers that may have integer weights: (outputs, inputs) by path."""
    head_shape = (model.config.vocab_size, model.config.hidden_size)
    return {**linear_shapes(model), model.head: head_shape, model.embedding: head_shape}


def _wanted_forms(
    model: Network, stored: Forms, folder: Path, quantize_bits: Bits | None, *, quantize_head: bool
) -> Forms:
    """The layers that shall have integer weights: those that are stored so, and those to be quantized now."""
    forms = dict(stored)
    stored_bits = model.config.quantization_bit
    if quantize_bits is not None:
        if stored_bits not in (0, quantize_bits):
            raise CheckpointError(
                folder,
                f"its weights are int{stored_bits} already: they cannot become int{quantize_bits}",
                "Leave --quantize out, or use the fp16 checkpoint",
            )
        forms |= dict.fromkeys(linear_shapes(model), quantize_bits)
    if quantize_head:
        forms.setdefault(model.head, 8)
    if model.config.tie_word_embeddings:
        for path, other in ((model.head, model.embedding), (model.embedding, model.head)):
            if path in forms:
                forms.setdefault(other, forms[path])
    return forms


def put_quantized(model: Network, forms: Forms) -> None:
    """Puts empty quantized layers in the places of these plain ones. Raises ValueError for rows that cannot be packed."""
    for path, bits in forms.items():
        plain = model.get_submodule(path)
        if isinstance(plain, nn.Embedding):
            set_module(model, path, QuantizedEmbedding(plain.num_embeddings, plain.embedding_dim, bits))
        else:
            linear = cast(nn.Linear, plain)
            has_bias = linear.bias is not None
            set_module(
                model, path, QuantizedLinear(linear.in_features, linear.out_features, bits, bias=has_bias)
            )


def _widen_head_when_used(model: Network) -> None:
    head = model.get_submodule(model.head)
    if isinstance(head, nn.Linear):
        stored = StoredLinear(head.in_features, head.out_features, bias=False)
        if model.config.tie_word_embeddings:
            stored.weight = model.get_parameter(f"{model.embedding}.weight")
        set_module(model, model.head, stored)


# --- one tensor after another ----------------------------------------------------------------------------------------


class _Loading:
    """Takes the tensors of a checkpoint, in any order, into a network that has none."""

    def __init__(
        self,
        model: Network,
        device: torch.device,
        dtype: torch.dtype,
        lora: Adapter | None,
        pack: Pack | None,
        *,
        keeps_half: bool,
    ) -> None:
        """keeps_half: embedding and head stay in the half precision that they are stored in, mapped."""
        self._model, self._device, self._dtype = model, device, dtype
        self._lora, self._pack = lora, pack
        self._expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._missing = set(self._expected)
        self._kept = {f"{path}.weight" for path in (model.embedding, model.head)} if keeps_half else set()
        self._shared = {model.embedding, model.head} if model.config.tie_word_embeddings else set()
        self._shared_from: tuple[Path, str] | None = None
        """Where the integers are that embedding and head share."""
        self._is_tied = False

    def take(self, path: Path, name: str, tensor: torch.Tensor) -> None:
        """Raises CheckpointError, which names the tensor and its file, when it does not fit."""
        if name.endswith(_IGNORED_SUFFIX) or name not in self._expected:
            return
        layer, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(layer)
        is_quantized = isinstance(module, QuantizedLinear | QuantizedEmbedding)
        if is_quantized and attribute == "weight":
            self._take_weight(path, layer, cast(QuantizedLinear, module), tensor)
        else:
            self._check(path, name, tensor, self._expected[name], is_floating=True)
            if is_quantized and attribute == "weight_scale":
                self._assign(name, tensor.to(self._device, torch.float16, copy=True))
            elif name in self._kept and tensor.itemsize == 2:
                self._assign(name, tensor)
            else:
                weights = tensor if self._lora is None else self._lora.merged(name, tensor, self._dtype)
                self._assign(name, weights.to(self._device, self._dtype, copy=True))
        self._pack_if_complete(layer)

    def finish(self, folder: Path) -> None:
        """Ties what is one tensor. Raises CheckpointError when a tensor has not come."""
        if not self._is_tied:
            self._tie()
        if self._missing:
            first, *others = sorted(self._missing)
            more = f" and {len(others)} more" if others else ""
            raise CheckpointError(
                folder,
                f"the tensor {first}{more} is in none of its weight files",
                "Download the checkpoint again",
            )

    def _take_weight(self, path: Path, layer: str, module: QuantizedLinear, tensor: torch.Tensor) -> None:
        """Integers as they are; floating point quantized, with the adapter in it."""
        name, bits = f"{layer}.weight", module.bits
        if not tensor.is_floating_point():
            self._check(path, name, tensor, self._expected[name], is_floating=False)
            self._assign(name, tensor.to(self._device))  # on a CPU it stays in the mapped file
            if layer in self._shared:
                self._shared_from = path, name
            return
        rows, columns = self._expected[name]
        self._check(path, name, tensor, torch.Size((rows, columns * 8 // bits)), is_floating=True)
        if self._lora is not None:
            tensor = self._lora.merged(name, tensor, tensor.dtype)
        quantized = quantize(tensor.to(self._device), bits)
        self._assign(name, stored_values(quantized, bits))
        self._assign(f"{layer}.weight_scale", quantized.scales)

    def _check(
        self, path: Path, name: str, tensor: torch.Tensor, shape: torch.Size, *, is_floating: bool
    ) -> None:
        if tensor.shape != shape:
            raise CheckpointError(
                path,
                f"{name} has the shape {list(tensor.shape)}, but config.json makes it {list(shape)}",
                "Take weights and config.json from the same release",
            )
        if tensor.is_floating_point() != is_floating or not (is_floating or tensor.dtype == torch.int8):
            expected = "a floating-point dtype" if is_floating else "int8"
            raise CheckpointError(
                path,
                f"{name} has the dtype {tensor.dtype}, and {expected} was expected",
                "Take weights and config.json from the same release",
            )

    def _assign(self, name: str, tensor: torch.Tensor) -> None:
        layer, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(layer)
        if attribute in module._parameters:
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, attribute, tensor)
        self._missing.discard(name)

    def _pack_if_complete(self, layer: str) -> None:
        module = self._model.get_submodule(layer)
        if self._pack is None or not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            return
        if any(f"{layer}.{attribute}" in self._missing for attribute in module.state_dict()):
            return
        if layer in self._shared:
            self._tie()
            self._pack_shared_head(self._pack)
        elif isinstance(module, QuantizedLinear):
            set_module(self._model, layer, self._pack(module))

    def _pack_shared_head(self, pack: Pack) -> None:
        head = cast(QuantizedLinear, self._model.get_submodule(self._model.head))
        if self._shared_from is not None:
            # Packing reads every page, and those of the embedding's own mapping would stay in memory.
            head.weight = stored_tensor(*self._shared_from)
        set_module(self._model, self._model.head, pack(head))

    def _tie(self) -> None:
        self._is_tied = True
        if not self._shared:
            return
        head, embedding = (
            self._model.get_submodule(path) for path in (self._model.head, self._model.embedding)
        )
        has_head = f"{self._model.head}.weight" not in self._missing
        source, target = (head, embedding) if has_head else (embedding, head)
        target_path = self._model.embedding if has_head else self._model.head
        for attribute in target.state_dict():
            setattr(target, attribute, getattr(source, attribute))
            if f"{self._model.head if has_head else self._model.embedding}.{attribute}" not in self._missing:
                self._missing.discard(f"{target_path}.{attribute}")
