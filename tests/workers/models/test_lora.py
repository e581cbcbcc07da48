"""Adapters as PEFT saves them: what they compute, and that none is taken that does not fit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.lora_adapter import PREFIX, write_adapter
from tests.workers.models.conftest import Golden
from workers.models.adapter_bank import AdapterBank
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.loader import load_model
from workers.models.lora import TARGETS, AdapterError, LoraConfig, linear_shapes, read_adapter

LAYER = "transformer.layers.0.attention.query_key_value"
DENSE = "transformer.layers.1.attention.dense"


@pytest.fixture(scope="module")
def model() -> ChatGLM:
    config = ModelConfig(
        hidden_size=32,
        inner_hidden_size=48,
        num_layers=2,
        num_heads=2,
        vocab_size=60,
        special_ids={"bos": 51, "eos": 52, "gmask": 50, "mask": 49},
    )
    torch.manual_seed(1)
    model = ChatGLM(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def shapes(model):
    return linear_shapes(model)


# --- what the original says ------------------------------------------------------------------------------------------


@pytest.fixture(
    params=["chatglm-6b-tiny", "chatglm-6b-realvocab", "chatglm2-6b-tiny", "chatglm2-6b-realvocab"]
)
def golden(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    return Golden(golden_root / request.param)


@torch.inference_mode()
def test_merged_logits_equal_the_originals(golden, pack_prompts):
    model = load_model(golden.folder, dtype=torch.float32, adapter=golden.folder / "lora")
    assert_golden_lora(golden, pack_prompts, model, None, atol=1e-2)


@torch.inference_mode()
def test_unmerged_logits_equal_the_originals(golden, pack_prompts):
    model = load_model(golden.folder, dtype=torch.float32)
    bank = AdapterBank(model, 2, dtype=torch.float32, device="cpu")
    bank.load(2, read_adapter(golden.folder / "lora", bank.shapes))
    assert_golden_lora(golden, pack_prompts, model, 2, atol=1e-3)


@torch.inference_mode()
def test_a_wrong_scale_would_be_noticed(golden, pack_prompts, tmp_path):
    shutil.copytree(golden.folder / "lora", tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 31}))
    model = load_model(golden.folder, dtype=torch.float32, adapter=tmp_path / "lora")
    with pytest.raises(AssertionError):
        assert_golden_lora(golden, pack_prompts, model, None, atol=1e-2)


def assert_golden_lora(golden, pack_prompts, model, slot, *, atol):
    indexes = [prompt["index"] for prompt in golden.data["lora"]["prompts"]]
    batch = pack_prompts([golden.data["prompts"][index]["input_ids"] for index in indexes], golden.config)
    if slot is not None:
        batch.adapter_slots = torch.full_like(batch.token_ids, slot)
    logits = golden.columns(model(batch, all_positions=True))
    assert len(indexes) == 3
    for position, index in enumerate(indexes):
        expected = golden.tensor(f"lora.prompt{index}.logits")
        end = int(batch.query_starts[position + 1])
        # Of one prompt the original's last position alone was kept.
        torch.testing.assert_close(logits[end - len(expected) : end], expected, atol=atol, rtol=0)


# --- what PEFT computes ----------------------------------------------------------------------------------------------


class _ConfigForPeft:
    """A network's config, with what PEFT asks of transformers' ones."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def __getattr__(self, name):
        return getattr(self._config, name)

    def to_dict(self):
        return {"model_type": "chatglm"}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["query_key_value"], "r": 8, "lora_alpha": 32},
        {"target_modules": list(TARGETS), "r": 4, "lora_alpha": 6},
        {"target_modules": ["query_key_value", "dense"], "r": 4, "lora_alpha": 6, "use_rslora": True},
        {"target_modules": ["dense_4h_to_h", "dense"], "r": 4, "rank_pattern": {"dense": 2, "dense_4h_to_h": 16}},
        {"target_modules": list(TARGETS), "r": 4, "alpha_pattern": {"layers.1.attention.dense": 1, "query_key_value": 40}},
        {"target_modules": ["query_key_value"], "r": 4, "rank_pattern": {r"layers.*.query_key_value": 3}},
        {"target_modules": ["query_key_value", "dense"], "r": 4, "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r".*\.mlp\.dense_h_to_4h", "r": 4},
    ],
)  # fmt: skip
@torch.no_grad()
def test_an_adapter_does_what_peft_makes_of_it(model, shapes, pack_prompts, tmp_path, fields):
    peft = pytest.importorskip("peft")
    copy = ChatGLM(model.config).requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    copy.config = _ConfigForPeft(model.config)
    peft_model = peft.PeftModel(copy, peft.LoraConfig(**fields))
    torch.manual_seed(5)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    peft_model.save_pretrained(tmp_path)
    batch = pack_prompts([[5, 6, 7, 50, 51, 9], [8, 50, 51]], model.config)
    expected = peft_model.eval().base_model.model(batch, all_positions=True)

    adapter = read_adapter(tmp_path, shapes)
    merged = ChatGLM(model.config).requires_grad_(False)
    merged.load_state_dict(
        {name: adapter.merged(name, tensor, torch.float32) for name, tensor in model.state_dict().items()}
    )

    logits = merged(batch, all_positions=True)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - model(batch, all_positions=True)).abs().max() > 0.1


