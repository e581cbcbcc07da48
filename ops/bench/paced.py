"""An engine that computes nothing and takes as long as it is told: what it leaves to be measured is the road to and from it.

    python -m ops.bench.paced <options of `python -m workers`>      a worker with such an engine

GLMQ_BENCH_PACE has four numbers: milliseconds of a decode step, microseconds more for each sequence in it, microseconds for each
token of a prefill, tokens of a prefill at most. The default is an H100 with e4m3 weights and an 8-bit cache. Ids are drawn from the whole vocabulary.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from dataclasses import dataclass

from workers import worker
from workers.engine import process
from workers.engine.config import EngineConfig
from workers.engine.messages import (
    FromEngine,
    Generate,
    LoadAdapter,
    Ready,
    Refused,
    Step,
    UnloadAdapter,
)
from workers.models.tokenizer import Tokenizer

MODULE = "ops.bench.paced"
DEFAULT_PACE = "3.5 26.5 10.6 4096"
NUM_DRAWN = 1 << 16


class NoAdapters:
    """An engine that knows none."""

    is_loading = False

    def load(self, command: LoadAdapter) -> None:
        raise NotImplementedError

    def unload(self, command: UnloadAdapter) -> None:
        raise NotImplementedError


@dataclass(slots=True)
class Answer:
    """A sequence, and how many tokens it still gets."""

    sequence_id: int
    prompt_len: int
    left: int


class PacedEngine:
    """The schedule of the real engine: a prefill of what waits, then a decode of all, and so on."""

    def __init__(self, config: EngineConfig) -> None:
        pace = os.environ.get("GLMQ_BENCH_PACE", DEFAULT_PACE).split()
        self._step_seconds, self._sequence_seconds = float(pace[0]) / 1e3, float(pace[1]) / 1e6
        self._token_seconds, self._max_prefill_tokens = float(pace[2]) / 1e6, int(pace[3])
        self._max_num_seqs = config.max_num_seqs
        self._context_len = config.context_len or 2048
        self.adapters = NoAdapters()
        self._waiting: deque[Answer] = deque()
        self._running: dict[int, Answer] = {}
        tokenizer = Tokenizer.from_folder(config.checkpoint)
        rng = random.Random(1)
        # Drawn before: drawing costs the host what it does not cost a GPU.
        ids = [rng.randrange(tokenizer.first_id + 100, tokenizer.end_id) for _ in range(NUM_DRAWN)]
        special = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.gmask_id, tokenizer.mask_id}
        self._ids = [id_ if id_ not in special else tokenizer.first_id + 100 for id_ in ids]
        self._num_made = 0
        self._has_prefilled = False
        self._due = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def settle(self) -> list[FromEngine]:
        return []

    def add(self, message: Generate) -> Refused | None:
        self._waiting.append(
            Answer(message.sequence_id, len(message.prompt_ids), message.sampling.max_new_tokens)
        )
        return None

    def abort(self, sequence_id: int) -> None:
        self._running.pop(sequence_id, None)
        self._waiting = deque(one for one in self._waiting if one.sequence_id != sequence_id)

    def step(self) -> Step:
        admitted: list[Answer] = []
        if not (self._has_prefilled and self._running):
            admitted = self._admit()
        self._has_prefilled = bool(admitted)
        chosen = admitted or list(self._running.values())
        seconds = (
            sum(one.prompt_len for one in admitted) * self._token_seconds
            if admitted
            else self._step_seconds + len(chosen) * self._sequence_seconds
        )
        # The time that the host took is the GPU's, as in the engine that runs ahead.
        self._due = max(self._due, time.perf_counter() - seconds) + seconds
        time.sleep(max(self._due - time.perf_counter(), 0))
        first = self._num_made % NUM_DRAWN
        token_ids = (self._ids[first:] + self._ids)[: len(chosen)]
        self._num_made += len(chosen)
        reasons = []
        for answer in chosen:
            answer.left -= 1
            reasons.append("" if answer.left else "length")
            if not answer.left:
                del self._running[answer.sequence_id]
        return Step(
            [answer.sequence_id for answer in chosen],
            token_ids,
            reasons,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
        )

    def _admit(self) -> list[Answer]:
        admitted: list[Answer] = []
        num_tokens = 0
        while self._waiting and len(self._running) < self._max_num_seqs:
            num_tokens += self._waiting[0].prompt_len
            if admitted and num_tokens > self._max_prefill_tokens:
                break
            answer = self._waiting.popleft()
            self._running[answer.sequence_id] = answer
            admitted.append(answer)
        return admitted

    def ready(self, load_seconds: float) -> Ready:
        return Ready(
            context_len=self._context_len,
            num_blocks=1 << 16,
            block_size=32,
            device="paced",
            dtype="none",
            load_seconds=load_seconds,
        )


if __name__ == "__main__":
    if len(sys.argv) == 3 and all(argument.isdigit() for argument in sys.argv[1:]):
        sys.exit(process.main(sys.argv[1:], PacedEngine))
    worker.ENGINES["native"] = MODULE
    sys.exit(worker.main())
