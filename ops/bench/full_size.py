"""Writes a checkpoint of ChatGLM-6B's full size with random weights: what loads, quantizes and answers as fast as the released one.

    python -m ops.bench.full_size FOLDER --tokenizer RELEASE_FOLDER [--bits 4]

The tokenizer and the special ids are those of RELEASE_FOLDER, whose own size does not matter. `--bits` writes the form that `glmq quantize` writes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from workers.models.config import CONFIG_FILE, ModelConfig, read_json
from workers.models.linear import stored_shape
from workers.models.loader import SAFETENSORS_FILE, new_network
from workers.models.lora import linear_shapes
from workers.models.quantization import Bits, quantize, stored_values
from workers.models.quantized_checkpoint import ACCOMPANYING_FILES, SafetensorsWriter

SIZES = {
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "vocab_size": 130528,
    "max_sequence_length": 2048,
}
WEIGHT_STD = 0.02


def write(folder: Path, tokenizer: Path, bits: Bits | None) -> None:
    """The folder must not exist. The weights are made on a GPU if there is one."""
    fields = read_json(tokenizer / CONFIG_FILE, "Give the folder of a release") | SIZES
    fields.pop("auto_map", None)
    if bits is not None:
        fields["quantization_bit"] = bits
    with torch.device("meta"):
        model = new_network(ModelConfig.from_fields({**fields, "quantization_bit": 0}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linears = {f"{path}.weight" for path in linear_shapes(model) if path not in (model.head, model.embedding)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # One tensor for both, under the embedding's name.
    del shapes[f"{model.head}.weight"]
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if bits is not None and name in linears:
            layout[name] = (torch.int8, stored_shape(shape[0], shape[1], bits))
            layout[f"{name}_scale"] = (torch.float16, shape[:1])
        else:
            layout[name] = (torch.float16, shape)
    folder.mkdir(parents=True)
    with SafetensorsWriter(folder / SAFETENSORS_FILE, layout) as writer:
        for name, shape in shapes.items():
            is_norm = "layernorm" in name and name.endswith("weight")
            tensor = torch.empty(shape, dtype=torch.float16, device=device).normal_(
                float(is_norm), WEIGHT_STD
            )
            if bits is not None and name in linears:
                quantized = quantize(tensor, bits)
                writer.write(name, stored_values(quantized, bits).cpu())
                writer.write(f"{name}_scale", quantized.scales.cpu())
            else:
                writer.write(name, tensor.cpu())
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    for name in ACCOMPANYING_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--layers", type=int, help="fewer, to try it out")
    arguments = parser.parse_args()
    if arguments.layers is not None:
        SIZES["num_layers"] = arguments.layers
    began = time.monotonic()
    with torch.inference_mode():
        write(arguments.folder, arguments.tokenizer, arguments.bits)
    size = (arguments.folder / SAFETENSORS_FILE).stat().st_size
    print(f"{size / 1e9:.2f} GB in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
