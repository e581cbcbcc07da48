"""The next token of every sequence at once, in tensor operations on any device.

The order is that of the model card's `chat()`: repetition penalty, bias, end token masked; temperature, top-k, top-p,
then one draw. The random number of a draw depends on nothing but the sequence's seed and the token's index, so that a
continuation repeats what an uninterrupted run would have said.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

from workers.engine.sequence import Sequence

MAX_TOP_K: Final = 256
"""Up to this, the candidates come from a partial sort; above it, or without top-k, from a full one."""

# The released code replaces the scores when one is invalid: all 0, but 5e4 for token 5.
INVALID_TOKEN: Final = 5
INVALID_SCORE: Final = 5e4

_MAX_SORTED_ELEMENTS: Final = 1 << 24


@dataclass(slots=True)
class SamplingBatch:
    """The parameters of the sequences of a step, on the device. Made anew only when other sequences run."""

    is_greedy: bool
    """All of them, and nothing else changes their scores."""
    temperatures: torch.Tensor
    """[B] float32, 0 for greedy"""
    top_ks: torch.Tensor
    """[B] int64, the vocabulary's size for none"""
    top_ps: torch.Tensor
    """[B] float64"""
    seeds: torch.Tensor
    """[B] int64"""
    few: torch.Tensor
    """Indexes of the sequences whose candidates a partial sort finds"""
    many: torch.Tensor
    """Indexes of the others"""
    max_top_k: int
    """Of the few"""
    penalties: Penalties | None
    biases: Biases | None
    min_new_tokens: torch.Tensor | None
    """[B] int64; None: no sequence has a minimum"""


class Penalties(NamedTuple):
    """Repetition penalties of the sequences that have one."""

    indexes: torch.Tensor
    """[P] int64: where they are in the batch"""
    rows: torch.Tensor
    """[P] int64: where they are in the table of seen tokens"""
    factors: torch.Tensor
    """[P, 1] float32"""


class Biases(NamedTuple):
    """The logit biases of all sequences, one after another."""

    indexes: torch.Tensor
    token_indexes: torch.Tensor
    values: torch.Tensor


