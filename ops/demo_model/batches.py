"""Examples as padded batches of ids, made by several processes and in the same order whatever their number.

It knows nothing about the network.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import sentencepiece

from ops.demo_model.tasks import mixture
from ops.demo_model.tasks.example import Example

Ints = npt.NDArray[np.int64]
PAD_ID = 3
EXAMPLES_PER_SHARD = 3000
WARM_SHARDS = 48
"""In so many shards the weights of the tasks go from those of the start to the lasting ones."""
LENGTH_STEP = 16
"""Rows are padded to a multiple of this: attention kernels want aligned lengths."""


class Encoder:
    """Text to ids as the worker's tokenizer makes them for text without white space tricks."""

    def __init__(self, model_file: Path) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.token_ids = {
            "bos_token_id": self._pieces.piece_to_id("<sop>"),
            "eos_token_id": self._pieces.piece_to_id("<eop>"),
            "mask_token_id": self._pieces.piece_to_id("[MASK]"),
            "gmask_token_id": self._pieces.piece_to_id("[gMASK]"),
            "pad_token_id": self._pieces.piece_to_id("<pad>"),
        }

    def text(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text.replace("\n", "<n>"))
        return ids

    def example(self, example: Example) -> tuple[list[int], int]:
        """(ids of prompt and answer with their special tokens, the place of `<sop>`)."""
        prompt = [*self.text(example.prompt), self.token_ids["gmask_token_id"]]
        answer = [*self.text(example.answer), self.token_ids["eos_token_id"]]
        return [*prompt, self.token_ids["bos_token_id"], *answer], len(prompt)


class Batch(NamedTuple):
    ids: Ints
    """[B, S], padded on the right."""
    context_lens: Ints
    """[B]"""
    wanted: Ints
    """[N]: places in the flattened ids whose next token belongs to an answer."""
    targets: Ints
    """[N]: those next tokens."""
    rows: Ints
    """[N]: the row of each place."""


def collate(encoded: list[tuple[list[int], int]]) -> Batch:
    """One batch of these (ids, place of `<sop>`)."""
    length = -(-max(len(ids) for ids, _ in encoded) // LENGTH_STEP) * LENGTH_STEP
    padded = np.full((len(encoded), length), PAD_ID, dtype=np.int64)
    wanted, targets, rows = [], [], []
    for row, (ids, context_len) in enumerate(encoded):
        padded[row, : len(ids)] = ids
        places = np.arange(context_len, len(ids) - 1)
        wanted.append(row * length + places)
        targets.append(padded[row, places + 1])
        rows.append(np.full(len(places), row))
    context_lens = np.array([context_len for _, context_len in encoded])
    return Batch(padded, context_lens, *(np.concatenate(part) for part in (wanted, targets, rows)))


def cut(encoded: list[tuple[list[int], int]], tokens: int) -> Iterator[list[tuple[list[int], int]]]:
    """Groups of similar lengths whose padded size stays within `tokens`."""
    group: list[tuple[list[int], int]] = []
    for one in sorted(encoded, key=lambda one: len(one[0])):
        if group and (len(group) + 1) * (len(one[0]) + LENGTH_STEP) > tokens:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class Shards:
    """The endless training text, in shards that each come from their own seed."""

    model_file: Path
    seed: int
    tokens: int
    """Of a batch, padding included."""
    max_len: int

    def make(self, index: int) -> list[Batch]:
        """The batches of one shard, in random order."""
        rng = random.Random(f"{self.seed}:{index}")
        encoder = Encoder(self.model_file)
        warmth = max(0.0, 1 - index / WARM_SHARDS)
        encoded = [encoder.example(mixture.draw(rng, warmth)) for _ in range(EXAMPLES_PER_SHARD)]
        fitting = [one for one in encoded if len(one[0]) <= self.max_len]
        batches = [collate(group) for group in cut(fitting, self.tokens)]
        rng.shuffle(batches)
        return batches

    def stream(self, num_processes: int) -> Iterator[Batch]:
        """All batches in the order of their shards; with 0 processes made here."""
        if num_processes == 0:
            for index in range(1 << 62):
                yield from self.make(index)
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            waiting: deque[Future[list[Batch]]] = deque(
                pool.submit(self.make, index) for index in range(2 * num_processes)
            )
            index = len(waiting)
            try:
                while True:
                    yield from waiting.popleft().result()
                    waiting.append(pool.submit(self.make, index))
                    index += 1
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def fixed(encoder: Encoder, examples: Iterable[Example], tokens: int) -> Iterator[Batch]:
    """Batches of these examples, for an evaluation."""
    for group in cut([encoder.example(example) for example in examples], tokens):
        yield collate(group)
