"""The judges of the chaos suite: whatever goes wrong with a stream must be found."""

from __future__ import annotations

import time

import pytest

from producer.contract import ChatRequest, Event, Failed, Finished, SamplingParams, Started, Token, Usage
from tests.chaos.readers import Heard, Stream
from tests.chaos.strikes import Strike, longest_gap, rows
from tests.chaos.undisturbed import Undisturbed
from tests.chaos.verdicts import Kept, Verdict, judge

REQUEST = ChatRequest(
    query="hello", sampling=SamplingParams(temperature=0.0, seed=1, max_new_tokens=6, min_new_tokens=6)
)


class KeptEvents(Kept):
    """What a server would have kept."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def events(self, request_id: str) -> list[Event]:
        return self._events

    def field(self, request_id: str, name: str) -> str | None:
        return "done"


@pytest.fixture
def whole(undisturbed: Undisturbed) -> list[Event]:
    """The events of an undisturbed answer, two tokens each."""
    [answer] = undisturbed.answers([REQUEST])
    tokens = [
        Token(index=end, ids=answer.ids[end - 2 : end], texts=answer.texts[end - 2 : end])
        for end in (2, 4, 6)
    ]
    finished = Finished(reason="length", text=answer.text, usage=Usage(completion_tokens=6))
    return [Started(attempt=1, worker="a"), *tokens, finished]


def _stream(events: list[Event], begin: float = 0.0, step: float = 0.1) -> Stream:
    stream = Stream(REQUEST, "r", begin)
    stream.heard = [Heard(begin + number * step, event) for number, event in enumerate(events)]
    return stream


def _judge(undisturbed: Undisturbed, heard: list[Event], kept: list[Event]) -> Verdict:
    [verdict] = judge([_stream(heard)], KeptEvents(kept), undisturbed)
    return verdict


def test_a_whole_answer_is_right_also_after_a_takeover(undisturbed: Undisturbed, whole: list[Event]) -> None:
    events = [*whole[:2], Started(attempt=2, worker="b"), *whole[2:]]

    verdict = _judge(undisturbed, events, events)

    assert (verdict.lost, verdict.duplicated, verdict.differences) == ([], [], [])


def test_tokens_that_are_missing_are_found_at_the_reader_and_at_the_server(
    undisturbed: Undisturbed, whole: list[Event]
) -> None:
    broken = [*whole[:2], *whole[3:]]

    assert "the reader: tokens 3 to 4 are missing" in _judge(undisturbed, broken, whole).lost
    assert _judge(undisturbed, whole, broken).lost == ["the server's stream: tokens 3 to 4 are missing"]


def test_tokens_that_come_twice_are_found_at_the_reader_and_at_the_server(
    undisturbed: Undisturbed, whole: list[Event]
) -> None:
    doubled = [*whole[:3], whole[2], *whole[3:]]

    assert "the reader: tokens 3 to 4 come twice" in _judge(undisturbed, doubled, whole).duplicated
    assert _judge(undisturbed, whole, doubled).duplicated == ["the server's stream: tokens 3 to 4 come twice"]
    assert _judge(undisturbed, whole, [*whole, whole[-1]]).duplicated == [
        "the server's stream: finished after the end"
    ]


def test_an_answer_without_an_end_or_with_a_failure_is_lost(
    undisturbed: Undisturbed, whole: list[Event]
) -> None:
    failed: list[Event] = [*whole[:2], Failed(code="internal_error", message="no")]

    assert _judge(undisturbed, whole[:-1], whole[:-1]).lost == ["no end; its state is done"]
    assert _judge(undisturbed, failed, failed).lost == ["failed: internal_error: no"]


def test_a_text_that_is_not_that_of_its_tokens_is_found(undisturbed: Undisturbed, whole: list[Event]) -> None:
    end = whole[-1]
    assert isinstance(end, Finished)
    changed = [*whole[:-1], end.model_copy(update={"text": end.text + "!"})]

    lost = _judge(undisturbed, changed, changed).lost

    assert lost == [
        "the finished text is not that of the tokens",
        "the ids are the undisturbed answer's, but the text is another",
    ]


def test_another_token_is_a_difference(undisturbed: Undisturbed, whole: list[Event]) -> None:
    last = whole[-2]
    assert isinstance(last, Token)
    other = next(id_ for id_ in range(20, 40) if id_ not in last.ids)
    changed = [*whole[:-2], last.model_copy(update={"ids": (last.ids[0], other)}), whole[-1]]

    verdict = _judge(undisturbed, changed, changed)

    assert verdict.differences[0].index == 6
    assert verdict.is_beyond_noise


def test_a_gap_counts_for_the_strike_that_hit_the_stream(whole: list[Event]) -> None:
    stream, other = _stream(whole), _stream([Started(attempt=1, worker="b"), *whole[1:]])
    stream.heard[3:] = [Heard(heard.at + 2.5, heard.event) for heard in stream.heard[3:]]
    strike = Strike("death", frozenset({"a"}), bound=2.0, at=0.25)
    early = Strike("earlier", frozenset({"a"}), bound=2.0, at=-1.0)

    assert strike.hits(stream)
    assert not strike.hits(other)
    assert not early.hits(stream)
    assert longest_gap(stream, strike, float("inf"))[0] == pytest.approx(2.6)
    found = {row.event: row for row in rows([early, strike], [Verdict(stream), Verdict(other)])}
    assert (found["death"].num_streams, found["death"].num_late, found["death"].is_right) == (1, 1, False)
    assert found["earlier"].num_late == 0


def test_a_stream_that_waits_for_ever_has_a_gap_until_now(whole: list[Event]) -> None:
    now = time.monotonic()
    stream = _stream(whole[:3], begin=now - 50)
    strike = Strike("death", None, bound=3.0, at=now - 49.85)

    assert longest_gap(stream, strike, float("inf"))[0] == pytest.approx(49.8, abs=1)


def test_what_is_wrong_with_a_stream_breaks_the_row_of_the_strike_that_hit_it(whole: list[Event]) -> None:
    strike = Strike("death", None, bound=9.0, at=0.15)
    verdict = Verdict(_stream(whole), lost=["a token"])

    [row] = rows([strike], [verdict])

    assert (row.num_lost, row.is_right) == (1, False)
    assert "a token" in row.problems[0]
