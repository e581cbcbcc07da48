"""Writes a checkpoint whose linear layers are integers: one safetensors file, made tensor by tensor.

The tensors have the names and the bytes that the original's own quantization gives them (CHATGLM.md C). At no time is more
than one of them in memory. Knows nothing about engines.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import torch

from workers.models.config import CONFIG_FILE, CheckpointError, ModelConfig, read_json
from workers.models.linear import stored_shape
from workers.models.loader import SAFETENSORS_FILE, Forms, new_network, weight_files
from workers.models.lora import Adapter, linear_shapes, read_adapter
from workers.models.network import Network
from workers.models.quantization import Bits, Quantized, quantize, stored_values
from workers.models.stored_tensors import stored_tensors
from workers.models.weight_file import TensorEntry, read_directory

Progress = Callable[[int, int], None]
"""(bytes of the source that are done, all of them)"""

ACCOMPANYING_FILES: Final = (
    "ice_text.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "LICENSE",
    "MODEL_LICENSE",
    "NOTICE",
)
"""Copied where the source has them. Python files are not: nothing here runs them."""

_NAMES: Final = {torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
_ELEMENTS_AT_ONCE: Final = 1 << 24


@dataclass(slots=True)
class LayerErrors:
    """What quantizing has cost the layers of one kind."""

    bits: Bits
    num_layers: int = 0
    largest: float = 0.0
    """The largest difference of a weight."""
    num_clamped_rows: int = 0
    """Rows of tiny weights on which the original would overflow or divide by zero."""
    _square_error: float = 0.0
    _square: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of the weights."""
        return (self._square_error / self._square) ** 0.5 if self._square else 0.0

    def add(self, weight: torch.Tensor, quantized: Quantized) -> None:
        """Counts one layer in: its weights before, and after."""
        self.num_layers += 1
        self.num_clamped_rows += quantized.num_clamped_rows
        step = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), step):
            before = weight[start : start + step].float()
            scales = quantized.scales[start : start + step].float().unsqueeze(1)
            error = before - quantized.values[start : start + step].float().mul_(scales)
            self.largest = max(self.largest, error.abs().max().item())
            self._square_error += error.square().sum(dtype=torch.float64).item()
            self._square += before.square().sum(dtype=torch.float64).item()


@dataclass(frozen=True, slots=True)
class Report:
    """What was written, and how far it is from what was read."""

    source_bytes: int
    target_bytes: int
    errors: dict[str, LayerErrors]
    """By the layers' own name: query_key_value, dense, ..."""


