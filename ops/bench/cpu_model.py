"""Measures a model of ChatGLM-6B's size on this CPU: loading, memory, first token, decode.

    python -m ops.bench.cpu_model                       # int4, fp16 head
    python -m ops.bench.cpu_model --bits 4 --head int8
    python -m ops.bench.cpu_model --keep /tmp/6b-int4   # keeps the checkpoint, or uses it if it is there

Weights are random: they do not change the speed. The checkpoint has the form that `glmq quantize` writes. Loading and running
happen in a process of their own, whose largest resident size is compared with the checkpoint's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Sampling
from workers.models.config import ModelConfig
from workers.models.linear import stored_shape
from workers.models.loader import new_network
from workers.models.lora import linear_shapes
from workers.models.quantization import Bits
from workers.models.quantized_checkpoint import SafetensorsWriter
from workers.settings import DEMO_CHECKPOINT

SIZES = {
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "vocab_size": 130528,
}


def write_checkpoint(folder: Path, bits: Bits, *, has_int8_head: bool, num_layers: int) -> None:
    """A checkpoint of random integers, with the demo's tokenizer."""
    fields = json.loads((DEMO_CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    fields |= {**SIZES, "num_layers": num_layers, "quantization_bit": bits}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    shutil.copyfile(DEMO_CHECKPOINT / "ice_text.model", folder / "ice_text.model")
    with torch.device("meta"):
        model = new_network(ModelConfig.from_fields(fields))
    forms: dict[str, Bits] = dict.fromkeys(linear_shapes(model), bits)
    if has_int8_head:
        forms[model.embedding] = 8
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        if path == model.head:
            continue
        if attribute == "weight" and path in forms:
            rows, columns = tensor.shape
            layout[name] = (torch.int8, stored_shape(rows, columns, forms[path]))
            layout[f"{path}.weight_scale"] = (torch.float16, (rows,))
        else:
            layout[name] = (torch.float16, tuple(tensor.shape))
    with SafetensorsWriter(folder / "model.safetensors", layout) as writer:
        for name, (dtype, shape) in layout.items():
            if dtype == torch.int8:
                tensor = torch.randint(-128, 128, shape, dtype=dtype)
            elif name.endswith("weight_scale"):
                tensor = torch.full(shape, 0.02 / 2 ** (bits - 1), dtype=dtype)
            else:
                tensor = torch.randn(shape).mul_(0.02).to(dtype) + ("layernorm.weight" in name)
            writer.write(name, tensor)


def peak_bytes() -> int:
    """Of this process since it began; `getrusage` would count the process that started it, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def measure(folder: Path, options: argparse.Namespace) -> None:
    """In a process of its own."""
    size = (folder / "model.safetensors").stat().st_size
    before = peak_bytes()
    begin = time.perf_counter()
    engine = Engine.from_config(
        EngineConfig(
            checkpoint=str(folder),
            device="cpu",
            num_threads=options.threads,
            activations=options.activations,
            context_len=1024,
            max_num_seqs=max(options.batches),
            cache_gib=0.25,  # the cache is not what is measured
        )
    )
    seconds = time.perf_counter() - begin
    print(
        f"checkpoint {size / 1e9:.2f} GB; loaded in {seconds:.1f} s; largest resident size {peak_bytes() / 1e9:.2f} GB, "
        f"{peak_bytes() / size:.2f} times the checkpoint ({before / 1e9:.2f} GB of it before loading)"
    )
    tokenizer = engine.tokenizer
    prompt = [
        *range(tokenizer.first_id + 100, tokenizer.first_id + 162),
        tokenizer.gmask_id,
        tokenizer.bos_id,
    ]
    for batch in options.batches:
        first, steps = [], []
        for _ in range(options.repeat):
            for index in range(batch):
                # min_new_tokens: random weights would soon say that they are done.
                sampling = Sampling(
                    max_new_tokens=options.tokens, min_new_tokens=options.tokens, seed=1, temperature=0.0
                )
                engine.add(Generate(index, prompt, sampling))
            times = []
            while engine.has_work:
                begin = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begin)
            first.append(times[0])
            steps += times[1:]
        steps.sort()
        median = steps[len(steps) // 2]
        print(
            f"batch {batch}: first token after {min(first):.2f} s ({len(prompt) * batch} tokens of prompt); decode "
            f"{batch / steps[0]:.1f} tokens/s at best, {batch / median:.1f} in the median of {len(steps)} steps; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--head", choices=("fp16", "int8"), default="fp16")
    parser.add_argument("--layers", type=int, default=SIZES["num_layers"])
    parser.add_argument("--activations", choices=("auto", "int8", "full"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="the checkpoint's folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary) / "checkpoint"
        if not folder.is_dir():
            write_checkpoint(
                folder, options.bits, has_int8_head=options.head == "int8", num_layers=options.layers
            )
        print(
            f"int{options.bits}, {options.head} head, {options.layers} layers, {options.threads} threads",
            flush=True,
        )
        environ = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as a worker starts its engine
        subprocess.run(
            [sys.executable, "-m", "ops.bench.cpu_model", *sys.argv[1:], "--measure", str(folder)],
            check=True,
            env=environ,
        )


if __name__ == "__main__":
    main()
