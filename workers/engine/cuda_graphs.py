"""A decode step as CUDA graphs, one for each size of batch: network and sampling in one launch, nothing read on the host.

All that changes from step to step is one block of bytes, filled on the host and copied in front of the graph; the tokens
themselves stay on the GPU. Knows nothing about sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from workers.models.batch import KVCache
from workers.models.cuda_chatglm import CudaChatGLM, DecodeInputs
from workers.models.kernels import cuda_ops

NUM_STAGED: Final = 3
"""Host copies of a step's inputs: one is being filled while earlier ones may still be on their way."""

_TORCH_DTYPES: Final[dict[type, torch.dtype]] = {
    np.int64: torch.int64,
    np.float64: torch.float64,
    np.int32: torch.int32,
    np.float32: torch.float32,
}


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that graphs are made for: fine steps while a step's time is the weights', coarse ones later."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, *range(192, 1025, 64), *range(1152, 4097, 128)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


DRAFT_SIZES: Final = (8, 16, 32)
"""Rows of the graphs that check drafts."""


def _fields(batch_size: int, max_blocks: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Name, type and shape of a step's inputs, the widest first, so that all are aligned."""
    return {
        "positions": (np.int64, (2, batch_size)),
        "slots": (np.int64, (batch_size,)),
        "seeds": (np.int64, (batch_size,)),
        "token_indexes": (np.int64, (batch_size,)),
        "adapter_slots": (np.int64, (batch_size,)),
        "token_ids": (np.int64, (batch_size,)),
        "top_ps": (np.float64, (batch_size,)),
        "kv_lens": (np.int32, (batch_size,)),
        "token_rows": (np.int32, (batch_size,)),
        "top_ks": (np.int32, (batch_size,)),
        "min_new_tokens": (np.int32, (batch_size,)),
        "temperatures": (np.float32, (batch_size,)),
        "block_tables": (np.int32, (batch_size, max_blocks)),
    }


class StepInputs:
    """A step's inputs in one block of bytes: on the GPU as tensors, on the host as arrays of the same names."""

    def __init__(self, batch_size: int, max_blocks: int, device: torch.device) -> None:
        fields = _fields(batch_size, max_blocks)
        offsets, size = {}, 0
        for name, (dtype, shape) in fields.items():
            offsets[name] = size
            size += int(np.prod(shape)) * np.dtype(dtype).itemsize
            size = -(-size // 8) * 8
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_STAGED)]
        self._next = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self._arrays: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in range(NUM_STAGED)]
        for name, (dtype, shape) in fields.items():
            end = offsets[name] + int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.tensors[name] = self._device[offsets[name] : end].view(_TORCH_DTYPES[dtype]).view(shape)
            for host, arrays in zip(self._hosts, self._arrays, strict=True):
                arrays[name] = host.numpy()[offsets[name] : end].view(dtype).reshape(shape)

    def fill(self, name: str, value: int) -> None:
        """What rows hold that no sequence has filled."""
        for arrays in self._arrays:
            arrays[name][...] = value

    def host(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays to fill for the next `send`."""
        return self._arrays[self._next]

    def send(self) -> None:
        """Copies them to the GPU, in the current stream. At most NUM_STAGED - 1 sends may be unfinished."""
        self._device.copy_(self._hosts[self._next], non_blocking=True)
        self._next = (self._next + 1) % NUM_STAGED


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which ids can be chosen."""

    first_id: int
    end_id: int
    eos_id: int
    invalid_token: int


class DecodeGraph:
    """The step of `batch_size` sequences. Rows that have none write to block 0 and to the last row of `last_tokens`.

    With drafts, a sequence has several rows at consecutive positions; their tokens come from the host, and go nowhere else.

    Making one runs the step once, which loads its kernels and makes what they share; `capture` comes after that.
    """

    logits: torch.Tensor
    """[B, vocab] of the last step, valid until another graph runs"""

    def __init__(
        self,
        model: CudaChatGLM,
        cache: KVCache,
        vocabulary: Vocabulary,
        last_tokens: torch.Tensor,
        *,
        batch_size: int,
        max_blocks: int,
        has_adapters: bool = False,
        has_drafts: bool = False,
        pool: Any = None,
    ) -> None:
        self.batch_size = batch_size
        self.inputs = StepInputs(batch_size, max_blocks, model.device)
        self.inputs.fill("kv_lens", 1)
        self.inputs.fill("top_ks", 1)
        self.inputs.fill("token_rows", len(last_tokens) - 1)
        self.inputs.send()
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._model, self._cache, self._vocabulary = model, cache, vocabulary
        self._last_tokens = last_tokens
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()
        tensors = self.inputs.tensors
        self._decode_inputs = DecodeInputs(
            tensors["token_ids"] if has_drafts else last_tokens,
            None if has_drafts else tensors["token_rows"],
            tensors["positions"],
            tensors["slots"],
            tensors["kv_lens"],
            tensors["block_tables"],
            tensors["adapter_slots"] if has_adapters else None,
            shares_sequences=has_drafts,
        )
        self._sampling_inputs = cuda_ops.SamplingInputs(
            tensors["temperatures"],
            tensors["top_ks"],
            tensors["top_ps"],
            tensors["seeds"],
            tensors["token_indexes"],
            tensors["min_new_tokens"],
            tensors["token_rows"],
        )
        self.logits = self._run()

    def _run(self) -> torch.Tensor:
        logits = self._model.decode(self._decode_inputs, self._cache)
        cuda_ops.run_sample(
            logits,
            self._sampling_inputs,
            self.tokens,
            self._last_tokens,
            first_id=self._vocabulary.first_id,
            end_id=self._vocabulary.end_id,
            eos_id=self._vocabulary.eos_id,
            invalid_token=self._vocabulary.invalid_token,
            is_dependent=True,
        )
        return logits

    def capture(self) -> None:
        torch.cuda.synchronize(self._model.device)
        with torch.cuda.graph(self._graph, pool=self._pool):
            self.logits = self._run()

    def pool(self) -> Any:
        """Memory that another graph may share, when the two never run at the same time."""
        return self._graph.pool()

    def replay(self) -> None:
        """Runs the step on the inputs last sent."""
        self._graph.replay()
