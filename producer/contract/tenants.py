"""What bounds the queue and each tenant's part of it, and what can be set for one tenant. Knows nothing about how it is enforced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from producer.contract.errors import InvalidRequest
from producer.contract.requests import ChatRequest, Name, Request, SummaryRequest

BYTES_PER_TOKEN: Final = 4
"""Of UTF-8: about what the model's tokenizer makes of Chinese (3 bytes a character, 0.7 tokens) and of English."""
ASSUMED_ANSWER_TOKENS: Final = 256
"""Of an answer, if the request does not ask for fewer."""

MAX_QUEUED: Final = 10_000
MAX_QUEUED_TOKENS: Final = 10_000_000
TENANT_SHARE: Final = 2
"""A tenant without settings of its own may have one part in so many of the queue."""


@dataclass(frozen=True, slots=True)
class QueueBounds:
    """What may wait for one model before submissions are refused. 0: no bound. Tokens are estimates (`estimate_tokens`)."""

    max_queued: int = MAX_QUEUED
    max_queued_tokens: int = MAX_QUEUED_TOKENS
    tenant_max_queued: int = MAX_QUEUED // TENANT_SHARE
    """Of one tenant."""
    tenant_max_queued_tokens: int = MAX_QUEUED_TOKENS // TENANT_SHARE


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """What a claim is told of the order beyond priority, fair shares and age."""

    tenant_max_running: int = 0
    """Requests of one tenant that may run at a time, of one model. 0: no limit."""
    ageing_seconds: float = 60.0
    """A less urgent request that has waited longer may go first,"""
    ageing_claims: int = 8
    """once in so many claims. 0: never."""


DEFAULT_BOUNDS: Final = QueueBounds()
DEFAULT_ORDER: Final = QueueOrder()


class TenantSettings(BaseModel):
    """What was set for one tenant; None: the default. Limits are for each model, 0 is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    """Of its share of the tokens. 1 by default."""
    max_running: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    max_queued: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    max_queued_tokens: Annotated[int, Field(ge=0, le=1_000_000_000_000)] | None = None

    @classmethod
    def of(cls, **values: float | None) -> TenantSettings:
        """Validated. Raises InvalidRequest."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InvalidRequest.from_validation(error) from error

    def encode(self) -> str:
        """As JSON, without what is not set."""
        return self.model_dump_json(exclude_none=True)


def check_tenant_name(tenant: str) -> str:
    """The name, if requests could carry it. Raises InvalidRequest."""
    return _Named.checked(tenant)


class _Named(BaseModel):
    tenant: Name

    @classmethod
    def checked(cls, tenant: str) -> str:
        try:
            return cls(tenant=tenant).tenant
        except ValidationError as error:
            raise InvalidRequest.from_validation(error) from error


def estimate_tokens(request: Request, encoded: str) -> int:
    """What a request will take, prompt and answer, before anybody has tokenized it.

    A quarter of the bytes of its JSON (`encoded`), and as many answer tokens as it allows, 256 at most. It decides about room in the
    queue and about the order until the request ends; then what it really took counts. What it is wrong by on the average does not
    matter for the waiting times, because the speed at which the queue drains is measured in the same unit.
    """
    if isinstance(request, ChatRequest | SummaryRequest) and request.sampling.max_new_tokens is not None:
        answer = min(request.sampling.max_new_tokens, ASSUMED_ANSWER_TOKENS)
    elif isinstance(request, SummaryRequest):
        answer = min(request.max_length, ASSUMED_ANSWER_TOKENS)
    else:
        answer = ASSUMED_ANSWER_TOKENS
    return math.ceil(len(encoded.encode()) / BYTES_PER_TOKEN) + answer
