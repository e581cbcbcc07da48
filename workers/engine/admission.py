"""Which sequences an engine takes: everything that is checked before one may wait. Knows nothing about blocks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from workers.engine.messages import Generate, Sampling
from workers.models.layout import AnyLayout
from workers.models.tokenizer import Tokenizer

RefusalCode = Literal["context_exceeded", "unknown_adapter", "invalid_request"]


class CannotRun(ValueError):
    """A sequence cannot be run here at all. The message says why, in words for whoever sent the request."""

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Admission:
    """What a sequence must respect on one engine."""

    tokenizer: Tokenizer
    vocab_size: int
    context_len: int

    def layout(self, message: Generate) -> AnyLayout:
        """The layout of a sequence that can be run. Raises CannotRun."""
        _check_sampling(message.sampling)
        self._check_tokens(message)
        try:
            return self.tokenizer.layout(message.prompt_ids)
        except ValueError as error:
            raise CannotRun("invalid_request", str(error)) from error

    def _check_tokens(self, message: Generate) -> None:
        emitted_ids = message.emitted_ids
        if not all(0 <= id_ < self.vocab_size for id_ in itertools.chain(message.prompt_ids, emitted_ids)):
            raise CannotRun(
                "invalid_request", f"the prompt has ids outside the vocabulary of {self.vocab_size}"
            )
        num_tokens = len(message.prompt_ids) + len(emitted_ids)
        if emitted_ids and (
            emitted_ids[-1] == self.tokenizer.eos_id
            or len(emitted_ids) >= message.sampling.max_new_tokens
            or num_tokens >= self.context_len
        ):
            raise CannotRun("invalid_request", "the emitted tokens are a whole answer: nothing is left to do")
        if num_tokens >= self.context_len:
            raise CannotRun(
                "context_exceeded",
                f"the prompt has {num_tokens} tokens, but prompt and answer together can have "
                f"{self.context_len}. Shorten the query or the history",
            )


def _check_sampling(sampling: Sampling) -> None:
    """The contract checks a request's parameters already; a value that slips through must not harm other sequences."""
    checks = (
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("min_new_tokens", sampling.min_new_tokens, sampling.min_new_tokens >= 0, "0 or more"),
        ("temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "0 or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 or more"),
        (
            "repetition_penalty",
            sampling.repetition_penalty,
            0 < sampling.repetition_penalty < math.inf,
            "above 0",
        ),
        ("logit_bias", sampling.logit_bias, all(map(math.isfinite, sampling.logit_bias.values())), "finite"),
        ("seed", sampling.seed, 0 <= sampling.seed < 1 << 63, "from 0 to 2**63 - 1"),
    )
    for name, value, is_right, expected in checks:
        if not is_right:
            raise CannotRun("invalid_request", f"{name} is {value}: it must be {expected}")
