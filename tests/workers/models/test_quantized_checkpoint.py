"""Quantized checkpoints: those that we write, and those that the original's code wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Sampling
from workers.models.config import CheckpointError, ModelConfig
from workers.models.linear import QuantizedEmbedding, QuantizedLinear, StoredLinear
from workers.models.loader import load_model
from workers.models.prefill import pack_sequences
from workers.models.quantization import dequantize, pack_int4, quantize, stored_values
from workers.models.quantized_checkpoint import SafetensorsWriter, write_quantized
from workers.models.tokenizer import Tokenizer

BITS = [8, 4]


def edit_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def copy_of(folder: Path, target: Path) -> Path:
    """All of a golden folder that a checkpoint has."""
    target.mkdir()
    for name in (
        "config.json",
        "ice_text.model",
        "tokenizer.model",
        "tokenizer_config.json",
        "pytorch_model.bin",
    ):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    return target


def original_state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def logits_of(model, tokenizer: Tokenizer, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(pack_sequences([ids], [tokenizer.layout(ids)]))


# --- ours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_that_are_written_are_the_originals(any_golden, tmp_path, bits):
    report = write_quantized(any_golden.folder, tmp_path / "small", bits)
    written = load_file(tmp_path / "small" / "model.safetensors")
    num_compared = 0
    with safe_open(any_golden.folder / f"int{bits}.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.endswith("dequantized_fp16"):
                assert torch.equal(written[name], file.get_tensor(name)), name
                num_compared += 1
    assert num_compared == 2 * 4 * any_golden.config.num_layers
    assert report.target_bytes == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert report.target_bytes < report.source_bytes + 20_000
    assert ModelConfig.from_folder(tmp_path / "small").quantization_bit == bits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("has_int8_head", [False, True])
def test_what_is_written_loads_as_what_is_quantized_while_it_loads(any_golden, tmp_path, bits, has_int8_head):
    head_bits = 8 if has_int8_head else None
    write_quantized(any_golden.folder, tmp_path / "small", bits, head_bits=head_bits)
    written = load_model(tmp_path / "small", dtype=torch.float32)
    at_load = load_model(
        any_golden.folder, dtype=torch.float32, quantize_bits=bits, quantize_head=has_int8_head
    )
    expected = state_of(at_load)
    assert state_of(written).keys() == expected.keys()
    for name, tensor in state_of(written).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    head = written.get_submodule(written.head)
    embedding = written.get_submodule(written.embedding)
    assert isinstance(head, QuantizedLinear if has_int8_head else StoredLinear)
    if written.config.tie_word_embeddings:
        assert head.weight is embedding.weight
        assert isinstance(embedding, QuantizedEmbedding) == has_int8_head
    ids = any_golden.data["prompts"][1]["input_ids"]
    logits = (logits_of(model, any_golden.tokenizer, ids) for model in (written, at_load))
    assert torch.equal(*logits)


def test_the_tokenizer_comes_along_and_code_does_not(any_golden, tmp_path):
    source = copy_of(any_golden.folder, tmp_path / "source")
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    write_quantized(source, tmp_path / "small", 4)
    tokenizer = Tokenizer.from_folder(tmp_path / "small")
    assert tokenizer.encode("你好 hello") == any_golden.tokenizer.encode("你好 hello")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer_config.json", tokenizer.model_file}


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_is_merged_before_the_weights_are_rounded(any_golden, tmp_path, bits):
    lora = any_golden.folder / "lora"
    write_quantized(any_golden.folder, tmp_path / "small", bits, adapter=lora)
    written = load_model(tmp_path / "small", dtype=torch.float32)
    merged = load_model(any_golden.folder, dtype=torch.float16, adapter=lora)
    plain = load_model(any_golden.folder, dtype=torch.float16, quantize_bits=bits)
    num_changed = 0
    for path, layer in written.named_modules():
        if isinstance(layer, QuantizedLinear):
            expected = quantize(merged.get_submodule(path).weight, bits)
            assert torch.equal(layer.weight, stored_values(expected, bits))
            assert torch.equal(layer.weight_scale, expected.scales)
            num_changed += not torch.equal(layer.weight, plain.get_submodule(path).weight)
    assert num_changed == any_golden.config.num_layers


def test_a_checkpoint_in_many_files_becomes_one(any_golden, tmp_path):
    source = copy_of(any_golden.folder, tmp_path / "source")
    state = original_state(source)
    (source / "pytorch_model.bin").unlink()
    weight_map = {}
    for number, name in enumerate(state):
        file_name = f"model-{number % 3}.safetensors"
        weight_map[name] = file_name
    for file_name in set(weight_map.values()):
        tensors = {name: state[name].clone() for name in state if weight_map[name] == file_name}
        save_file(tensors, source / file_name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_quantized(source, tmp_path / "small", 4)
    write_quantized(any_golden.folder, tmp_path / "expected", 4)
    files = [tmp_path / name / "model.safetensors" for name in ("small", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_files_are_mapped_anew_without_losing_a_tensor(any_golden, tmp_path, monkeypatch):
    write_quantized(any_golden.folder, tmp_path / "at-once", 4)
    monkeypatch.setattr("workers.models.stored_tensors._BYTES_OF_A_MAPPING", 1)
    write_quantized(any_golden.folder, tmp_path / "one-by-one", 4)
    files = [tmp_path / name / "model.safetensors" for name in ("at-once", "one-by-one")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = [state_of(load_model(file.parent)) for file in files]
    assert all(torch.equal(loaded[0][name], tensor) for name, tensor in loaded[1].items())


def test_the_report_says_how_far_the_weights_are_off(any_golden, tmp_path):
    progress: list[tuple[int, int]] = []
    report = write_quantized(
        any_golden.folder, tmp_path / "small", 4, head_bits=8, on_progress=lambda *both: progress.append(both)
    )
    model = load_model(any_golden.folder, dtype=torch.float32)
    layers = [module.weight for path, module in model.named_modules() if path.endswith(".mlp.dense_h_to_4h")]
    restored = [
        dequantize(stored_values(q, 4), q.scales, 4, torch.float32)
        for q in (quantize(weight.half(), 4) for weight in layers)
    ]
    errors = report.errors["dense_h_to_4h"]
    differences = [weight - other for weight, other in zip(layers, restored, strict=True)]
    squares = [sum(t.square().sum() for t in tensors) for tensors in (differences, layers)]
    assert errors.relative == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4)
    assert errors.largest == pytest.approx(max(t.abs().max().item() for t in differences), rel=1e-4)
    assert (errors.bits, errors.num_layers, errors.num_clamped_rows) == (4, model.config.num_layers, 0)
    assert {name: one.bits for name, one in report.errors.items()} == {
        **dict.fromkeys(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), 4),
        "word_embeddings" if model.config.tie_word_embeddings else "output_layer": 8,
    }
    assert progress == sorted(progress)
    assert progress[-1] == (report.source_bytes, report.source_bytes)


def test_rows_that_the_original_cannot_quantize_are_counted(any_golden, tmp_path):
    source = copy_of(any_golden.folder, tmp_path / "source")
    state = original_state(source)
    name = next(name for name in state if name.endswith("mlp.dense_4h_to_h.weight"))
    state[name][:5] = 2.0**-24
    torch.save(state, source / "pytorch_model.bin")
    report = write_quantized(source, tmp_path / "small", 4)
    clamped = {name: errors.num_clamped_rows for name, errors in report.errors.items()}
    assert clamped["dense_4h_to_h"] == sum(clamped.values()) == 5


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda state, name: state.pop(name), "is in none of its weight files"),
        (lambda state, name: state.update({name: state[name][1:]}), "has the shape"),
        (lambda state, name: state.update({name: state[name].int()}), "has the dtype int32"),
        (lambda state, name: state[name][0].fill_(torch.inf), "not finite"),
    ],
)
def test_nothing_is_written_of_a_damaged_checkpoint(any_golden, tmp_path, damage, problem):
    source = copy_of(any_golden.folder, tmp_path / "source")
    state = original_state(source)
    name = next(name for name in state if name.endswith("query_key_value.weight"))
    damage(state, name)
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=problem) as raised:
        write_quantized(source, tmp_path / "small", 8)
    assert name in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_exists_is_left_alone(any_golden, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(CheckpointError, match="it exists already"):
        write_quantized(any_golden.folder, tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_place_that_cannot_be_written_is_named(any_golden, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/small: it cannot be written"):
        write_quantized(any_golden.folder, tmp_path / "file" / "small", 4)


def test_integers_are_not_quantized_again(any_golden, tmp_path):
    write_quantized(any_golden.folder, tmp_path / "small", 4)
    with pytest.raises(CheckpointError, match="its weights are int4 already"):
        write_quantized(tmp_path / "small", tmp_path / "smaller", 4)
    with pytest.raises(CheckpointError, match="they cannot become int8"):
        load_model(tmp_path / "small", quantize_bits=8)
    assert load_model(tmp_path / "small", quantize_bits=4).config.quantization_bit == 4


def test_an_adapter_cannot_be_merged_into_integers(any_golden, tmp_path):
    write_quantized(any_golden.folder, tmp_path / "small", 8)
    with pytest.raises(CheckpointError, match=r"glmq quantize SRC DST --adapter"):
        load_model(tmp_path / "small", adapter=any_golden.folder / "lora")


def answer_of(folder: Path, prompt_ids: list[int], max_new_tokens: int, **settings) -> list[int]:
    """A greedy answer of an engine on this checkpoint."""
    engine = Engine.from_config(
        EngineConfig(checkpoint=str(folder), device="cpu", context_len=256, **settings)
    )
    engine.add(Generate(0, prompt_ids, Sampling(max_new_tokens=max_new_tokens, seed=0, temperature=0.0)))
    answer: list[int] = []
    while engine.has_work:
        answer += engine.step().token_ids
    return answer


@pytest.mark.parametrize("bits", BITS)
def test_greedy_answers_equal_the_originals(any_golden, tmp_path, bits):
    write_quantized(any_golden.folder, tmp_path / "small", bits)
    expected = any_golden.data["quantization"][f"int{bits}"]["greedy_prompt0"]
    prompt = any_golden.data["prompts"][0]["input_ids"]
    answer = answer_of(tmp_path / "small", prompt, len(expected), activations="full")
    if answer != expected:
        # The original's answer was made with weights rounded to fp16: another token only where two were as good as equal.
        place = next(i for i, both in enumerate(zip(answer, expected, strict=True)) if both[0] != both[1])
        model = load_model(tmp_path / "small", dtype=torch.float32)
        logits = logits_of(model, any_golden.tokenizer, prompt + expected[:place])[0]
        assert logits[answer[place]] - logits[expected[place]] < 0.02


@pytest.mark.parametrize("activations", ["full", "int8"])
def test_an_engine_answers_alike_from_what_was_written_and_what_it_quantizes(
    tiny_checkpoint, tmp_path, activations
):
    write_quantized(tiny_checkpoint, tmp_path / "small", 4, head_bits=8)
    prompt = Tokenizer.from_folder(tiny_checkpoint).build_prompt("你好")
    written = answer_of(tmp_path / "small", prompt, 20, activations=activations)
    at_load = answer_of(
        tiny_checkpoint, prompt, 20, quantize="int4", quantize_head=True, activations=activations
    )
    assert written == at_load


# --- the original's --------------------------------------------------------------------------------------------------


def originally_quantized(any_golden, folder: Path, bits: int) -> Path:
    """A checkpoint as `save_pretrained` of the original's quantized model leaves it."""
    copy_of(any_golden.folder, folder)
    state = original_state(folder)
    with safe_open(any_golden.folder / f"int{bits}.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.endswith("dequantized_fp16"):
                state[name] = file.get_tensor(name)
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, quantization_bit=bits)
    return folder


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_that_the_original_quantized_gives_its_logits(any_golden, tmp_path, bits):
    model = load_model(originally_quantized(any_golden, tmp_path / "small", bits), dtype=torch.float32)
    for index in (0, 2, 8):
        ids = any_golden.data["prompts"][index]["input_ids"]
        expected = any_golden.tensor(f"int{bits}.dequant_fp32_product.prompt{index}.logits")
        logits = any_golden.columns(logits_of(model, any_golden.tokenizer, ids))
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("names", ["both", "embedding", "head"])
def test_the_quantized_embedding_of_the_int4_release_serves_as_head_too(golden, tmp_path, bits, names):
    folder = originally_quantized(golden, tmp_path / "small", bits)
    state = original_state(folder)
    head, embedding = "lm_head.weight", "transformer.word_embeddings.weight"
    rows = quantize(state.pop(head), bits)
    del state[embedding]
    for name in {"both": (head, embedding), "embedding": (embedding,), "head": (head,)}[names]:
        state[name], state[f"{name}_scale"] = stored_values(rows, bits), rows.scales
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, quantization_embeddings=True)
    model = load_model(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    wide = load_model(folder, dtype=torch.float32)
    wide.transformer.word_embeddings = torch.nn.Embedding.from_pretrained(
        rows.values.half() * rows.scales[:, None]
    )
    wide.lm_head = torch.nn.Linear(*reversed(rows.values.shape), bias=False)
    wide.lm_head.weight.data = dequantize(stored_values(rows, bits), rows.scales, bits, torch.float32)
    ids = golden.data["prompts"][3]["input_ids"]
    torch.testing.assert_close(
        logits_of(model, golden.tokenizer, ids), logits_of(wide, golden.tokenizer, ids), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("config", "has_integers", "problem"),
    [
        ({"quantization_bit": 8}, False, "quantization_bit is 8, but .* is stored in floating point"),
        ({"quantization_bit": None}, True, "quantization_bit is 0, but .* is stored in 4 bits"),
        ({"quantization_bit": 8}, True, "quantization_bit is 8, but .* is stored in 4 bits"),
        ({"quantization_bit": 5}, True, "quantization_bit is 5"),
    ],
)
def test_weights_that_contradict_the_config_are_refused(any_golden, tmp_path, config, has_integers, problem):
    folder = tmp_path / "small"
    if has_integers:
        originally_quantized(any_golden, folder, 4)
    else:
        copy_of(any_golden.folder, folder)
    edit_config(folder, **config)
    with pytest.raises(CheckpointError, match=problem):
        load_model(folder)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda state, name: state.pop(name), "has the shape"),
        (lambda state, name: state.pop(f"{name}_scale"), "stored in floating point"),
        (lambda state, name: state.update({name: state[name][:, 1:]}), "has the shape"),
        (lambda state, name: state.update({name: state[name].short()}), "int8 was expected"),
        (lambda state, name: state.update({f"{name}_scale": state[f"{name}_scale"][1:]}), "has the shape"),
        (lambda state, name: state.update({f"{name}_scale": state[f"{name}_scale"].int()}), "floating-point"),
    ],
)
def test_damaged_integers_are_refused_by_name(any_golden, tmp_path, damage, problem):
    folder = originally_quantized(any_golden, tmp_path / "small", 4)
    state = original_state(folder)
    name = next(name for name in state if name.endswith("dense.weight"))
    damage(state, name)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=problem) as raised:
        load_model(folder)
    assert name.removesuffix(".weight") in str(raised.value)


