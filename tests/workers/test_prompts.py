"""Prompts within the context, in the language of the text, and refusals that say what to do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from producer.contract import ChatRequest, SamplingParams, SummaryRequest, Turn
from workers.prompts import Prompts, Refusal, is_mostly_han, summary_query

SEEDED = SamplingParams(seed=7)


class CharacterTokenizer:
    """One token a character, two special ones at the end: lengths can be counted by eye."""

    def build_prompt(self, query: str, history: Iterable[tuple[str, str]] = ()) -> list[int]:
        text = "".join(question + answer for question, answer in history) + query
        return [ord(character) for character in text] + [-1, -2]


@pytest.fixture
def prompts() -> Prompts:
    return Prompts(CharacterTokenizer(), context_len=100, adapters=frozenset({"fitness", "law"}))


def test_an_answer_without_a_limit_may_fill_the_context(prompts: Prompts) -> None:
    prompt = prompts.build(ChatRequest(query="x" * 38, sampling=SEEDED))

    assert len(prompt.ids) == 40
    assert prompt.sampling.max_new_tokens == 60


def test_a_limit_that_the_context_cannot_hold_is_clamped(prompts: Prompts) -> None:
    sampling = SamplingParams(seed=7, max_new_tokens=20_000, min_new_tokens=90)

    prompt = prompts.build(ChatRequest(query="x" * 38, sampling=sampling))

    assert prompt.sampling.max_new_tokens == 60
    assert prompt.sampling.min_new_tokens == 60


def test_a_limit_that_fits_is_kept(prompts: Prompts) -> None:
    prompt = prompts.build(ChatRequest(query="x", sampling=SamplingParams(seed=7, max_new_tokens=9)))

    assert prompt.sampling.max_new_tokens == 9


def test_a_prompt_may_leave_one_token_for_the_answer_but_not_none(prompts: Prompts) -> None:
    assert prompts.build(ChatRequest(query="x" * 97, sampling=SEEDED)).sampling.max_new_tokens == 1

    with pytest.raises(Refusal) as refused:
        prompts.build(ChatRequest(query="x" * 98, sampling=SEEDED))

    assert refused.value.code == "context_exceeded"
    assert refused.value.message.startswith("query: the prompt has 100 tokens, and the context of 100 ")


def test_a_history_that_does_not_fit_is_told_from_a_query_that_does_not(prompts: Prompts) -> None:
    history = (Turn("q" * 40, "a" * 40), Turn("q", "a"))

    with pytest.raises(Refusal) as refused:
        prompts.build(ChatRequest(query="x" * 20, history=history, sampling=SEEDED))

    assert refused.value.code == "context_exceeded"
    assert refused.value.message.startswith("history: the prompt has 104 tokens")
    assert "the query alone makes 22" in refused.value.message
    assert "oldest of the 2 turns" in refused.value.message


def test_a_text_that_is_too_long_to_summarize_at_once_is_refused(prompts: Prompts) -> None:
    with pytest.raises(Refusal) as refused:
        prompts.build(SummaryRequest(text="文" * 200, sampling=SEEDED))

    assert refused.value.code == "context_exceeded"
    assert refused.value.message.startswith("text: ")


def test_an_unknown_adapter_is_refused_with_the_known_ones(prompts: Prompts) -> None:
    with pytest.raises(Refusal) as refused:
        prompts.build(ChatRequest(query="x", adapter="poetry", sampling=SEEDED))

    assert refused.value.code == "unknown_adapter"
    assert "'poetry' is not loaded here (loaded: fitness, law)" in refused.value.message


def test_a_known_adapter_goes_to_the_engine(prompts: Prompts) -> None:
    assert prompts.build(ChatRequest(query="x", adapter="law", sampling=SEEDED)).adapter == "law"


@pytest.mark.parametrize(
    ("text", "style", "query"),
    [
        ("今天天气很好。", "paragraph", "请为下面的文字写一段摘要：\n今天天气很好。"),
        ("今天天气很好。", "bullets", "请用要点概括下面的文字：\n今天天气很好。"),
        ("今天天气很好。", "title", "请为下面的文字起一个标题：\n今天天气很好。"),
        (
            "Nice weather.",
            "paragraph",
            "Summarize the following text in one paragraph:\nNice weather.",
        ),
        ("Nice weather.", "bullets", "Summarize the following text as bullet points:\nNice weather."),
        ("Nice weather.", "title", "Write a title for the following text:\nNice weather."),
        ("{style} {text} {0}", "title", "Write a title for the following text:\n{style} {text} {0}"),
    ],
)
def test_a_summary_is_asked_for_in_the_language_of_its_text(text: str, style: str, query: str) -> None:
    assert summary_query(SummaryRequest(text=text, style=style)) == query  # type: ignore[arg-type]


def test_the_language_is_that_of_most_letters() -> None:
    assert is_mostly_han("他用 Python 写了一个很长的程序")
    assert not is_mostly_han("The word 天气 means weather")
    assert not is_mostly_han("1234 !?")


@pytest.mark.parametrize(
    ("max_length", "max_new_tokens", "resolved"),
    [(20, None, 20), (20, 10, 10), (20, 30, 20), (5000, None, 42)],
)
def test_a_summary_is_at_most_max_length_tokens_long(
    prompts: Prompts, max_length: int, max_new_tokens: int | None, resolved: int
) -> None:
    sampling = SamplingParams(seed=7, max_new_tokens=max_new_tokens)

    prompt = prompts.build(SummaryRequest(text="今" * 42, max_length=max_length, sampling=sampling))

    assert prompt.sampling.max_new_tokens == resolved
