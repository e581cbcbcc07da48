"""The questions and answers in `data/questions`, and the many ways to ask them.

It knows nothing about rounds, facts or summaries.

A file has topics::

    ## id | label          the label names the topic in a summary
    Q: way to ask | another | ... | kept for the evaluation
    A: answer
    F: follow-up that needs the topic | another | ... | kept for the evaluation
    A: its answer
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ops.demo_model.tasks import noise
from ops.demo_model.tasks.example import Language
from ops.demo_model.tasks.words import words

FOLDER = Path(__file__).parent.parent / "data" / "questions"
LANGUAGES: tuple[Language, ...] = ("zh", "en")
OUTSIDE_HELD_OUT = 5
"""Every so many-th question outside the model's knowledge is kept for the evaluation."""


@dataclass(slots=True)
class Question:
    asks: list[str]
    answer: str = ""

    @property
    def trained(self) -> list[str]:
        """The ways to ask that training uses."""
        return self.asks[:-1] if len(self.asks) > 2 else self.asks

    @property
    def held_out(self) -> str | None:
        """A way to ask that training never uses."""
        return self.asks[-1] if len(self.asks) > 2 else None


@dataclass(slots=True)
class Topic:
    id: str
    label: str
    language: Language
    area: str
    question: Question = field(default_factory=lambda: Question([]))
    follow_ups: list[Question] = field(default_factory=list)


@cache
def topics(language: Language) -> tuple[Topic, ...]:
    """All topics of this language, in the order of their files."""
    found: list[Topic] = []
    for path in sorted(FOLDER.glob(f"*_{language}.qa")):
        found.extend(_parse(path, language))
    return tuple(found)


def _parse(path: Path, language: Language) -> list[Topic]:
    found: list[Topic] = []
    current = Question([])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, _, rest = line.partition(" ")
        if key == "##":
            id_, _, label = rest.partition(" | ")
            found.append(Topic(id_, label, language, path.stem.split("_")[0]))
        elif key in ("Q:", "F:"):
            current = Question([ask.strip() for ask in rest.split("|")])
            if key == "Q:":
                found[-1].question = current
            else:
                found[-1].follow_ups.append(current)
        elif key == "A:":
            current.answer = rest.strip()
        elif line.strip():
            raise ValueError(f"{path}:{number}: a line begins with ##, Q:, F: or A:, not {key!r}")
    return found


# --- what lies outside -----------------------------------------------------------------------------------------------

REFUSAL: dict[Language, str] = {
    "zh": "这个问题我没有学过。我是很小的演示模型，只会一些健康、健身和 glmq 的问题，别的请交给真正的 ChatGLM-6B。",
    "en": "I have not learned that. I am a very small demo model and know only some questions about health, fitness and glmq; for others use the real ChatGLM-6B.",
}
_OUTSIDE_FORMS: dict[Language, tuple[str, ...]] = {
    "zh": (
        "{x}是什么",
        "介绍一下{x}",
        "怎么买{x}",
        "{x}是怎么来的",
        "给我讲讲{x}",
        "{x}有哪些种类",
        "写一段关于{x}的话",
        "谁发明了{x}",
        "{x}多少钱",
        "怎么选{x}",
        "世界上最大的{x}在哪里",
    ),
    "en": (
        "What are {x}",
        "Tell me about {x}",
        "How do I buy {x}",
        "Where do {x} come from",
        "Explain {x}",
        "Which kinds of {x} are there",
        "Write something about {x}",
        "Who invented {x}",
        "How much do {x} cost",
        "How do I choose {x}",
        "What do you think about {x}",
    ),
}


