"""Pieces, joined, are the whole text, whatever the ids; and no piece is given out too early."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.detokenizer import StreamDetokenizer
from workers.models.tokenizer import TRAINING_TIME, Tokenizer

# Pieces that the clean-ups look at, in one piece or spread over several.
TROUBLE = {
    *(
        "'",
        "n",
        "t",
        "n't",
        "s",
        "m",
        "v",
        "e",
        "r",
        "re",
        "ve",
        "'s",
        "'m",
        "'re",
        "'ve",
        "",
        ".",
        "?",
        "!",
        ",",
    ),
    *(
        ":",
        ";",
        "[",
        "[[",
        "]",
        "]]",
        "训练",
        "时间",
        "训",
        "练",
        "时",
        "间",
        "你",
        "年",
        "a",
        "\n",
        "  ",
        "\t",
    ),
}


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


GOLDEN_MODELS = ("chatglm-6b-tiny", "chatglm-6b-realvocab", "chatglm2-6b-tiny", "chatglm2-6b-realvocab")


@pytest.fixture(scope="module", params=["tiny", *GOLDEN_MODELS])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "tiny":
        return request.getfixturevalue("tiny_tokenizer")
    return Tokenizer.from_folder(request.getfixturevalue("golden_root") / request.param)


@pytest.fixture(scope="module")
def pools(tokenizer) -> list[list[int]]:
    """Ids to draw from: troublesome ones three times as often as bytes, special tokens and anything."""
    trouble = [
        tokenizer.first_id + piece
        for piece, surface in enumerate(tokenizer.surfaces)
        if surface in TROUBLE or surface.strip(" ") in TROUBLE
        if surface
    ]
    bytes_ = [tokenizer.first_id + piece for piece, byte in enumerate(tokenizer.byte_values) if byte >= 0]
    special = [
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        *range(tokenizer.first_id, tokenizer.first_id + 6),
    ]
    return [trouble, trouble, trouble, bytes_, special, list(range(tokenizer.first_id, tokenizer.end_id))]


DRAWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), max_size=14)


def ids_of(pools: list[list[int]], draws: list[tuple[int, int]]) -> list[int]:
    return [pools[pool][number % len(pools[pool])] for pool, number in draws]


def pieces_of(detokenizer: StreamDetokenizer, ids: Sequence[int]) -> list[str]:
    return [detokenizer.add(id_) for id_ in ids]


def whole_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.process_response(tokenizer.decode(ids))


@settings(deadline=None, max_examples=500)
@given(draws=DRAWS)
def test_the_pieces_of_any_ids_are_the_whole_text(tokenizer, pools, draws):
    ids = ids_of(pools, draws)
    detokenizer = StreamDetokenizer(tokenizer)
    pieces = pieces_of(detokenizer, ids)
    assert "".join(pieces) + detokenizer.finish() == whole_text(tokenizer, ids)


@settings(deadline=None, max_examples=250)
@given(draws=DRAWS, more=DRAWS)
def test_no_continuation_takes_anything_back(tokenizer, pools, draws, more):
    ids = ids_of(pools, draws)
    given_out = "".join(pieces_of(StreamDetokenizer(tokenizer), ids))
    assert whole_text(tokenizer, ids + ids_of(pools, more)).startswith(given_out)


@settings(deadline=None, max_examples=250)
@given(draws=DRAWS, cut=st.integers(0, 14), stop=st.sampled_from([(), ("'s",), ("年", "\n")]))
def test_a_resumed_detokenizer_gives_the_same_pieces(tokenizer, pools, draws, cut, stop):
    ids = ids_of(pools, draws)
    whole = StreamDetokenizer(tokenizer, stop)
    pieces = pieces_of(whole, ids)
    resumed = StreamDetokenizer(tokenizer, stop, ids[:cut])
    assert pieces_of(resumed, ids[cut:]) == pieces[cut:]
    assert resumed.finish() == whole.finish()


STOPS = st.lists(
    st.sampled_from(
        ["'s", "n't", "你", "年", "[[", "。", "\n", "\n\n", "a,", " t", "，", "训练时", "问：", "nn"]
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=400)
@given(draws=DRAWS, stop=STOPS)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(tokenizer, pools, draws, stop):
    ids = ids_of(pools, draws)
    detokenizer = StreamDetokenizer(tokenizer, stop)
    text = "".join(pieces_of(detokenizer, ids)) + detokenizer.finish()
    # White space at the end is part of the answer for a stop string, though not for the reader.
    sentinel = "\u2603"
    full = tokenizer.process_response(tokenizer.decode(ids) + sentinel).removesuffix(sentinel)
    ends = [(full.index(one) + len(one), full.index(one)) for one in stop if one in full]
    if ends and detokenizer.is_stopped:
        assert text == full[: min(ends)[1]].rstrip()
    else:
        assert not ends
        assert text == whole_text(tokenizer, ids)


def test_golden_answers_come_in_pieces(golden_root):
    for name in GOLDEN_MODELS:
        data = json.loads((golden_root / name / "golden_model.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_folder(golden_root / name)
        for prompt in data["prompts"]:
            detokenizer = StreamDetokenizer(tokenizer)
            pieces = pieces_of(detokenizer, prompt["greedy_new_ids"])
            assert "".join(pieces) + detokenizer.finish() == prompt["response"]


def test_text_comes_at_once_when_nothing_can_change_it_any_more(tiny_tokenizer):
    ids = tiny_tokenizer.encode("深蹲的时候膝盖不要超过脚尖。多喝水、多休息")
    detokenizer = StreamDetokenizer(tiny_tokenizer)
    for number, id_ in enumerate(ids, start=1):
        given_out = detokenizer.add(id_)
        is_complete = tiny_tokenizer.byte_values[id_] < 0
        assert bool(given_out) or not is_complete or number == 1
    words = tiny_tokenizer.encode("What is the capital of France")
    for number in range(len(words)):
        detokenizer = StreamDetokenizer(tiny_tokenizer, (), words[:number])
        assert len(detokenizer.finish()) <= 3


def test_an_incomplete_character_is_held_back(tiny_tokenizer):
    ids = tiny_tokenizer.encode("a🙂b")
    detokenizer = StreamDetokenizer(tiny_tokenizer)
    pieces = pieces_of(detokenizer, ids)
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_marks_wait_for_their_right_neighbour_only_when_it_matters(tiny_tokenizer):
    encode = tiny_tokenizer.encode
    detokenizer = StreamDetokenizer(tiny_tokenizer)
    assert "".join(pieces_of(detokenizer, encode("你,"))) == "你，"
    detokenizer = StreamDetokenizer(tiny_tokenizer)
    assert "".join(pieces_of(detokenizer, encode("a,"))) == "a"
    assert detokenizer.finish() == ","


def test_the_training_time_is_replaced_however_it_is_cut(tiny_tokenizer):
    ids = tiny_tokenizer.encode(f"数据更新于{TRAINING_TIME}:[[训练")
    detokenizer = StreamDetokenizer(tiny_tokenizer)
    text = "".join(pieces_of(detokenizer, ids))
    assert text == "数据更新于2023年："
    assert detokenizer.finish() == "[[训练"


def test_nothing_follows_a_stop_string(tiny_tokenizer):
    detokenizer = StreamDetokenizer(tiny_tokenizer, ("问：",))
    pieces = pieces_of(detokenizer, tiny_tokenizer.encode("你好 \n问：再见"))
    assert "".join(pieces) == "你好"
    assert detokenizer.is_stopped
    assert set(pieces_of(detokenizer, tiny_tokenizer.encode("再见"))) == {""}
    assert detokenizer.finish() == ""


def test_the_end_token_has_no_text_and_an_id_outside_the_pieces_is_an_error(tokenizer):
    detokenizer = StreamDetokenizer(tokenizer)
    assert detokenizer.add(tokenizer.eos_id) == ""
    with pytest.raises(ValueError, match="no token"):
        detokenizer.add(tokenizer.end_id)


def test_a_token_costs_a_few_microseconds(tiny_tokenizer):
    """10 microseconds on an idle machine, for a step of hundreds of sequences; five times that on a busy one."""
    ids = tiny_tokenizer.encode(
        "In 2023, I can't say that it's good. 你好，我是人工智能助手。\n1. 多喝水\n" * 50
    )
    best = float("inf")
    for _ in range(5):
        detokenizer = StreamDetokenizer(tiny_tokenizer)
        started = time.perf_counter()
        for id_ in ids:
            detokenizer.add(id_)
        best = min(best, (time.perf_counter() - started) / len(ids))
    assert best < 50e-6