def test_both_file_formats_and_all_float_dtypes_are_read(shapes, tmp_path):
    expected = read_adapter(write_adapter(tmp_path / "safetensors", shapes), shapes).factors[LAYER]
    from_bin = read_adapter(write_adapter(tmp_path / "bin", shapes, as_bin=True), shapes).factors[LAYER]
    halves = {A: expected.a.half(), B: expected.b.T.contiguous().half() / 2}
    from_half = read_adapter(write_adapter(tmp_path / "half", shapes, tensors=halves), shapes).factors[LAYER]

    assert torch.equal(from_bin.a, expected.a)
    assert torch.equal(from_bin.b, expected.b)
    assert from_half.a.dtype == torch.float32
    torch.testing.assert_close(from_half.b, expected.b, atol=1e-3, rtol=1e-3)


def test_the_safetensors_file_is_taken_where_both_are_there(shapes, tmp_path):
    write_adapter(tmp_path, shapes, seed=1, as_bin=True)
    write_adapter(tmp_path, shapes, seed=2)
    expected = read_adapter(write_adapter(tmp_path / "other", shapes, seed=2), shapes)
    assert torch.equal(read_adapter(tmp_path, shapes).factors[LAYER].a, expected.factors[LAYER].a)


# --- what does not fit -----------------------------------------------------------------------------------------------

A, B = f"{PREFIX}{LAYER}.lora_A.weight", f"{PREFIX}{LAYER}.lora_B.weight"
OTHER_GENERATION = f"{PREFIX}transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "named", "remedy"),
    [
        ({A: torch.ones(4, 33)}, [A, "[4, 33]", "[4, 32]"], "checkpoint that the adapter was trained on"),
        ({B: torch.ones(96, 5)}, [B, "[96, 5]", "[96, 4]"], "adapter_config.json"),
        ({A: torch.ones(4, 32, 1)}, [A, "[4, 32, 1]"], "checkpoint"),
        ({B: None}, [B, "missing"], "again"),
        ({A: None, B: None}, [LAYER, "target_modules"], "again"),
        ({A: torch.full((4, 32), torch.nan)}, [A, "finite"], "earlier state"),
        ({A: torch.ones(4, 32, dtype=torch.int8)}, [A, "int8"], "float32"),
        ({"lm_head.weight": torch.ones(2)}, ["lm_head.weight"], "save_pretrained"),
        ({LAYER + ".lora_A.weight": torch.ones(4, 32)}, [LAYER], PREFIX),
        ({f"{PREFIX}{LAYER}.lora_A.default.weight": torch.ones(4, 32)}, ["lora_A.default"], "save_pretrained"),
        ({f"{PREFIX}{LAYER}.lora_magnitude_vector": torch.ones(4)}, ["lora_magnitude_vector"], "names"),
        ({f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, ["q_proj"], "checkpoint"),
        ({f"{PREFIX}transformer.layers.27.mlp.dense_h_to_4h.lora_A.weight": torch.ones(4, 32)}, ["layers.27", "2 layers"], "checkpoint"),
        ({OTHER_GENERATION: torch.ones(4, 32)}, [OTHER_GENERATION, "ChatGLM2-6B", "ChatGLM-6B"], "trained on ChatGLM-6B"),
    ],
)  # fmt: skip
def test_a_tensor_that_fits_nothing_is_named_with_the_remedy(shapes, tmp_path, tensors, named, remedy):
    write_adapter(tmp_path, shapes, tensors=tensors)
    with pytest.raises(AdapterError) as raised:
        read_adapter(tmp_path, shapes)
    message = str(raised.value)
    assert message.startswith(str(tmp_path))
    assert all(text in message for text in named), message
    assert remedy.lower() in raised.value.remedy.lower(), message


