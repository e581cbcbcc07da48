"""A reader's place in a stream, decided without any connection."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import (
    Event,
    Failed,
    Finished,
    InvalidRequest,
    RedisUnavailable,
    Started,
    StreamGone,
    Token,
    UnknownRequest,
    encode_event,
)
from producer.ledger import Entry, Followed, State
from producer.streams import Outage, Push, StreamCursor, parse_push


def token(index: int, num_ids: int = 1) -> Token:
    ids = tuple(range(index - num_ids + 1, index + 1))
    return Token(index=index, ids=ids, texts=tuple(f"<{i}>" for i in ids))


def entry(place: str, event: Event) -> Entry:
    return Entry(place, encode_event(event))


def followed(*entries: Entry, state: State = "running", last_id: str | None = None) -> Followed:
    return Followed(state, last_id or (entries[-1].id if entries else "0-0"), list(entries))


STREAM = [
    entry("0-1", Started(attempt=1, worker="a")),
    entry("1-0", token(1)),
    entry("4-0", token(4, 3)),
    entry("4-2", Started(attempt=2, worker="b")),
    entry("6-0", token(6, 2)),
    entry("6-3", Finished(reason="stop", text="<1><2><3><4><5><6>")),
]


def pushes(entries: Sequence[Entry]) -> list[Push]:
    places = ["0-0", *(each.id for each in entries)]
    return [Push(before, each.id, each.event) for before, each in zip(places, entries, strict=False)]


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def test_pushes_that_follow_one_another_are_given_at_once() -> None:
    cursor = StreamCursor("r")
    assert cursor.read(followed()) == []
    events = [event for push in pushes(STREAM) for event in cursor.push(push)]
    assert [encode_event(event) for event in events] == [each.event for each in STREAM]
    assert cursor.is_done


def test_a_missing_push_makes_the_cursor_read_and_nothing_is_lost_or_doubled() -> None:
    for missing in range(len(STREAM) - 1):
        cursor = StreamCursor("r")
        cursor.read(followed())
        events: list[Event] = []
        for number, push in enumerate(pushes(STREAM)):
            if number == missing:
                continue
            events += cursor.push(push)
            if cursor.wants_read:
                unread = [each for each in STREAM[: number + 1] if STREAM.index(each) >= len(events)]
                events += cursor.read(followed(*unread, state="done" if number == 5 else "running"))
        assert [encode_event(event) for event in events] == [each.event for each in STREAM]


@pytest.mark.parametrize("after", range(7))
def test_a_reader_resumes_behind_any_token_also_in_the_middle_of_an_event(after: int) -> None:
    cursor = StreamCursor("r", after)
    [index, number] = map(int, cursor.position.split("-"))
    unread = [each for each in STREAM if tuple(map(int, each.id.split("-"))) > (index, number)]
    events = cursor.read(followed(*unread, state="done"))
    assert texts(events) == "".join(f"<{i}>" for i in range(after + 1, 7))
    assert isinstance(events[-1], Finished)
    assert cursor.is_done


@pytest.mark.parametrize("after", range(1, 6))
def test_a_reader_that_resumes_by_push_gets_the_rest_of_an_event(after: int) -> None:
    cursor = StreamCursor("r", after)
    cursor.read(followed())
    events = [event for push in pushes(STREAM) for event in cursor.push(push)]
    assert texts(events) == "".join(f"<{i}>" for i in range(after + 1, 7))


@given(st.data())
def test_whatever_is_lost_doubled_or_late_each_event_comes_once_and_in_order(data: st.DataObject) -> None:
    after = data.draw(st.integers(0, 6))
    cursor = StreamCursor("r", after)
    written = 0
    events: list[Event] = []
    while not cursor.is_done:
        if cursor.wants_read:
            unread = [
                each
                for each in STREAM[:written]
                if tuple(map(int, each.id.split("-"))) > tuple(map(int, cursor.position.split("-")))
            ]
            state: State = "done" if written == len(STREAM) else "running"
            last = STREAM[written - 1].id if written else "0-0"
            events += cursor.read(followed(*unread, state=state, last_id=last))
            continue
        written = min(written + data.draw(st.sampled_from([3, 2, 1, 0])), len(STREAM))
        # Simple examples come to their end quickly: the first choices are those that go on.
        if written and data.draw(st.sampled_from([True, False])):
            number = data.draw(st.integers(0, written - 1))
            events += cursor.push(pushes(STREAM)[number])
        if data.draw(st.sampled_from([True, False])):
            cursor.interrupted()
    assert texts(events) == "".join(f"<{i}>" for i in range(after + 1, 7))
    if after == 0:
        assert [encode_event(event) for event in events] == [each.event for each in STREAM]


def test_what_is_unknown_is_told_from_what_is_gone() -> None:
    with pytest.raises(UnknownRequest):
        StreamCursor("r").read(None)
    with pytest.raises(StreamGone):
        StreamCursor("r", after=3).read(None)
    with pytest.raises(StreamGone):
        StreamCursor("r").read(Followed("done", "6-3", []))


def test_a_stream_without_its_beginning_is_gone() -> None:
    with pytest.raises(StreamGone):
        StreamCursor("r").read(followed(*STREAM[2:]))


def test_a_token_index_beyond_the_answer_is_an_error_and_not_an_endless_wait() -> None:
    with pytest.raises(InvalidRequest, match="after: 9 is beyond the answer's 6 tokens"):
        StreamCursor("r", after=9).read(Followed("done", "6-3", []))


@pytest.mark.parametrize("after", [-1, True, 1.0, "1"])
def test_only_a_token_index_can_be_resumed_from(after: object) -> None:
    with pytest.raises(InvalidRequest, match="after"):
        StreamCursor("r", after)  # type: ignore[arg-type]


def test_a_failed_request_ends_its_stream() -> None:
    cursor = StreamCursor("r")
    cursor.read(followed())
    assert cursor.push(Push("0-0", "0-2", encode_event(Failed(code="c", message="m"))))
    assert cursor.is_done


def test_the_longer_it_is_silent_the_rarer_it_reads() -> None:
    cursor = StreamCursor("r")
    cursor.read(followed())
    waits = []
    for _ in range(6):
        waits.append(cursor.wait_seconds)
        cursor.silent()
        assert cursor.wants_read
        cursor.read(followed())
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    # A lost connection says nothing about how busy the request is.
    cursor.interrupted()
    cursor.read(followed())
    assert cursor.wait_seconds == 8.0
    cursor.push(pushes(STREAM)[0])
    assert cursor.wait_seconds == 1.0


def test_a_message_has_a_line_for_each_event_whatever_its_text() -> None:
    events = [encode_event(Token(index=1, ids=(1,), texts=(text,))) for text in ("\u2028\x85", "\t\n")]
    message = "\n".join(f"r{i}\t0-1\t1-0\t{event}" for i, event in enumerate(events))
    assert list(parse_push(message)) == [
        (f"r{i}", Push("0-1", "1-0", event)) for i, event in enumerate(events)
    ]
    assert list(parse_push("")) == []


def test_a_server_that_was_never_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    error = RedisUnavailable("somewhere", "refused")
    with pytest.raises(RedisUnavailable):
        Outage(60).pause(error)

    outage = Outage(60)
    outage.over()
    assert outage.pause(error) > 0
    now = 159.0
    assert outage.pause(error) > 0
    outage.over()
    now = 200.0
    assert outage.pause(error) > 0
    now = 261.0
    with pytest.raises(RedisUnavailable):
        outage.pause(error)
