"""The lists in `data/words.toml`, read once. It knows nothing about what they are used for."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from ops.demo_model.tasks.example import Language

PATH = Path(__file__).parent.parent / "data" / "words.toml"


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def words(language: Language, group: str, name: str) -> list[str]:
    """The list of this name; a string counts as a list of its characters."""
    return list(_read()[language][group][name])