class Sampler:
    """Samples for the rows of one engine. Token ids from `first_id` up to `end_id` can be chosen, others never."""

    def __init__(
        self, *, first_id: int, end_id: int, eos_id: int, max_num_seqs: int, device: torch.device
    ) -> None:
        self._first_id = first_id
        self._end_id = end_id
        self._eos = eos_id - first_id
        self._max_num_seqs = max_num_seqs
        self._device = device
        self._seen: torch.Tensor | None = None
        """[rows, vocabulary]: tokens of prompt and answer, for the repetition penalty; made when it is first used"""
        self._invalid_scores = torch.zeros(end_id - first_id, device=device)
        self._invalid_scores[INVALID_TOKEN] = INVALID_SCORE

    def add(self, sequence: Sequence) -> None:
        """This sequence has got its row."""
        if sequence.sampling.repetition_penalty == 1.0:
            return
        if self._seen is None:
            self._seen = torch.zeros(
                (self._max_num_seqs, self._end_id - self._first_id), dtype=torch.bool, device=self._device
            )
        ids = np.unique(np.asarray(sequence.token_ids)) - self._first_id
        ids = ids[(ids >= 0) & (ids < self._seen.shape[1])]
        self._seen[sequence.row] = False
        self._seen[sequence.row, self._tensor(ids, np.int64)] = True

    def batch(self, sequences: Seq[Sequence]) -> SamplingBatch:
        """The parameters of these sequences, in this order."""
        sampling = [sequence.sampling for sequence in sequences]
        num_ids = self._end_id - self._first_id
        top_ks = [s.top_k if 0 < s.top_k < num_ids else num_ids for s in sampling]
        # A greedy sequence needs one candidate only.
        is_few = [s.temperature == 0 or k <= MAX_TOP_K for s, k in zip(sampling, top_ks, strict=True)]
        few = [index for index, one in enumerate(is_few) if one]
        many = [index for index, one in enumerate(is_few) if not one]
        penalties = self._penalties(sequences)
        biases = self._biases(sequences)
        has_minimum = any(s.min_new_tokens for s in sampling)
        return SamplingBatch(
            is_greedy=all(s.temperature == 0 for s in sampling) and not (penalties or biases or has_minimum),
            temperatures=self._tensor([s.temperature for s in sampling], np.float32),
            top_ks=self._tensor(top_ks, np.int64),
            top_ps=self._tensor([s.top_p for s in sampling], np.float64),
            seeds=self._tensor([s.seed for s in sampling], np.int64),
            few=self._tensor(few, np.int64),
            many=self._tensor(many, np.int64),
            max_top_k=max((top_ks[index] for index in few if sampling[index].temperature), default=1),
            penalties=penalties,
            biases=biases,
            min_new_tokens=self._tensor([s.min_new_tokens for s in sampling], np.int64)
            if has_minimum
            else None,
        )

    def _penalties(self, sequences: Seq[Sequence]) -> Penalties | None:
        indexes = [
            index for index, sequence in enumerate(sequences) if sequence.sampling.repetition_penalty != 1.0
        ]
        if not indexes:
            return None
        return Penalties(
            self._tensor(indexes, np.int64),
            self._tensor([sequences[index].row for index in indexes], np.int64),
            self._tensor([[sequences[index].sampling.repetition_penalty] for index in indexes], np.float32),
        )

    def _biases(self, sequences: Seq[Sequence]) -> Biases | None:
        biases = [
            (index, id_ - self._first_id, bias)
            for index, sequence in enumerate(sequences)
            for id_, bias in sequence.sampling.logit_bias.items()
            if self._first_id <= id_ < self._end_id
        ]
        if not biases:
            return None
        indexes, token_indexes, values = zip(*biases, strict=True)
        return Biases(
            self._tensor(indexes, np.int64),
            self._tensor(token_indexes, np.int64),
            self._tensor(values, np.float32),
        )

    def sample(self, logits: torch.Tensor, batch: SamplingBatch, token_indexes: torch.Tensor) -> torch.Tensor:
        """The next token id of each sequence: [B] int64.

        logits: [B, vocabulary] in any float dtype. token_indexes: [B] int64, how many answer tokens came before.
        """
        scores = logits[:, self._first_id : self._end_id]
        lowest, highest = torch.aminmax(scores, dim=-1)
        is_valid = torch.isfinite(lowest) & torch.isfinite(highest)
        if batch.is_greedy:
            chosen = torch.where(is_valid, scores.argmax(dim=-1), INVALID_TOKEN)
            return chosen + self._first_id
        # The released code does this for the whole batch when one row is invalid; here each row is on its own.
        scores = torch.where(is_valid.unsqueeze(1), scores.float(), self._invalid_scores)
        self._adjust(scores, batch, token_indexes)
        chosen = self._choose(scores, batch, token_indexes)
        if batch.penalties is not None and self._seen is not None:
            self._seen[batch.penalties.rows, chosen[batch.penalties.indexes]] = True
        return chosen + self._first_id

    def _choose(
        self, scores: torch.Tensor, batch: SamplingBatch, token_indexes: torch.Tensor
    ) -> torch.Tensor:
        candidates = Candidates(
            scores, batch.temperatures, batch.top_ks, batch.top_ps, uniform(batch.seeds, token_indexes)
        )
        if len(batch.many) == 0:
            return candidates.draw(batch.max_top_k)
        num_ids = scores.shape[1]
        chosen = torch.empty_like(batch.seeds)
        if len(batch.few) > 0:
            chosen[batch.few] = candidates.part(batch.few).draw(batch.max_top_k)
        # The full sort of a large batch would need gigabytes at once.
        for indexes in torch.split(batch.many, max(1, _MAX_SORTED_ELEMENTS // num_ids)):
            chosen[indexes] = candidates.part(indexes).draw(num_ids)
        return chosen

    def _adjust(self, scores: torch.Tensor, batch: SamplingBatch, token_indexes: torch.Tensor) -> None:
        """Repetition penalty, bias and minimum length, in place."""
        if batch.penalties is not None and self._seen is not None:
            indexes, rows, factors = batch.penalties
            part = scores[indexes]
            penalized = torch.where(part > 0, part / factors, part * factors)
            scores[indexes] = torch.where(self._seen[rows], penalized, part)
        if batch.biases is not None:
            indexes, token_indexes_, values = batch.biases
            scores.index_put_((indexes, token_indexes_), values, accumulate=True)
        if batch.min_new_tokens is not None:
            may_not_end = token_indexes < batch.min_new_tokens
            scores[:, self._eos] = torch.where(may_not_end, -torch.inf, scores[:, self._eos])

    def _tensor(self, values: object, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype=dtype)).to(self._device, non_blocking=True)


class Candidates(NamedTuple):
    """Scores and what filters them; one draw from what is left."""

    scores: torch.Tensor
    """[B, vocabulary] float32"""
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    draws: torch.Tensor
    """[B] float64 in [0, 1)"""

    def part(self, indexes: torch.Tensor) -> Candidates:
        """Those of some sequences."""
        return Candidates(*(tensor[indexes] for tensor in self))

    def draw(self, num_candidates: int) -> torch.Tensor:
        """[B] indexes into the vocabulary: the inverse of the filtered distribution's CDF at `draws`.

        `num_candidates` is at least every top-k.
        """
        indexes, probabilities = self.filtered(num_candidates)
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        targets = self.draws * cumulative[:, -1]
        places = (cumulative <= targets.unsqueeze(1)).sum(dim=-1).clamp(max=indexes.shape[1] - 1)
        places = torch.where(self.temperatures == 0, 0, places)
        return indexes.gather(1, places.unsqueeze(1)).squeeze(1)

    def filtered(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(indexes, probabilities) of the candidates, [B, C]: 0 for what is cut; the sum of a row may be below 1.

        They are ordered by falling score, then by index, whatever path finds them: a draw then gives the same token
        beside any other sequences.
        """
        temperatures = torch.where(self.temperatures == 0, 1.0, self.temperatures)
        values, indexes = _sorted_candidates(self.scores / temperatures.unsqueeze(1), num_candidates)
        # Top-k keeps every score that equals the k-th, as transformers does.
        last = values.gather(1, (self.top_ks.clamp(max=values.shape[1]) - 1).unsqueeze(1))
        probabilities = values.masked_fill(values < last, -torch.inf).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
        # With top_p 1 nothing is cut, although the sum of what came before may be rounded up to 1.
        is_kept = (before < self.top_ps.unsqueeze(1)) | (self.top_ps >= 1).unsqueeze(1)
        is_kept[:, 0] = True
        return indexes, torch.where(is_kept, probabilities, 0)


def _sorted_candidates(scores: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, indexes) of the best candidates, by falling score, then by index. At least `num_candidates`."""
    num_ids = scores.shape[1]
    # Some more than asked for: scores that equal the k-th belong to the candidates.
    size = min(2 * num_candidates + 14, num_ids)
    if size * 4 > num_ids:
        return scores.sort(dim=-1, descending=True, stable=True)
    indexes = scores.topk(size, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = scores.gather(1, indexes).sort(dim=-1, descending=True, stable=True)
    return values, indexes.gather(1, order)


def uniform(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each pair: [B] int64, [B] int64 -> [B] float64. The same on every device.

    The finalizer of splitmix64 (Steele, Lea, Flood 2014) over the seed and, a second time, over the counter.
    """
    mixed = _mix(_mix(seeds) + counters * _GOLDEN_GAMMA)
    return _shift(mixed, 12).double() * 2.0**-52


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN_GAMMA: Final = _signed(0x9E3779B97F4A7C15)


def _mix(x: torch.Tensor) -> torch.Tensor:
    # int64 products wrap around, which is what a hash of 64 bits wants.
    x = x + _GOLDEN_GAMMA
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
