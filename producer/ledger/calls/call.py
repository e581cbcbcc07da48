"""What a call is, and what all of them need to write their arguments and to read their answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from producer.contract.errors import InvalidRequest
from producer.contract.events import Finished, encode_event
from producer.contract.requests import Request, encode_request
from producer.contract.tenants import estimate_tokens

T = TypeVar("T")

State = Literal["queued", "running", "waiting", "done", "failed", "cancelled", "dead"]
FINAL_STATES: Final = frozenset({"done", "failed", "cancelled", "dead"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
CANCELLED: Final = encode_event(Finished(reason="cancelled", text=""))
"""Filled in by the script when a request is cancelled that no worker has."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A script with its arguments, and how to read the answer."""

    script: str
    args: Sequence[str | int | float]
    parse: Callable[[Any], T]
    again: Callable[[Any], bool] = lambda _: False
    """Whether this answer means: not done yet, call once more."""


def milliseconds(seconds: float) -> int:
    """As the scripts count time."""
    return round(seconds * 1000)


def seconds_or_none(ms: str | None) -> float | None:
    """A time that a hash may not have."""
    return None if ms is None else int(ms) / 1000


def pairs(flat: list[str]) -> dict[str, str]:
    """HGETALL's answer, as a script passes it on."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def checked_name(field: str, value: str) -> str:
    """Ids travel in keys, in channel names and in tab-separated lines."""
    if not _NAME.fullmatch(value):
        raise InvalidRequest(
            field,
            f"{value!r} cannot be an id",
            "Use at most 128 letters, digits and . _ : @ -, a letter or digit first.",
        )
    return value


def with_estimate(request: Request) -> tuple[str, int]:
    """A request's JSON, and the tokens that it will take."""
    encoded = encode_request(request)
    return encoded, estimate_tokens(request, encoded)


def digest_of(request: Request) -> str:
    """Equal for equal requests: a repeated submit is known by it."""
    return digest_of_body(request.model_dump(mode="json", exclude_defaults=True), request.kind)


def digest_of_body(body: object, kind: str) -> str:
    """32 hexadecimal digits."""
    canonical = json.dumps([kind, body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
