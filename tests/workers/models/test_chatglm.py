"""The network against the original code's own results, and against itself where those say nothing."""

from __future__ import annotations

import pytest
import torch

from workers.models.batch import KVCache
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.layout import Layout
from workers.models.loader import load_model


def small_config(**changes) -> ModelConfig:
    fields = {"hidden_size": 32, "inner_hidden_size": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 60}
    ids = {"bos": 51, "eos": 52, "gmask": 50, "mask": 49}
    return ModelConfig(**{**fields, "special_ids": ids, **changes})


def random_model(config: ModelConfig) -> ChatGLM:
    torch.manual_seed(1)
    model = ChatGLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@torch.inference_mode()
def test_prompt_logits_equal_the_originals_at_every_position(golden, pack_prompts):
    prompts = [prompt["input_ids"] for prompt in golden.data["prompts"]]
    batch = pack_prompts(prompts, golden.config)
    logits = golden.model(batch, all_positions=True)
    for index, prompt in enumerate(golden.data["prompts"]):
        own = logits[batch.query_starts[index] : batch.query_starts[index + 1]]
        expected = golden.tensor(f"prompt{index}.logits")
        assert len(prompts) == 13
        torch.testing.assert_close(golden.columns(own), expected, atol=1e-3, rtol=0)
        assert own.argmax(-1).tolist() == prompt["argmax_per_position"]


@torch.inference_mode()
def test_a_wrong_residual_scale_would_be_noticed(golden, pack_prompts, monkeypatch):
    monkeypatch.setattr("workers.models.chatglm.RESIDUAL_SCALE", (2 * golden.config.num_layers) ** 0.5)
    logits = golden.model(pack_prompts([golden.data["prompts"][8]["input_ids"]], golden.config))
    assert (golden.columns(logits) - golden.tensor("prompt8.logits")[-1]).abs().max() > 0.1


@torch.inference_mode()
def test_rows_of_a_batch_equal_the_originals_padded_batch(golden, pack_prompts):
    pad = golden.tokenizer.pad_id
    prompts = [[id_ for id_ in row if id_ != pad] for row in golden.data["batch"]["input_ids"]]
    logits = golden.model(pack_prompts(prompts, golden.config))
    expected = golden.tensor("batch.logits").squeeze(1)
    torch.testing.assert_close(golden.columns(logits), expected, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_a_long_prompt_equals_the_originals(golden, pack_prompts):
    ids = golden.tokenizer.build_prompt(golden.data["long_prompt"]["prompt"])
    assert ids == golden.data["long_prompt"]["input_ids"]
    logits = golden.model(pack_prompts([ids], golden.config), all_positions=True)
    torch.testing.assert_close(
        golden.columns(logits[-8:]), golden.tensor("long.last8.logits"), atol=1e-3, rtol=0
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_far_from_float32_as_the_originals(golden, pack_prompts, dtype):
    """The original's own fp16 is up to `max_abs_diff_fp16_vs_fp32_last` from its fp32; ours may be twice as far from
    either. bf16 has three bits less."""
    noise = golden.data["half"]["max_abs_diff_fp16_vs_fp32_last"]
    tolerance = 2 * noise if dtype == torch.float16 else 32 * noise
    model = load_model(golden.folder, dtype=dtype)
    logits = model(pack_prompts([golden.data["prompts"][8]["input_ids"]], golden.config))
    assert logits.dtype == dtype
    ours = golden.columns(logits.float())
    torch.testing.assert_close(ours, golden.tensor("fp16cpu.prompt8.last_logits"), atol=tolerance, rtol=0)
    torch.testing.assert_close(ours, golden.tensor("prompt8.logits")[-1:], atol=tolerance, rtol=0)


def test_positions_and_visibility_equal_the_originals(golden):
    ids = golden.config.special_ids
    for prompt in golden.data["prompts"]:
        layout = Layout.of_prompt(
            prompt["input_ids"], bos_id=ids["bos"], gmask_id=ids["gmask"], mask_id=ids["mask"]
        )
        num_tokens = len(prompt["input_ids"])
        assert [list(layout.positions(0, num_tokens))] == [
            [list(row) for row in both] for both in prompt["prefill"]["position_ids"]
        ]
        for offset, step in enumerate(prompt["decode_steps"]):
            first, block = layout.position(num_tokens + offset)
            assert [[[first], [block]]] == step["position_ids"]


@torch.inference_mode()
def test_decoding_with_a_cache_gives_the_logits_of_one_long_prefill(pack_prompts):
    config = small_config()
    model = random_model(config)
    prompt, answer = [5, 6, 7, 50, 51], [9, 10, 11, 12, 13, 14]
    expected = model(pack_prompts([prompt + answer], config), all_positions=True)[len(prompt) - 1 :]
    cache = KVCache(*(torch.full((2, 6, 2, 4, 16), 1e30) for _ in range(2)))
    blocks = [4, 2, 5]
    slots = torch.tensor([blocks[i // 4] * 4 + i % 4 for i in range(len(prompt + answer))])

    batch = pack_prompts([prompt], config)
    batch.slots = slots[: len(prompt)]
    logits = [model(batch, cache)]
    layout = Layout(context_len=4, mask_position=3)
    for index, id_ in enumerate(answer, start=len(prompt)):
        batch.is_prefill = False
        batch.token_ids = torch.tensor([id_])
        batch.positions = torch.tensor(layout.position(index)).unsqueeze(1)
        batch.slots = slots[index : index + 1]
        batch.kv_lens = torch.tensor([index + 1], dtype=torch.int32)
        batch.block_tables = torch.tensor([blocks], dtype=torch.int32)
        batch.max_kv_len = index + 1
        logits.append(model(batch, cache))

    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)


def test_training_reaches_every_parameter(pack_prompts):
    config = small_config()
    model = random_model(config)
    logits = model(pack_prompts([[5, 6, 50, 51, 9], [7, 50, 51, 8]], config), all_positions=True)
    assert logits.shape == (9, 60)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "weight" in name)


def test_embedding_and_head_are_one_tensor_only_when_the_config_ties_them():
    assert (tied := ChatGLM(small_config())).lm_head.weight is tied.transformer.word_embeddings.weight
    untied = ChatGLM(small_config(tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.transformer.word_embeddings.weight


@torch.inference_mode()
def test_a_model_that_changes_its_dtype_gets_new_angles(pack_prompts):
    config = small_config()
    model = random_model(config)
    exact, _ = model.rotary()
    rounded, _ = model.half().rotary()
    assert rounded.dtype == exact.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 1.5


def test_a_decode_without_a_cache_is_refused(pack_prompts):
    config = small_config()
    batch = pack_prompts([[5, 50, 51]], config)
    batch.is_prefill = False
    with pytest.raises(ValueError, match="cache"):
        random_model(config)(batch)
