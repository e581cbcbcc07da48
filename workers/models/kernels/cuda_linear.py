"""Matrix products of few rows with int4, int8, e4m3 or fp16 weights, each weight read once: `cuda/linear*.cu`.

Knows shapes and formats, and which build is fastest for which batch; knows nothing about the network.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Literal

import torch

from workers.models.kernels.cuda_driver import Kernel

Format = Literal["INT4", "INT8", "E4M3", "F16"]

MAX_SHARED_BYTES: Final = 227 * 1024


@dataclass(frozen=True, slots=True)
class WarpPlan:
    """A build of `linear.cu`: any card from sm_80 on. `batch_tiles` of 8 rows, `row_tiles` of 16 outputs a block."""

    batch_tiles: int
    row_tiles: int
    split: int
    prefetch: int
    stages: int = 4
    min_blocks: int = 1


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A build of `linear_wgmma.cu`: Hopper, int4 and int8. `batch` rows, 128 * `tall` outputs a block, K cut in `split`."""

    batch: int
    tall: int
    split: int
    prefetch: int
    stages: int = 5
    min_blocks: int = 1


Plan = WarpPlan | GroupPlan


@functools.cache
def linear_kernel(
    plan: Plan, weight_format: Format, out_features: int, in_features: int, has_bias: bool, has_gelu: bool
) -> Kernel:
    """The build for this plan and shape."""
    defines: dict[str, int | str] = {
        "N": out_features,
        "K": in_features,
        "FORMAT": weight_format,
        "SPLIT": plan.split,
        "PREFETCH": plan.prefetch,
        "STAGES": plan.stages,
        "MIN_BLOCKS": plan.min_blocks,
        "BIAS": int(has_bias),
        "GELU": int(has_gelu),
    }
    if isinstance(plan, WarpPlan):
        defines |= {
            "BATCH_TILES": plan.batch_tiles,
            "ROW_TILES": plan.row_tiles,
            "SCALED": int(weight_format != "F16"),
        }
        ring = plan.split * plan.stages * plan.batch_tiles * 1024
        sums = plan.split * plan.row_tiles * plan.batch_tiles * 512
        return Kernel("linear.cu", "linear", "pppppi", defines, plan.split * 32, max(ring, sums))
    defines |= {"BATCH": plan.batch, "TALL": plan.tall}
    ring = plan.stages * (-(-plan.batch * 128 // 1024) * 1024)
    sums = plan.batch * (128 * plan.tall + 4) * 4
    return Kernel("linear_wgmma.cu", "linear", "pppppi", defines, 256, max(ring, sums))


def linear_grid(plan: Plan, out_features: int) -> tuple[int, ...]:
    if isinstance(plan, WarpPlan):
        return (-(-out_features // (16 * plan.row_tiles)),)
    return (plan.split, -(-out_features // (128 * plan.tall)))


def run_linear(
    plan: Plan,
    weight_format: Format,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    has_gelu: bool = False,
    is_dependent: bool = False,
) -> None:
    """out[M, N] = x[M, K] weight^T * scales + bias. x, bias, out: fp16; scales: float32; contiguous."""
    kernel = linear_kernel(plan, weight_format, out.shape[1], x.shape[1], bias is not None, has_gelu)
    grid = linear_grid(plan, out.shape[1])
    kernel.launch(grid, weight, scales, bias, x, out, x.shape[0], is_dependent=is_dependent)
