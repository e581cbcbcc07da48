"""The engine: sequences in, one token of each a step out. Knows nothing about processes, queues or text."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from workers.engine.adapters import Adapters
from workers.engine.admission import Admission, CannotRun
from workers.engine.block_manager import BlockManager
from workers.engine.config import GIB, EngineConfig
from workers.engine.cuda_runner import CudaRunner
from workers.engine.loading import load_network
from workers.engine.messages import FromEngine, Generate, Ready, Refused, Step
from workers.engine.model_runner import Launched, ModelRunner, Runner
from workers.engine.sampler import Sampler
from workers.engine.scheduler import Schedule, Scheduler
from workers.engine.sequence import Sequence
from workers.engine.speculation import Speculation, accepted
from workers.models.adapter_bank import AdapterBank
from workers.models.batch import KVCache
from workers.models.config import ModelConfig
from workers.models.cuda_chatglm import CudaChatGLM, WeightSetting, on_gpu
from workers.models.network import Network
from workers.models.tokenizer import Tokenizer


class Engine:
    """Continuous batching over one model on one device. Single-threaded."""

    def __init__(
        self,
        model: Network | CudaChatGLM,
        tokenizer: Tokenizer,
        config: EngineConfig,
        adapters: Adapters | None = None,
    ) -> None:
        """adapters: those of this model; None: it takes none."""
        self.adapters = adapters or Adapters(None)
        self.tokenizer = tokenizer
        self._device = model.device
        self._dtype = model.dtype
        context_len = config.context_len or model.config.max_sequence_length
        is_int8_cache = config.cache_dtype == "int8"
        if is_int8_cache and not isinstance(model, CudaChatGLM):
            raise ValueError("cache_dtype is int8: only the CUDA kernels have it. Use auto on this device")
        num_blocks = config.num_blocks or _num_blocks(model, config, context_len)
        block_manager = BlockManager(num_blocks, config.block_size)
        # Any sequence must be able to run alone to its end.
        self.context_len = min(context_len, block_manager.num_usable_blocks * config.block_size)
        model.set_max_positions(self.context_len)
        self._admission = Admission(tokenizer, model.config.vocab_size, self.context_len)
        self.scheduler = Scheduler(
            block_manager,
            max_num_seqs=config.max_num_seqs,
            max_prefill_tokens=config.max_prefill_tokens,
        )
        sampler = Sampler(
            first_id=tokenizer.first_id,
            end_id=tokenizer.end_id,
            eos_id=tokenizer.eos_id,
            max_num_seqs=config.max_num_seqs,
            device=model.device,
        )
        cache = new_cache(model, num_blocks, config.block_size, is_int8=is_int8_cache)
        self._runner: Runner
        if isinstance(model, CudaChatGLM):
            self._runner = CudaRunner(
                model,
                cache,
                sampler,
                first_id=tokenizer.first_id,
                end_id=tokenizer.end_id,
                eos_id=tokenizer.eos_id,
                max_num_seqs=config.max_num_seqs,
                context_len=self.context_len,
            )
            self._runner.capture()
        else:
            self._runner = ModelRunner(
                model,
                cache,
                sampler,
                max_num_seqs=config.max_num_seqs,
                context_len=self.context_len,
            )
        self._sequences: dict[int, Sequence] = {}
        self._launched: _Step | None = None
        """A step whose tokens were not read yet."""
        self.speculation = Speculation(self._runner.max_draft_rows if config.speculation == "auto" else 0)
        self._arrivals = itertools.count()
        self.on_prefill: Callable[[list[int]], None] = lambda _sequence_ids: None
        """Called with the sequences of a prefill before it is launched."""

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads the checkpoint. Raises CheckpointError, or ValueError for a device that is not there."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        model_config = ModelConfig.from_folder(config.checkpoint)
        tokenizer = Tokenizer.from_folder(config.checkpoint, model_config)
        merged = next(iter(config.adapters.items()), None) if config.merge_adapter else None
        model = load_network(config, model_config, adapter=merged[1] if merged else None)
        weights: WeightSetting | None = "fp8" if config.quantize == "fp8" else None
        head = weights if config.quantize_head else None
        fast = on_gpu(model, weights, head) if model.device.type == "cuda" else None
        # Before the cache, which takes the memory that is left.
        adapters = _adapters(model, config, merged[0] if merged else None)
        if fast is not None:
            fast.bank = adapters.bank
        return cls(fast or model, tokenizer, config, adapters)

    def step(self) -> Step:
        """The next token of some sequences. Call it only while there is work.

        On a GPU the following step is launched before this one's tokens are read, so that the GPU never waits for the host.
        A sequence that turns out to have ended takes part in that step in vain. While a sequence copies, its next step
        waits for the tokens of this one, because the draft goes on from them.
        """
        began = time.perf_counter()
        launched = self._launched or self._launch()
        has_drafts = launched is not None and launched.schedule.drafts is not None
        waits = has_drafts or self.speculation.is_likely(self.scheduler.running)
        self._launched = self._launch() if self._runner.runs_ahead and not waits else None
        ended = self._advance(launched) if launched is not None else []
        if launched is not None and not launched.schedule.is_prefill:
            seconds, num_sequences = time.perf_counter() - began, len(launched.schedule.sequences)
            self.speculation.time(seconds, num_sequences, len(ended), has_drafts=has_drafts)
        return Step(
            sequence_ids=[sequence_id for sequence_id, _, _ in ended],
            token_ids=[token_id for _, token_id, _ in ended],
            finish_reasons=[finish_reason for _, _, finish_reason in ended],
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + self.adapters.num_waiting,
            num_free_blocks=self.scheduler.block_manager.num_free_blocks,
            num_preemptions=self.scheduler.num_preemptions,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._launched is not None

    def add(self, message: Generate) -> Refused | None:
        """Takes this sequence in, or says why it cannot be run here."""
        if message.sequence_id in self._sequences:
            return Refused(
                message.sequence_id, "invalid_request", "the engine has a sequence with this id already"
            )
        try:
            self.adapters.check(message.adapter)
            layout = self._admission.layout(message)
        except CannotRun as error:
            return Refused(message.sequence_id, error.code, str(error))
        sequence = Sequence(
            sequence_id=message.sequence_id,
            arrival=next(self._arrivals),
            token_ids=[*message.prompt_ids, *message.emitted_ids],
            prompt_len=len(message.prompt_ids),
            layout=layout,
            sampling=message.sampling,
            max_len=min(len(message.prompt_ids) + message.sampling.max_new_tokens, self.context_len),
        )
        self._sequences[sequence.sequence_id] = sequence
        if self.adapters.take(sequence, message.adapter):
            self.scheduler.add(sequence)
        return None

    def settle(self) -> list[FromEngine]:
        """What happens between two steps: adapters come, and sequences that waited for them. Returns what the worker is to
        be told. To be called before each step, and while `adapters.is_loading`."""
        admitted, news = self.adapters.settle()
        for sequence in admitted:
            self.scheduler.add(sequence)
        for message in news:
            if isinstance(message, Refused):
                del self._sequences[message.sequence_id]
        return news

    def abort(self, sequence_id: int) -> None:
        """Forgets this sequence, whether it waits or runs; its blocks are free at once. An unknown id is ignored."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None and self.adapters.release(sequence):
            self.scheduler.remove(sequence)

    def ready(self, load_seconds: float) -> Ready:
        """What the worker is told about this engine."""
        return Ready(
            context_len=self.context_len,
            num_blocks=self.scheduler.block_manager.num_blocks,
            block_size=self.scheduler.block_manager.block_size,
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            load_seconds=load_seconds,
            adapters=self.adapters.names,
            loaded_adapters=self.adapters.loaded,
        )

    def _launch(self) -> _Step | None:
        schedule = self.scheduler.schedule()
        if schedule is None:
            return None
        if schedule.is_prefill:
            self.on_prefill([sequence.sequence_id for sequence in schedule.sequences])
        else:
            schedule = self._with_drafts(schedule)
        launched = self._runner.launch(schedule)
        for sequence in schedule.sequences:
            sequence.num_pending += 1
        return _Step(schedule, launched)

    def _with_drafts(self, schedule: Schedule) -> Schedule:
        """The same decode, with drafts for the sequences that copy."""
        sequences = schedule.sequences
        if not self.speculation.is_likely(sequences) or any(one.num_pending for one in sequences):
            return schedule
        drafts = self.speculation.drafts(sequences)
        blocks = self.scheduler.block_manager
        for index, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            # A draft pushes nobody out: each of the others can still have a block.
            if draft and not blocks.allocate_ahead(sequence, len(draft), num_reserved=len(sequences)):
                drafts[index] = []
        return replace(schedule, drafts=drafts) if any(drafts) else schedule

    def _advance(self, step: _Step) -> list[tuple[int, int, str]]:
        """Gives each sequence its tokens, and lets those go that have ended. Returns (id, token, finish reason) of those that
        had not ended, or been aborted, before."""
        advanced = []
        is_watching = self.speculation.is_useful(self.scheduler.running)
        for sequence, draft, drawn in step.results():
            sequence.num_pending -= 1
            if self._sequences.get(sequence.sequence_id) is not sequence:
                continue
            num_before, finish_reason = len(sequence.token_ids), ""
            for token_id in accepted(draft, drawn):
                sequence.token_ids.append(token_id)
                finish_reason = sequence.finish_reason(self.tokenizer.eos_id)
                advanced.append((sequence.sequence_id, token_id, finish_reason))
                if finish_reason:
                    break
            if draft:
                self.speculation.judge(sequence, len(draft), len(sequence.token_ids) - num_before - 1)
            if finish_reason:
                del self._sequences[sequence.sequence_id]
                self.scheduler.remove(sequence)
                self.adapters.release(sequence)
            elif is_watching:
                self.speculation.follow(sequence)
        return advanced


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way."""

    schedule: Schedule
    launched: Launched

    def results(self) -> Iterator[tuple[Sequence, list[int], list[int]]]:
        """(sequence, its draft, the tokens drawn after its last token and after each of the draft's). Waits for the step."""
        drawn = self.launched.token_ids()
        drafts = self.schedule.drafts or [[]] * len(self.schedule.sequences)
        start = 0
        for sequence, draft in zip(self.schedule.sequences, drafts, strict=True):
            end = start + len(draft) + 1
            yield sequence, draft, drawn[start:end]
            start = end


def new_cache(
    model: Network | CudaChatGLM, num_blocks: int, block_size: int, *, is_int8: bool = False
) -> KVCache:
    """An empty cache for this model, on its device and in its dtype, or in int8 with scales."""
    config = model.config
    shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim)
    dtype = torch.int8 if is_int8 else model.dtype
    keys, values = (_zeros(shape, dtype, model.device) for _ in range(2))
    if not is_int8:
        return KVCache(keys, values)
    scales = (torch.zeros(shape[:-1], dtype=torch.float16, device=model.device) for _ in range(2))
    return KVCache(keys, values, *scales)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks for zeroed memory and touches none of it; torch writes zeros into gigabytes, which takes seconds, and most of
    # them are never used.
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
    )


