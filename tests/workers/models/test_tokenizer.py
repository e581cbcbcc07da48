"""The tokenizer against the original's vectors, and what it does differently on purpose."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from workers.models.config import CheckpointError, ModelConfig
from workers.models.pieces import PieceModel, PieceType
from workers.models.tokenizer import (
    Tokenizer,
    chat_text,
    clean_up_spaces,
    process_response,
    split_utf8,
)

TYPED_SPECIALS = ("<sop>", "<eop>", "<unk>", "<pad>", "[MASK]", "<n>", "<|tab|>", "<|blank_")
"""In a user's text the original takes these for the tokens; here they are text."""


def has_typed_special(text: str) -> bool:
    return any(special in text for special in TYPED_SPECIALS)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


@pytest.fixture(scope="module")
def pieces(tiny_checkpoint) -> PieceModel:
    return PieceModel((tiny_checkpoint / "ice_text.model").read_bytes())


@pytest.fixture(scope="module")
def processor(tiny_checkpoint) -> SentencePieceProcessor:
    """sentencepiece itself on the same file."""
    return SentencePieceProcessor(model_file=str(tiny_checkpoint / "ice_text.model"))


def test_ids_equal_the_originals_but_for_typed_special_tokens(golden):
    differing = []
    for vector in golden.tokenizer_data["tokenizer"]:
        ids = golden.tokenizer.encode_prompt(vector["text"])
        assert golden.tokenizer.encode(vector["text"]) == ids[:-2]
        if ids != vector["ids"]:
            differing.append(vector["text"])
    assert len(golden.tokenizer_data["tokenizer"]) == 92
    assert differing == [
        vector["text"] for vector in golden.tokenizer_data["tokenizer"] if has_typed_special(vector["text"])
    ]


def test_decoded_text_equals_the_originals(golden):
    for vector in golden.tokenizer_data["tokenizer"]:
        assert golden.tokenizer.decode(vector["ids"]) == vector["decode_ids"]
        assert golden.tokenizer.decode(vector["ids_no_special"]) == vector["decode_no_special"]
    for vector in golden.tokenizer_data["decode"]:
        assert golden.tokenizer.decode(vector["ids"]) == vector["decode"]
    for prompt in golden.data["prompts"]:
        assert golden.tokenizer.decode(prompt["greedy_new_ids"]) == prompt["decoded"]


def test_prompts_and_responses_equal_the_originals(golden):
    for vector in golden.tokenizer_data["prompts"]:
        assert chat_text(vector["query"], vector["history"]) == vector["chatglm1"]
    for vector in golden.tokenizer_data["process_response"]:
        assert process_response(vector["in"]) == vector["out"]
    for prompt in golden.data["prompts"]:
        assert golden.tokenizer.process_response(prompt["decoded"]) == prompt["response"]
        if not has_typed_special(prompt["prompt"]):
            ids = golden.tokenizer.build_prompt(prompt["query"], prompt["history"])
            assert ids == prompt["input_ids"]


def test_special_ids_equal_the_originals(golden):
    expected = golden.tokenizer_data["special_ids"]
    ours = golden.tokenizer
    assert (ours.bos_id, ours.eos_id, ours.mask_id, ours.gmask_id, ours.pad_id) == tuple(
        expected[piece] for piece in ("<sop>", "<eop>", "[MASK]", "[gMASK]", "<pad>")
    )


def test_an_id_that_no_piece_has_cannot_be_decoded(golden):
    for id_ in (golden.tokenizer.end_id, -1, 10**9):
        with pytest.raises(ValueError, match=str(id_)):
            golden.tokenizer.decode([id_])
    assert golden.tokenizer.end_id == golden.tokenizer_data["meta"]["lens"]["len_tok"]


FRAGMENTS = [
    *TYPED_SPECIALS,
    *("[gMASK]", "[sMASK]", "<s>", "</s>", "<ENC>", "<dBLOCK>", "<|blank_2|>", "<|blank_80|>", "<0x0A>"),
    # The same in full width, which the normalizer turns into ASCII.
    *("＜n＞", "＜sop＞", "［gMASK］", "＜|tab|＞"),
    *("\n", "\t", " ", "  ", " " * 83, "\r", "\x00", "\u2028", "你好", "a", "，", "n", ">", "<", "|"),
    *("\U0010f800", "\n\U0010f800", "\ud800", "🙂", "▁", "\u0301"),
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join))
def test_text_never_makes_a_special_token(tokenizer, pieces, text):
    ids = tokenizer.encode(text)
    kinds = {pieces.pieces[id_].type for id_ in ids}
    assert kinds <= {PieceType.NORMAL, PieceType.BYTE, PieceType.USER_DEFINED}
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.gmask_id, tokenizer.mask_id}.intersection(ids)
    # A line end is never typed in another way either.
    assert [tokenizer.surfaces[id_] for id_ in ids].count("\n") == text.count("\n")
    assert [tokenizer.surfaces[id_] for id_ in ids].count("\t") == text.count("\t")
    user_defined = [
        pieces.pieces[id_].text for id_ in ids if pieces.pieces[id_].type is PieceType.USER_DEFINED
    ]
    assert len(user_defined) == len(re.findall("\n|\t| {2,80}", text))


