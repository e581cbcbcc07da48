"""Where a text may be cut: Chinese and English sentences, and what to do without any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.splitting import pack, sentences, split


def words(text: str) -> int:
    """As many tokens as words: so a joined text has one less where a word was cut."""
    return len(text.split())


@pytest.mark.parametrize(
    "expected",
    [
        ["今天下雨。", "我们在家！", "你呢？", "好；", "再见……", "走了。"],
        ["他说：“我不去。”", "她走了。"],
        ["（见下文。）", "下一句。"],
        ["真的吗？！", "是的。"],
        ["It rained. ", "We stayed! ", "Did you? ", "Yes."],
        ["Dr. Smith met Mrs. Jones at 3.14 p.m. on St. Mary's Road. ", "They left."],
        ["J. R. R. Tolkien wrote it, e.g. in Fig. 3 of Vol. 2, i.e. here. ", "End."],
        ["The U.S. team won. ", "It was vs. Brazil."],
        ['He asked: "Why?" ', "(Nobody knew.) ", "So it was."],
        ["Wait... what was that? ", "Nothing."],
        ["It is what I. ", "Then he left."],
        ["version 2.0.1 came out at example.com yesterday. ", "Try it."],
        ["A heading\n\n", "A paragraph without an end\n \n", "Another"],
        ["One line\nand the next. ", "End"],
        ["混合 text。", "Then English. ", "然后中文。"],
    ],
)
def test_a_sentence_ends_where_a_reader_would_say(expected: list[str]) -> None:
    assert sentences("".join(expected)) == expected


@given(st.text(alphabet='aZ1 .!?。！；…\n"”)，,字', max_size=200))
def test_sentences_joined_are_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text


@given(st.text(alphabet="ab .!?。！；…\n”，,字\u0301", max_size=200), st.integers(2, 30))
def test_pieces_joined_are_the_text_and_none_is_too_long(text: str, limit: int) -> None:
    pieces = split(text, len, limit)
    assert all(len(piece) <= limit for piece in pieces)
    assert all(piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_pieces_are_about_the_same_size() -> None:
    text = "".join(f"Sentence {number:02}. " for number in range(25))
    sizes = [words(piece) for piece in split(text, words, 24)]
    assert sizes == [18, 18, 14]


def test_a_sentence_that_is_too_long_is_cut_at_lines_then_commas_then_spaces_then_anywhere() -> None:
    assert split("aaaa aaaa\nbbbb bbbb", len, 10) == ["aaaa aaaa\n", "bbbb bbbb"]
    assert split("aaaa aaaa, bbbb bbbb", len, 11) == ["aaaa aaaa, ", "bbbb bbbb"]
    assert split("一二三四，五六七八", len, 6) == ["一二三四，", "五六七八"]
    assert split("aaaa bbbb cccc", len, 5) == ["aaaa ", "bbbb ", "cccc"]
    assert split("abcdefghij", len, 5) == ["abcde", "fghij"]


def test_a_mark_stays_with_its_letter() -> None:
    assert split("aaae\u0301bb", len, 4) == ["aaa", "e\u0301bb"]


def test_a_character_that_is_too_long_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="'x' alone has more than 3 tokens"):
        split("xx", lambda text: 4 * len(text), 3)


def test_whole_texts_are_joined_in_order_to_as_few_as_hold_them() -> None:
    assert pack(["aa\n", "bb\n", "cc\n", "dd\n"], len, 6) == ["aa\nbb\n", "cc\ndd\n"]


def test_tokens_that_depend_on_what_stands_beside_them_are_counted_joined() -> None:
    """Each part counts two more by itself than joined, as with a tokenizer that puts a space first."""

    def count(text: str) -> int:
        return len(text) + 2

    pieces = split("aaa. " * 40, count, 52)
    assert [len(piece) for piece in pieces] == [50, 50, 50, 50]


def test_a_text_of_a_million_characters_without_a_place_to_cut_takes_few_counts() -> None:
    num_counted = 0

    def count(text: str) -> int:
        nonlocal num_counted
        num_counted += len(text)
        return len(text)

    pieces = split("x" * 1_000_000, count, 1000)
    assert len(pieces) <= 1_020
    assert num_counted < 30_000_000
