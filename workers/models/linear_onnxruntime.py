"""Quantized linear layers on a CPU: ONNX Runtime's `MatMulNBits`, which multiplies int4 or int8 weights by 8-bit activations.

Activations are rounded to 8 bits, each block of up to 256 inputs of a token with its own scale, and the sums are exact: what
chatglm.cpp does, too. torch's packed operators compute in bfloat16 or float32 instead, and lose (ops/bench/LOG.md). Knows
nothing about checkpoints or networks.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import Final

import torch
from torch import nn

from workers.models.linear import QuantizedLinear
from workers.models.quantization import Bits

BLOCK_SIZES: Final = (256, 128, 64, 32, 16)
"""Inputs that share a scale; the operator has no other sizes. Large blocks cost less memory, and hardly any precision."""

_ELEMENTS_OF_A_SESSION: Final = 1 << 26
"""While a session is made, its weights are in memory two or three times. A whole head would be too much."""

_INT8_ACTIVATIONS: Final = 4
"""`accuracy_level`: 8-bit activations with 32-bit sums."""


def is_available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def pack(linear: QuantizedLinear) -> nn.Module:
    """This layer as ONNX Runtime runs it. The layer itself is empty afterwards; a layer that cannot be packed comes back."""
    block_size = next((size for size in BLOCK_SIZES if linear.in_features % size == 0), None)
    if block_size is None:
        return linear
    packed = OnnxLinear(linear, block_size)
    linear.weight = linear.weight.new_empty(0)
    _return_freed_memory()
    return packed


class OnnxLinear(nn.Module):
    """A linear layer whose weights live in ONNX Runtime sessions, in the order that its kernel for this CPU wants."""

    def __init__(self, linear: QuantizedLinear, block_size: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, linear.bits
        rows = max(1, _ELEMENTS_OF_A_SESSION // linear.in_features)
        self._sessions = [
            _session(linear, slice(start, start + rows), block_size)
            for start in range(0, linear.out_features, rows)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of x. Not differentiable."""
        tokens = x.detach().reshape(-1, self.in_features).float().numpy()
        parts = [torch.from_numpy(session.run(["y"], {"x": tokens})[0]) for session in self._sessions]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def _with_offset(stored: torch.Tensor, bits: Bits) -> torch.Tensor:
    """A checkpoint's integers as the operator wants them: unsigned, the first of two 4-bit values in the low bits.

    `stored` stays as it is: an embedding may share it, or it lies in the mapped file.
    """
    unsigned = stored.view(torch.uint8)
    if bits == 8:
        return unsigned ^ 0x80
    return (unsigned >> 4).bitwise_or_(unsigned << 4).bitwise_xor_(0x88)


def _return_freed_memory() -> None:
    """glibc keeps freed memory that lies between the sessions' own: by the last layer as much as a third of the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _share_threads() -> None:
    """One pool for all sessions of the process, as large as torch's."""
    import onnxruntime  # noqa: PLC0415

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def _session(linear: QuantizedLinear, rows: slice, block_size: int):
    """These outputs of a layer."""
    import onnxruntime  # noqa: PLC0415

    _share_threads()
    num_blocks = linear.in_features // block_size
    scales = linear.weight_scale[rows].float().unsqueeze(1).expand(-1, num_blocks).contiguous()
    values = _with_offset(linear.weight[rows], linear.bits).view(len(scales), num_blocks, -1)
    initializers = {"weight": values.numpy(), "scales": scales.numpy()}
    if linear.bias is not None:
        initializers["bias"] = linear.bias.detach()[rows].float().numpy()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.enable_cpu_mem_arena = False  # each session's would keep its largest output
    options.log_severity_level = 3
    # Handed over as they are: the session keeps its own packed copy, and drops these.
    given = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in initializers.values()]
    options.add_external_initializers(list(initializers), given)
    model = _model(linear, block_size, {name: value.shape for name, value in initializers.items()})
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# --- the model file: protobuf's wire format, as far as it is needed (onnx.proto) -------------------------------------

_FLOAT, _UINT8 = 1, 2
_EXTERNAL = 1
_IR_VERSION, _OPSET = 9, 17


def _model(linear: QuantizedLinear, block_size: int, shapes: dict[str, tuple[int, ...]]) -> bytes:
    """An ONNX model of one node: y [t, out] = x [t, in] by the weights + bias, with initializers that come from outside."""
    attributes = {
        "K": linear.in_features,
        "N": shapes["scales"][0],
        "bits": linear.bits,
        "block_size": block_size,
        "accuracy_level": _INT8_ACTIVATIONS,
    }
    inputs = ["x", "weight", "scales", *(["", "", "bias"] if "bias" in shapes else [])]
    node = b"".join(
        [
            *(_bytes(1, name) for name in inputs),
            _bytes(2, "y"),
            _bytes(4, "MatMulNBits"),
            *(
                _bytes(5, _bytes(1, name) + _int(3, value) + _int(20, 2))
                for name, value in attributes.items()
            ),
            _bytes(7, "com.microsoft"),
        ]
    )
    graph = b"".join(
        [
            _bytes(1, node),
            _bytes(2, "linear"),
            *(
                _bytes(5, _initializer(name, _UINT8 if name == "weight" else _FLOAT, shape))
                for name, shape in shapes.items()
            ),
            _bytes(11, _tensor_type("x", linear.in_features)),
            _bytes(12, _tensor_type("y", shapes["scales"][0])),
        ]
    )
    opsets = _bytes(8, _int(2, _OPSET)) + _bytes(8, _bytes(1, "com.microsoft") + _int(2, 1))
    return _int(1, _IR_VERSION) + _bytes(7, graph) + opsets


def _initializer(name: str, data_type: int, shape: tuple[int, ...]) -> bytes:
    location = _bytes(1, "location") + _bytes(2, "memory")
    dims = b"".join(_int(1, size) for size in shape)
    return dims + _int(2, data_type) + _bytes(8, name) + _bytes(13, location) + _int(14, _EXTERNAL)


def _tensor_type(name: str, width: int) -> bytes:
    shape = _bytes(1, _bytes(2, "t")) + _bytes(1, _int(1, width))
    return _bytes(1, name) + _bytes(2, _bytes(1, _int(1, _FLOAT) + _bytes(2, shape)))


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes | str) -> bytes:
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))
