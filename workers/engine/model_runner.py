"""Schedules to tensors: builds the batch of a step, runs the network, samples. Owns the KV cache's memory.

Keeps tables with a row for each running sequence, so that a decode gathers them instead of building them anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from workers.engine.sampler import Sampler, SamplingBatch
from workers.engine.scheduler import Schedule
from workers.engine.sequence import Sequence
from workers.models.batch import Batch, KVCache
from workers.models.network import Network


class Launched(Protocol):
    """A step that was started."""

    @property
    def sequences(self) -> list[Sequence]: ...

    def token_ids(self) -> list[int]:
        """The next token of each of them; waits for the step to end. With drafts: the token after each sequence's last one,
        and after each of its draft, sequence by sequence."""


class Runner(Protocol):
    """What runs an engine's schedules."""

    runs_ahead: bool
    """Whether a step may be launched before the tokens of the last one were read."""
    max_draft_rows: int
    """Tokens that a step with drafts may have, all sequences together."""

    def launch(self, schedule: Schedule) -> Launched: ...


@dataclass(frozen=True, slots=True)
class _Ended:
    sequences: list[Sequence]
    _token_ids: list[int]

    def token_ids(self) -> list[int]:
        return self._token_ids


class ModelRunner:
    """Runs schedules on any device, one after another."""

    runs_ahead: bool = False
    max_draft_rows: int = 16
    """A CPU has no idle tensor cores: each row costs."""

    def __init__(
        self,
        model: Network,
        cache: KVCache,
        sampler: Sampler,
        *,
        max_num_seqs: int,
        context_len: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._device = model.device
        self._block_tables = np.zeros((max_num_seqs, -(-context_len // cache.block_size)), dtype=np.int32)
        self._num_table_blocks = [0] * max_num_seqs
        self._sampled: list[int] = []
        self._sampling: SamplingBatch | None = None

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> Launched:
        """Runs this step to its end."""
        sequences = schedule.sequences
        if schedule.is_prefill:
            for sequence in sequences:
                self._num_table_blocks[sequence.row] = 0
                self._sampler.add(sequence)
            batch = self._prefill_batch(sequences)
        else:
            batch = self._decode_batch(sequences, schedule.drafts)
        logits = self._model(batch, self._cache)
        drafts = schedule.drafts or [[] for _ in sequences]
        # A draft's tokens are further rows of its sequence, each with the draw of its own index.
        rows = [one for one, draft in zip(sequences, drafts, strict=True) for _ in range(len(draft) + 1)]
        offsets = [offset for draft in drafts for offset in range(len(draft) + 1)]
        token_indexes = self._tensor(
            [one.num_generated + offset for one, offset in zip(rows, offsets, strict=True)]
        )
        chosen = self._sampler.sample(logits, self._sampling_batch(rows), token_indexes)
        return _Ended(sequences, chosen.tolist())

    def _prefill_batch(self, sequences: list[Sequence]) -> Batch:
        lens = [len(sequence) for sequence in sequences]
        first_positions: list[int] = []
        block_positions: list[int] = []
        slots = []
        for sequence, num_tokens in zip(sequences, lens, strict=True):
            first, block = sequence.layout.positions(0, num_tokens)
            first_positions += first
            block_positions += block
            slots.append(self._slots(sequence, np.arange(num_tokens)))
        return Batch(
            is_prefill=True,
            token_ids=self._tensor(list(chain.from_iterable(sequence.token_ids for sequence in sequences))),
            positions=self._tensor([first_positions, block_positions]),
            slots=self._tensor(np.concatenate(slots)),
            kv_lens=self._tensor(lens, np.int32),
            block_tables=self._tensor(np.zeros((len(sequences), 1), dtype=np.int32), np.int32),
            query_starts=self._tensor(np.cumsum([0, *lens]), np.int32),
            prefix_lens=self._tensor([sequence.layout.prefix_len for sequence in sequences], np.int32),
            max_query_len=max(lens),
            max_kv_len=max(lens),
            adapter_slots=self._adapter_slots(sequences, lens),
        )

    def _decode_batch(self, sequences: list[Sequence], drafts: list[list[int]] | None = None) -> Batch:
        for sequence in sequences:
            num_known = self._num_table_blocks[sequence.row]
            if num_known < len(sequence.blocks):
                self._block_tables[sequence.row, num_known : len(sequence.blocks)] = sequence.blocks[
                    num_known:
                ]
                self._num_table_blocks[sequence.row] = len(sequence.blocks)
        token_ids = [sequence.token_ids[-1] for sequence in sequences]
        lens = [len(sequence) for sequence in sequences]
        if drafts is not None:
            pairs = list(zip(sequences, drafts, strict=True))
            sequences = [one for one, draft in pairs for _ in range(len(draft) + 1)]
            token_ids = [id_ for one, draft in pairs for id_ in (one.token_ids[-1], *draft)]
            lens = [len(one) + offset for one, draft in pairs for offset in range(len(draft) + 1)]
        positions = [one.layout.position(length - 1) for one, length in zip(sequences, lens, strict=True)]
        rows = [sequence.row for sequence in sequences]
        max_kv_len = max(lens)
        num_columns = -(-max_kv_len // self._cache.block_size)
        block_tables = self._block_tables[rows, :num_columns]
        last = np.asarray(lens) - 1
        blocks = block_tables[np.arange(len(rows)), last // self._cache.block_size]
        slots = blocks.astype(np.int64) * self._cache.block_size + last % self._cache.block_size
        return Batch(
            is_prefill=False,
            token_ids=self._tensor(token_ids),
            positions=self._tensor(np.array(positions).T),
            slots=self._tensor(slots),
            kv_lens=self._tensor(lens, np.int32),
            block_tables=self._tensor(block_tables, np.int32),
            query_starts=self._tensor(np.arange(len(rows) + 1), np.int32),
            prefix_lens=self._tensor(np.zeros(len(rows)), np.int32),
            max_kv_len=max_kv_len,
            adapter_slots=self._adapter_slots(sequences),
        )

    def _sampling_batch(self, sequences: list[Sequence]) -> SamplingBatch:
        """The sequences' sampling parameters, kept while the same sequences run."""
        sequence_ids = [sequence.sequence_id for sequence in sequences]
        rows = [sequence.row for sequence in sequences]
        if self._sampling is None or [*sequence_ids, *rows] != self._sampled:
            self._sampling = self._sampler.batch(sequences)
            self._sampled = [*sequence_ids, *rows]
        return self._sampling

    def _slots(self, sequence: Sequence, indexes: np.ndarray) -> np.ndarray:
        block_size = self._cache.block_size
        blocks = np.asarray(sequence.blocks, dtype=np.int64)
        slots: np.ndarray = blocks[indexes // block_size] * block_size + indexes % block_size
        return slots

    def _adapter_slots(self, sequences: list[Sequence], lens: list[int] | None = None) -> torch.Tensor | None:
        """Each token's slot, for sequences with so many tokens; None when no sequence has an adapter."""
        slots = [sequence.adapter_slot for sequence in sequences]
        if not any(slots):
            return None
        return self._tensor(slots if lens is None else np.repeat(slots, lens))

    def _tensor(self, values: object, dtype: type = np.int64) -> torch.Tensor:
        array: np.ndarray = np.ascontiguousarray(values, dtype=dtype)
        return torch.from_numpy(array).to(self._device, non_blocking=True)
