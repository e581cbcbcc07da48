"""Which sequences run in the next step: admission, preemption, and the order of waiting. Knows blocks, no tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from workers.engine.block_manager import BlockManager
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work: either whole sequences that enter the cache, or one token of each running sequence."""

    sequences: list[Sequence]
    is_prefill: bool
    drafts: list[list[int]] | None = None
    """Of a decode: for each sequence the tokens that are to be checked beside its last one. Its blocks have room for them."""


class Scheduler:
    """Waiting and running sequences.

    A prefill takes the oldest waiting sequences that fit. While others run, a prefill is always followed by a decode, so
    that a stream of new prompts never holds up the answers in progress. When a running sequence needs a block and none
    is free, the youngest one is preempted: it loses its blocks and is prefilled again later, answer included.
    """

    def __init__(self, block_manager: BlockManager, *, max_num_seqs: int, max_prefill_tokens: int) -> None:
        self.block_manager = block_manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Oldest first."""
        self.num_preemptions = 0
        self._max_prefill_tokens = max_prefill_tokens
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._has_just_prefilled = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets this sequence, finished or aborted; its blocks are free at once."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def schedule(self) -> Schedule | None:
        """The next step's work. None: nothing can be done before the steps on their way have ended, or there is no work."""
        if not (self._has_just_prefilled and self.running):
            admitted = self._admit()
            if admitted:
                self._has_just_prefilled = True
                return Schedule(admitted, is_prefill=True)
        self._has_just_prefilled = False
        self._make_room()
        growing = [sequence for sequence in self.running if sequence.can_grow]
        return Schedule(growing, is_prefill=False) if growing else None

    def _admit(self) -> list[Sequence]:
        """Waiting sequences that fit into one prefill, each with its blocks and a row."""
        admitted: list[Sequence] = []
        num_tokens = 0
        while self.waiting and self._free_rows:
            sequence = self.waiting[0]
            num_tokens += len(sequence)
            # A prompt sees itself in both directions, so it cannot be cut: a longer one goes alone.
            if admitted and num_tokens > self._max_prefill_tokens:
                break
            num_left = self.block_manager.num_free_blocks - self.block_manager.num_missing_blocks(sequence)
            if num_left < self._num_reserved_blocks() or not self.block_manager.allocate(sequence):
                break
            self.waiting.popleft()
            sequence.row = self._free_rows.pop()
            admitted.append(sequence)
            self.running.append(sequence)
        if admitted:
            self.running.sort(key=lambda sequence: sequence.arrival)
        return admitted

    def _num_reserved_blocks(self) -> int:
        """Blocks that a new sequence must leave free, so that it is not preempted right after its prefill: growth for
        some steps. None when nothing runs, since then it is all there is."""
        return -(-len(self.running) // 4)

    def _make_room(self) -> None:
        """Blocks for the newest token of every running sequence, at the expense of the youngest ones."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if not sequence.can_grow or self.block_manager.allocate(sequence):
                index += 1
            else:
                self._preempt(self.running.pop())

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.free(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = -1
