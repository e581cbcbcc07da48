"""What is asked for: a chat answer, a summary, or what workers ask of each other, with how to sample it.

Validated where it is built, versioned on the wire. Knows nothing about queues or models.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic._internal._model_construction import ModelMetaclass

from producer.contract.errors import InvalidRequest

CONTRACT_VERSION: Final = 1
MAX_TEXT_LEN = 4_000_000
"""Characters of one text field: far above any context, far below what would hurt Redis."""

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LEN)]


class Turn(NamedTuple):
    """One finished exchange of a conversation."""

    query: str
    answer: str


ModelT = TypeVar("ModelT", bound="_Strict")


class _RaisesInvalidRequest(ModelMetaclass):
    """Construction raises our error. Nested fields are built by pydantic itself, so paths stay whole."""

    def __call__(self, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise InvalidRequest.from_validation(error) from error


class _Strict(BaseModel, metaclass=_RaisesInvalidRequest):
    """Immutable, no coercion, no unknown fields."""

    # What a user wrote must not turn up in logs by way of an error.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def replace(self: ModelT, **changes: Any) -> ModelT:
        """A copy with other values, validated like a new one."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **changes})


class SamplingParams(_Strict):
    """How the next token is chosen. The defaults are the model card's (`chat()` of ChatGLM-6B)."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """At most so many answer tokens; None: as many as the context leaves."""
    min_new_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """The end token cannot be chosen before so many answer tokens."""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.95
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.7
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """0 switches it off."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """Above 1: tokens of the prompt and the answer become less likely."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)
    ] = ()
    """The answer ends before the first of these texts."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The same seed gives the same answer, also after a takeover; None: a random one is drawn at submit."""
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)
    ] = Field(default_factory=dict)
    """Token id → added to its logit."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_tuple(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _keys_as_ints(cls, value: object) -> object:
        """JSON has only string keys."""
        if not isinstance(value, dict):
            return value
        return {
            int(key) if isinstance(key, str) and key.isdigit() else key: bias for key, bias in value.items()
        }

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
            )
        return self


class _Request(_Strict):
    """What chat and summary requests have in common."""

    version: Literal[1] = CONTRACT_VERSION
    model: Name | None = None
    """Served by the workers of this name; None: the client's setting."""
    adapter: Name | None = None
    """The LoRA adapter to answer with; None: the model as it was loaded."""
    sampling: SamplingParams = Field(default_factory=SamplingParams)
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    """0 is the most urgent."""
    tenant: Name = "default"
    """Whose request it is, for fair shares and limits."""
    deadline_seconds: Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)] | None = None
    """Counted from submit, on Redis' clock: not started after it, aborted at it."""
    metadata: Annotated[dict[str, str], Field(max_length=64)] = Field(default_factory=dict)
    """The caller's own labels; kept with the request, never interpreted."""


class ChatRequest(_Request):
    """An answer to `query`, given the turns before it."""

    kind: Literal["chat"] = "chat"
    query: Text
    history: tuple[Turn, ...] = ()
    """Earlier turns, oldest first. Not together with `conversation_id`, whose turns are kept for you."""
    conversation_id: Name | None = None

    @field_validator("query")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is blank: give a question")
        return value

    @field_validator("history", mode="before")
    @classmethod
    def _turns(cls, value: object) -> object:
        """JSON has lists of two strings."""
        if not isinstance(value, list | tuple):
            return value
        return tuple(
            Turn(*turn) if isinstance(turn, list | tuple) and len(turn) == 2 else turn for turn in value
        )

    @field_validator("conversation_id")
    @classmethod
    def _without_history(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("history"):
            raise ValueError(
                "comes with a history, but the turns of a conversation are kept for you: leave one out"
            )
        return value


class SummaryRequest(_Request):
    """A summary of `text`."""

    kind: Literal["summary"] = "summary"
    text: Text
    style: Literal["paragraph", "bullets", "title"] = "paragraph"
    max_length: Annotated[int, Field(ge=8, le=100_000)] = 256
    """Tokens of the summary, at most."""

    @field_validator("text")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is blank: give a text to summarize")
        return value


class FoldRequest(_Request):
    """A new summary of a conversation: the old one, with the turns from `first` on folded into it.

    Workers make it; no caller can. How many turns it takes is decided, and kept, when its prompt is built.
    """

    kind: Literal["fold"] = "fold"
    conversation_id: Name
    first: Annotated[int, Field(ge=0)]
    """Index of the oldest turn that the summary does not cover, from 0."""


Request = ChatRequest | SummaryRequest | FoldRequest

_adapter: TypeAdapter[Request] = TypeAdapter(
    Annotated[Request, Field(discriminator="kind")], config=ConfigDict(hide_input_in_errors=True)
)


def encode_request(request: Request) -> str:
    """The request as compact JSON; fields that hold their default are left out."""
    fields = request.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(
        {"version": request.version, "kind": request.kind, **fields},
        ensure_ascii=False,
        separators=(",", ":"),
    )


def decode_request(data: str | bytes) -> Request:
    """The request in this JSON.

    Raises InvalidRequest, also for a version of the contract that this code does not know.
    """
    try:
        return _adapter.validate_json(data)
    except ValidationError as error:
        raise InvalidRequest.from_validation(error) from error