def write_quantized(
    source: Path,
    target: Path,
    bits: Bits,
    *,
    adapter: Path | None = None,
    head_bits: Bits | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Report:
    """Reads the floating-point checkpoint in `source`, and writes the folder `target`, which must not exist.

    adapter: the folder of a LoRA that is merged into the weights first. head_bits: the head's, and the embedding's where
    both are one tensor; None: they keep their precision.
    Raises CheckpointError, and AdapterError; the target is not there then.
    """
    config = ModelConfig.from_folder(source)
    if config.quantization_bit:
        raise CheckpointError(
            source, f"its weights are int{config.quantization_bit} already", "Give the fp16 checkpoint"
        )
    if target.exists():
        raise CheckpointError(target, "it exists already", "Give a folder that does not exist")
    with torch.device("meta"):
        model = new_network(config)
    lora = None if adapter is None else read_adapter(adapter, linear_shapes(model))
    files = weight_files(source)
    stored = _checked_directory(model, files, source)
    forms: Forms = dict.fromkeys(linear_shapes(model), bits)
    if head_bits is not None:
        forms[model.head] = head_bits
        if config.tie_word_embeddings:
            forms[model.embedding] = head_bits
    try:
        layout = _layout(model, stored, forms)
    except ValueError as error:
        raise CheckpointError(source / CONFIG_FILE, str(error), "Use 8 bits") from error
    with _folder_in_the_making(target) as folder:
        with SafetensorsWriter(folder / SAFETENSORS_FILE, layout) as writer:
            errors = _write_tensors(
                model, files, stored, writer, forms=forms, lora=lora, on_progress=on_progress
            )
        _write_config(source, folder, config, bits, has_quantized_embedding=model.embedding in forms)
        for name in ACCOMPANYING_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    return Report(
        source_bytes=sum(entry.nbytes for entry in stored.values()),
        target_bytes=(target / SAFETENSORS_FILE).stat().st_size,
        errors=errors,
    )


def _checked_directory(model: Network, files: list[Path], source: Path) -> dict[str, TensorEntry]:
    """What the source has of the network's tensors, each once. Raises CheckpointError for what is missing or misshapen."""
    directory = {name: entry for path in files for name, entry in read_directory(path).items()}
    head, embedding = f"{model.head}.weight", f"{model.embedding}.weight"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected[head if head not in directory else embedding]
    for name, shape in expected.items():
        if name not in directory:
            raise CheckpointError(
                source, f"the tensor {name} is in none of its weight files", "Download the checkpoint again"
            )
        if directory[name].shape != shape:
            raise CheckpointError(
                source,
                f"{name} has the shape {list(directory[name].shape)}, but config.json makes it {list(shape)}",
                "Take weights and config.json from the same release",
            )
        if directory[name].dtype not in ("float16", "bfloat16", "float32"):
            raise CheckpointError(
                source,
                f"{name} has the dtype {directory[name].dtype}",
                "Use the checkpoint with fp16 weights",
            )
    return {name: directory[name] for name in expected}


def _layout(
    model: Network, stored: dict[str, TensorEntry], forms: Forms
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name → dtype and shape of all tensors in the target."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in stored.items():
        path = _target_path(model, name.rpartition(".")[0])
        bits = forms.get(path) if name.endswith(".weight") else None
        if bits is None:
            layout[f"{path}.{name.rpartition('.')[2]}"] = (_stored_dtype(entry), entry.shape)
        else:
            rows, columns = entry.shape
            layout[f"{path}.weight"] = (torch.int8, stored_shape(rows, columns, bits))
            layout[f"{path}.weight_scale"] = (torch.float16, (rows,))
    return layout


def _target_path(model: Network, path: str) -> str:
    """One name for a tensor that is both head and embedding."""
    return model.embedding if model.config.tie_word_embeddings and path == model.head else path


def _stored_dtype(entry: TensorEntry) -> torch.dtype:
    return torch.bfloat16 if entry.dtype == "bfloat16" else torch.float16


def _write_tensors(
    model: Network,
    files: list[Path],
    stored: dict[str, TensorEntry],
    writer: SafetensorsWriter,
    *,
    forms: Forms,
    lora: Adapter | None,
    on_progress: Progress,
) -> dict[str, LayerErrors]:
    errors: dict[str, LayerErrors] = {}
    done, total = 0, sum(entry.nbytes for entry in stored.values())
    for file, name, tensor in stored_tensors(files):
        if name not in stored:
            continue
        layer, _, attribute = name.rpartition(".")
        path = _target_path(model, layer)
        bits = forms.get(path) if attribute == "weight" else None
        weights = tensor if lora is None else lora.merged(name, tensor, tensor.dtype)
        if bits is None:
            weights = weights.to(_stored_dtype(stored[name]))
            _check_finite(file, name, weights)
            writer.write(f"{path}.{attribute}", weights)
        else:
            _check_finite(file, name, weights)
            quantized = quantize(weights, bits)
            writer.write(f"{path}.weight", stored_values(quantized, bits))
            writer.write(f"{path}.weight_scale", quantized.scales)
            errors.setdefault(path.rpartition(".")[2], LayerErrors(bits)).add(weights, quantized)
        done += stored[name].nbytes
        on_progress(done, total)
    return errors


def _check_finite(file: Path, name: str, tensor: torch.Tensor) -> None:
    # Piece by piece: a mask of the whole head would have half a gigabyte.
    flat = tensor.flatten()
    for start in range(0, len(flat), _ELEMENTS_AT_ONCE):
        if not flat[start : start + _ELEMENTS_AT_ONCE].isfinite().all():
            raise CheckpointError(
                file,
                f"{name} has values that are not finite in {tensor.dtype}",
                "Download the checkpoint again",
            )


def _write_config(
    source: Path, folder: Path, config: ModelConfig, bits: Bits, *, has_quantized_embedding: bool
) -> None:
    fields = read_json(source / CONFIG_FILE, "config.json comes with every checkpoint")
    fields |= {
        "quantization_bit": bits,
        "torch_dtype": "bfloat16" if config.dtype == "bfloat16" else "float16",
    }
    if has_quantized_embedding:
        fields["quantization_embeddings"] = True
    (folder / CONFIG_FILE).write_text(
        json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


@contextmanager
def _folder_in_the_making(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, or is gone."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(target)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            target, f"it cannot be written ({error})", "Give a folder on a disk with enough room"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class SafetensorsWriter:
    """A safetensors file whose tensors are known beforehand and written one by one, in any order."""

    def __init__(self, path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """layout: name → dtype and shape."""
        self._path = path
        # The widest first, so that every tensor begins at a multiple of its own width.
        names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        position = 0
        for name in names:
            dtype, shape = layout[name]
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
            self._places[name] = (position, end)
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
        # Alignment of the data that follows, for readers that map it.
        self._header = encoded + b" " * (-(len(encoded) + 8) % 64)
        self._size = position
        self._missing = set(names)
        self._file: BinaryIO

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        self._data_start = self._file.tell()
        self._file.truncate(self._data_start + self._size)
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        self._file.close()
        if exception_type is None and self._missing:
            raise ValueError(f"{sorted(self._missing)[0]} was never written")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ValueError when it is not of the size that was announced."""
        start, end = self._places[name]
        if tensor.nbytes != end - start:
            raise ValueError(f"{name} has {tensor.nbytes} bytes, and {end - start} were announced")
        self._file.seek(self._data_start + start)
        self._file.write(tensor.contiguous().view(torch.uint8).flatten().numpy().data)
        self._missing.remove(name)
