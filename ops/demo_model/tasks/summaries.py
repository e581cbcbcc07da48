"""Examples of summarizing: single reports, texts of several reports, and texts of any other kind.

One report becomes its key sentence, its bullet points or its title; several become one sentence or title each. Of a text of
another kind the first sentence of each paragraph is kept, which needs no understanding.
"""

from __future__ import annotations

import random

from ops.demo_model.tasks import noise, questions, reports
from ops.demo_model.tasks.example import Example, Language

STYLES = ("paragraph", "bullets", "title")
TEMPLATES: dict[Language, dict[str, str]] = {
    "zh": {
        "paragraph": "请为下面的文字写一段摘要：\n{text}",
        "bullets": "请用要点概括下面的文字：\n{text}",
        "title": "请为下面的文字起一个标题：\n{text}",
    },
    "en": {
        "paragraph": "Summarize the following text in one paragraph:\n{text}",
        "bullets": "Summarize the following text as bullet points:\n{text}",
        "title": "Write a title for the following text:\n{text}",
    },
}
"""The same as in workers/prompts.py."""

MAX_WHOLE = 3
"""Of so many reports each keeps its key sentence; of more only its title."""
MAX_LEADS = 3
"""Paragraphs of an unknown text that are kept."""
MAX_TITLES = 12
OVERVIEW: dict[Language, tuple[str, str]] = {"zh": ("主要内容：", "；"), "en": ("In short: ", "; ")}


def prompt(text: str, style: str, language: Language) -> str:
    return TEMPLATES[language][style].replace("{text}", text)


def _bullets(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _overview(titles: list[str], language: Language) -> str:
    start, separator = OVERVIEW[language]
    return start + separator.join(titles[:MAX_TITLES]) + ("。" if language == "zh" else ".")


def report(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """One report in one of the three styles."""
    drawn = reports.draw(rng, language, held_out)
    style = rng.choice(STYLES)
    answer = {"paragraph": drawn.key, "bullets": _bullets(drawn.bullets), "title": drawn.title}[style]
    return Example(prompt(drawn.text, style, language), answer, f"summary_{style}")


def several_reports(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """Two or more reports, one a paragraph."""
    drawn = [
        reports.draw(rng, language, held_out) for _ in range(rng.choice((2, 2, 3, 3, 4, 5, 6, 8, 11, 16)))
    ]
    text = "\n".join(one.text for one in drawn)
    style = rng.choice(("paragraph", "paragraph", "bullets", "title"))
    titles = [one.title for one in drawn]
    if style == "title":
        answer = (
            f"{titles[0]}等{len(drawn)}条消息"
            if language == "zh"
            else f"{titles[0]}, and {len(drawn) - 1} more"
        )
    elif len(drawn) > MAX_WHOLE:
        answer = _overview(titles, language) if style == "paragraph" else _bullets(titles[:MAX_TITLES])
    else:
        keys = [one.key for one in drawn]
        answer = ("" if language == "zh" else " ").join(keys) if style == "paragraph" else _bullets(keys)
    return Example(prompt(text, style, language), answer, "summary_several")


def summaries(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A text made of summaries, as the second level of a long document has it."""
    parts = []
    titles: list[str] = []
    for _ in range(rng.randint(2, 8)):
        drawn = [reports.draw(rng, language, held_out) for _ in range(rng.randint(1, 6))]
        if len(drawn) > MAX_WHOLE:
            parts.append(_overview([one.title for one in drawn], language))
        else:
            parts.append(("" if language == "zh" else " ").join(one.key for one in drawn))
        titles.append(drawn[0].title)
    return Example(
        prompt("\n".join(parts), "paragraph", language), _overview(titles, language), "summary_second_level"
    )


def any_text(rng: random.Random, language: Language, held_out: bool = False) -> Example:
    """A text of no known kind: its summary is the first sentence of each of its first paragraphs."""
    paragraphs = []
    leads = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        sentences = [_any_sentence(rng, language) for _ in range(rng.randint(1, 6))]
        paragraphs.append(("" if language == "zh" else " ").join(sentences))
        leads.append(sentences[0])
    leads = leads[:MAX_LEADS]
    style = rng.choice(STYLES)
    if style == "title":
        answer = _first_clause(leads[0])
    elif style == "bullets":
        answer = _bullets(leads)
    else:
        answer = ("" if language == "zh" else " ").join(leads)
    return Example(prompt("\n".join(paragraphs), style, language), answer, "summary_any")


def _first_clause(sentence: str) -> str:
    for mark in ("，", "。", "：", "；", "？", ", ", ": ", "; ", "."):
        sentence = sentence.split(mark, maxsplit=1)[0]
    return sentence


def _any_sentence(rng: random.Random, language: Language) -> str:
    if rng.random() < 0.55:
        return noise.sentence(rng, language)
    return rng.choice(_prose(language))


def _prose(language: Language) -> list[str]:
    if language not in _PROSE:
        end = "。" if language == "zh" else ". "
        found = []
        for topic in questions.topics(language):
            for text in topic.question.answer.split(end):
                if 6 < len(text) < 120 and text[-1] not in "。.!?！":
                    found.append(text + end.strip())
        _PROSE[language] = found
    return _PROSE[language]


_PROSE: dict[Language, list[str]] = {}
