"""LoRA adapters as PEFT saves them: a folder's config and tensors, checked against the network they are for; merging.

Executes nothing from the folder. Knows nothing about slots, batches or requests: `adapter_bank` runs what is read here.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from workers.models.config import CheckpointError, read_json
from workers.models.stored_tensors import stored_tensors
from workers.models.weight_file import TensorEntry, file_in_folder, read_directory

logger = logging.getLogger(__name__)

CONFIG_FILE: Final = "adapter_config.json"
SAFETENSORS_FILE: Final = "adapter_model.safetensors"
BIN_FILE: Final = "adapter_model.bin"

TARGETS: Final = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The linear layers that an adapter may change, in both generations of the model."""

_PREFIX: Final = "base_model.model."
_GENERATIONS: Final = {"transformer.layers.": "ChatGLM-6B", "transformer.encoder.layers.": "ChatGLM2-6B"}

Shapes = Mapping[str, tuple[int, int]]
"""Path of a linear layer → (outputs, inputs)."""


class AdapterError(CheckpointError):
    """An adapter cannot be used. The message names the file, what was found and what to do."""


@contextlib.contextmanager
def _adapter_errors() -> Iterator[None]:
    """What the readers of checkpoints raise is, in an adapter's folder, an error of the adapter."""
    try:
        yield
    except AdapterError:
        raise
    except CheckpointError as error:
        raise AdapterError(error.path, error.problem, error.remedy) from error


# --- config ----------------------------------------------------------------------------------------------------------

_MEANS_SOMETHING_ELSE: Final = {
    "use_dora": "DoRA also rescales the columns of the base weights",
    "lora_bias": "it adds a bias to lora_B",
    "layer_replication": "it repeats layers of the base model",
    "use_qalora": "QA-LoRA pools the inputs of lora_A",
    "alora_invocation_tokens": "an activated LoRA changes only the tokens after its invocation",
    "target_parameters": "it changes parameters other than those of linear layers",
    "trainable_token_indices": "it changes rows of the embedding",
    "modules_to_save": "it replaces whole modules of the base model",
    "arrow_config": "Arrow mixes several adapters",
    "use_bdlora": "its factors are block-diagonal",
    "enable_lora": "it changes only parts of a fused projection",
}
"""Settings that, when on, make an adapter more than a pair of factors beside a linear layer, and why."""

_HARMLESS: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout",
        "megatron_config", "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "task_type",
    }
)  # fmt: skip
"""What steers training, or tells where the adapter comes from: no part of an answer's computation."""

_READ: Final = frozenset(
    {
        "alpha_pattern", "bias", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type", "r",
        "rank_pattern", "target_modules", "use_rslora",
    }
)  # fmt: skip

