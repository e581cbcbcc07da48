"""Which build runs which batch, on which card; and that the CUDA sources compile. Needs no GPU."""

from __future__ import annotations

import pytest

from workers.models.kernels import cuda_driver, cuda_ops
from workers.models.kernels.cuda_linear import (
    MAX_ROWS,
    Card,
    GroupPlan,
    WarpPlan,
    linear_kernel,
    plan_for,
    shared_bytes,
)

H100 = Card((9, 0), 232_448)
A100 = Card((8, 0), 166_912)
RTX_3090 = Card((8, 6), 101_376)
L40 = Card((8, 9), 101_376)
CARDS = [H100, A100, RTX_3090, L40]
SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384), (130528, 4096), (192, 64), (64, 256)]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("weight_format", ["INT4", "INT8", "F16", "E4M3"])
def test_every_plan_fits_its_card_and_takes_its_batch(card, weight_format):
    for shape in SHAPES:
        for rows in range(1, MAX_ROWS + 1):
            plan = plan_for(weight_format, *shape, rows, card)
            if plan is None:
                continue
            assert shared_bytes(plan) <= card.max_shared_bytes
            chunks = shape[1] // 64
            if isinstance(plan, GroupPlan):
                assert card is H100
                assert plan.batch >= rows
                # Every set of warpgroups has as much of K as the others, an even number of chunks.
                assert chunks % (2 * plan.split * plan.k_groups) == 0
                assert plan.num_threads <= 1024
            else:
                assert plan.batch_tiles * 8 >= rows
                assert plan.split <= max(chunks, 1) or plan.split <= 8


@pytest.mark.parametrize("card", CARDS)
def test_small_batches_never_widen_quantized_weights_in_memory(card):
    for shape in SHAPES:
        for weight_format in ("INT4", "INT8"):
            assert all(plan_for(weight_format, *shape, rows, card) for rows in range(1, 65))


def test_a_shape_that_is_not_made_of_tiles_has_no_plan():
    assert plan_for("INT4", 40, 64, 1, H100) is None
    assert plan_for("F16", 64, 40, 1, H100) is None


def kernels() -> list[cuda_driver.Kernel]:
    """One build of each source."""
    shape = (4096, 4096)
    return [
        linear_kernel(WarpPlan(1, 2, 8, 2), "INT4", *shape, True, True),
        linear_kernel(WarpPlan(2, 2, 8, 2), "INT8", *shape, True, False),
        linear_kernel(WarpPlan(1, 1, 8, 2), "F16", *shape, False, False),
        linear_kernel(GroupPlan(64, 1, 2, 4), "INT4", *shape, True, False),
        linear_kernel(GroupPlan(64, 1, 2, 4, 4, 1, 1, 4), "INT8", *shape, True, True),
        cuda_ops._norm_kernel(4096, "RESIDUAL", False, False),
        cuda_ops._norm_kernel(4096, "PACKED_EMBEDDING", False, False),
        cuda_ops._rows_kernel(16384, False, True, False),
        cuda_ops._rotate_kernel(128, 32, 32, True, True),
        cuda_ops._prefill_kernel(128, 32, 2),
        cuda_ops.decode_kernel(cuda_ops.DecodePlan(4, 256, 8, 4), 128, 32, 32, 32, True, True),
        cuda_ops._dequantize_kernel(4, *shape, False),
        cuda_ops._sample_kernel(130528, 0, 130344, 130005, 5),
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_every_source_compiles_without_a_card(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cuda_driver._nvrtc()
    except cuda_driver.CudaUnavailableError as error:
        pytest.skip(f"needs NVRTC: {error}")
    built = kernels()
    assert {kernel.source for kernel in built} == {
        path.name for path in cuda_driver.SOURCE_FOLDER.glob("*.cu")
    }
    for kernel in built:
        if kernel.source == "linear_wgmma.cu" and arch != "sm_90a":
            continue
        assert cuda_driver.compile_source(kernel.source, kernel.defines, arch)
    # The second time they come from the folder.
    stored = {path.stat().st_mtime_ns for path in cuda_driver.cache_folder().iterdir()}
    assert cuda_driver.compile_source(built[0].source, built[0].defines, arch)
    assert {path.stat().st_mtime_ns for path in cuda_driver.cache_folder().iterdir()} == stored


def test_a_machine_without_the_runtime_compiler_is_told_what_is_missing(monkeypatch):
    cuda_driver._nvrtc.cache_clear()
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("torch.version.cuda", "99.0")
    try:
        with pytest.raises(cuda_driver.CudaUnavailableError, match="nvidia-cuda-nvrtc"):
            cuda_driver._nvrtc()
    finally:
        cuda_driver._nvrtc.cache_clear()
