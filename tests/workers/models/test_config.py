from __future__ import annotations

import json

import pytest

from workers.models.config import CheckpointError, ModelConfig


@pytest.fixture
def fields(tiny_checkpoint) -> dict:
    return json.loads((tiny_checkpoint / "config.json").read_text())


def test_a_released_config_is_read(golden):
    config = ModelConfig.from_folder(golden.folder)
    fields = json.loads((golden.folder / "config.json").read_text())
    assert (config.hidden_size, config.num_layers) == (fields["hidden_size"], fields["num_layers"])
    assert config.tie_word_embeddings
    assert config.special_ids["gmask"] == fields["gmask_token_id"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("num_layers", "3"),
        ("vocab_size", True),
        ("vocab_size", 2.5),
        ("layernorm_epsilon", -1),
        ("torch_dtype", "int8"),
        ("num_attention_heads", 7),
        ("model_type", "llama"),
        ("position_encoding_2d", False),
        ("pre_seq_len", 128),
        ("bos_token_id", "x"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(fields, field, value):
    with pytest.raises(CheckpointError, match=field) as raised:
        ModelConfig.from_fields({**fields, field: value}, "somewhere/config.json")
    assert str(raised.value).startswith("somewhere/config.json: ")
    assert raised.value.remedy


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: the file does not exist"):
        ModelConfig.from_folder(tmp_path)