def test_four_bits_of_an_odd_row_are_refused(golden, tmp_path):
    folder = copy_of(golden.folder, tmp_path / "odd")
    inner = golden.config.inner_hidden_size - 1
    state = original_state(folder)
    for name in list(state):
        if "dense_h_to_4h" in name:
            state[name] = state[name][:inner].clone()
        if name.endswith("dense_4h_to_h.weight"):
            state[name] = state[name][:, :inner].clone()
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, inner_hidden_size=inner)
    for refused in (
        lambda: load_model(folder, quantize_bits=4),
        lambda: write_quantized(folder, tmp_path / "small", 4),
    ):
        with pytest.raises(CheckpointError, match=f"an even number of inputs, not {inner}"):
            refused()
    assert load_model(folder, quantize_bits=8).config.inner_hidden_size == inner


def test_the_first_release_has_its_ids_after_those_of_images(golden, tmp_path):
    """20,000 rows for images before all others, and every id of config.json that much larger."""
    num_images = 20_000
    folder = copy_of(golden.folder, tmp_path / "first")
    state = original_state(folder)
    for name in ("lm_head.weight", "transformer.word_embeddings.weight"):
        state[name] = torch.cat(
            [torch.ones(num_images, state[name].shape[1], dtype=torch.float16), state[name]]
        )
    torch.save(state, folder / "pytorch_model.bin")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids = {name: value + num_images for name, value in fields.items() if name.endswith("_token_id")}
    edit_config(folder, **ids, vocab_size=fields["vocab_size"] + num_images)

    tokenizer = Tokenizer.from_folder(folder)
    prompt = golden.data["prompts"][1]
    shifted = tokenizer.build_prompt(prompt["query"], prompt["history"])
    assert shifted == [id_ + num_images for id_ in prompt["input_ids"]]
    assert tokenizer.decode(shifted) == golden.tokenizer.decode(prompt["input_ids"])
    answer = answer_of(folder, shifted, 8)
    assert answer == [id_ + num_images for id_ in prompt["greedy_new_ids"][:8]]


