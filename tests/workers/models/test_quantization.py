"""Integer weights against the original's, bit for bit, and where the original has no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import workers.models
from workers.models import linear_onnxruntime
from workers.models.loader import load_model
from workers.models.prefill import pack_sequences
from workers.models.quantization import (
    SMALLEST_SCALE,
    dequantize,
    integers,
    pack_int4,
    quantize,
    stored_values,
    unpack_int4,
)
from workers.models.tokenizer import Tokenizer

BITS = [8, 4]


def all_positive_halves() -> torch.Tensor:
    return torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_integers_scales_and_packed_bytes_equal_the_originals(any_golden, bits):
    model = load_model(any_golden.folder, dtype=torch.float32, quantize_bits=bits)
    compared = set()
    with safe_open(any_golden.folder / f"int{bits}.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            layer, _, attribute = name.rpartition(".")
            module = model.get_submodule(layer)
            if attribute == "dequantized_fp16":
                ours = dequantize(module.weight, module.weight_scale, bits, torch.float16)
            else:
                ours = getattr(module, attribute)
            assert torch.equal(ours, file.get_tensor(name)), name
            compared.add(attribute)
    assert compared == {"weight", "weight_scale", "dequantized_fp16"}


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_quantized_logits_equal_the_originals(any_golden, bits):
    model = load_model(any_golden.folder, dtype=torch.float32, quantize_bits=bits)
    tokenizer = any_golden.tokenizer
    for index in (0, 2, 8):
        ids = any_golden.data["prompts"][index]["input_ids"]
        logits = model(pack_sequences([ids], [tokenizer.layout(ids)]))
        expected = any_golden.tensor(f"int{bits}.dequant_fp32_product.prompt{index}.logits")
        torch.testing.assert_close(any_golden.columns(logits), expected, atol=1e-3, rtol=0)
        # The original's GPU kernels round each weight to fp16, which is far enough off to be told apart.
        rounded = any_golden.tensor(f"int{bits}.dequant_fp16_rounded.prompt{index}.logits")
        assert (any_golden.columns(logits) - rounded).abs().max() > 2e-3


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_weights_rounded_to_half_give_the_logits_of_the_originals_gpu_kernels(any_golden, bits):
    model = load_model(any_golden.folder, dtype=torch.float32, quantize_bits=bits)
    for module in list(model.modules()):
        if hasattr(module, "weight_scale"):
            plain = dequantize(module.weight, module.weight_scale, bits, torch.float16).float()
            module.forward = lambda x, plain=plain, bias=module.bias: torch.nn.functional.linear(
                x, plain, bias
            )
    ids = any_golden.data["prompts"][2]["input_ids"]
    logits = model(pack_sequences([ids], [any_golden.tokenizer.layout(ids)]))
    expected = any_golden.tensor(f"int{bits}.dequant_fp16_rounded.prompt2.logits")
    torch.testing.assert_close(any_golden.columns(logits), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_tiny_weights_are_clamped_and_counted(bits):
    """All 31,743 largest values that a row of fp16 weights can have (CHATGLM.md C)."""
    largest = all_positive_halves()
    weight = torch.stack((largest, -largest), dim=1)
    quantized = quantize(weight, bits)
    limit = 2 ** (bits - 1) - 1
    plain_scales = (largest / limit).half()
    plain = torch.round(weight / plain_scales.unsqueeze(1))
    overflows = (plain.abs() > limit).any(1)
    assert quantized.num_clamped_rows == int(overflows.sum())
    # Of them so many where the scale is zero.
    counted = {8: (1871, 63), 4: (15, 3)}[bits]
    assert (quantized.num_clamped_rows, int((plain_scales == 0).sum())) == counted
    assert torch.equal(quantized.values[~overflows].half(), plain[~overflows])
    assert torch.equal(quantized.scales[plain_scales > 0], plain_scales[plain_scales > 0])


@pytest.mark.parametrize("bits", BITS)
def test_no_row_is_far_from_its_weights_however_small_they_are(bits):
    largest = all_positive_halves()
    weight = torch.stack((largest, largest / 2, -largest / 3), dim=1).half()
    quantized = quantize(weight, bits)
    restored = quantized.values.double() * quantized.scales.double().unsqueeze(1)
    error = (restored - weight.double()).abs()
    # Half a step, and what rounding the scale to fp16 costs: 2^-11 of it for normal numbers, half of the smallest else.
    step = quantized.scales.double().unsqueeze(1)
    limit = 2 ** (bits - 1) - 1
    allowed = step / 2 + limit * torch.maximum(step * 2**-11, torch.tensor(SMALLEST_SCALE / 2)) * 1.01
    assert (error <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_zeros_is_zero(bits):
    quantized = quantize(torch.zeros(3, 4, dtype=torch.float16), bits)
    assert not quantized.values.any()
    assert not quantized.scales.any()
    assert quantized.num_clamped_rows == 0


def test_a_row_below_the_smallest_scale_is_exact():
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0]]).mul(SMALLEST_SCALE).half()
    quantized = quantize(weight, 4)
    assert quantized.values.tolist() == [[1, -3, 0, 2]]
    assert quantized.scales.tolist() == [SMALLEST_SCALE]
    assert quantized.num_clamped_rows == 1


def test_quantizing_piece_by_piece_changes_nothing(monkeypatch):
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(1)).half()
    whole = quantize(weight, 4)
    monkeypatch.setattr("workers.models.quantization._ELEMENTS_AT_ONCE", 100)
    pieces = quantize(weight, 4)
    assert torch.equal(whole.values, pieces.values)
    assert torch.equal(whole.scales, pieces.scales)


def test_the_even_column_is_in_the_high_four_bits():
    values = torch.tensor([[7, -8, -1, 0, 1, -7]], dtype=torch.int8)
    assert pack_int4(values).view(torch.uint8).tolist() == [[0x78, 0xF0, 0x19]]


def test_every_byte_holds_the_two_values_that_are_packed_into_it():
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(pairs)
    assert len(packed.unique()) == 256
    assert torch.equal(unpack_int4(packed), pairs)


def test_an_odd_row_cannot_be_packed():
    with pytest.raises(ValueError, match="5 values"):
        pack_int4(torch.zeros(2, 5, dtype=torch.int8))


DEMO = Path(workers.models.__file__).parent / "demo"


@torch.inference_mode()
def test_8_bit_activations_cost_a_trained_model_little():
    """Mean square of the differences of all logits after the prompt, on the demo checkpoint."""
    models = {
        name: load_model(DEMO, dtype=torch.float32, quantize_bits=bits, pack=pack)
        for name, bits, pack in (
            ("full", None, None),
            ("int8", 8, None),
            ("int4", 4, None),
            ("int8 fast", 8, linear_onnxruntime.pack),
            ("int4 fast", 4, linear_onnxruntime.pack),
        )
    }
    tokenizer = Tokenizer.from_folder(DEMO)
    prompts = [
        tokenizer.build_prompt(text)
        for text in ("你好", "怎么做深蹲？", "What is a queue?", "我感冒了怎么办")
    ]
    batch = pack_sequences(prompts, [tokenizer.layout(ids) for ids in prompts])
    logits = {name: model(batch) for name, model in models.items()}

    def difference(one: str, other: str) -> float:
        return (logits[one] - logits[other]).square().mean().item()

    assert 0 < difference("int4 fast", "int4") < difference("int4", "full") / 4
    assert 0 < difference("int8 fast", "full") < difference("int4", "full") / 20
    assert torch.equal(logits["int8 fast"].argmax(-1), logits["full"].argmax(-1))


@pytest.mark.parametrize("bits", BITS)
def test_integers_are_what_was_stored(bits):
    quantized = quantize(torch.randn(6, 8, generator=torch.Generator().manual_seed(2)), bits)
    assert torch.equal(integers(stored_values(quantized, bits), bits), quantized.values)