def original_encode(processor: SentencePieceProcessor, text: str) -> list[int]:
    """As the original does it, without its search for special tokens."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return processor.encode(text)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([f for f in FRAGMENTS if f != "\ud800"]) | st.text(max_size=3), max_size=9))
def test_any_other_text_gets_the_originals_ids(tokenizer, processor, fragments):
    text = "".join(fragments)
    if any(piece in text.replace("＜", "<").replace("＞", ">") for piece in ("<n>", "<|tab|>", "<|blank_")):
        return
    assert tokenizer.encode(text) == original_encode(processor, text)


def test_typed_special_tokens_come_back_as_they_were_typed(golden):
    for text in ("<n>", "a<sop>b", "[MASK]", "x <|tab|> y", "<|blank_2|>", "＜n＞"):
        decoded = golden.tokenizer.decode(golden.tokenizer.encode(text))
        assert decoded == text.replace("＜", "<").replace("＞", ">")


def original_decode(processor: SentencePieceProcessor, ids: list[int], pad_id: int) -> str:
    text = processor.decode([id_ for id_ in ids if id_ != pad_id])
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    for length in range(80, 1, -1):
        text = text.replace(f"<|blank_{length}|>", " " * length)
    return clean_up_spaces(text)


@settings(deadline=None, max_examples=400)
@given(
    numbers=st.lists(st.tuples(st.sampled_from(["any", "first", "byte"]), st.integers(0, 10**6)), max_size=12)
)
def test_any_ids_decode_as_sentencepiece_joins_them(golden, numbers):
    tokenizer = golden.tokenizer
    first_byte = golden.processor.piece_to_id("<0x00>")
    choices = {"any": (0, tokenizer.end_id), "first": (0, 10), "byte": (first_byte, 256)}
    ids = [choices[kind][0] + number % choices[kind][1] for kind, number in numbers]
    assert tokenizer.decode(ids) == original_decode(golden.processor, ids, tokenizer.pad_id)


@settings(max_examples=500)
@given(st.binary(max_size=8) | st.text(max_size=4).map(lambda text: text.encode("utf-8", "ignore")))
def test_bytes_become_characters_as_soon_as_they_are_complete(data):
    held, text = b"", ""
    for byte in data:
        piece, held = split_utf8(held + bytes([byte]))
        assert len(held) < 4
        text += piece
    whole, rest = split_utf8(data)
    assert (text, held) == (whole, rest)
    try:
        assert whole == data[: len(data) - len(rest)].decode("utf-8")
    except UnicodeDecodeError:
        assert "\ufffd" in whole


def test_the_first_releases_ids_are_shifted_by_its_image_tokens(tiny_checkpoint, tokenizer):
    pieces = PieceModel((tiny_checkpoint / "ice_text.model").read_bytes())
    first = Tokenizer(pieces, {"bos": tokenizer.bos_id + 20000, "eos": tokenizer.eos_id + 20000})
    prompt = first.build_prompt("你好, hello\n", [("a", "b")])
    assert prompt == [id_ + 20000 for id_ in tokenizer.build_prompt("你好, hello\n", [("a", "b")])]
    assert first.decode(prompt) == tokenizer.decode([id_ - 20000 for id_ in prompt])
    assert (first.first_id, first.end_id) == (20000, 20000 + len(pieces))
    with pytest.raises(ValueError, match="19999"):
        first.decode([19999])


def test_a_config_that_contradicts_the_pieces_is_refused(tiny_checkpoint, tmp_path):
    fields = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "ice_text.model").write_bytes((tiny_checkpoint / "ice_text.model").read_bytes())
    wrong = {"eos_token_id": 9, "bos_token_id": 1, "vocab_size": 300, "gmask_token_id": 7}
    for field, value in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
        with pytest.raises(CheckpointError, match=field) as raised:
            Tokenizer.from_folder(tmp_path)
        assert "same release" in str(raised.value)


def test_a_missing_or_damaged_model_file_is_named(tiny_checkpoint, tmp_path):
    config = ModelConfig.from_folder(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"ice_text\.model.*does not exist"):
        Tokenizer.from_folder(tmp_path, config)
    model = (tiny_checkpoint / "ice_text.model").read_bytes()
    for damaged in (b"", b"not a model", model[: len(model) // 2], b"\xff" * 50):
        (tmp_path / "ice_text.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"ice_text\.model"):
            Tokenizer.from_folder(tmp_path, config)


def test_the_tokenizer_needs_no_torch(tiny_checkpoint):
    code = (
        "import sys; from workers.models.tokenizer import Tokenizer; import workers.engine.client;"
        "import workers.engine.detokenizer, workers.engine.messages, workers.models.config;"
        f"Tokenizer.from_folder({str(tiny_checkpoint)!r}).encode('你好'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
