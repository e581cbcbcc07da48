"""What can be set for a tenant, and the estimate of what a request takes."""

from __future__ import annotations

import pytest

from producer.contract import (
    ChatRequest,
    FoldRequest,
    InvalidRequest,
    SamplingParams,
    SummaryRequest,
    encode_request,
)
from producer.contract.requests import Request
from producer.contract.tenants import TenantSettings, check_tenant_name, estimate_tokens


def estimate(request: Request) -> int:
    return estimate_tokens(request, encode_request(request))


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (ChatRequest(query="q"), 256),
        (ChatRequest(query="q", sampling=SamplingParams(max_new_tokens=20)), 20),
        (ChatRequest(query="q", sampling=SamplingParams(max_new_tokens=2000)), 256),
        (SummaryRequest(text="t", max_length=64), 64),
        (SummaryRequest(text="t", max_length=1000), 256),
        (SummaryRequest(text="t", max_length=64, sampling=SamplingParams(max_new_tokens=16)), 16),
        (FoldRequest(conversation_id="c", first=0), 256),
    ],
)
def test_an_answer_counts_as_long_as_it_may_become_and_256_tokens_at_most(
    request_: Request, answer: int
) -> None:
    assert answer < estimate(request_) < answer + 50


def test_chinese_and_english_text_count_about_what_the_tokenizer_makes_of_them() -> None:
    few = SamplingParams(max_new_tokens=1)
    chinese = "感冒是一种常见的呼吸道疾病，多喝水，注意休息，必要时去医院看医生。" * 30
    english = (
        "A cold is a common illness of the airways. Drink water, rest, and see a doctor if need be. " * 30
    )
    for text, tokens_per_character in ((chinese, 0.7), (english, 0.25)):
        tokens = estimate(ChatRequest(query=text, sampling=few))
        assert tokens == pytest.approx(len(text) * tokens_per_character, rel=0.2)


@pytest.mark.parametrize(
    "values",
    [
        {"weight": 0},
        {"weight": 101},
        {"weight": float("nan")},
        {"max_running": -1},
        {"max_queued": 1.5},
        {"shares": 1},
    ],
)
def test_a_setting_out_of_range_names_itself(values: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(values))):
        TenantSettings.of(**values)


def test_only_what_is_set_is_written() -> None:
    assert TenantSettings.of(weight=2, max_running=None).encode() == '{"weight":2.0}'
    assert TenantSettings().encode() == "{}"


@pytest.mark.parametrize("name", ["", "a b", "a|b", "x" * 129])
def test_a_name_that_no_request_can_carry_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="tenant"):
        check_tenant_name(name)