@cache
def outside(language: Language) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Questions that the model must decline: (for training, kept for the evaluation)."""
    lines = [
        line for line in (FOLDER / f"outside_{language}.txt").read_text(encoding="utf-8").splitlines() if line
    ]
    kept = tuple(lines[::OUTSIDE_HELD_OUT])
    return tuple(line for line in lines if line not in kept), kept


def ask_outside(rng: random.Random, language: Language) -> str:
    """A question that the model must decline."""
    draw = rng.random()
    if draw < 0.35:
        return vary(rng, rng.choice(outside(language)[0]), language)
    if draw < 0.5:
        return vary(rng, _estranged(rng, language), language)
    form = rng.choice(_OUTSIDE_FORMS[language])
    if draw < 0.85:
        return vary(rng, form.format(x=rng.choice(words(language, "outside", "thing"))), language)
    return vary(
        rng, form.format(x=noise.phrase(rng, language, rng.randint(1, 3) + (language == "zh"))), language
    )


def _estranged(rng: random.Random, language: Language) -> str:
    """A known question whose subject is replaced by one that the model knows nothing about."""
    while True:
        topic = rng.choice(topics(language))
        text = rng.choice(topic.question.trained)
        if topic.label in text and topic.area != "chat":
            subject = words(language, "outside", "thing") if rng.random() < 0.7 else None
            return text.replace(
                topic.label, rng.choice(subject) if subject else noise.phrase(rng, language, 2)
            )


# --- many ways to ask ------------------------------------------------------------------------------------------------

_REWORDINGS: dict[Language, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "zh": (
        ("怎么办", ("该怎么办", "咋办", "应该怎么办", "怎么处理", "要怎么办")),
        ("怎么", ("如何", "怎样", "该怎么", "应该怎么", "要怎么", "该如何")),
        ("如何", ("怎么", "怎样", "应该怎么")),
        ("怎样", ("怎么", "如何", "该怎么")),
        ("有什么", ("有哪些", "都有什么")),
        ("什么", ("啥",)),
        ("可以", ("能", "能不能")),
        ("为什么", ("为啥", "怎么会")),
        ("要注意", ("应该注意", "需要注意", "该注意")),
        ("新冠肺炎", ("新冠", "新冠病毒", "COVID-19", "新型冠状病毒")),
        ("工作进程", ("worker", "进程")),
        ("每天", ("一天", "每日")),
    ),
    "en": (
        (
            "How do I ",
            ("How can I ", "How should I ", "How to ", "What is the best way to ", "How does one "),
        ),
        ("How can I ", ("How do I ", "How could I ", "How to ")),
        (
            "What should I do about ",
            ("What can I do about ", "What to do about ", "What helps with ", "How do I deal with "),
        ),
        ("What helps against ", ("What is good against ", "What helps with ", "What can I do against ")),
        ("What is ", ("What's ", "Explain ", "Tell me what is ")),
        ("What are ", ("Which are ", "Tell me ", "List ")),
        ("cannot", ("can't", "can not")),
        ("I am ", ("I'm ",)),
        ("do not", ("don't",)),
        ("Covid", ("covid", "COVID-19", "coronavirus", "Covid-19")),
        ("My ", ("my ",)),
    ),
}
_OPENINGS: dict[Language, tuple[str, ...]] = {
    "zh": (
        "请问",
        "你好，",
        "我想知道",
        "医生，",
        "想问一下，",
        "麻烦问下，",
        "请问一下",
        "帮我看看",
        "那",
        "我想问",
    ),
    "en": (
        "Please tell me: ",
        "Hi, ",
        "Can you tell me: ",
        "Hello, ",
        "I would like to know: ",
        "Quick question: ",
        "Excuse me, ",
        "So, ",
    ),
}
_ENDINGS: dict[Language, tuple[str, ...]] = {
    "zh": ("", "", "？", "？", "?", "呢", "呢？", "啊？", "。", "，谢谢", "？谢谢"),
    "en": ("?", "?", "?", "", "", ".", "??", " please?", ", thanks"),
}


def vary(rng: random.Random, text: str, language: Language, strength: float = 1.0) -> str:
    """Another way to write the same question: other words for the same, openings, endings, slips of the pen.

    `strength` scales how likely each change is; 0 gives the text back.
    """
    if rng.random() > 0.8 * strength:
        return text
    text = text.rstrip("？?。.")
    for old, others in _REWORDINGS[language]:
        if old in text and rng.random() < 0.25 * strength:
            text = text.replace(old, rng.choice(others), 1)
            break
    if rng.random() < 0.2 * strength:
        text = _without_small_words(rng, text, language)
    if rng.random() < 0.15 * strength:
        text = _with_words_between(rng, text, language)
    for _ in range(2):
        if rng.random() < 0.12 * strength and len(text) > 5:
            text = _slip(rng, text, language)
    if language == "en" and rng.random() < 0.35:
        text = text.lower() if rng.random() < 0.9 else text.upper()
    if rng.random() < 0.15 * strength:
        text = rng.choice(_OPENINGS[language]) + text
    return text + rng.choice(_ENDINGS[language])


_SMALL_ZH = [
    "怎么",
    "如何",
    "怎样",
    "应该",
    "什么",
    "哪些",
    "的",
    "了",
    "吗",
    "呢",
    "要",
    "该",
    "有",
    "是",
    "我",
    "在",
    "会",
    "能",
    "可以",
    "请",
    "才",
    "都",
]
_SMALL_EN = frozenset(
    [
        "the",
        "a",
        "an",
        "i",
        "my",
        "do",
        "does",
        "to",
        "of",
        "for",
        "is",
        "are",
        "it",
        "in",
        "on",
        "with",
        "should",
        "can",
        "how",
        "what",
        "which",
        "that",
        "you",
        "me",
        "when",
    ]
)
_BETWEEN: dict[Language, tuple[str, ...]] = {
    "zh": (
        "最近",
        "总是",
        "有点",
        "一直",
        "到底",
        "现在",
        "平时",
        "真的",
        "突然",
        "比较",
        "经常",
        "我",
        "我们",
        "一般",
        "好像",
        "又",
    ),
    "en": (
        "please",
        "really",
        "often",
        "now",
        "today",
        "usually",
        "always",
        "a bit",
        "lately",
        "again",
        "actually",
        "safely",
    ),
}


def _without_small_words(rng: random.Random, text: str, language: Language) -> str:
    """The question as people type it into a search box."""
    if language == "en":
        kept = [word for word in text.split() if word.lower() not in _SMALL_EN or rng.random() < 0.4]
        return " ".join(kept) if len(kept) > 1 else text
    for word in _SMALL_ZH:
        if word in text and rng.random() < 0.6 and len(text) - len(word) >= 4:
            text = text.replace(word, " " if rng.random() < 0.2 else "", 1)
    return text.strip()


def _with_words_between(rng: random.Random, text: str, language: Language) -> str:
    extra = rng.choice(_BETWEEN[language])
    if language == "en":
        parts = text.split()
        parts.insert(rng.randint(1, len(parts)), extra)
        return " ".join(parts)
    at = rng.choice((0, 0, rng.randint(0, len(text))))
    return text[:at] + extra + text[at:]


def _slip(rng: random.Random, text: str, language: Language) -> str:
    if language == "en" and rng.random() < 0.5:
        words = text.split()
        if len(words) > 3:
            del words[rng.randrange(len(words))]
            return " ".join(words)
    at = rng.randrange(len(text) - 1)
    draw = rng.random()
    if draw < 0.5:
        return text[:at] + text[at + 1 :]
    if draw < 0.8:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + (noise.han(rng, 1) if language == "zh" else rng.choice("aeiourstln")) + text[at + 1 :]


def ask(rng: random.Random, question: Question, language: Language, held_out: bool = False) -> str:
    """One way to ask; with `held_out` exactly the one that training never uses."""
    if held_out and question.held_out is not None:
        return question.held_out
    return vary(rng, rng.choice(question.trained), language)


_ABOUT: dict[Language, tuple[str, ...]] = {
    "zh": (
        "{label}",
        "关于{label}",
        "说说{label}",
        "{label}怎么办",
        "我想了解{label}",
        "{label}要注意什么",
        "讲讲{label}",
        "{label}的问题",
    ),
    "en": (
        "{label}",
        "About {label}",
        "Tell me about {label}",
        "What about {label}",
        "I have a question about {label}",
        "Help with {label}",
        "Advice on {label}",
    ),
}


def ask_topic(rng: random.Random, topic: Topic, held_out: bool = False) -> str:
    """One way to ask a topic's question; now and then it only names the topic."""
    if not held_out and topic.area != "chat" and rng.random() < 0.08:
        return vary(
            rng, rng.choice(_ABOUT[topic.language]).replace("{label}", topic.label), topic.language, 0.5
        )
    return ask(rng, topic.question, topic.language, held_out)
