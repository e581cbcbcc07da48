"""Measures one full-size linear layer on this CPU in every form, at several batch sizes; milliseconds, the best of many.

    python -m ops.bench.cpu_linear
    python -m ops.bench.cpu_linear --threads 2 --batches 1 4 16 --inputs 4096 --outputs 16384

`ours` is what a worker runs by default (ONNX Runtime, 8-bit activations) and with `--activations full` (exact); beside it the
unquantized layer, and the operators of torch and their own price. Weights are random: they do not change the speed. The best of
many runs is printed because others may use the machine; the load average is printed for the same reason.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from workers.models import linear_onnxruntime
from workers.models.linear import QuantizedLinear
from workers.models.quantization import Bits

Product = Callable[[torch.Tensor], torch.Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quantized(inputs: int, outputs: int, bits: Bits) -> QuantizedLinear:
    layer = QuantizedLinear(inputs, outputs, bits)
    layer.weight.random_(-127, 128)
    layer.weight_scale.fill_(1e-3)
    return layer


def products(inputs: int, outputs: int) -> dict[str, tuple[torch.dtype, Product]]:
    """What to measure: the dtype of the activations, and the product."""
    forms: dict[str, tuple[torch.dtype, Product]] = {}
    for name, dtype in DTYPES.items():
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        forms[name] = dtype, lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
    for bits, name in ((8, "int8"), (4, "int4")):
        forms[f"{name} ours"] = torch.float32, linear_onnxruntime.pack(quantized(inputs, outputs, bits))
        forms[f"{name} full"] = torch.float32, quantized(inputs, outputs, bits)
    int8 = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scales = torch.rand(outputs).bfloat16()
    forms["int8 torch"] = torch.bfloat16, lambda x: torch.ops.aten._weight_int8pack_mm(x, int8, scales)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1
    )
    groups = torch.ones(inputs // 256, outputs, 2, dtype=torch.bfloat16)
    forms["int4 torch"] = (
        torch.bfloat16,
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, int4, 256, groups),
    )
    return forms


def best_ms(product: Product, x: torch.Tensor, seconds: float) -> float:
    product(x)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        product(x)
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=16384)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    forms = products(options.inputs, options.outputs)
    print(
        f"{options.outputs} x {options.inputs}, {options.threads} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}"
    )
    print("| batch | " + " | ".join(forms) + " |\n|" + "---|" * (len(forms) + 1))
    for batch in options.batches:
        cells = []
        for dtype, product in forms.values():
            x = torch.randn(batch, options.inputs).to(dtype)
            cells.append(f"{best_ms(product, x, options.seconds):.2f}")
        print(f"| {batch} | " + " | ".join(cells) + " |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