def _adapters(model: Network, config: EngineConfig, merged: str | None) -> Adapters:
    """The adapters of this model, those of the start loaded. Raises AdapterError."""
    if merged is not None:
        why = f"{merged} is merged into the weights, and no other adapter fits those"
        return Adapters(None, fixed=[merged], why_fixed=why)
    if config.max_adapters == 0:
        return Adapters(None)
    bank = AdapterBank(model, config.max_adapters, dtype=model.dtype, device=model.device)
    adapters = Adapters(bank, max_rank=config.max_adapter_rank)
    for name, folder in config.known_adapters.items():
        adapters.know(name, Path(folder))
    for name, folder in config.adapters.items():
        adapters.load_now(name, Path(folder))
    return adapters


def _num_blocks(model: Network | CudaChatGLM, config: EngineConfig, context_len: int) -> int:
    """Blocks that the memory allows, but no more than all sequences can use; at least one whole sequence's."""
    shape = model.config
    # In int8 each vector has a scale of two bytes.
    vector_bytes = (
        shape.head_dim * model.dtype.itemsize if config.cache_dtype == "auto" else shape.head_dim + 2
    )
    block_bytes = 2 * shape.num_layers * shape.num_kv_heads * config.block_size * vector_bytes
    blocks_per_seq = -(-context_len // config.block_size)
    if config.cache_gib is not None:
        return max(int(config.cache_gib * GIB) // block_bytes, 2)
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
        # A prefill's activations and a step's scores, both generously.
        width = 8 * shape.hidden_size + 2 * shape.inner_hidden_size
        reserved = config.max_prefill_tokens * width * model.dtype.itemsize
        reserved += config.max_num_seqs * shape.vocab_size * 16 + GIB
        num_affordable = max(int(free_bytes * 0.95) - reserved, 0) // block_bytes
    else:
        num_affordable = 2 * GIB // block_bytes
    return min(max(num_affordable, blocks_per_seq), config.max_num_seqs * blocks_per_seq) + 1
