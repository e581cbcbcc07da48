"""Examples of repeating and of looking something up in the prompt.

They teach in few steps what every summary and every recalled fact needs: to find a place in the prompt and to copy from it.
"""

from __future__ import annotations

import random

from ops.demo_model.tasks import noise
from ops.demo_model.tasks.example import Example, Language
from ops.demo_model.tasks.facts import person_name

_REPEAT: dict[Language, tuple[str, ...]] = {
    "zh": ("请重复下面的文字：\n{text}", "跟我说：{text}", "重复一遍：{text}"),
    "en": ("Repeat the following text:\n{text}", "Say after me: {text}", "Repeat: {text}"),
}
_LOOK_UP: dict[Language, str] = {
    "zh": "{entries}\n{key}是什么？",
    "en": "{entries}\nWhat is {key}?",
}


def repeat(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A text without meaning, given back as it is."""
    if rng.random() < 0.3:
        text = "".join(str(rng.randint(0, 9)) for _ in range(rng.randint(2, 8)))
    elif rng.random() < 0.4:
        text = person_name(rng, language)
    else:
        text = noise.phrase(rng, language, rng.randint(2, 16))
    return Example(rng.choice(_REPEAT[language]).replace("{text}", text), text, "repeat")


def look_up(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """One value of a list of names and values."""
    size = 2 if language == "zh" else 1
    entries = {
        noise.phrase(rng, language, size): noise.phrase(rng, language, rng.randint(1, 3) * size)
        for _ in range(rng.randint(2, 8))
    }
    key = rng.choice(list(entries))
    listed = "\n".join(
        f"{name}：{value}" if language == "zh" else f"{name}: {value}" for name, value in entries.items()
    )
    prompt = _LOOK_UP[language].replace("{entries}", listed).replace("{key}", key)
    return Example(prompt, entries[key], "look_up")
