"""The ledger's scripts on the real server, with the time in the test's hands, and everything that they left there in one reading.

Knows nothing of what is right. A mutation is a textual substitution in the scripts' sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import redis

from producer.contract.keys import Keys
from producer.ledger.calls import Call
from producer.ledger.scripts import script

T = TypeVar("T")

_FOLDER = Path(__file__).parent
START_US = 1_800_000_000_000_000
"""When every run begins: in 2027."""
CALL_US = 130
"""From one call to the next."""


class Substitution(NamedTuple):
    """A text of the scripts, and what a broken ledger would have in its place."""

    old: str
    new: str
    seed: int = 5
    """Where to begin: any finds it, some sooner."""


class Entry(NamedTuple):
    """An entry of a request's stream."""

    place: tuple[int, int]
    event: str


@dataclass(frozen=True)
class Snapshot:
    """What the server has at one moment. Names of keys are without their prefix."""

    now_ms: int
    requests: dict[str, dict[str, str]] = field(default_factory=dict)
    streams: dict[str, list[Entry]] = field(default_factory=dict)
    conversations: dict[str, dict[str, str]] = field(default_factory=dict)
    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)
    sorted_sets: dict[str, dict[str, float]] = field(default_factory=dict)
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)
    expiries: dict[str, int] = field(default_factory=dict)
    published: list[tuple[str, str]] = field(default_factory=list)
    """(channel, message), of the calls since the last snapshot."""

    def members(self, name: str) -> dict[str, float]:
        """Of a sorted set; empty where there is none."""
        return self.sorted_sets.get(name, {})


class ControlledServer:
    """Runs calls as `Ledger` does. Each one takes `CALL_US` on a clock that otherwise stands still."""

    def __init__(
        self, connection: redis.Redis, keys: Keys, substitutions: tuple[Substitution, ...] = ()
    ) -> None:
        self.keys = keys
        self.now_us = START_US
        self.num_calls = 0
        self._execute: Any = connection.execute_command
        self._substitutions = substitutions

    @property
    def now_ms(self) -> int:
        return self.now_us // 1000

    def advance(self, ms: int) -> None:
        self.now_us += ms * 1000

    def run(self, call: Call[T]) -> T:
        """The answer of one call. Raises what the call raises."""
        sha, source = mutated(call.script, self._substitutions)
        while True:
            self.now_us += CALL_US
            self.num_calls += 1
            answer = self._evaluate(sha, source, *call.args)
            if not call.again(answer):
                return call.parse(answer)

    def snapshot(self, names: Iterable[str] = ()) -> Snapshot:
        """These keys, or all that there are."""
        sha, source = _own_script("snapshot")
        found, expiries, published = self._evaluate(sha, source, *names)
        snapshot = Snapshot(
            self.now_ms,
            expiries={
                key.removeprefix(self.keys.prefix): int(at)
                for key, at in zip(expiries[::2], expiries[1::2], strict=True)
            },
            published=list(zip(published[::2], published[1::2], strict=True)),
        )
        for name, kind, content in found:
            place_content(snapshot, name, kind, content)
        return snapshot

    def save(self) -> None:
        """The disk has everything until now."""
        self._evaluate(*_own_script("backup"), "save")

    def restore(self) -> None:
        """The server has died, and come back with what the disk has. The time goes on."""
        self._evaluate(*_own_script("backup"), "restore")

    def clear(self) -> None:
        """Delete everything of this namespace."""
        names = self._execute("KEYS", f"{self.keys.prefix}*")
        if names:
            self._execute("DEL", *names)

    def _evaluate(self, sha: str, source: str, *args: Any) -> Any:
        keys = (2, self.keys.prefix, self.now_us)
        try:
            return self._execute("EVALSHA", sha, *keys, *args)
        except redis.exceptions.NoScriptError:
            return self._execute("EVAL", source, *keys, *args)


def place_content(snapshot: Snapshot, name: str, kind: str, content: Any) -> None:
    """Put one key's content where it belongs in the snapshot."""
    family, _, rest = name.partition(":")
    match kind, family:
        case "hash", "request":
            snapshot.requests[rest] = _pairs(content)
        case "hash", "conversation":
            snapshot.conversations[rest] = _pairs(content)
        case "hash", _:
            snapshot.hashes[name] = _pairs(content)
        case "stream", "events":
            snapshot.streams[rest] = [Entry(place_of(entry), fields[1]) for entry, fields in content]
        case "list", "turns":
            snapshot.turns[rest] = [decoded(turn) for turn in content]
        case "zset", _:
            snapshot.sorted_sets[name] = {
                member: float(score) for member, score in zip(content[::2], content[1::2], strict=True)
            }
        case "set", _:
            snapshot.sets[name] = set(content)
        case "string", _:
            snapshot.strings[name] = content
        case _:
            raise AssertionError(f"{name} is a {kind}: nobody expects that")


def place_of(entry_id: str) -> tuple[int, int]:
    index, _, number = entry_id.partition("-")
    return int(index), int(number)


@lru_cache(maxsize=10_000)
def decoded(text: str) -> dict[str, Any]:
    """JSON; the same object for the same text."""
    value: dict[str, Any] = json.loads(text)
    return value


@lru_cache(maxsize=256)
def mutated(name: str, substitutions: tuple[Substitution, ...]) -> tuple[str, str]:
    """A script's hash and source, with the time controlled and the substitutions made."""
    source = script(name).source
    for substitution in substitutions:
        source = source.replace(*substitution)
    return _compiled(source)


@cache
def _own_script(name: str) -> tuple[str, str]:
    return _compiled((_FOLDER / f"{name}.lua").read_text(encoding="utf-8"))


@lru_cache(maxsize=256)
def _compiled(source: str) -> tuple[str, str]:
    source = (_FOLDER / "controlled_time.lua").read_text(encoding="utf-8") + source
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
