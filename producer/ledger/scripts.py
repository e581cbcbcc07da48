"""The Lua scripts, read from the files beside this one. Knows how to name one to Redis, not what any of them does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_PRELUDE = "ledger"
"""The file whose functions every script begins with."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script as the server knows it."""

    name: str
    source: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script in `<name>.lua`, with the shared functions in front of it."""
    prelude = (_FOLDER / f"{_PRELUDE}.lua").read_text(encoding="utf-8")
    source = prelude + (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def script_names() -> list[str]:
    """All scripts, without the shared part."""
    return sorted(path.stem for path in _FOLDER.glob("*.lua") if path.stem != _PRELUDE)
