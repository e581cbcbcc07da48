"""What a user may tell about themselves: statements, questions, and how an answer or a summary says it.

Fourteen kinds in Chinese and English. It knows nothing about rounds or summaries as a whole.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from ops.demo_model.tasks import noise
from ops.demo_model.tasks.example import Language
from ops.demo_model.tasks.words import words

Pool = Callable[[random.Random, Language, bool], str]
"""Draws a value; the flag asks for one that training never uses."""

HELD_OUT_SHARE = 8
"""One value in so many of an open pool is kept for the evaluation."""


def is_held_out(value: str) -> bool:
    """Whether training must not use this value of an open pool; the same on every machine."""
    return zlib.crc32(value.encode()) % HELD_OUT_SHARE == 0


@dataclass(frozen=True, slots=True)
class Wording:
    """How one kind of fact is said in one language. Every text but `unknown` has one {v}."""

    tells: tuple[str, ...]
    """First person, to be joined with others: «我叫{v}»."""
    asks: tuple[str, ...]
    """Questions; the last is kept for the evaluation."""
    clause: str
    """After «你» or «用户» in Chinese; after «The user» in English."""
    answer: str
    unknown: str
    """What the user has not told, after «你还没有告诉我» or «You have not told me»."""


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    pool: Pool
    zh: Wording
    en: Wording

    def wording(self, language: Language) -> Wording:
        return self.zh if language == "zh" else self.en


# --- values ----------------------------------------------------------------------------------------------------------

_BLOOD = ("A", "B", "AB", "O")


def _listed(name: str) -> Pool:
    """From a list whose last sixth is kept for the evaluation; now and then an invented value, so that copying is learned."""

    def draw(rng: random.Random, language: Language, held_out: bool) -> str:
        values = words(language, "fact", name)
        cut = len(values) - len(values) // 6
        if held_out:
            return rng.choice(values[cut:])
        if rng.random() < 0.2:
            return noise.phrase(rng, language, rng.randint(2, 3) if language == "zh" else rng.randint(1, 2))
        return rng.choice(values[:cut])

    return draw


def _open(make: Callable[[random.Random, Language], str]) -> Pool:
    """From values that are made up as needed; those that `is_held_out` are kept for the evaluation."""

    def draw(rng: random.Random, language: Language, held_out: bool) -> str:
        while True:
            value = make(rng, language)
            if is_held_out(value) is held_out:
                return value

    return draw


def _number(low: int, high: int) -> Pool:
    return lambda rng, _language, _held_out: str(rng.randint(low, high))


def person_name(rng: random.Random, language: Language) -> str:
    """A full name in Chinese, a first name in English; some rare, some of the other language."""
    if rng.random() < 0.06:
        language = "en" if language == "zh" else "zh"
    if language == "en":
        return rng.choice(words("en", "fact", "name")) if rng.random() < 0.6 else noise.word(rng).capitalize()
    length = rng.choice((1, 2, 2))
    given = (
        noise.han(rng, length)
        if rng.random() < 0.25
        else "".join(rng.choice(words("zh", "fact", "given")) for _ in range(length))
    )
    if rng.random() < 0.1:
        return rng.choice("小阿老") + given[0]
    return rng.choice(words("zh", "fact", "surname")) + given


def _pet(rng: random.Random, language: Language) -> str:
    if language == "zh":
        name = noise.han(rng, 2) if rng.random() < 0.3 else rng.choice(words("zh", "fact", "pet_name"))
        return f"一只叫{name}的{rng.choice(words('zh', 'fact', 'pet'))}"
    name = noise.word(rng).capitalize() if rng.random() < 0.3 else rng.choice(words("en", "fact", "pet_name"))
    return f"a {rng.choice(words('en', 'fact', 'pet'))} called {name}"


def _goal(rng: random.Random, language: Language) -> str:
    if rng.random() < 0.12:
        return noise.phrase(rng, language, 4 if language == "zh" else 3)
    template = rng.choice(words(language, "fact", "goal"))
    return template.format(
        n=rng.randint(2, 30), k=rng.randint(5, 15), d=rng.choice((3, 5, 10, 21, 42)), h=rng.randint(6, 9)
    )


def _birthday(rng: random.Random, language: Language) -> str:
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    return f"{month}月{day}日" if language == "zh" else f"{words('en', 'calendar', 'month')[month - 1]} {day}"


# --- the kinds, in the order in which a summary names them -----------------------------------------------------------

KINDS: tuple[Kind, ...] = (
    Kind(
        "name",
        _open(person_name),
        Wording(
            ("我叫{v}", "我的名字是{v}", "我是{v}", "叫我{v}就行", "我名叫{v}"),
            ("我叫什么名字", "我叫什么", "你知道我是谁吗", "你还记得我的名字吗", "我的名字是什么"),
            "叫{v}",
            "你叫{v}。",
            "你的名字",
        ),
        Wording(
            ("my name is {v}", "I am {v}", "I'm {v}", "call me {v}", "you can call me {v}"),
            (
                "What is my name",
                "Do you know my name",
                "What am I called",
                "Do you remember my name",
                "Tell me my name",
            ),
            "is called {v}",
            "Your name is {v}.",
            "your name",
        ),
    ),
    Kind(
        "age",
        _number(6, 95),
        Wording(
            ("今年{v}岁", "我{v}岁了", "我{v}岁", "年龄是{v}岁"),
            ("我多大了", "我今年几岁", "我几岁", "我的年龄是多少", "我多少岁"),
            "{v}岁",
            "你{v}岁。",
            "你的年龄",
        ),
        Wording(
            ("I am {v} years old", "I'm {v} years old", "my age is {v}", "I am {v}"),
            (
                "How old am I",
                "What is my age",
                "Do you know how old I am",
                "Do you remember my age",
                "Tell me my age",
            ),
            "is {v} years old",
            "You are {v} years old.",
            "your age",
        ),
    ),
    Kind(
        "height",
        _number(140, 198),
        Wording(
            ("身高{v}厘米", "我身高{v}厘米", "我有{v}厘米高", "我高{v}厘米"),
            ("我身高多少", "我有多高", "我的身高是多少", "我多高", "你记得我的身高吗"),
            "身高{v}厘米",
            "你身高{v}厘米。",
            "你的身高",
        ),
        Wording(
            ("I am {v} cm tall", "my height is {v} cm", "I'm {v} cm tall"),
            ("How tall am I", "What is my height", "Do you know my height", "Do you remember how tall I am"),
            "is {v} cm tall",
            "You are {v} cm tall.",
            "your height",
        ),
    ),
    Kind(
        "weight",
        _number(35, 130),
        Wording(
            ("体重{v}公斤", "我体重{v}公斤", "我重{v}公斤", "我现在{v}公斤"),
            ("我体重多少", "我有多重", "我的体重是多少", "我多少公斤", "你记得我的体重吗"),
            "体重{v}公斤",
            "你体重{v}公斤。",
            "你的体重",
        ),
        Wording(
            ("I weigh {v} kg", "my weight is {v} kg", "I now weigh {v} kg"),
            (
                "How much do I weigh",
                "What is my weight",
                "Do you know my weight",
                "Do you remember how much I weigh",
            ),
            "weighs {v} kg",
            "You weigh {v} kg.",
            "your weight",
        ),
    ),
    Kind(
        "city",
        _listed("city"),
        Wording(
            ("我住在{v}", "住在{v}", "我家在{v}", "我现在住{v}", "我搬到{v}了"),
            ("我住在哪里", "我住在哪个城市", "我在哪儿住", "你知道我住哪吗", "我家在哪里"),
            "住在{v}",
            "你住在{v}。",
            "你住在哪里",
        ),
        Wording(
            ("I live in {v}", "my home is in {v}", "I have moved to {v}", "I'm living in {v}"),
            (
                "Where do I live",
                "In which city do I live",
                "Do you know where I live",
                "Do you remember my city",
                "What city do I live in",
            ),
            "lives in {v}",
            "You live in {v}.",
            "where you live",
        ),
    ),
    Kind(
        "job",
        _listed("job"),
        Wording(
            ("我是一名{v}", "我的职业是{v}", "我的工作是{v}", "职业是{v}", "我当{v}"),
            ("我的职业是什么", "我是做什么工作的", "我的工作是什么", "你知道我做什么工作吗", "我做什么职业"),
            "职业是{v}",
            "你的职业是{v}。",
            "你的职业",
        ),
        Wording(
            ("I work as {v}", "my job is {v}", "I'm working as {v}", "I am {v} by profession"),
            (
                "What is my job",
                "What do I do for a living",
                "Do you know my job",
                "What do I work as",
                "What is my profession",
            ),
            "works as {v}",
            "You work as {v}.",
            "your job",
        ),
    ),
    Kind(
        "allergy",
        _listed("allergy"),
        Wording(
            ("我对{v}过敏", "对{v}过敏", "我{v}过敏", "我不能碰{v}，会过敏"),
            (
                "我对什么过敏",
                "我有什么过敏",
                "你记得我对什么过敏吗",
                "我不能吃什么，会过敏的",
                "我过敏的是什么",
            ),
            "对{v}过敏",
            "你对{v}过敏。",
            "你对什么过敏",
        ),
        Wording(
            ("I am allergic to {v}", "I'm allergic to {v}", "I have an allergy to {v}"),
            (
                "What am I allergic to",
                "Which allergy do I have",
                "Do you remember my allergy",
                "Do you know what I am allergic to",
                "What is my allergy",
            ),
            "is allergic to {v}",
            "You are allergic to {v}.",
            "what you are allergic to",
        ),
    ),
    Kind(
        "condition",
        _listed("condition"),
        Wording(
            ("我有{v}", "我得了{v}", "我患有{v}", "医生说我有{v}"),
            ("我有什么病", "我得了什么病", "你记得我有什么病吗", "我患有什么疾病", "我的病是什么"),
            "有{v}",
            "你有{v}。",
            "你有什么病",
        ),
        Wording(
            ("I have {v}", "I suffer from {v}", "my doctor says that I have {v}", "I was diagnosed with {v}"),
            (
                "Which disease do I have",
                "What do I suffer from",
                "Do you remember my illness",
                "What is my condition",
                "What illness do I have",
            ),
            "has {v}",
            "You have {v}.",
            "which illness you have",
        ),
    ),
    Kind(
        "blood",
        lambda rng, _language, _held_out: rng.choice(_BLOOD),
        Wording(
            ("我的血型是{v}型", "我是{v}型血", "血型{v}型"),
            ("我是什么血型", "我的血型是什么", "你记得我的血型吗", "我血型是哪种"),
            "血型是{v}型",
            "你的血型是{v}型。",
            "你的血型",
        ),
        Wording(
            ("my blood type is {v}", "I have blood type {v}", "my blood group is {v}"),
            (
                "What is my blood type",
                "Which blood type do I have",
                "Do you know my blood group",
                "Do you remember my blood type",
            ),
            "has blood type {v}",
            "Your blood type is {v}.",
            "your blood type",
        ),
    ),
    Kind(
        "birthday",
        _open(_birthday),
        Wording(
            ("我的生日是{v}", "我{v}过生日", "生日是{v}", "我是{v}出生的"),
            ("我的生日是哪天", "我什么时候过生日", "我生日几号", "你记得我的生日吗", "我哪天生日"),
            "生日是{v}",
            "你的生日是{v}。",
            "你的生日",
        ),
        Wording(
            ("my birthday is on {v}", "I was born on {v}", "my birthday is {v}"),
            (
                "When is my birthday",
                "When was I born",
                "Do you remember my birthday",
                "What day is my birthday",
            ),
            "was born on {v}",
            "Your birthday is on {v}.",
            "your birthday",
        ),
    ),
    Kind(
        "hobby",
        _listed("hobby"),
        Wording(
            ("我喜欢{v}", "我的爱好是{v}", "平时喜欢{v}", "我爱{v}"),
            ("我喜欢什么", "我的爱好是什么", "我平时喜欢做什么", "你记得我的爱好吗", "我有什么爱好"),
            "喜欢{v}",
            "你喜欢{v}。",
            "你的爱好",
        ),
        Wording(
            ("I like {v}", "my hobby is {v}", "I enjoy {v}", "I love {v}"),
            (
                "What is my hobby",
                "What do I like",
                "What do I enjoy",
                "Do you remember my hobby",
                "What do I like to do",
            ),
            "likes {v}",
            "You like {v}.",
            "your hobby",
        ),
    ),
    Kind(
        "food",
        _listed("food"),
        Wording(
            ("我最爱吃{v}", "我最喜欢吃{v}", "最爱吃{v}", "我特别爱吃{v}"),
            ("我最爱吃什么", "我喜欢吃什么", "我最喜欢的食物是什么", "你记得我爱吃什么吗", "我爱吃什么"),
            "最爱吃{v}",
            "你最爱吃{v}。",
            "你爱吃什么",
        ),
        Wording(
            ("my favourite food is {v}", "I love to eat {v}", "I like to eat {v} best"),
            (
                "What is my favourite food",
                "What do I like to eat",
                "What do I love to eat",
                "Do you remember my favourite food",
            ),
            "loves to eat {v}",
            "You love to eat {v}.",
            "your favourite food",
        ),
    ),
    Kind(
        "pet",
        _open(_pet),
        Wording(
            ("我养了{v}", "我有{v}", "家里养了{v}", "我家有{v}"),
            ("我养了什么宠物", "我的宠物是什么", "我的宠物叫什么", "你记得我的宠物吗", "我家养了什么"),
            "养了{v}",
            "你养了{v}。",
            "你的宠物",
        ),
        Wording(
            ("I have {v}", "my pet is {v}", "at home I have {v}"),
            ("What pet do I have", "What is my pet called", "Do you know my pet", "Do you remember my pet"),
            "has {v}",
            "You have {v}.",
            "your pet",
        ),
    ),
    Kind(
        "goal",
        _open(_goal),
        Wording(
            ("我的目标是{v}", "我想{v}", "我打算{v}", "目标是{v}"),
            ("我的目标是什么", "我想达到什么目标", "我打算做什么", "你记得我的目标吗", "我的目标是啥"),
            "目标是{v}",
            "你的目标是{v}。",
            "你的目标",
        ),
        Wording(
            ("my goal is to {v}", "I want to {v}", "I plan to {v}", "I would like to {v}"),
            (
                "What is my goal",
                "What do I want to do",
                "What do I plan to do",
                "Do you remember my goal",
                "What are my plans",
            ),
            "wants to {v}",
            "Your goal is to {v}.",
            "your goal",
        ),
    ),
)

BY_NAME = {kind.name: kind for kind in KINDS}
Facts = dict[str, str]
"""Kind → value."""


def clauses(facts: Facts, language: Language) -> list[str]:
    """What is known, in the fixed order of the kinds."""
    return [kind.wording(language).clause.format(v=facts[kind.name]) for kind in KINDS if kind.name in facts]


def draw(rng: random.Random, kind: Kind, language: Language, held_out: bool = False) -> str:
    return kind.pool(rng, language, held_out)


def tell(rng: random.Random, told: Facts, language: Language) -> str:
    """One sentence in the first person with all of these facts, in their order."""
    parts = [
        rng.choice(BY_NAME[name].wording(language).tells).format(v=value) for name, value in told.items()
    ]
    if language == "zh":
        opening = rng.choice(("", "", "", "", "你好，", "记住，", "顺便说一下，", "对了，", "告诉你，"))
        return opening + "，".join(parts) + rng.choice(("。", "。", "", "！"))
    opening = rng.choice(
        ("", "", "", "", "Hi, ", "By the way, ", "Please remember: ", "Note that ", "Just so you know, ")
    )
    text = (
        parts[0]
        if len(parts) == 1
        else ", ".join(parts[:-1]) + rng.choice((" and ", ", ", ", and ")) + parts[-1]
    )
    text = opening + text
    return text[0].upper() + text[1:] + rng.choice((".", ".", "", "!"))


def acknowledge(told: Facts, language: Language) -> str:
    """The answer to `tell`: it repeats what it has understood, in the order of the kinds."""
    ordered = [kind for kind in KINDS if kind.name in told]
    if language == "zh":
        parts = [kind.zh.clause.format(v=told[kind.name]) for kind in ordered]
        return "好的，我记住了：你" + "，".join(parts) + "。"
    parts = [kind.en.answer.format(v=told[kind.name])[:-1] for kind in ordered]
    return "Got it: " + ", ".join(part[0].lower() + part[1:] for part in parts) + "."


def answer(kind: Kind, facts: Facts, language: Language) -> str:
    """The answer to a question about a fact, also when it was never told."""
    wording = kind.wording(language)
    if kind.name in facts:
        return wording.answer.format(v=facts[kind.name])
    return (
        f"你还没有告诉我{wording.unknown}。"
        if language == "zh"
        else f"You have not told me {wording.unknown}."
    )
