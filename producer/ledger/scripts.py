"""The Lua scripts, read from the files beside this one. Knows how to name one to Redis, not what any of them does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_PRELUDES = ("ledger", "queue")
"""The files whose functions every script begins with, in this order."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script as the server knows it."""

    name: str
    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script in `<name>.lua`, with the shared functions in front of it."""
    source = "".join((_FOLDER / f"{part}.lua").read_text(encoding="utf-8") for part in (*_PRELUDES, name))
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def script_names() -> list[str]:
    """All scripts, without the shared parts."""
    return sorted(path.stem for path in _FOLDER.glob("*.lua") if path.stem not in _PRELUDES)
