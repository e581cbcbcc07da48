"""Schedules to work on an NVIDIA GPU, without waiting for it: the host prepares a step while the one before it runs.

A decode is one CUDA graph (`cuda_graphs`). The token that a sequence got stays on the GPU for its next step, so a step can be
launched before the host has seen the tokens of the last one. Owns the KV cache's memory.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from workers.engine.cuda_graphs import DRAFT_SIZES, DecodeGraph, Vocabulary, batch_sizes
from workers.engine.sampler import INVALID_TOKEN, Sampler, SamplingBatch
from workers.engine.scheduler import Schedule
from workers.engine.sequence import Sequence
from workers.models.batch import Batch, KVCache
from workers.models.cuda_chatglm import CudaChatGLM
from workers.models.kernels import cuda_ops
from workers.models.kernels.cuda_driver import build_all, collect_launches

NUM_IN_FLIGHT: Final = 2
"""Steps whose tokens the host has not read yet, at most."""


@dataclass(slots=True)
class OnItsWay:
    """A step that the GPU has got."""

    sequences: list[Sequence]
    """With drafts, `token_ids` has several for each (see `Launched`)."""
    _tokens: torch.Tensor
    """On the host; written by the GPU."""
    _done: torch.cuda.Event

    def token_ids(self) -> list[int]:
        """Waits for the step."""
        self._done.synchronize()
        token_ids: list[int] = self._tokens.tolist()
        return token_ids


class CudaRunner:
    """Runs schedules on one GPU. At most NUM_IN_FLIGHT steps may be unread."""

    runs_ahead: bool = True
    max_draft_rows: int = DRAFT_SIZES[-1]

    def __init__(
        self,
        model: CudaChatGLM,
        cache: KVCache,
        sampler: Sampler,
        *,
        first_id: int,
        end_id: int,
        eos_id: int,
        max_num_seqs: int,
        context_len: int,
    ) -> None:
        """sampler: for what the graph cannot do (`_is_simple`)."""
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._vocabulary = Vocabulary(first_id, end_id, eos_id, INVALID_TOKEN)
        self._max_blocks = -(-context_len // cache.block_size)
        self._sizes = batch_sizes(max_num_seqs)
        # The last row takes the tokens of a graph's unused rows.
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=model.device)
        self._table = _SequenceTable(max_num_seqs, self._max_blocks, cache.block_size)
        num_tokens = max(max_num_seqs, self.max_draft_rows)
        self._host_tokens = [
            torch.zeros(num_tokens, dtype=torch.int64, pin_memory=True) for _ in range(NUM_IN_FLIGHT + 1)
        ]
        self._num_launched = 0
        self._graphs: dict[_Shape, DecodeGraph] = {}
        self._untold: dict[int, Sequence] = {}
        """By row, those whose last token came from a step with drafts: a decode would not find it."""
        self._adapter_generation = -1
        self._special: tuple[list[int], SamplingBatch] | None = None

    @torch.inference_mode()
    def capture(self) -> None:
        """Makes the graphs of all batch sizes, the largest first, so that the smaller ones find its memory."""
        shapes = [_Shape(size) for size in self._sizes]
        shapes += [_Shape(size, has_drafts=True) for size in DRAFT_SIZES]
        with collect_launches() as kernels:
            for shape in shapes:
                self._new_graph(shape)
        build_all(kernels, self._model.device)
        for shape in sorted(shapes, key=lambda shape: -shape.size):
            self._graph(shape)

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> OnItsWay:
        """Starts this step behind whatever is under way."""
        sequences = schedule.sequences
        num_tokens = len(sequences)
        if schedule.is_prefill:
            tokens = self._prefill(sequences)
        elif schedule.drafts is not None:
            tokens = self._check(sequences, schedule.drafts)
            num_tokens += sum(map(len, schedule.drafts))
        else:
            tokens = self._decode(sequences)
        host_tokens = self._host_tokens[self._num_launched % len(self._host_tokens)][:num_tokens]
        self._num_launched += 1
        host_tokens.copy_(tokens[:num_tokens], non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return OnItsWay(list(sequences), host_tokens, done)

    # --- prefill -----------------------------------------------------------------------------------------------------

    def _prefill(self, sequences: list[Sequence]) -> torch.Tensor:
        for sequence in sequences:
            self._table.add(sequence)
            self._sampler.add(sequence)
            self._untold.pop(sequence.row, None)
        lens = [len(sequence.token_ids) for sequence in sequences]
        positions = [
            sequence.layout.positions(0, length) for sequence, length in zip(sequences, lens, strict=True)
        ]
        adapter_slots = [sequence.adapter_slot for sequence in sequences]
        batch = Batch(
            is_prefill=True,
            token_ids=self._tensor(list(chain.from_iterable(one.token_ids for one in sequences))),
            positions=self._tensor(
                [list(chain.from_iterable(both[row] for both in positions)) for row in (0, 1)]
            ),
            slots=self._tensor(np.concatenate([self._table.slots(one) for one in sequences])),
            kv_lens=self._tensor(lens, np.int32),
            block_tables=torch.zeros((len(sequences), 1), dtype=torch.int32, device=self._model.device),
            query_starts=self._tensor(np.cumsum([0, *lens]), np.int32),
            prefix_lens=self._tensor([one.layout.prefix_len for one in sequences], np.int32),
            max_query_len=max(lens),
            max_kv_len=max(lens),
            adapter_slots=self._tensor(np.repeat(adapter_slots, lens)) if any(adapter_slots) else None,
        )
        logits = self._model.prefill(batch, self._cache)
        sampling = [one.sampling for one in sequences]
        inputs = cuda_ops.SamplingInputs(
            temperatures=self._tensor([s.temperature for s in sampling], np.float32),
            top_ks=self._tensor([s.top_k for s in sampling], np.int32),
            top_ps=self._tensor([s.top_p for s in sampling], np.float64),
            seeds=self._tensor([s.seed for s in sampling], np.int64),
            token_indexes=self._tensor([one.num_generated for one in sequences]),
            min_new_tokens=self._tensor([s.min_new_tokens for s in sampling], np.int32),
            rows=self._tensor([one.row for one in sequences], np.int32),
        )
        tokens = torch.empty(len(sequences), dtype=torch.int64, device=self._model.device)
        cuda_ops.run_sample(
            logits,
            inputs,
            tokens,
            self._last_tokens,
            first_id=self._vocabulary.first_id,
            end_id=self._vocabulary.end_id,
            eos_id=self._vocabulary.eos_id,
            invalid_token=self._vocabulary.invalid_token,
        )
        self._sample_special(sequences, logits, tokens)
        return tokens

    # --- decode ------------------------------------------------------------------------------------------------------

    def _decode(self, sequences: list[Sequence]) -> torch.Tensor:
        if self._untold:
            self._tell(sequences)
        has_adapters = any(sequence.adapter_slot for sequence in sequences)
        size = next(size for size in self._sizes if size >= len(sequences))
        graph = self._graph(_Shape(size, has_adapters))
        self._table.fill(graph.inputs.host(), sequences, unused_row=len(self._last_tokens) - 1)
        graph.inputs.send()
        graph.replay()
        self._sample_special(sequences, graph.logits, graph.tokens)
        return graph.tokens

    def _check(self, sequences: list[Sequence], drafts: list[list[int]]) -> torch.Tensor:
        """Draws after each sequence's last token and after each of its draft. Nothing of these sequences is under way."""
        num_rows = len(sequences) + sum(map(len, drafts))
        has_adapters = any(sequence.adapter_slot for sequence in sequences)
        size = next(size for size in DRAFT_SIZES if size >= num_rows)
        graph = self._graph(_Shape(size, has_adapters, has_drafts=True))
        unused_row = len(self._last_tokens) - 1
        self._table.fill_drafts(graph.inputs.host(), sequences, drafts, unused_row)
        graph.inputs.send()
        graph.replay()
        rows = [one for one, draft in zip(sequences, drafts, strict=True) for _ in range(len(draft) + 1)]
        if not all(map(_is_simple, sequences)):
            offsets = [offset for draft in drafts for offset in range(len(draft) + 1)]
            self._sample_special(rows, graph.logits, graph.tokens, offsets)
        self._untold.update((sequence.row, sequence) for sequence in sequences)
        return graph.tokens

    def _tell(self, sequences: list[Sequence]) -> None:
        """Brings tokens that only the host knows to where a decode looks for them."""
        known = [sequence for sequence in sequences if self._untold.get(sequence.row) is sequence]
        self._untold.clear()
        if known:
            rows = self._tensor([sequence.row for sequence in known])
            self._last_tokens[rows] = self._tensor([sequence.token_ids[-1] for sequence in known])

    def _graph(self, shape: _Shape) -> DecodeGraph:
        """The graph for this shape; those with adapters are captured when they are first needed, and again when the adapters'
        memory has moved."""
        bank = self._model.bank
        if shape.has_adapters and bank is not None and bank.generation != self._adapter_generation:
            self._graphs = {key: graph for key, graph in self._graphs.items() if not key.has_adapters}
            self._adapter_generation = bank.generation
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._new_graph(shape)
            graph.capture()
        return graph

    def _new_graph(self, shape: _Shape) -> DecodeGraph:
        return DecodeGraph(
            self._model,
            self._cache,
            self._vocabulary,
            self._last_tokens,
            batch_size=shape.size,
            max_blocks=self._max_blocks,
            has_adapters=shape.has_adapters,
            has_drafts=shape.has_drafts,
            pool=next(iter(self._graphs.values())).pool() if self._graphs else None,
        )

    # --- what the graph's sampling does not do ------------------------------------------------------------------------

    def _sample_special(
        self,
        sequences: Seq[Sequence],
        logits: torch.Tensor,
        tokens: torch.Tensor,
        offsets: Seq[int] | None = None,
    ) -> None:
        """Draws again, with the engine's sampler, for the sequences that need more than the kernel has.

        offsets: with drafts, the place of each row in its sequence's draft.
        """
        special = [index for index, sequence in enumerate(sequences) if not _is_simple(sequence)]
        if not special:
            return
        chosen = [sequences[index] for index in special]
        identity = [number for one in chosen for number in (one.sequence_id, one.row)]
        if self._special is None or self._special[0] != identity:
            self._special = identity, self._sampler.batch(chosen)
        indexes = self._tensor(special)
        token_indexes = self._tensor(
            [
                sequences[index].num_generated + (offsets[index] if offsets is not None else 0)
                for index in special
            ]
        )
        drawn = self._sampler.sample(logits[indexes], self._special[1], token_indexes)
        tokens[indexes] = drawn
        if offsets is not None:
            return
        self._last_tokens[self._tensor([sequence.row for sequence in chosen])] = drawn

    def _tensor(self, values: object, dtype: type = np.int64) -> torch.Tensor:
        array: np.ndarray = np.ascontiguousarray(values, dtype=dtype)
        return torch.from_numpy(array).to(self._model.device, non_blocking=True)


