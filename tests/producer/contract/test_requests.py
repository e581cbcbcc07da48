"""What a request may be, and what is said when it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import (
    ChatRequest,
    InvalidRequest,
    SamplingParams,
    SummaryRequest,
    Turn,
    decode_request,
    encode_request,
)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"query": 7}, "query", "Send a value of type string"),
        ({"query": None}, "query", "Send a value of type string"),
        ({"query": ""}, "query", "Give at least 1"),
        ({"query": " \n "}, "query", "is blank"),
        ({}, "query", "Give it a value"),
        ({"query": "q", "qurey": "q"}, "qurey", "Remove it, or put it into metadata"),
        ({"query": "q", "priority": 11}, "priority", "Use 9 or less"),
        ({"query": "q", "priority": -1}, "priority", "Use 0 or more"),
        ({"query": "q", "priority": "5"}, "priority", "Send a value of type int"),
        ({"query": "q", "priority": True}, "priority", "Send a value of type int"),
        ({"query": "q", "tenant": "a b"}, "tenant", "Use a value that matches"),
        ({"query": "q", "tenant": "a\n"}, "tenant", "Use a value that matches"),
        ({"query": "q", "model": "{x}"}, "model", "Use a value that matches"),
        ({"query": "q", "deadline_seconds": 0}, "deadline_seconds", "Use a value above 0"),
        ({"query": "q", "deadline_seconds": float("nan")}, "deadline_seconds", "finite"),
        ({"query": "q", "metadata": {"a": 1}}, "metadata.a", "Send a value of type string"),
        ({"query": "q", "version": 2}, "version", "Use 1"),
        ({"query": "q", "history": [["only a question"]]}, "history.0.1", "Give it a value"),
        ({"query": "q", "history": [["one", "two", "three"]]}, "history.0", "Give at most 2"),
        ({"query": "q", "history": ["text"]}, "history.0", "Send a value of type [query, answer]"),
        (
            {"query": "q", "history": [["q", "a"], ["q", 1]]},
            "history.1.answer",
            "Send a value of type string",
        ),
        ({"query": "q", "history": "text"}, "history", "Send a value of type list"),
        ({"query": "q", "sampling": {"top_p": 2.0}}, "sampling.top_p", "Use 1.0 or less"),
        ({"query": "q", "sampling": {"temprature": 1}}, "sampling.temprature", "Remove it"),
        (
            {"query": "q", "sampling": {"logit_bias": {"7": 101.0}}},
            "sampling.logit_bias.7",
            "Use 100.0 or less",
        ),
        ({"query": "q", "sampling": {"stop": ["a", ""]}}, "sampling.stop.1", "Give at least 1"),
        ({"query": "q", "sampling": {"seed": 2**63}}, "sampling.seed", "Use a value below"),
        (
            {"query": "q", "sampling": {"min_new_tokens": 9, "max_new_tokens": 8}},
            "sampling",
            "min_new_tokens 9 is above max_new_tokens 8",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_path_and_a_remedy(
    fields: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest(**fields)
    assert caught.value.field == field
    assert says in str(caught.value)

    body = json.dumps({"kind": "chat", **fields})
    with pytest.raises(InvalidRequest) as decoded:
        decode_request(body)
    assert decoded.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "t", "style": "poem"}, "style"),
        ({"text": "t", "max_length": 7}, "max_length"),
        ({"text": "\t"}, "text"),
        ({"text": "t", "query": "q"}, "query"),
    ],
)
def test_a_wrong_field_of_a_summary_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SummaryRequest(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "Send valid JSON"),
        ("{", "Send valid JSON"),
        ("[]", "request: "),
        ("{}", "Set kind to 'chat' or 'summary'"),
        ('{"kind": "poem"}', "Set kind to 'chat' or 'summary'"),
    ],
)
def test_a_body_that_is_no_request_is_refused_with_a_remedy(body: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        decode_request(body)


def test_an_error_is_both_ours_and_a_value_error() -> None:
    with pytest.raises(ValueError, match="priority: "):
        ChatRequest(query="q", priority=11)


def test_a_request_cannot_be_changed_only_replaced_and_is_validated_again() -> None:
    request = ChatRequest(query="q", history=(Turn("a", "b"),))
    assert request.replace(priority=0).priority == 0
    assert request.replace(query="other").history == (Turn("a", "b"),)
    with pytest.raises(InvalidRequest, match="priority"):
        request.replace(priority=10)
    with pytest.raises(Exception, match="frozen"):
        request.priority = 1  # type: ignore[misc]


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1000),
    stop=st.lists(texts, max_size=3).map(tuple),
    seed=st.none() | st.integers(0, 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, 130_000), st.floats(-100, 100), max_size=3),
)
requests = st.one_of(
    st.builds(
        ChatRequest,
        query=texts.filter(str.strip),
        history=st.lists(st.builds(Turn, texts, texts), max_size=3).map(tuple),
        sampling=samplings,
        priority=st.integers(0, 9),
        metadata=st.dictionaries(texts, texts, max_size=2),
        deadline_seconds=st.none() | st.floats(0.001, 86400),
    ),
    st.builds(
        SummaryRequest,
        text=texts.filter(str.strip),
        style=st.sampled_from(["paragraph", "bullets", "title"]),
        max_length=st.integers(8, 2000),
        sampling=samplings,
    ),
)


@given(requests)
def test_a_request_survives_the_wire(request_: ChatRequest | SummaryRequest) -> None:
    assert decode_request(encode_request(request_)) == request_