def test_an_adapter_of_the_other_generation_is_refused_on_both_models(golden_root):
    for ours, theirs in (("chatglm-6b-tiny", "chatglm2-6b-tiny"), ("chatglm2-6b-tiny", "chatglm-6b-tiny")):
        own = {
            name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (0, 0)
            for name in torch.load(golden_root / ours / "lora/adapter_model.bin", weights_only=True)
        }
        with pytest.raises(
            AdapterError, match=r"belongs to ChatGLM2?-6B, and this checkpoint is ChatGLM2?-6B"
        ):
            read_adapter(golden_root / theirs / "lora", own)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"r": 0}, "r"),
        ({"r": True}, "r"),
        ({"r": "8"}, "r"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 1e999}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": [1]}, "target_modules"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"rank_pattern": [8]}, "rank_pattern"),
        ({"rank_pattern": {"dense": 1.5}}, "rank_pattern[dense]"),
        ({"rank_pattern": {"(a+)+b": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"layers.[0-9].dense": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"": 8}}, "alpha_pattern"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_its_key(shapes, tmp_path, fields, named):
    write_adapter(tmp_path, shapes, **fields)
    with pytest.raises(AdapterError) as raised:
        read_adapter(tmp_path, shapes)
    assert f"adapter_config.json: {named}" in str(raised.value)
    assert raised.value.remedy


def test_keys_of_other_peft_versions_are_tolerated_with_a_warning(shapes, tmp_path, caplog):
    write_adapter(tmp_path, shapes, quantum_config={"x": 1}, fancy=True, peft_version="1.2", use_dora=False)
    with caplog.at_level(logging.WARNING):
        assert read_adapter(tmp_path, shapes).rank == 4
    (record,) = caplog.records
    assert "fancy, quantum_config" in record.getMessage()


def test_a_config_without_anything_optional_has_pefts_defaults():
    config = LoraConfig.from_fields({"peft_type": "LORA"})
    assert (config.rank, config.scale_of(LAYER)) == (8, 1.0)


def test_an_adapter_that_changes_nothing_is_warned_of(shapes, tmp_path, caplog):
    zeros = {
        name: torch.zeros(96, 4)
        for name in (
            f"{PREFIX}transformer.layers.{i}.attention.query_key_value.lora_B.weight" for i in (0, 1)
        )
    }
    write_adapter(tmp_path, shapes, tensors=zeros)
    with caplog.at_level(logging.WARNING):
        read_adapter(tmp_path, shapes)
    assert "changes nothing" in caplog.text


def test_a_rank_that_the_engine_has_no_room_for_is_refused(shapes, tmp_path):
    write_adapter(tmp_path, shapes, rank=9)
    assert read_adapter(tmp_path, shapes, max_rank=9).rank == 9
    with pytest.raises(AdapterError, match=r"rank is 9.*room for 8.*--max-adapter-rank"):
        read_adapter(tmp_path, shapes, max_rank=8)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: the file does not exist"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 700), "truncated"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 0), "truncated"),
        (lambda folder: leads_out(folder / "adapter_model.safetensors"), "leads out of the folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_an_adapter_error(shapes, tmp_path, spoil, problem):
    folder = write_adapter(tmp_path / "adapter", shapes)
    spoil(folder)
    with pytest.raises(AdapterError, match=problem):
        read_adapter(folder, shapes)


def leads_out(path: Path) -> None:
    target = path.rename(path.parent.parent / "elsewhere.safetensors")
    path.symlink_to(target)


def test_a_file_without_tensors_is_refused(shapes, tmp_path):
    with pytest.raises(AdapterError, match="no tensors"):
        read_adapter(write_adapter(tmp_path, {}), shapes)


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_bin_file_does_not_run(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path, shapes)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({A: _Payload()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        read_adapter(tmp_path, shapes)
    assert not (tmp_path / "executed").exists()


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merging_leaves_other_tensors_alone(shapes, tmp_path):
    adapter = read_adapter(write_adapter(tmp_path, shapes), shapes)
    for name in (f"{DENSE}.weight", f"{LAYER}.bias", "lm_head.weight"):
        tensor = torch.ones(3)
        assert adapter.merged(name, tensor, torch.float32) is tensor


def test_a_merge_that_leaves_the_range_of_fp16_is_refused(shapes, tmp_path):
    adapter = read_adapter(write_adapter(tmp_path, shapes, alpha=1e6), shapes)
    weight = torch.zeros(96, 32, dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"range of torch\.float16.*--dtype"):
        adapter.merged(f"{LAYER}.weight", weight, torch.float16)
    assert adapter.merged(f"{LAYER}.weight", weight, torch.bfloat16).isfinite().all()
