"""The linear layers of every format against float32, at full size and at the demo's, into memory that was poisoned first."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from workers.models.kernels import weight_packing
from workers.models.kernels.cuda_driver import build_all, collect_launches
from workers.models.kernels.cuda_linear import Activations, Format, LinearWeight, apply

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROWS = (1, 3, 16, 17, 64, 100, 255, 300)
"""Each way that a batch can take: one tile, several, wgmma, two passes, weights widened in memory."""
SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384), (1024, 256), (256, 1024)]
TOLERANCE = 2e-3
E4M3_TOLERANCE = 6e-2
"""Of large batches, whose activations are e4m3, too: three bits of mantissa."""
DEVICE = "cuda"


def random_weight(out_features: int, in_features: int, weight_format: Format) -> LinearWeight:
    dense = torch.randn(out_features, in_features, device=DEVICE, dtype=torch.float16) * 0.02
    bias = torch.randn(out_features, device=DEVICE, dtype=torch.float16)
    return LinearWeight.from_dense(dense, bias, weight_format)


def meaning(weight: LinearWeight) -> torch.Tensor:
    """[out, in] in float32: what the stored values stand for."""
    if weight.weight_format == "F16":
        return weight.weight.float()
    assert weight.scales is not None
    if weight.weight_format == "E4M3":
        return weight.weight.float() * weight.scales[:, None]
    bits = 4 if weight.weight_format == "INT4" else 8
    values = weight_packing.unpack(weight.weight, bits, weight.out_features, weight.in_features)
    return values.float() * weight.scales[:, None]


def build(weight: LinearWeight, *, has_gelu: bool) -> None:
    """All kernels that these batches need, together on all cores."""
    with collect_launches() as kernels:
        for rows in ROWS:
            x = torch.zeros(rows, weight.in_features, device=DEVICE, dtype=torch.float16)
            apply(weight, Activations(x), has_gelu=has_gelu)
    build_all(kernels, weight.weight.device)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float32; NaN when anything was left unwritten."""
    return ((found.float() - expected).norm() / expected.norm()).item()


def poison(*shape: int) -> None:
    """Leaves NaN in the memory that the allocator gives to the next tensor of this size."""
    torch.full(shape, torch.nan, device=DEVICE, dtype=torch.float16)


@torch.inference_mode()
@pytest.mark.parametrize("has_gelu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_format", ["F16", "INT8", "INT4", "E4M3"])
def test_a_linear_layer_agrees_with_float32(
    weight_format: Format, shape: tuple[int, int], has_gelu: bool
) -> None:
    if weight_format == "E4M3" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    weight = random_weight(*shape, weight_format)
    assert weight.bias is not None
    exact = meaning(weight)
    build(weight, has_gelu=has_gelu)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device=DEVICE, dtype=torch.float16)
        expected = x.float() @ exact.T + weight.bias.float()
        if has_gelu:
            expected = functional.gelu(expected, approximate="tanh")
        poison(rows, shape[0])
        found = apply(weight, Activations(x), has_gelu=has_gelu)
        if found.e4m3 is not None and found.scales is not None:
            # With GELU the e4m3 units leave their result in e4m3 alone, and rows beyond the batch unwritten.
            y, tolerance = found.e4m3[:rows].float() * found.scales[:rows, None], E4M3_TOLERANCE
        else:
            is_e4m3 = weight_format == "E4M3" and weight.launch(rows, has_gelu=has_gelu) is None
            y, tolerance = found.half, E4M3_TOLERANCE if is_e4m3 else TOLERANCE
        error = relative_error(y, expected)
        assert error < tolerance, (rows, error)


@torch.inference_mode()
@pytest.mark.parametrize("weight_format", ["F16", "INT8", "INT4", "E4M3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_build_writes_all_of_its_output_and_nothing_behind_it(
    shape: tuple[int, int], weight_format: Format
) -> None:
    if weight_format == "E4M3" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    weight = random_weight(*shape, weight_format)
    assert weight.bias is not None
    exact = meaning(weight)
    num_builds = 0
    for rows in (1, 3, 16, 17, 30, 48, 64, 90, 128):
        launch = weight.launch(rows, has_gelu=False)
        if launch is None:
            continue
        num_builds += 1
        x = torch.randn(rows, shape[1], device=DEVICE, dtype=torch.float16)
        out = torch.full((rows + 1, shape[0]), torch.nan, device=DEVICE, dtype=torch.float16)
        launch.run(x, weight.weight, weight.scales, weight.bias, out[:rows])
        assert relative_error(out[:rows], x.float() @ exact.T + weight.bias.float()) < TOLERANCE
        assert out[rows].isnan().all()
    assert num_builds >= (9 if weight_format in ("INT4", "INT8") else 3)


@torch.inference_mode()
@pytest.mark.parametrize("weight_format", ["INT8", "INT4"])
def test_a_result_is_the_same_every_time(weight_format: Format) -> None:
    """Sums are made in a fixed order, whichever warpgroup comes first."""
    weight = random_weight(4096, 16384, weight_format)
    for rows in (16, 24, 64, 128):
        x = torch.randn(rows, 16384, device=DEVICE, dtype=torch.float16)
        first = apply(weight, Activations(x)).half
        for _ in range(20):
            assert torch.equal(apply(weight, Activations(x)).half, first)
