"""The forms of one checkpoint, each loaded in turn and measured on a sample beside the unquantized one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.models import linear_onnxruntime
from workers.models.adapter_bank import AdapterBank
from workers.models.chatglm import ChatGLM
from workers.models.config import CheckpointError, Dtype, ModelConfig
from workers.models.cuda_chatglm import CudaChatGLM, on_gpu
from workers.models.loader import DTYPES, Pack, load_model
from workers.models.lora import read_adapter
from workers.models.network import Network
from workers.models.quantization import Bits
from workers.models.tokenizer import Tokenizer
from workers.quality.measures import Quality, predictions
from workers.quality.sample import Passage, SampleError, sequences_of


@dataclass(frozen=True, slots=True)
class Form:
    """A form of the weights, and what they are multiplied by."""

    name: str
    bits: Bits | None = None
    pack: Pack | None = None
    """None: activations keep the dtype of the computation."""
    is_e4m3: bool = False
    """Weights and activations in e4m3, on the kernels that have it."""


def forms_on(device: torch.device, dtype: Dtype) -> list[Form]:
    """What a worker on this device can run. The first is whole, and the others are compared with it."""
    forms = [Form(dtype), Form("int8", 8), Form("int4", 4)]
    if device.type == "cpu" and linear_onnxruntime.is_available():
        forms += [
            Form("int8, int8 activations", 8, linear_onnxruntime.pack),
            Form("int4, int8 activations", 4, linear_onnxruntime.pack),
        ]
    if device.type == "cuda" and dtype == "float16" and torch.cuda.get_device_capability(device) >= (8, 9):
        forms.append(Form("fp8", is_e4m3=True))
    return forms


@dataclass(frozen=True, slots=True)
class Measured:
    """One form, with an adapter or without."""

    form: str
    adapter: str | None
    weight_bytes: int
    """Of all parameters, as they are in memory."""
    quality: Quality


def evaluate(
    folder: Path,
    passages: Sequence[Passage],
    *,
    device: torch.device,
    dtype: Dtype,
    adapter: Path | None = None,
    max_len: int = 512,
    max_targets: int = 4096,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Measured]:
    """Each form without the adapter, then each with it, beside the weights. The unquantized one is what the others are held
    against; its predictions are kept in memory: max_targets times the vocabulary, in float32.

    Raises CheckpointError, AdapterError, SampleError.
    """
    config = ModelConfig.from_folder(folder)
    if config.quantization_bit:
        raise CheckpointError(
            folder, "its weights are quantized already", "Evaluate the checkpoint that it was made of"
        )
    tokenizer = Tokenizer.from_folder(folder, config)
    max_len = min(max_len, config.max_sequence_length)
    sequences = sequences_of(passages, tokenizer, max_len=max_len, max_targets=max_targets)
    if not sequences:
        raise SampleError(f"no passage of the sample fits into {max_len} tokens. Raise --max-len")
    expected: dict[bool, list[torch.Tensor]] = {}
    measured: dict[bool, list[Measured]] = {}
    weight_bytes: dict[Bits | None, int] = {}
    whole, *others = forms_on(device, dtype)
    for form in (whole, *others):
        progress(f"loading it in {form.name}")
        model: Network | CudaChatGLM = load_model(
            folder,
            dtype=DTYPES[dtype],
            device=device,
            config=config,
            quantize_bits=form.bits,
            pack=form.pack,
        )
        if form.is_e4m3:
            if not isinstance(model, ChatGLM):
                continue  # no other network has such weights
            model = _in_e4m3(model)
        # Packed weights are out of torch's sight, and as many.
        num_bytes = _weight_bytes(model) if form.pack is None else weight_bytes[form.bits]
        weight_bytes.setdefault(form.bits, num_bytes)
        for with_adapter in (False, True) if adapter is not None else (False,):
            slot = _load_adapter(model, adapter) if with_adapter and adapter is not None else 0
            progress(f"measuring {form.name}{' with the adapter' if with_adapter else ''}")
            quality = Quality()
            kept: list[torch.Tensor] = []
            for index, (log_probs, targets) in enumerate(predictions(model, tokenizer, sequences, slot)):
                if form is whole:
                    kept.append(log_probs.cpu())
                    quality.add(log_probs, log_probs, targets)
                else:
                    quality.add(log_probs, expected[with_adapter][index].to(device), targets)
            if form is whole:
                expected[with_adapter] = kept
            name = adapter.name if with_adapter and adapter is not None else None
            measured.setdefault(with_adapter, []).append(Measured(form.name, name, num_bytes, quality))
        del model
        gc.collect()
    for group in measured.values():
        yield from group


def _in_e4m3(model: ChatGLM) -> CudaChatGLM:
    """Takes the parameters of a half-precision model on a GPU. Raises ValueError when the kernels cannot run here."""
    taken = on_gpu(model, "fp8")
    if taken is None:
        raise ValueError("fp8 is on the CUDA kernels alone, and they cannot run here")
    return taken


def _load_adapter(model: Network | CudaChatGLM, folder: Path) -> int:
    """Puts the adapter beside the weights. Returns its slot."""
    if isinstance(model, CudaChatGLM):
        with torch.device("meta"):
            shapes = ChatGLM(model.config)
        bank = model.bank = AdapterBank(shapes, 1, dtype=model.dtype, device=model.device)
    else:
        bank = AdapterBank(model, 1, dtype=model.dtype, device=model.device)
    bank.load(1, read_adapter(folder, bank.shapes))
    return 1


def _weight_bytes(model: Network | CudaChatGLM) -> int:
    """A tensor that two layers share counts once."""
    if isinstance(model, CudaChatGLM):
        return model.weights.num_bytes
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
