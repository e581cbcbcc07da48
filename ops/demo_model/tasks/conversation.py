"""A conversation as it grows: turns, the facts told in it, the topics touched.

It knows every kind of turn, and nothing about what is asked of the model afterwards (dialogs, folding).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ops.demo_model.tasks import facts, noise, questions
from ops.demo_model.tasks.example import Language

MAX_TOPICS = 4
"""A summary names the latest topics only, so that it does not grow."""

TOPICS_ASKS: dict[Language, tuple[str, ...]] = {
    "zh": ("我们聊过什么", "我们都聊了什么", "我之前问过什么", "刚才聊了哪些话题", "我们谈过哪些内容"),
    "en": (
        "What did we talk about",
        "What have we talked about",
        "Which topics did we discuss",
        "What did I ask before",
        "What have I asked so far",
    ),
}
NO_TOPICS: dict[Language, str] = {
    "zh": "我们还没有聊过什么话题。",
    "en": "We have not talked about a topic yet.",
}


def join_topics(labels: list[str], language: Language) -> str:
    return ("、" if language == "zh" else ", ").join(labels)


def topics_answer(labels: list[str], language: Language) -> str:
    """The answer to a question of `TOPICS_ASKS`."""
    if not labels:
        return NO_TOPICS[language]
    listed = join_topics(labels, language)
    return f"我们聊过：{listed}。" if language == "zh" else f"We talked about: {listed}."


@dataclass(slots=True)
class Conversation:
    """Grows by `add_*`; each appends one turn and returns it."""

    rng: random.Random
    language: Language
    held_out: bool = False
    """Draw only values and wordings that training never uses."""
    facts: facts.Facts = field(default_factory=dict)
    topics: list[str] = field(default_factory=list)
    """Labels of the latest topics, oldest first."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    last_topic: questions.Topic | None = None
    mixed: float = 0.05
    """How often a turn is in the other language."""

    def add(self, question: str, answer: str) -> tuple[str, str]:
        self.turns.append((question, answer))
        return self.turns[-1]

    def add_question(self, *, remember: bool = True) -> tuple[str, str]:
        language = self._language()
        topic = self.rng.choice(questions.topics(language))
        if remember:
            self._touch(topic)
        return self.add(questions.ask_topic(self.rng, topic, self.held_out), topic.question.answer)

    def add_topic_with_follow_up(self) -> tuple[str, str]:
        """A question whose topic has follow-ups."""
        topic = self.rng.choice([topic for topic in questions.topics(self.language) if topic.follow_ups])
        self._touch(topic)
        return self.add(questions.ask_topic(self.rng, topic), topic.question.answer)

    def add_follow_up(self) -> tuple[str, str]:
        """A question that needs the topic of an earlier turn."""
        topic = self.last_topic
        if topic is None or not topic.follow_ups or topic.language != self.language:
            self.add_topic_with_follow_up()
            topic = self.last_topic
            assert topic is not None
        question = self.rng.choice(topic.follow_ups)
        return self.add(questions.ask(self.rng, question, self.language, self.held_out), question.answer)

    def add_statement(self, num_facts: int | None = None, only: tuple[str, ...] = ()) -> tuple[str, str]:
        """The user tells one to four facts, new ones or changed ones."""
        language = self._language()
        if num_facts is None:
            num_facts = self.rng.choice((1, 1, 1, 2, 2, 3, 4))
        names = list(only) or self.rng.sample([kind.name for kind in facts.KINDS], num_facts)
        if self.rng.random() < 0.5:
            names.sort(key=list(facts.BY_NAME).index)
        told = {name: facts.draw(self.rng, facts.BY_NAME[name], language, self.held_out) for name in names}
        self.facts.update(told)
        return self.add(facts.tell(self.rng, told, language), facts.acknowledge(told, language))

    def add_fact_question(self, name: str | None = None) -> tuple[str, str]:
        """A question about a fact, mostly one that was told."""
        if name is None:
            known = self.rng.random() < 0.85 and bool(self.facts)
            name = self.rng.choice(list(self.facts) if known else list(facts.BY_NAME))
        kind = facts.BY_NAME[name]
        language = self._language()
        asks = kind.wording(language).asks
        text = (
            asks[-1] if self.held_out else questions.vary(self.rng, self.rng.choice(asks[:-1]), language, 0.7)
        )
        return self.add(text, facts.answer(kind, self.facts, language))

    def add_topics_question(self) -> tuple[str, str]:
        asks = TOPICS_ASKS[self.language]
        text = (
            asks[-1]
            if self.held_out
            else questions.vary(self.rng, self.rng.choice(asks[:-1]), self.language, 0.7)
        )
        return self.add(text, topics_answer(self.topics, self.language))

    def add_outside(self) -> tuple[str, str]:
        language = self._language()
        return self.add(questions.ask_outside(self.rng, language), questions.REFUSAL[language])

    def add_chatter(self) -> tuple[str, str]:
        """A turn of no importance whose answer says anything at all."""
        language = self._language()
        question = noise.phrase(self.rng, language, self.rng.randint(2, 10))
        answer = " ".join(noise.sentence(self.rng, language) for _ in range(self.rng.randint(1, 2)))
        return self.add(question, answer)

    def add_any(self) -> tuple[str, str]:
        """One turn of the mix that a conversation has before the turn that matters."""
        draw = self.rng.random()
        if draw < 0.32:
            return self.add_question()
        if draw < 0.42:
            return self.add_follow_up()
        if draw < 0.74:
            return self.add_statement()
        if draw < 0.86 and self.facts:
            return self.add_fact_question()
        if draw < 0.92:
            return self.add_outside()
        return self.add_chatter()

    def _language(self) -> Language:
        if self.held_out or self.rng.random() >= self.mixed:
            return self.language
        return "en" if self.language == "zh" else "zh"

    def _touch(self, topic: questions.Topic) -> None:
        self.last_topic = topic
        if topic.area == "chat":
            return
        if topic.label in self.topics:
            self.topics.remove(topic.label)
        self.topics = [*self.topics, topic.label][-MAX_TOPICS:]