# --- the file --------------------------------------------------------------------------------------------------------


def test_tensors_may_be_written_in_any_order(tmp_path):
    layout = {
        "a": (torch.int8, (3, 5)),
        "b": (torch.float16, (7,)),
        "c": (torch.bfloat16, (2, 2)),
        "d": (torch.int8, (0,)),
    }
    tensors = {
        "d": torch.zeros(0, dtype=torch.int8),
        "c": torch.randn(2, 2).bfloat16(),
        "a": torch.randint(-128, 128, (5, 3), dtype=torch.int8).T,
        "b": torch.randn(7).half(),
    }
    with SafetensorsWriter(tmp_path / "file.safetensors", layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_that_is_forgotten_or_of_another_size_is_an_error(tmp_path):
    layout = {"a": (torch.int8, (2,)), "b": (torch.int8, (3,))}
    with (
        pytest.raises(ValueError, match="b was never written"),
        SafetensorsWriter(tmp_path / "x", layout) as writer,
    ):
        writer.write("a", pack_int4(torch.zeros(4, dtype=torch.int8)))
    with (
        pytest.raises(ValueError, match="3 bytes, and 2 were announced"),
        SafetensorsWriter(tmp_path / "x", layout) as writer,
    ):
        writer.write("a", torch.zeros(3, dtype=torch.int8))
