"""Perplexity of a text, and how far a model's predictions are from those of another one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from workers.models.cuda_chatglm import CudaChatGLM
from workers.models.network import Network
from workers.models.prefill import pack_sequences
from workers.models.tokenizer import Tokenizer
from workers.quality import sample

MAX_TOKENS_PER_PASS = 1024
"""Of packed sequences: with a vocabulary of 130,528 their logits are half a gigabyte."""


@dataclass(slots=True)
class Quality:
    """Measured over all targets of a sample. The first model is compared with itself: agreement 1, divergence 0."""

    num_targets: int = 0
    _nll: float = 0.0
    _num_agreeing: int = 0
    _divergences: list[torch.Tensor] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the targets."""
        return math.exp(min(self._nll / self.num_targets, 700))

    @property
    def agreement(self) -> float:
        """Share of targets at which both models find the same token the likeliest."""
        return self._num_agreeing / self.num_targets

    @property
    def divergence(self) -> float:
        """Mean KL(other || this) in nats: what it costs to take this model's predictions for the other one's."""
        return float(torch.cat(self._divergences).mean())

    @property
    def worst_divergence(self) -> float:
        """The KL that one target in a hundred exceeds."""
        return float(torch.cat(self._divergences).quantile(0.99))

    def add(self, log_probs: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor) -> None:
        """log_probs, expected: [N, V] float32, of this model and of the other one; targets: [N]."""
        self.num_targets += len(targets)
        self._nll -= float(log_probs.gather(1, targets[:, None]).double().sum())
        self._num_agreeing += int((log_probs.argmax(-1) == expected.argmax(-1)).sum())
        # Where the other one gives no probability at all, nothing can be lost: 0 * -inf is not a number.
        terms = torch.where(expected > -torch.inf, expected.exp() * (expected - log_probs), 0)
        self._divergences.append(terms.double().sum(-1).clamp(min=0).cpu())


def predictions(
    model: Network | CudaChatGLM,
    tokenizer: Tokenizer,
    sequences: Sequence[sample.Sequence],
    adapter_slot: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """([N, V] log-probabilities, [N] targets) of a few sequences after another, float32, on the model's device."""
    for group in _groups(sequences):
        layouts = [tokenizer.layout(sequence.ids[: sequence.prompt_len]) for sequence in group]
        batch = pack_sequences([sequence.ids for sequence in group], layouts, model.device)
        if adapter_slot:
            batch.adapter_slots = torch.full_like(batch.token_ids, adapter_slot)
        starts = batch.query_starts.tolist()
        # The logits at a token are the prediction of the next one.
        places = [
            start + index - 1
            for start, sequence in zip(starts, group, strict=False)
            for index in range(sequence.prompt_len, len(sequence.ids))
        ]
        rows = torch.tensor(places, device=model.device)
        with torch.inference_mode():
            logits = model(batch, all_positions=True)[rows]
            # Rows of the embedding that no piece has are never sampled, and no form is to be judged by them.
            scores = logits[:, : tokenizer.end_id].float()
            scores[:, : tokenizer.first_id] = -torch.inf
            yield scores.log_softmax(-1), batch.token_ids[rows + 1]


def _groups(sequences: Iterable[sample.Sequence]) -> Iterator[list[sample.Sequence]]:
    group: list[sample.Sequence] = []
    num_tokens = 0
    for sequence in sequences:
        if group and num_tokens + len(sequence.ids) > MAX_TOKENS_PER_PASS:
            yield group
            group, num_tokens = [], 0
        group.append(sequence)
        num_tokens += len(sequence.ids)
    if group:
        yield group
