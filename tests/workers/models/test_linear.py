"""Linear layers in other forms than the computation's dtype, each against the plain product of its widened weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from workers.models import linear, linear_onnxruntime
from workers.models.linear import QuantizedEmbedding, QuantizedLinear, StoredLinear
from workers.models.quantization import dequantize, quantize, stored_values

BITS = [8, 4]


def quantized_layer(in_features: int, out_features: int, bits, *, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(in_features + out_features)
    layer = QuantizedLinear(in_features, out_features, bits, bias=bias)
    quantized = quantize(torch.randn(out_features, in_features, generator=generator) * 0.05, bits)
    layer.weight, layer.weight_scale = stored_values(quantized, bits), quantized.scales
    if layer.bias is not None:
        layer.bias.data = torch.randn(out_features, generator=generator)
    return layer


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_a_quantized_layer_is_the_product_of_its_widened_weights(bits, num_tokens, monkeypatch):
    monkeypatch.setattr(linear, "_ELEMENTS_AT_ONCE", {"cpu": 1000, "cuda": 1})
    layer = quantized_layer(96, 80, bits)
    x = activations(num_tokens, 96)
    plain = dequantize(layer.weight, layer.weight_scale, bits, torch.float64)
    expected = F.linear(x.double(), plain, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_in_half_precision_no_sum_leaves_the_range_that_its_scale_brings_back(bits):
    layer = quantized_layer(4096, 4, bits, bias=False)
    x = torch.full((1, 4096), 8.0, dtype=torch.float16)
    layer.weight.fill_(0x77 if bits == 4 else 127)
    layer.weight_scale.fill_(2.0**-12)
    expected = 4096 * 8.0 * (7 if bits == 4 else 127) * 2.0**-12
    assert layer(x).tolist() == [pytest.approx([expected] * 4, rel=1e-3)]


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_an_embedding_gives_the_rows_as_the_original_widens_them(bits):
    rows = quantize(activations(12, 10), bits)
    embedding = QuantizedEmbedding(12, 10, bits)
    embedding.weight, embedding.weight_scale = stored_values(rows, bits), rows.scales
    ids = torch.tensor([3, 0, 3, 11])
    expected = (rows.values.half() * rows.scales.unsqueeze(1))[ids]
    assert torch.equal(embedding(ids), expected)


@torch.inference_mode()
def test_a_layer_stored_in_half_computes_in_the_dtype_of_what_it_is_given(monkeypatch):
    monkeypatch.setattr(linear, "_ELEMENTS_AT_ONCE", {"cpu": 300, "cuda": 1})
    layer = StoredLinear(32, 50)
    layer.weight.data = layer.weight.data.half()
    x = activations(5, 32)
    expected = F.linear(x, layer.weight.float(), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    assert layer.weight.dtype == torch.float16


def test_4_bits_need_an_even_number_of_inputs():
    with pytest.raises(ValueError, match="even number of inputs, not 7"):
        QuantizedLinear(7, 4, 4)


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("in_features", "out_features"), [(16, 24), (48, 16), (256, 96), (1712, 40)])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_a_packed_layer_is_as_near_as_8_bit_activations_are(bits, in_features, out_features, num_tokens):
    layer = quantized_layer(in_features, out_features, bits)
    x = activations(num_tokens, in_features)
    expected = layer(x)
    packed = linear_onnxruntime.pack(layer)
    assert isinstance(packed, linear_onnxruntime.OnnxLinear)
    without_bias = expected - layer.bias
    # An activation is off by up to half a step of its block, a 254th of the largest one.
    assert (packed(x) - expected).norm() < 0.01 * without_bias.norm()
    assert layer.weight.numel() == 0


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_a_packed_layer_is_exact_for_activations_that_8_bits_hold(bits):
    """Every weight is the right one, in its place, with the sign and the scale of its row."""
    layer = quantized_layer(256, 64, bits)
    exact = layer(torch.eye(256))
    packed = linear_onnxruntime.pack(layer)
    torch.testing.assert_close(packed(torch.eye(256)), exact, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_do_not_overflow(sign):
    for bits, byte in ((8, 127), (8, -128), (4, 0x77), (4, -0x78)):
        layer = quantized_layer(4096, 16, bits, bias=False)
        layer.weight.fill_(byte)
        layer.weight_scale.fill_(1.0)
        x = torch.full((3, 4096), float(sign))
        expected = layer(x)
        torch.testing.assert_close(linear_onnxruntime.pack(layer)(x), expected, rtol=1e-5, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_a_token_gets_in_a_batch_what_it_gets_alone(bits):
    packed = linear_onnxruntime.pack(quantized_layer(512, 96, bits))
    # One token's large values must not coarsen another one's steps.
    x = activations(9, 512) * torch.logspace(-3, 3, 9).unsqueeze(1)
    together = packed(x)
    for row, alone in enumerate(x):
        torch.testing.assert_close(together[row], packed(alone.unsqueeze(0))[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_a_large_layer_is_packed_in_parts(bits, monkeypatch):
    whole = linear_onnxruntime.pack(quantized_layer(64, 100, bits))
    monkeypatch.setattr(linear_onnxruntime, "_ELEMENTS_OF_A_SESSION", 64 * 32)
    parts = linear_onnxruntime.pack(quantized_layer(64, 100, bits))
    x = activations(3, 64)
    assert len(parts._sessions) == 4
    torch.testing.assert_close(parts(x), whole(x), atol=1e-6, rtol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("bits", BITS)
def test_packing_leaves_integers_that_an_embedding_shares_as_they_are(bits):
    layer = quantized_layer(64, 32, bits)
    shared = layer.weight
    before = shared.clone()
    linear_onnxruntime.pack(layer)
    assert torch.equal(shared, before)


@torch.inference_mode()
def test_a_packed_layer_answers_in_the_dtype_and_shape_it_is_asked_in():
    packed = linear_onnxruntime.pack(quantized_layer(64, 32, 4))
    y = packed(activations(2, 3, 64).bfloat16())
    assert (y.dtype, y.shape) == (torch.bfloat16, (2, 3, 32))


def test_a_layer_that_the_operator_cannot_have_stays_as_it_is():
    layer = quantized_layer(40, 8, 4)
    assert linear_onnxruntime.pack(layer) is layer
    assert layer.weight.numel() == 40 * 8 // 2