# Other initialisations (pissa, olora, corda, loftq) change the base weights too, and the tensors fit only those.
_PLAIN_INITIALISATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says about the computation (CHATGLM.md D)."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None = None
    """Names of layers, or ends of their paths; None: given by a pattern or left out, and not checked."""
    layers: frozenset[int] | None = None
    """Only in these layers; None: in all."""
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Layers (names, ends of paths, `.*` for any part) with a rank of their own."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, path: str) -> int:
        return _of_pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) for a rank-stabilised adapter."""
        rank, alpha = self.rank_of(path), _of_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, path: str) -> bool:
        """Whether the config says that this layer has factors; False where it does not say so plainly."""
        if self.target_modules is None or not any(_ends_with(path, name) for name in self.target_modules):
            return False
        return self.layers is None or any(
            int(part) in self.layers for part in path.split(".") if part.isdigit()
        )

    @classmethod
    def from_folder(cls, folder: Path | str) -> LoraConfig:
        """Reads `adapter_config.json`. Keys that this code does not know are named in a warning.

        Raises AdapterError, which names the key.
        """
        path = Path(folder) / CONFIG_FILE
        with _adapter_errors():
            fields = read_json(path, "PEFT saves it beside the adapter's tensors")
        return cls.from_fields(fields, path)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], path: Path | str = CONFIG_FILE) -> LoraConfig:
        """The config with these fields; `path` is named in errors."""
        _check_kind(fields, path)
        unknown = sorted(fields.keys() - _READ - _HARMLESS - _MEANS_SOMETHING_ELSE.keys())
        if unknown:
            logger.warning("%s: unknown keys are ignored: %s", path, ", ".join(unknown))
        values = _Fields(fields, path)
        target_modules, layers = fields.get("target_modules"), fields.get("layers_to_transform")
        exact = isinstance(target_modules, list) and not fields.get("exclude_modules")
        return cls(
            rank=values.positive_int("r", fields.get("r", 8)),
            alpha=values.number("lora_alpha", fields.get("lora_alpha", 8)),
            target_modules=tuple(values.texts("target_modules", target_modules)) if exact else None,
            layers=None if layers is None else frozenset(values.indexes("layers_to_transform", layers)),
            use_rslora=values.flag("use_rslora"),
            rank_pattern={
                key: values.positive_int(f"rank_pattern[{key}]", value)
                for key, value in values.patterns("rank_pattern")
            },
            alpha_pattern={
                key: values.number(f"alpha_pattern[{key}]", value)
                for key, value in values.patterns("alpha_pattern")
            },
        )


def _check_kind(fields: Mapping[str, Any], path: Path | str) -> None:
    """Raises AdapterError for an adapter that is no plain LoRA."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            path, f"peft_type is {kind!r}", "Only LoRA adapters (peft_type 'LORA') can be used"
        )
    for key, reason in _MEANS_SOMETHING_ELSE.items():
        if fields.get(key):
            raise AdapterError(
                path,
                f"{key} is set, which is not supported: {reason}",
                "Train without it, or merge the adapter into a checkpoint with PEFT and load that",
            )
    if fields.get("bias", "none") != "none":
        raise AdapterError(
            path,
            f"bias is {fields['bias']!r}, so the adapter also replaces biases of the base model",
            "Train with bias='none', or merge the adapter into a checkpoint with PEFT and load that",
        )
    initialisation = fields.get("init_lora_weights", True)
    if not any(initialisation is known or initialisation == known for known in _PLAIN_INITIALISATIONS):
        raise AdapterError(
            path,
            f"init_lora_weights is {initialisation!r}, which changes the base weights as well",
            "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to adapter_config.json, with errors that name the key."""

    fields: Mapping[str, Any]
    path: Path | str

    def positive_int(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
            raise self._wrong(name, value, "a positive integer")
        return value

    def number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if not (value is None or isinstance(value, bool)):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def texts(self, name: str, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._wrong(name, value, "a list of names")
        return value

    def indexes(self, name: str, value: object) -> list[int]:
        numbers: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise self._wrong(name, value, "a layer's number or a list of them")
        return numbers

    def patterns(self, name: str) -> Iterable[tuple[str, object]]:
        table = self.fields.get(name) or {}
        if not isinstance(table, dict):
            raise self._wrong(name, table, "a table of layers and values")
        return [(self._glob(name, key), value) for key, value in table.items()]

    def _glob(self, name: str, key: str) -> str:
        """PEFT takes these keys for regular expressions. One from elsewhere could run for ever: only `.*` is allowed."""
        glob = key.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
        if not glob or any(character in glob for character in "[](){}|?+\\^$") or "**" in glob:
            raise self._wrong(name, key, "names of layers, or ends of their paths, with .* for any part")
        return glob

    def _wrong(self, name: str, value: object, expected: str) -> AdapterError:
        return AdapterError(
            self.path,
            f"{name} is {str(value)[:80]!r}",
            f"It must be {expected}: correct the file or save it again",
        )


def _of_pattern(table: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that fits this path."""
    for key, value in table.items():
        if fnmatchcase(path, key) or fnmatchcase(path, f"*.{key}"):
            return value
    return default


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


# --- tensors ---------------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What an adapter adds to one linear layer: y += (x A^T) B."""

    a: torch.Tensor
    """[r, inputs]"""
    b: torch.Tensor
    """[r, outputs], with the scale in it"""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory, checked: every tensor belongs to a layer of the network and fits it."""

    folder: Path
    factors: dict[str, Factors]
    """By the path of the linear layer; float32 as they are read."""

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(factors.rank for factors in self.factors.values())

    def to(self, dtype: torch.dtype) -> Adapter:
        """The adapter in this dtype. Raises AdapterError when its values leave the dtype's range."""
        converted = {
            path: Factors(factors.a.to(dtype), factors.b.to(dtype)) for path, factors in self.factors.items()
        }
        for path, factors in converted.items():
            if not (factors.a.isfinite().all() and factors.b.isfinite().all()):
                raise AdapterError(
                    self.folder,
                    f"its values for {path} leave the range of {dtype}",
                    "Run the worker with --dtype bfloat16 or float32",
                )
        return Adapter(self.folder, converted)

    def merged(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """This stored tensor, a linear layer's weight with the adapter in it, summed in float32, in `dtype`.

        The tensor itself where the adapter has nothing for it. Raises AdapterError when the sum leaves the dtype's range.
        """
        factors = self.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is None:
            return tensor
        merged = torch.addmm(tensor.float(), factors.b.T.float(), factors.a.float()).to(dtype)
        if not merged.isfinite().all():
            raise AdapterError(
                self.folder,
                f"merged into {name} it leaves the range of {dtype}",
                "Run the worker with --dtype bfloat16 or float32",
            )
        return merged


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The layers of this network that an adapter may change, whatever form their weights have."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in TARGETS
    }


def read_adapter(folder: Path | str, shapes: Shapes, *, max_rank: int | None = None) -> Adapter:
    """The adapter in this folder, for a network with these linear layers.

    Raises AdapterError for whatever does not fit: PEFT would load such an adapter without a word, and it would do nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(folder, "there is no such folder", f"Give the folder that has {CONFIG_FILE}")
    config = LoraConfig.from_folder(folder)
    with _adapter_errors():
        path = _tensor_file(folder)
        layers = _check_directory(path, read_directory(path), config, shapes)
        sides: dict[tuple[str, str], torch.Tensor] = {}
        for _, name, tensor in stored_tensors([path]):
            if not tensor.isfinite().all():
                raise AdapterError(
                    path,
                    f"{name} has values that are not finite",
                    "Its training has diverged: use an earlier state",
                )
            sides[_parse_name(path, name, shapes)] = tensor.to(torch.float32, copy=True)
    factors = {
        layer: Factors(sides[layer, "A"], (sides[layer, "B"].T * config.scale_of(layer)).contiguous())
        for layer in layers
    }
    adapter = Adapter(folder, factors)
    if max_rank is not None and adapter.rank > max_rank:
        raise AdapterError(
            folder,
            f"its rank is {adapter.rank}, and this engine has room for {max_rank}",
            "Raise --max-adapter-rank, or merge the adapter at load",
        )
    if not any(pair.b.any() for pair in factors.values()):
        logger.warning("%s: every lora_B is zero: the adapter changes nothing", folder)
    return adapter


def _tensor_file(folder: Path) -> Path:
    for name in (SAFETENSORS_FILE, BIN_FILE):
        if (folder / name).is_file():
            return file_in_folder(folder, name, folder)
    raise AdapterError(
        folder,
        f"it has no tensors: neither {SAFETENSORS_FILE} nor {BIN_FILE}",
        "Save the adapter with PEFT's save_pretrained",
    )


def _check_directory(
    path: Path, entries: Mapping[str, TensorEntry], config: LoraConfig, shapes: Shapes
) -> list[str]:
    """The layers that the file has factors for. Raises AdapterError for a tensor that fits nothing, and for one that is
    missing."""
    found: dict[str, set[str]] = {}
    for name, entry in entries.items():
        layer, side = _parse_name(path, name, shapes)
        _check_entry(path, name, entry, _expected_shape(config, layer, side, shapes))
        found.setdefault(layer, set()).add(side)
    if not found:
        raise AdapterError(
            path, "the file has no tensors", "Save the adapter again with PEFT's save_pretrained"
        )
    for layer, sides in found.items():
        for side in {"A", "B"} - sides:
            raise AdapterError(
                path, f"{_PREFIX}{layer}.lora_{side}.weight is missing", "Save or copy the adapter again"
            )
    missing = [layer for layer in shapes if config.is_target(layer) and layer not in found]
    if missing:
        more = f" and {len(missing) - 1} more layers" if len(missing) > 1 else ""
        raise AdapterError(
            path,
            f"it has nothing for {missing[0]}{more}, which target_modules in {CONFIG_FILE} name",
            "The file is incomplete, or from a smaller model: save or copy the adapter again",
        )
    return sorted(found)


def _parse_name(path: Path, name: str, shapes: Shapes) -> tuple[str, str]:
    """The layer, and "A" or "B". Raises AdapterError for a name that PEFT would not find a place for either."""
    layer = name.removeprefix(_PREFIX)
    for side in ("A", "B"):
        suffix = f".lora_{side}.weight"
        if name.startswith(_PREFIX) and layer.endswith(suffix):
            layer = layer.removesuffix(suffix)
            if layer in shapes:
                return layer, side
            raise _wrong_layer(path, name, layer, shapes)
    raise AdapterError(
        path,
        f"{name} is no tensor of a LoRA on a linear layer",
        f"Names are {_PREFIX}<layer>.lora_A.weight and .lora_B.weight: save the adapter with PEFT's save_pretrained",
    )


def _wrong_layer(path: Path, name: str, layer: str, shapes: Shapes) -> AdapterError:
    ours, theirs = _generation(shapes), _generation([layer])
    if ours and theirs and ours != theirs:
        return AdapterError(
            path,
            f"{name} belongs to {theirs}, and this checkpoint is {ours}: their layers differ in form and meaning",
            f"Use an adapter that was trained on {ours}, or the checkpoint that this one was trained on",
        )
    num_layers = len({part for shape in shapes for part in shape.split(".") if part.isdigit()})
    return AdapterError(
        path,
        f"{name} is for a layer that this checkpoint does not have ({num_layers} layers, "
        f"in each {', '.join(TARGETS)})",
        "Use the checkpoint that the adapter was trained on",
    )


def _generation(layers: Iterable[str]) -> str | None:
    for layer in layers:
        for prefix, generation in _GENERATIONS.items():
            if layer.startswith(prefix):
                return generation
    return None


def _expected_shape(config: LoraConfig, layer: str, side: str, shapes: Shapes) -> tuple[int, int]:
    outputs, inputs = shapes[layer]
    rank = config.rank_of(layer)
    return (rank, inputs) if side == "A" else (outputs, rank)


def _check_entry(path: Path, name: str, entry: TensorEntry, expected: tuple[int, int]) -> None:
    if entry.shape != expected:
        raise AdapterError(
            path,
            f"{name} has the shape {list(entry.shape)}, but the checkpoint and {CONFIG_FILE} make it {list(expected)}",
            f"Use the checkpoint that the adapter was trained on, with the adapter's own {CONFIG_FILE}",
        )
    if entry.dtype not in ("float32", "float16", "bfloat16"):
        raise AdapterError(
            path, f"{name} has the dtype {entry.dtype}", "Save it as float32, float16 or bfloat16"
        )
