"""What an answer would have been if nothing had happened, and how close another one was to it.

The same engine in this process, alone and never interrupted; each prompt is answered once. It knows nothing about Redis or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from producer.contract import Request, SummaryRequest
from workers.documents import fits, piece_summary_len, pieces
from workers.engine.config import EngineConfig
from workers.engine.detokenizer import StreamDetokenizer
from workers.engine.engine import Engine
from workers.engine.loading import load_network
from workers.engine.messages import Generate
from workers.engine.sampler import Candidates, Sampler, uniform
from workers.engine.sequence import Sequence as EngineSequence
from workers.models.config import ModelConfig
from workers.models.prefill import pack_sequences
from workers.models.tokenizer import Tokenizer
from workers.prompts import Prompt, Prompts
from workers.splitting import sentences

FLOAT_NOISE: Final = 1e-4
"""Of a logit in float32, absolute: what the order of additions may change. Logits of the demo checkpoint go up to about 40, whose last bit
is 4e-6; the greatest difference seen between one batch and another is printed by `tests.chaos --only continuation`."""
_SCALES: Final = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NUM_DRAWS: Final = 512
MAX_FLIPS: Final = 20
"""Of one answer: one that differs so often is another answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: ids, what each adds to the text, and why it ended."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    reason: str

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Difference:
    """One token that is not the undisturbed answer's, after tokens that are."""

    index: int
    """Of the token, from 1."""
    expected: int | None
    """Token id; None: the answer had ended."""
    actual: int | None
    margin: float
    """The smallest change of the logits, uniform in ±margin, that was seen to choose either of the two. Infinite: none was."""
    top_two: float
    """Greedy: how far the best logit was above the second. Sampled: how far the draw was from the end of its token's interval."""

    @property
    def is_noise(self) -> bool:
        return self.margin <= FLOAT_NOISE

    def __str__(self) -> str:
        return f"token {self.index}: {self.actual} instead of {self.expected}, margin {self.margin:.0e} ({self.top_two:.2e})"