class _Shape(NamedTuple):
    """What a graph is for."""

    size: int
    has_adapters: bool = False
    has_drafts: bool = False


def _is_simple(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return (
        (sampling.temperature == 0 or 0 < sampling.top_k <= cuda_ops.MAX_TOP_K)
        and sampling.repetition_penalty == 1.0
        and not sampling.logit_bias
    )


class _SequenceTable:
    """A row for each running sequence with all that a decode needs, kept up to date in place.

    While the same sequences run, a step costs a few additions over all rows instead of a loop over sequences.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._blocks = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._sequences: list[Sequence] = []
        """Those of the last decode."""
        self._rows = np.zeros(0, dtype=np.int64)
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}

    def add(self, sequence: Sequence) -> None:
        """This sequence has got its row, and all its blocks anew."""
        self._num_blocks[sequence.row] = 0
        self._sequences = []

    def slots(self, sequence: Sequence) -> np.ndarray[Any, Any]:
        """Where the keys and values of all its tokens go."""
        index = np.arange(len(sequence.token_ids))
        blocks = np.asarray(sequence.blocks, dtype=np.int64)
        slots: np.ndarray[Any, Any] = blocks[index // self._block_size] * self._block_size
        return slots + index % self._block_size

    def fill(self, host: dict[str, np.ndarray[Any, Any]], sequences: list[Sequence], unused_row: int) -> None:
        """Writes the next step of these sequences into a graph's inputs."""
        self._take_blocks(sequences)
        if self._sequences == sequences:
            for name in ("kv_lens", "token_indexes"):
                self._arrays[name] += 1
            self._arrays["positions"][1] += 1
        else:
            self._sequences = list(sequences)
            self._gather(sequences)
        self._write(host, unused_row)

    def fill_drafts(
        self,
        host: dict[str, np.ndarray[Any, Any]],
        sequences: list[Sequence],
        drafts: list[list[int]],
        unused_row: int,
    ) -> None:
        """The same, with a row for each token of a draft behind the row of its sequence."""
        self._take_blocks(sequences)
        # How far the sequences will have come, this step decides.
        self._sequences = []
        self._gather(
            [one for one, draft in zip(sequences, drafts, strict=True) for _ in range(len(draft) + 1)],
            [offset for draft in drafts for offset in range(len(draft) + 1)],
        )
        self._write(host, unused_row)
        token_ids = [
            id_ for one, draft in zip(sequences, drafts, strict=True) for id_ in (one.token_ids[-1], *draft)
        ]
        host["token_ids"][: len(token_ids)] = token_ids
        host["token_ids"][len(token_ids) :] = 0
        host["token_rows"][:] = unused_row

    def _take_blocks(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            known = self._num_blocks[sequence.row]
            if known < len(sequence.blocks):
                self._blocks[sequence.row, known : len(sequence.blocks)] = sequence.blocks[known:]
                self._num_blocks[sequence.row] = len(sequence.blocks)

    def _write(self, host: dict[str, np.ndarray[Any, Any]], unused_row: int) -> None:
        count = len(self._rows)
        last = self._arrays["kv_lens"] - 1
        blocks = self._blocks[self._rows, last // self._block_size].astype(np.int64)
        for name, values in self._arrays.items():
            host[name][..., :count] = values
        host["slots"][:count] = blocks * self._block_size + last % self._block_size
        num_columns = int(last.max()) // self._block_size + 1
        host["block_tables"][:count, :num_columns] = self._blocks[self._rows, :num_columns]
        host["kv_lens"][count:] = 1
        host["slots"][count:] = 0
        host["token_rows"][count:] = unused_row
        host["temperatures"][count:] = 0
        host["adapter_slots"][count:] = 0

    def _gather(self, sequences: list[Sequence], offsets: list[int] | None = None) -> None:
        """Everything anew: other sequences run than in the step before. offsets: how far each row is ahead of its sequence."""
        self._rows = np.array([sequence.row for sequence in sequences], dtype=np.int64)
        offsets = offsets or [0] * len(sequences)
        lens = [len(sequence) + offset for sequence, offset in zip(sequences, offsets, strict=True)]
        positions = [one.layout.position(length - 1) for one, length in zip(sequences, lens, strict=True)]
        sampling = [sequence.sampling for sequence in sequences]
        self._arrays = {
            "positions": np.array(positions, dtype=np.int64).T.copy(),
            "seeds": np.array([s.seed for s in sampling], dtype=np.int64),
            "token_indexes": np.array(lens, dtype=np.int64)
            - np.array([one.prompt_len for one in sequences], dtype=np.int64),
            "adapter_slots": np.array([one.adapter_slot for one in sequences], dtype=np.int64),
            "top_ps": np.array([s.top_p for s in sampling], dtype=np.float64),
            "kv_lens": np.array(lens, dtype=np.int32),
            "token_rows": self._rows.astype(np.int32),
            "top_ks": np.array([max(s.top_k, 1) for s in sampling], dtype=np.int32),
            "min_new_tokens": np.array([s.min_new_tokens for s in sampling], dtype=np.int32),
            "temperatures": np.array([s.temperature for s in sampling], dtype=np.float32),
        }
