"""What a service that speaks only Celery may send, and what it is told when it is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from producer.contract import ChatRequest, InvalidRequest, SummaryRequest, Turn
from workers.tasks import carries_request, request_of


def test_keyword_arguments_are_the_fields_of_a_chat_request() -> None:
    kwargs = {
        "query": "再说一遍",
        "history": [["你好", "你好！"]],
        "sampling": {"temperature": 0, "stop": ["。"], "logit_bias": {"5": 1}},
        "priority": 1,
    }

    request = request_of("glmq.chat", [], kwargs, model="chatglm-6b")

    assert isinstance(request, ChatRequest)
    assert request.model == "chatglm-6b"
    assert request.history == (Turn("你好", "你好！"),)
    assert request.sampling.stop == ("。",)
    assert request.sampling.logit_bias == {5: 1.0}
    assert request.priority == 1


def test_keyword_arguments_are_the_fields_of_a_summary_request() -> None:
    request = request_of("glmq.summarize", [], {"text": "A text.", "style": "title"}, model="chatglm-6b")

    assert isinstance(request, SummaryRequest)
    assert request.style == "title"


@pytest.mark.parametrize(
    ("args", "kwargs", "field"),
    [
        ([], {}, "query"),
        ([], {"query": "   "}, "query"),
        ([], {"query": 3}, "query"),
        ([], {"query": "x", "priority": 11}, "priority"),
        ([], {"query": "x", "colour": "red"}, "colour"),
        ([], {"query": "x", "sampling": {"temperature": "hot"}}, "sampling.temperature"),
        ([], {"query": "x", "model": "another"}, "model"),
        ([], {"query": "x", "kind": "summary"}, "kind"),
        (["x"], {}, "args"),
    ],
)
def test_wrong_arguments_are_refused_by_the_name_of_their_field(
    args: list[Any], kwargs: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request_of("glmq.chat", args, kwargs, model="chatglm-6b")

    assert refused.value.field == field
    assert refused.value.remedy


def test_a_ticket_carries_no_request() -> None:
    assert not carries_request("glmq.next")
    assert carries_request("glmq.chat")
    assert carries_request("glmq.summarize")