class Undisturbed:
    """Answers by prompt."""

    def __init__(self, checkpoint: Path, *, context_len: int | None = None, max_num_seqs: int = 16) -> None:
        config = EngineConfig(
            checkpoint=str(checkpoint),
            device="cpu",
            context_len=context_len,
            max_num_seqs=max_num_seqs,
            max_adapters=0,
        )
        model_config = ModelConfig.from_folder(config.checkpoint)
        self.tokenizer = Tokenizer.from_folder(config.checkpoint, model_config)
        self.model = load_network(config, model_config)
        self.engine = Engine(self.model, self.tokenizer, config)
        self.prompts = Prompts(self.tokenizer, self.engine.context_len)
        self._config = config
        self._answers: dict[tuple[object, ...], Answer] = {}
        self._next_id = 0

    # --- answers ----------------------------------------------------------------------------------------------------

    def answers(self, requests: Iterable[Request]) -> list[Answer]:
        """The answers to these requests, none of which needs a conversation or pieces."""
        return self.answer_prompts(
            [(self.prompts.build(request), request.sampling.stop) for request in requests]
        )

    def answer_prompts(self, asked: Sequence[tuple[Prompt, tuple[str, ...]]]) -> list[Answer]:
        """Of each prompt with its stop strings. Those that are not known yet are generated together."""
        wanted = {_key(prompt, stop): (prompt, stop) for prompt, stop in asked}
        missing = {key: each for key, each in wanted.items() if key not in self._answers}
        generated = self.generate([prompt for prompt, _ in missing.values()])
        for (key, (_, stop)), (ids, reason) in zip(missing.items(), generated, strict=True):
            self._answers[key] = self.answer_of(ids, reason, stop)
        return [self._answers[_key(prompt, stop)] for prompt, stop in asked]

    def generate(
        self, prompts: Sequence[Prompt], emitted: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[list[int], str]]:
        """(ids, finish reason) of each, `emitted` included."""
        heads = emitted or [[] for _ in prompts]
        first_id = self._next_id + 1
        self._next_id += len(prompts)
        ids = {first_id + place: list(head) for place, head in enumerate(heads)}
        reasons: dict[int, str] = {}
        for place, (prompt, head) in enumerate(zip(prompts, heads, strict=True)):
            refused = self.engine.add(Generate(first_id + place, prompt.ids, prompt.sampling, list(head)))
            assert refused is None, refused
        while self.engine.has_work:
            step = self.engine.step()
            for sequence_id, token_id, reason in zip(
                step.sequence_ids, step.token_ids, step.finish_reasons, strict=True
            ):
                ids[sequence_id].append(token_id)
                if reason:
                    reasons[sequence_id] = reason
        return [(ids[sequence_id], reasons[sequence_id]) for sequence_id in ids]

    def answer_of(self, ids: Sequence[int], reason: str, stop: tuple[str, ...] = ()) -> Answer:
        """As a worker would publish these ids: cut at a stop string."""
        detokenizer = StreamDetokenizer(self.tokenizer, stop=stop)
        texts: list[str] = []
        for token_id in ids:
            texts.append(detokenizer.add(token_id))
            if detokenizer.is_stopped:
                reason = "stop"
                break
        texts[-1] += detokenizer.finish()
        return Answer(tuple(ids[: len(texts)]), tuple(texts), "length" if reason == "length" else "stop")

    # --- documents --------------------------------------------------------------------------------------------------

    def pieces_of(self, request: SummaryRequest, units: list[str] | None = None) -> list[str]:
        """The texts of the next level of a document; `units`: the summaries of the level before. None: it fits."""
        whole = request if units is None else request.model_copy(update={"text": "".join(units)})
        if fits(self.prompts, whole):
            return []
        return pieces(self.prompts, sentences(request.text) if units is None else units)

    @property
    def piece_summary_len(self) -> int:
        return piece_summary_len(self.prompts)

    # --- differences ------------------------------------------------------------------------------------------------

    def differences(
        self, prompt: Prompt, stop: tuple[str, ...], actual: Sequence[int], expected: Answer
    ) -> list[Difference]:
        """Where this answer is not the undisturbed one. After each difference it is compared with what follows that token
        undisturbed, so that one flip is one difference, and not the whole rest."""
        differences: list[Difference] = []
        while (index := _first_difference(actual, expected.ids)) is not None and len(differences) < MAX_FLIPS:
            differences.append(self._difference(prompt, index, actual, expected.ids))
            if index >= len(actual):
                break
            head = list(actual[: index + 1])
            if head[-1] == self.tokenizer.eos_id or len(head) >= prompt.sampling.max_new_tokens:
                expected = self.answer_of(head, "stop", stop)
            else:
                [(ids, reason)] = self.generate([prompt], [head])
                expected = self.answer_of(ids, reason, stop)
        return differences

    def _difference(
        self, prompt: Prompt, index: int, actual: Sequence[int], expected: Sequence[int]
    ) -> Difference:
        was = actual[index] if index < len(actual) else None
        should = expected[index] if index < len(expected) else None
        head = list(expected[:index])
        logits = self.logits(prompt.ids, [head])[0]
        margin = float("inf")
        for scale in _SCALES if was is not None and should is not None else ():
            if {was, should} <= self._drawn(prompt, head, logits, scale):
                margin = scale
                break
        return Difference(index + 1, should, was, margin, self._distance(prompt, head, logits))

    def logits(self, prompt_ids: list[int], heads: Sequence[Sequence[int]]) -> torch.Tensor:
        """[number of heads, vocabulary] after this prompt and each of these beginnings of an answer, prefilled."""
        layout = self.tokenizer.layout(prompt_ids)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                pack_sequences([[*prompt_ids, *head] for head in heads], [layout] * len(heads))
            )
        return logits

    def _sampler(self, prompt: Prompt, head: list[int], number: int) -> tuple[Sampler, list[EngineSequence]]:
        tokenizer = self.tokenizer
        sampler = Sampler(
            first_id=tokenizer.first_id,
            end_id=tokenizer.end_id,
            eos_id=tokenizer.eos_id,
            max_num_seqs=number,
            device=torch.device("cpu"),
        )
        sequences = [
            EngineSequence(
                sequence_id=row,
                arrival=row,
                token_ids=[*prompt.ids, *head],
                prompt_len=len(prompt.ids),
                layout=tokenizer.layout(prompt.ids),
                sampling=prompt.sampling,
                max_len=self.engine.context_len,
                row=row,
            )
            for row in range(number)
        ]
        for sequence in sequences:
            sampler.add(sequence)
        return sampler, sequences

    def _drawn(self, prompt: Prompt, head: list[int], logits: torch.Tensor, scale: float) -> set[int]:
        """Token ids that come out when the logits are disturbed by so much."""
        sampler, sequences = self._sampler(prompt, head, _NUM_DRAWS)
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand(_NUM_DRAWS, len(logits), generator=generator) * 2 - 1
        # Not only every logit by itself: a boundary of the distribution moves most when all logits beyond it move together.
        noise[_NUM_DRAWS // 2 :] = noise[_NUM_DRAWS // 2 :].sign()
        indexes = torch.full((_NUM_DRAWS,), len(head), dtype=torch.int64)
        with torch.inference_mode():
            drawn = sampler.sample(logits + noise * scale, sampler.batch(sequences), indexes)
        return set(drawn.tolist())

    def _distance(self, prompt: Prompt, head: list[int], logits: torch.Tensor) -> float:
        sampler, [sequence] = self._sampler(prompt, head, 1)
        batch, index = sampler.batch([sequence]), torch.tensor([len(head)])
        scores = logits[self.tokenizer.first_id : self.tokenizer.end_id].float().unsqueeze(0)
        with torch.inference_mode():
            scores = scores.clone()
            sampler._adjust(scores, batch, index)
            if prompt.sampling.temperature == 0:
                best, second = scores[0].topk(2).values.tolist()
                return float(best - second)

            def token_at(draw: float) -> int:
                draws = torch.tensor([draw], dtype=torch.float64)
                drawn = Candidates(scores, batch.temperatures, batch.top_ks, batch.top_ps, draws)
                return int(drawn.draw(scores.shape[1])[0])

            draw = float(uniform(batch.seeds, index)[0])
            return min(_reach(token_at, draw, end) for end in (0.0, 1.0 - 2**-52))


def _reach(token_at: Callable[[float], int], draw: float, end: float) -> float:
    """How far from this draw towards `end` the token stays the same."""
    chosen = token_at(draw)
    if token_at(end) == chosen:
        return 1.0
    inside, outside = draw, end
    for _ in range(60):
        middle = (inside + outside) / 2
        if token_at(middle) == chosen:
            inside = middle
        else:
            outside = middle
    return abs(draw - outside)


def _first_difference(actual: Sequence[int], expected: Sequence[int]) -> int | None:
    for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
        if one != other:
            return index
    return None if len(actual) == len(expected) else min(len(actual), len(expected))


def _key(prompt: Prompt, stop: tuple[str, ...]) -> tuple[object, ...]:
    sampling = prompt.sampling
    return (
        tuple(prompt.ids),
        stop,
        sampling.max_new_tokens,
        sampling.min_new_tokens,
        sampling.seed,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.repetition_penalty,
        tuple(sorted(sampling.logit_bias.items())),
    )
