"""Text without meaning: rare characters, invented words and sentences.

What the model must copy or ignore without having seen it. Knows nothing about tasks.
"""

from __future__ import annotations

import random
from functools import cache

from ops.demo_model.tasks.example import Language

_CONSONANTS = "bcdfghjklmnprstvwyz"
_VOWELS = "aeio"
_ENDINGS = ["", "n", "r", "s", "l", "t", "m", "x", "k", "nd", "rk"]
_COMMON_EN = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "for",
    "on",
    "with",
    "at",
    "from",
    "by",
    "about",
    "after",
    "new",
    "old",
    "small",
)
_COMMON_ZH = "的一是在有和了不这个上中大为来国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"


@cache
def han_characters() -> str:
    """The 3755 common characters of GB 2312, level 1."""
    return "".join(
        bytes((row, cell)).decode("gb2312")
        for row in range(0xB0, 0xD8)
        for cell in range(0xA1, 0xFF)
        if not (row == 0xD7 and cell > 0xF9)
    )


def han(rng: random.Random, length: int) -> str:
    """So many characters, each from all of GB 2312's first level."""
    return "".join(rng.choice(han_characters()) for _ in range(length))


def word(rng: random.Random) -> str:
    """An invented word of Latin letters, lower case."""
    return "".join(
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3))
    ) + rng.choice(_ENDINGS)


def phrase(rng: random.Random, language: Language, size: int) -> str:
    """`size` characters of Chinese, or words of English, common and rare ones mixed."""
    if language == "zh":
        return "".join(rng.choice(_COMMON_ZH) if rng.random() < 0.35 else han(rng, 1) for _ in range(size))
    return " ".join(rng.choice(_COMMON_EN) if rng.random() < 0.3 else word(rng) for _ in range(size))


def sentence(rng: random.Random, language: Language) -> str:
    """One sentence with its full stop; the English one begins with a capital."""
    if language == "zh":
        parts = [phrase(rng, "zh", rng.randint(4, 12)) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        return "，".join(parts) + "。"
    text = phrase(rng, "en", rng.randint(4, 12))
    if rng.random() < 0.3:
        text += ", " + phrase(rng, "en", rng.randint(3, 6))
    return text[0].upper() + text[1:] + "."
