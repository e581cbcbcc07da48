"""ChatGLM2-6B's network and tokenizer against the original code's own results."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from workers.models import kernels
from workers.models.batch import KVCache
from workers.models.chatglm2 import ChatGLM2
from workers.models.config import CheckpointError, ModelConfig
from workers.models.layers import pair_rotary_tables
from workers.models.layout import CausalLayout
from workers.models.loader import load_model
from workers.models.prefill import pack_sequences
from workers.models.tokenizer import ChatGLM2Tokenizer, Tokenizer, rounds_text


def pack(*prompts: list[int]):
    return pack_sequences(prompts, [CausalLayout()] * len(prompts))


def small_config(**changes) -> ModelConfig:
    fields = {"hidden_size": 32, "inner_hidden_size": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    grouped = {"model_type": "chatglm2", "kv_channels": 16, "num_kv_groups": 2, "tie_word_embeddings": False}
    return ModelConfig(**{**fields, **grouped, **changes})


def random_model(config: ModelConfig) -> ChatGLM2:
    torch.manual_seed(1)
    model = ChatGLM2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@torch.inference_mode()
def test_prompt_logits_equal_the_originals_at_every_position(golden2):
    prompts = [prompt["input_ids"] for prompt in golden2.data["prompts"]]
    batch = pack(*prompts)
    logits = golden2.model(batch, all_positions=True)
    assert len(prompts) == 13
    for index, prompt in enumerate(golden2.data["prompts"]):
        own = logits[batch.query_starts[index] : batch.query_starts[index + 1]]
        expected = golden2.tensor(f"prompt{index}.logits")
        torch.testing.assert_close(golden2.columns(own), expected, atol=1e-3, rtol=0)
        assert own.argmax(-1).tolist() == prompt["argmax_per_position"]


@torch.inference_mode()
def test_keys_of_a_wrong_layout_would_be_noticed(golden2, monkeypatch):
    attend = kernels.attend_prefill

    def swapped(q, k, v, *rest):
        return attend(q, k.flatten(1).roll(1, dims=1).view_as(k), v, *rest)

    monkeypatch.setattr("workers.models.kernels.attend_prefill", swapped)
    logits = golden2.model(pack(golden2.data["prompts"][8]["input_ids"]))
    assert (golden2.columns(logits) - golden2.tensor("prompt8.logits")[-1]).abs().max() > 0.01


@torch.inference_mode()
def test_rows_of_a_batch_equal_the_originals_padded_batch(golden2):
    mask = golden2.tensor("batch.attention_mask").bool().tolist()
    prompts = [
        [id_ for id_, is_real in zip(ids, row, strict=True) if is_real]
        for ids, row in zip(golden2.data["batch"]["input_ids"], mask, strict=True)
    ]
    assert len({len(prompt) for prompt in prompts}) > 1
    expected = golden2.tensor("batch.logits").squeeze(1)
    torch.testing.assert_close(golden2.columns(golden2.model(pack(*prompts))), expected, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_a_long_prompt_equals_the_originals(golden2):
    ids = golden2.tokenizer.encode_prompt(golden2.data["long_prompt"]["prompt"])
    assert ids == golden2.data["long_prompt"]["input_ids"]
    logits = golden2.model(pack(ids), all_positions=True)
    expected = golden2.tensor("long.last8.logits")
    torch.testing.assert_close(golden2.columns(logits[-8:]), expected, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_half_precision_is_rounded_as_the_original_rounds(golden2):
    model = load_model(golden2.folder, dtype=torch.float16)
    logits = model(pack(golden2.data["prompts"][8]["input_ids"]))
    assert logits.dtype == torch.float16
    # Other products of matrices may add up in another order.
    tolerance = golden2.data["half"]["max_abs_diff_fp16_vs_fp32_last"]
    expected = golden2.tensor("fp16cpu.prompt8.last_logits")
    torch.testing.assert_close(golden2.columns(logits.float()), expected, atol=tolerance, rtol=0)


@torch.inference_mode()
def test_bfloat16_is_as_near_as_its_three_bits_less_allow(golden2):
    model = load_model(golden2.folder, dtype=torch.bfloat16)
    logits = model(pack(golden2.data["prompts"][8]["input_ids"]))
    assert logits.dtype == torch.bfloat16
    tolerance = 32 * golden2.data["half"]["max_abs_diff_fp16_vs_fp32_last"]
    expected = golden2.tensor("prompt8.logits")[-1:]
    torch.testing.assert_close(golden2.columns(logits.float()), expected, atol=tolerance, rtol=0)


@torch.inference_mode()
def test_decoding_with_a_cache_gives_the_logits_of_one_long_prefill():
    model = random_model(small_config())
    prompt, answer = [5, 6, 7, 50, 51], [9, 10, 11, 12, 13, 14]
    expected = model(pack(prompt + answer), all_positions=True)[len(prompt) - 1 :]
    # What no sequence has written yet is finite, as in an engine, and must not be seen.
    cache = KVCache(*(torch.full((2, 6, 2, 4, 16), 1e6) for _ in range(2)))
    blocks = [4, 2, 5]
    slots = torch.tensor([blocks[i // 4] * 4 + i % 4 for i in range(len(prompt + answer))])

    batch = pack(prompt)
    batch.slots = slots[: len(prompt)]
    logits = [model(batch, cache)]
    for index, id_ in enumerate(answer, start=len(prompt)):
        batch.is_prefill = False
        batch.token_ids = torch.tensor([id_])
        batch.positions = torch.tensor([[index], [0]])
        batch.slots = slots[index : index + 1]
        batch.kv_lens = torch.tensor([index + 1], dtype=torch.int32)
        batch.block_tables = torch.tensor([blocks], dtype=torch.int32)
        batch.max_kv_len = index + 1
        logits.append(model(batch, cache))

    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)


def test_training_reaches_every_parameter():
    model = random_model(small_config())
    logits = model(pack([5, 6, 50, 51, 9], [7, 50, 51, 8]), all_positions=True)
    assert logits.shape == (9, 60)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "weight" in name)


def test_a_decode_without_a_cache_is_refused():
    batch = pack([5, 50, 51])
    batch.is_prefill = False
    with pytest.raises(ValueError, match="cache"):
        random_model(small_config())(batch)


def test_angles_are_rounded_where_the_original_rounds_them():
    device = torch.device("cpu")
    exact, _ = pair_rotary_tables(700, 128, torch.float32, device)
    rounded, _ = pair_rotary_tables(700, 128, torch.float16, device)
    wide, _ = pair_rotary_tables(700, 128, torch.bfloat16, device)
    assert torch.equal(rounded, rounded.half().float())
    assert 1e-3 < (rounded - exact).abs().max() < 1
    assert torch.equal(wide, exact)


# --- config ----------------------------------------------------------------------------------------------------------


def test_a_released_config_is_read(golden2):
    config = golden2.config
    assert (config.model_type, config.tie_word_embeddings) == ("chatglm2", False)
    assert config.num_kv_heads < config.num_heads
    assert (
        config.head_dim * config.num_heads
        == golden2.model.transformer.encoder.layers[0].self_attention.dense.in_features
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rmsnorm", False),
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("rope_ratio", 50),
        ("multi_query_group_num", 3),
        ("multi_query_attention", "yes"),
        ("padded_vocab_size", 0),
        ("kv_channels", 6),
        ("ffn_hidden_size", None),
        ("seq_length", 1 << 40),
        ("pre_seq_len", 128),
        ("quantization_bit", 3),
    ],
)
def test_a_field_that_cannot_be_used_is_named(golden2, field, value):
    fields = json.loads((golden2.folder / "config.json").read_text())
    name = "head of 6" if field == "kv_channels" else field
    with pytest.raises(CheckpointError, match=name) as raised:
        ModelConfig.from_fields({**fields, field: value}, "somewhere/config.json")
    assert str(raised.value).startswith("somewhere/config.json: ")


def test_without_grouped_attention_every_head_has_its_own_keys(golden2):
    fields = json.loads((golden2.folder / "config.json").read_text())
    config = ModelConfig.from_fields({**fields, "multi_query_attention": False})
    assert config.num_kv_heads == config.num_heads


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_ids_equal_the_originals(golden2):
    tokenizer = golden2.tokenizer
    assert isinstance(tokenizer, ChatGLM2Tokenizer)
    assert len(golden2.tokenizer_data["tokenizer"]) == 92
    for vector in golden2.tokenizer_data["tokenizer"]:
        assert tokenizer.encode_prompt(vector["text"]) == vector["ids"]
        assert tokenizer.encode(vector["text"]) == vector["ids_no_special"]


def test_decoded_text_equals_the_originals(golden2):
    for vector in golden2.tokenizer_data["tokenizer"]:
        assert golden2.tokenizer.decode(vector["ids"]) == vector["decode_ids"]
        assert golden2.tokenizer.decode(vector["ids_no_special"]) == vector["decode_no_special"]
    for vector in golden2.tokenizer_data["decode"]:
        assert golden2.tokenizer.decode(vector["ids"]) == vector["decode"]
    for prompt in golden2.data["prompts"]:
        assert golden2.tokenizer.decode(prompt["greedy_new_ids"]) == prompt["decoded"]


def test_prompts_and_responses_equal_the_originals(golden2):
    for vector in golden2.tokenizer_data["prompts"]:
        assert rounds_text(vector["query"], vector["history"]) == vector["chatglm2"]
    for vector in golden2.tokenizer_data["process_response"]:
        assert golden2.tokenizer.process_response(vector["in"]) == vector["out"]
    for prompt in golden2.data["prompts"]:
        assert golden2.tokenizer.process_response(prompt["decoded"]) == prompt["response"]
        assert golden2.tokenizer.build_prompt(prompt["query"], prompt["history"]) == prompt["input_ids"]


def test_special_ids_equal_the_originals(golden2):
    expected = golden2.tokenizer_data["special_ids"]
    ours = golden2.tokenizer
    assert (
        ours.mask_id,
        ours.gmask_id,
        ours.smask_id,
        ours.bos_id,
        ours.eop_id,
        ours.eos_id,
        ours.pad_id,
    ) == tuple(expected[name] for name in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "</s>", "<unk>"))


def test_an_id_that_no_piece_has_cannot_be_decoded(golden2):
    for id_ in (golden2.tokenizer.end_id, -1):
        with pytest.raises(ValueError, match=str(id_)):
            golden2.tokenizer.decode([id_])
    assert golden2.tokenizer.end_id == golden2.tokenizer_data["meta"]["lens"]["len_tok"]


def test_decoding_any_ids_joins_them_as_sentencepiece_does(golden2):
    processor = SentencePieceProcessor(model_file=str(golden2.folder / "tokenizer.model"))
    tokenizer, num_pieces = golden2.tokenizer, len(processor)
    ids = st.integers(0, 260) | st.integers(num_pieces, num_pieces + 4) | st.integers(0, num_pieces - 1)

    @settings(deadline=None, max_examples=500)
    @given(st.lists(ids, max_size=10))
    def joins(ids: list[int]) -> None:
        # The original decodes control pieces and its added tokens as empty pieces.
        pieces = ["" if id_ < 3 or id_ >= num_pieces else processor.IdToPiece(id_) for id_ in ids]
        assert tokenizer.decode(ids) == processor.DecodePieces(pieces)

    joins()


TYPED = (
    "[gMASK]",
    "sop",
    "eop",
    "</s>",
    "<s>",
    "<unk>",
    "[MASK]",
    "<0x0A>",
    "\n",
    "\t",
    "  ",
    "你好",
    "\ud800",
)


def test_text_never_makes_a_special_token(golden2):
    tokenizer, num_pieces = golden2.tokenizer, golden2.tokenizer.mask_id

    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.sampled_from(TYPED) | st.text(max_size=3), max_size=8).map("".join))
    def is_text(text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(3 <= id_ < num_pieces for id_ in ids)
        # Nothing is normalised: what was typed comes back.
        typed = text.encode("utf-8", "replace").decode("utf-8")
        assert tokenizer.decode(ids) == typed.replace("▁", " ") or typed.startswith((" ", "▁"))

    is_text()


def test_the_tokenizer_of_the_other_generation_is_missed_by_name(golden2, tmp_path):
    (tmp_path / "config.json").write_bytes((golden2.folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: the file does not exist"):
        Tokenizer.from_folder(tmp_path)
