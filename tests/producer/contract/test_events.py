"""Events on the wire, and an event that a reader has half of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import (
    Event,
    Failed,
    Finished,
    NewTokens,
    Progress,
    Started,
    Timings,
    Token,
    Usage,
    decode_event,
    encode_event,
    encode_tokens,
)

any_text = st.text(st.characters(exclude_categories=("Cs",)))


@pytest.mark.parametrize(
    "event",
    [
        Progress(level=2, done=3, total=17),
        Started(attempt=1, worker="gpu-0", prompt_tokens=12),
        Token(index=3, ids=(5, 130000), texts=("多喝", "")),
        Finished(
            reason="length",
            text="多喝",
            usage=Usage(prompt_tokens=3, completion_tokens=2),
            timings=Timings(queue_seconds=0.25, first_token_seconds=0.5, total_seconds=1.5),
            attempts=2,
        ),
        Failed(code="context_exceeded", message="It is too long."),
    ],
)
def test_an_event_survives_the_wire(event: Event) -> None:
    assert decode_event(encode_event(event)) == event


@given(any_text)
def test_an_event_is_one_line_without_tabs_whatever_the_text(text: str) -> None:
    event = Token(index=1, ids=(1,), texts=(text,))
    line = encode_event(event)
    assert not {"\n", "\t", "\r"} & set(line)
    assert decode_event(line) == event


@given(st.lists(st.tuples(st.integers(0, 150_527), any_text), min_size=1, max_size=4))
def test_what_a_worker_has_made_goes_over_the_wire_as_the_event_that_its_readers_know(
    tokens: list[tuple[int, str]],
) -> None:
    ids, texts = zip(*tokens, strict=True)
    assert encode_tokens(NewTokens(9, ids, texts)) == encode_event(Token(index=9, ids=ids, texts=texts))


def test_a_later_version_s_extra_fields_are_ignored() -> None:
    assert decode_event('{"type":"failed","code":"x","message":"y","hint":"z"}') == Failed(
        code="x", message="y"
    )


@pytest.mark.parametrize(
    ("after", "ids", "texts"),
    [(0, (1, 2, 3), "abc"), (4, (1, 2, 3), "abc"), (5, (2, 3), "bc"), (6, (3,), "c")],
)
def test_a_token_event_can_be_cut_for_a_reader_that_has_its_beginning(
    after: int, ids: tuple[int, ...], texts: str
) -> None:
    cut = Token(index=7, ids=(1, 2, 3), texts=("a", "b", "c")).after(after)
    assert (cut.index, cut.ids, cut.text) == (7, ids, texts)
