"""Linear layers with int4, int8, e4m3 or fp16 weights: for few rows the kernels of `cuda/linear*.cu`, which read each weight
once, for many the matrix products of torch.

Knows shapes and formats, and which way is fastest for which batch; knows nothing about the network.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch

from workers.models.kernels import weight_packing
from workers.models.kernels.cuda_driver import Kernel, row_tile_map
from workers.models.kernels.cuda_ops import run_dequantize, run_rows
from workers.models.kernels.weight_packing import TILE_INPUTS
from workers.models.quantization import Bits, quantize

Format = Literal["INT4", "INT8", "E4M3", "F16"]

MAX_SHARED_BYTES: Final = 227 * 1024
E4M3_MAX: Final = 448.0
MAX_ROWS: Final = 128
"""Of the largest plan."""
MAX_PASSES: Final = 2
"""So many passes over packed weights are still faster than widening them in memory first."""


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
    """A build of `linear_wgmma.cu`: Hopper, int4 and int8. `batch` rows, 64 * `groups` * `tall` outputs a block; K is cut in
    `split` between blocks, and in `k_groups` within one."""

    batch: int
    tall: int
    split: int
    prefetch: int
    stages: int = 5
    min_blocks: int = 1
    groups: int = 2
    k_groups: int = 1

    @property
    def num_threads(self) -> int:
        return 128 * self.groups * self.k_groups

    @property
    def num_rows(self) -> int:
        """Outputs of a block."""
        return 64 * self.groups * self.tall


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
        return Kernel("linear.cu", "linear", "pppppi", defines, plan.split * 32, shared_bytes(plan))
    defines |= {
        "BATCH": plan.batch,
        "TALL": plan.tall,
        "GROUPS": plan.groups,
        "K_GROUPS": plan.k_groups,
    }
    return Kernel("linear_wgmma.cu", "linear", "mppppi", defines, plan.num_threads, shared_bytes(plan))


def linear_grid(plan: Plan, out_features: int) -> tuple[int, ...]:
    if isinstance(plan, WarpPlan):
        return (-(-out_features // (16 * plan.row_tiles)),)
    return (plan.split, -(-out_features // plan.num_rows))


@dataclass(frozen=True, slots=True)
class Launch:
    """A build with the grid that it runs in, for one shape and up to so many rows."""

    plan: Plan
    kernel: Kernel
    grid: tuple[int, ...]

    @classmethod
    @functools.cache
    def of(
        cls,
        plan: Plan,
        weight_format: Format,
        out_features: int,
        in_features: int,
        has_bias: bool,
        has_gelu: bool,
    ) -> Launch:
        kernel = linear_kernel(plan, weight_format, out_features, in_features, has_bias, has_gelu)
        return cls(plan, kernel, linear_grid(plan, out_features))

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        is_dependent: bool = False,
    ) -> None:
        """out[M, N] = x[M, K] weight^T * scales + bias. x, bias, out: fp16; scales: float32; contiguous."""
        if isinstance(self.plan, GroupPlan):
            tiles = row_tile_map(x, self.plan.batch, TILE_INPUTS)
            self.kernel.launch(self.grid, tiles, weight, scales, bias, out, len(x), is_dependent=is_dependent)
        else:
            self.kernel.launch(self.grid, weight, scales, bias, x, out, len(x), is_dependent=is_dependent)


# --- which build for which batch -------------------------------------------------------------------------------------

Shape = Literal["fused", "tall", "square", "wide"]

# For batches up to so many rows, the fastest build measured on an H100 (ops/bench/tune_linear.py, LOG.md).
_PLANS: Final[dict[tuple[Format, Shape], tuple[tuple[int, Plan], ...]]] = {
    ("INT4", "fused"): (
        (8, WarpPlan(1, 2, 8, 2)),
        (16, WarpPlan(2, 2, 8, 2)),
        (24, GroupPlan(24, 2, 1, 4, 8, 1, 1, 4)),
        (32, GroupPlan(32, 2, 1, 4, 8, 1, 1, 4)),
        (48, GroupPlan(48, 1, 2, 8, 8, 1, 3)),
        (64, GroupPlan(64, 1, 2, 8, 8, 1, 3)),
        (96, GroupPlan(96, 1, 2, 4, 4, 1, 3)),
        (128, GroupPlan(128, 1, 2, 4, 4, 1, 3)),
    ),
    ("INT4", "tall"): (
        (8, WarpPlan(1, 2, 8, 2)),
        (16, GroupPlan(16, 2, 1, 4, 8, 1, 1, 4)),
        (24, GroupPlan(24, 2, 1, 4, 8, 1, 1, 4)),
        (32, GroupPlan(32, 2, 1, 4, 8, 1, 1, 4)),
        (48, GroupPlan(48, 1, 1, 8, 8, 1, 2, 2)),
        (64, GroupPlan(64, 1, 1, 4, 4, 1, 2, 2)),
        (96, GroupPlan(96, 1, 1, 4, 4, 1, 2, 2)),
        (128, GroupPlan(128, 1, 1, 4, 4, 1, 2, 2)),
    ),
    ("INT4", "square"): (
        (8, WarpPlan(1, 2, 16, 4)),
        (16, WarpPlan(2, 2, 16, 2)),
        (24, GroupPlan(24, 1, 2, 4, 4, 1, 1, 4)),
        (32, GroupPlan(32, 1, 2, 4, 4, 1, 1, 4)),
        (48, GroupPlan(48, 1, 2, 4, 4, 1, 1, 4)),
        (64, GroupPlan(64, 1, 2, 4, 4, 1, 1, 4)),
        (96, GroupPlan(96, 1, 2, 8, 8, 1, 1, 2)),
        (128, GroupPlan(128, 1, 2, 4, 4, 1, 1, 2)),
    ),
    ("INT4", "wide"): (
        (8, WarpPlan(1, 1, 16, 2)),
        (16, WarpPlan(2, 2, 16, 8)),
        (24, GroupPlan(24, 1, 2, 4, 4, 1, 1, 4)),
        (32, GroupPlan(32, 1, 2, 4, 4, 1, 1, 4)),
        (48, GroupPlan(48, 1, 2, 8, 8, 1, 1, 4)),
        (64, GroupPlan(64, 1, 2, 4, 4, 1, 1, 4)),
        (96, GroupPlan(96, 1, 2, 4, 4, 1, 1, 4)),
        (128, GroupPlan(128, 1, 2, 4, 4, 1, 1, 2)),
    ),
    ("INT8", "fused"): (
        (8, WarpPlan(1, 1, 8, 2)),
        (16, WarpPlan(2, 2, 4, 4)),
        (32, GroupPlan(32, 1, 1, 8, 8, 1, 1, 2)),
        (64, GroupPlan(64, 1, 1, 4, 4, 2, 1, 2)),
        (128, GroupPlan(128, 1, 2, 4, 8, 1, 3)),
    ),
    ("INT8", "tall"): (
        (8, WarpPlan(1, 1, 8, 2)),
        (16, WarpPlan(2, 2, 4, 4)),
        (32, GroupPlan(32, 1, 1, 8, 8, 2, 1, 2)),
        (64, GroupPlan(64, 1, 1, 4, 4, 2, 1, 2)),
        (128, GroupPlan(128, 2, 1, 4, 4, 1, 1, 2)),
    ),
    ("INT8", "square"): (
        (8, WarpPlan(1, 1, 16, 2)),
        (16, WarpPlan(2, 2, 16, 2)),
        (32, GroupPlan(32, 1, 2, 4, 4, 1, 1, 4)),
        (64, GroupPlan(64, 1, 2, 8, 8, 1, 1, 2)),
        (128, GroupPlan(128, 1, 2, 4, 4, 1, 1, 2)),
    ),
    ("INT8", "wide"): (
        (8, WarpPlan(1, 2, 16, 4)),
        (16, WarpPlan(2, 2, 16, 2)),
        (32, GroupPlan(32, 1, 2, 8, 8, 1, 1, 4)),
        (64, GroupPlan(64, 1, 2, 4, 4, 1, 1, 4)),
        (128, GroupPlan(128, 1, 2, 4, 4, 1, 1, 2)),
    ),
    ("F16", "tall"): ((8, WarpPlan(1, 1, 16, 2)), (16, WarpPlan(2, 2, 16, 2))),
    ("F16", "square"): ((8, WarpPlan(1, 1, 16, 2)), (16, WarpPlan(2, 2, 16, 2))),
    ("F16", "wide"): ((8, WarpPlan(1, 2, 16, 2)), (16, WarpPlan(2, 2, 16, 2))),
    ("E4M3", "tall"): ((8, WarpPlan(1, 1, 8, 2)), (16, WarpPlan(2, 2, 4, 4))),
    ("E4M3", "square"): ((8, WarpPlan(1, 1, 16, 2)), (16, WarpPlan(2, 2, 16, 4))),
    ("E4M3", "wide"): ((8, WarpPlan(1, 2, 16, 4)), (16, WarpPlan(2, 2, 16, 2))),
}


def _shape(out_features: int, in_features: int) -> Shape:
    if in_features > 8192:
        return "wide"
    if out_features > 12288:
        return "tall"
    return "fused" if out_features > 8192 else "square"


@dataclass(frozen=True, slots=True)
class Card:
    """What a build must respect."""

    capability: tuple[int, int]
    max_shared_bytes: int

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Card:
        properties = torch.cuda.get_device_properties(device)
        shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls((properties.major, properties.minor), shared)


def shared_bytes(plan: Plan) -> int:
    """Dynamic shared memory of a block: the rings of activations, and later the sums in their place."""
    if isinstance(plan, WarpPlan):
        ring = plan.stages * plan.batch_tiles * 1024
        return plan.split * max(ring, plan.row_tiles * plan.batch_tiles * 512)
    ring = plan.stages * (-(-plan.batch * 128 // 1024) * 1024)
    return plan.k_groups * max(ring, plan.batch * (plan.num_rows + 4) * 4)


BARRIER_BYTES: Final = 1024
"""Shared memory that a block of `linear_wgmma.cu` has beside that."""


@functools.cache
def plan_for(
    weight_format: Format, out_features: int, in_features: int, num_rows: int, card: Card
) -> Plan | None:
    """The build for a batch of this size; None when a matrix product of torch is faster, or the shape has no build."""
    if out_features % 16 or in_features % 64:
        return None
    shape = _shape(out_features, in_features)
    plans = _PLANS.get((weight_format, shape)) or _PLANS[weight_format, "tall"]
    plan = next((plan for rows, plan in plans if num_rows <= rows), None)
    if plan is None:
        return None
    chunks = in_features // 64
    if isinstance(plan, GroupPlan):
        # Each set of warpgroups takes an even number of chunks.
        split, k_groups = plan.split, plan.k_groups
        while chunks % (2 * split * k_groups) and split * k_groups > 1:
            split, k_groups = (split // 2, k_groups) if split > 1 else (split, k_groups // 2)
        steps = chunks // (split * k_groups)
        if card.capability == (9, 0) and steps % 2 == 0:
            return replace(plan, split=split, k_groups=k_groups, prefetch=min(plan.prefetch, steps))
        if num_rows > 64:
            return None
        plan = WarpPlan(-(-num_rows // 8), 2, 8, 4, 2)
    split = min(plan.split, chunks)
    plan = replace(plan, split=split, prefetch=max(1, min(plan.prefetch, chunks // split)))
    # Smaller cards have less shared memory than the ones that the table was measured on.
    while shared_bytes(plan) > card.max_shared_bytes and plan.split > 1:
        plan = replace(plan, stages=2) if plan.stages > 2 else replace(plan, split=plan.split // 2)
    return plan


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A layer's weights on a GPU in one of the formats. INT4, INT8: packed (`weight_packing`); E4M3, F16: [out, in]."""

    weight_format: Format
    weight: torch.Tensor
    scales: torch.Tensor | None
    """[out] float32; None for F16"""
    bias: torch.Tensor | None
    """[out] fp16"""
    out_features: int
    in_features: int
    _launches: dict[tuple[int, bool], Launch | None] = field(default_factory=dict, compare=False, repr=False)

    def launch(self, num_rows: int, *, has_gelu: bool) -> Launch | None:
        """How a batch of this size runs in one go; None: not with the kernels of `cuda/linear*.cu`."""
        key = (min(num_rows, MAX_ROWS + 1), has_gelu)
        if key not in self._launches:
            shape = (self.out_features, self.in_features)
            plan = plan_for(self.weight_format, *shape, key[0], Card.of(self.weight.device))
            has_bias = self.bias is not None
            self._launches[key] = (
                None if plan is None else Launch.of(plan, self.weight_format, *shape, has_bias, has_gelu)
            )
        return self._launches[key]

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, weight_format: Format
    ) -> LinearWeight:
        """Quantizes fp16 weights [out, in], which stay as they are."""
        out_features, in_features = weight.shape
        if weight_format == "F16":
            return cls("F16", weight, None, bias, out_features, in_features)
        if weight_format == "E4M3":
            scales = (weight.abs().amax(dim=1).float() / E4M3_MAX).clamp(min=1e-12)
            stored = (weight.float() / scales.unsqueeze(1)).to(torch.float8_e4m3fn)
            return cls("E4M3", stored, scales, bias, out_features, in_features)
        bits: Bits = 4 if weight_format == "INT4" else 8
        quantized = quantize(weight, bits)
        return cls.from_integers(quantized.values, quantized.scales, bias, bits)

    @classmethod
    def from_integers(
        cls, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: Bits
    ) -> LinearWeight:
        """values: int8 [out, in]; scales: [out]."""
        packed = weight_packing.pack(values, bits)
        return cls("INT4" if bits == 4 else "INT8", packed, scales.float(), bias, *values.shape)

    @property
    def num_bytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (self.weight, self.scales, self.bias) if t is not None
        )


@dataclass(slots=True)
class Activations:
    """Rows in fp16, and in e4m3 with a scale a row once somebody has made that."""

    half: torch.Tensor
    e4m3: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def as_e4m3(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.e4m3 is None or self.scales is None:
            self.e4m3, self.scales = empty_e4m3(self.half)
            run_rows(self.half, out_e4m3=self.e4m3, out_scales=self.scales)
        return self.e4m3, self.scales


def empty_e4m3(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for these rows and their scales. Up to the next multiple of 16 rows are added, which nobody writes: the products
    of cuBLAS do not take every number of rows, and rows do not mix."""
    num_rows = -(-like.shape[0] // 16) * 16
    return (
        torch.empty(num_rows, like.shape[1], dtype=torch.float8_e4m3fn, device=like.device),
        torch.empty(num_rows, dtype=torch.float32, device=like.device),
    )


def takes_e4m3(weight: LinearWeight, num_rows: int) -> bool:
    """Whether `apply` runs this batch on the e4m3 matrix units."""
    return weight.weight_format == "E4M3" and weight.launch(num_rows, has_gelu=False) is None


def apply(
    weight: LinearWeight, x: Activations, *, has_gelu: bool = False, is_dependent: bool = False
) -> Activations:
    """y[M, N], through GELU if asked. With the e4m3 units, GELU's result is left in e4m3 alone."""
    num_rows, (out_features, in_features) = x.half.shape[0], (weight.out_features, weight.in_features)
    if takes_e4m3(weight, num_rows):
        return _apply_e4m3(weight, x, has_gelu=has_gelu)
    step, launch = num_rows, weight.launch(num_rows, has_gelu=has_gelu)
    if launch is None and weight.weight_format in ("INT4", "INT8") and num_rows <= MAX_PASSES * MAX_ROWS:
        step = MAX_ROWS
        launch = weight.launch(step, has_gelu=has_gelu)
    out = torch.empty(num_rows, out_features, dtype=torch.float16, device=x.half.device)
    if launch is not None:
        for begin in range(0, num_rows, step):
            part = x.half[begin : begin + step] if step < num_rows else x.half
            part_out = out[begin : begin + step] if step < num_rows else out
            launch.run(part, weight.weight, weight.scales, weight.bias, part_out, is_dependent=is_dependent)
        return Activations(out)
    dense = weight.weight
    if weight.weight_format in ("INT4", "INT8"):
        if weight.scales is None:
            raise ValueError("integer weights have scales")
        dense = torch.empty(out_features, in_features, dtype=torch.float16, device=x.half.device)
        run_dequantize(weight.weight, weight.scales, 4 if weight.weight_format == "INT4" else 8, dense)
    if weight.bias is not None:
        torch.addmm(weight.bias, x.half, dense.T, out=out)
    else:
        torch.mm(x.half, dense.T, out=out)
    if has_gelu:
        run_rows(out, out=out, has_gelu=True)
    return Activations(out)


def _apply_e4m3(weight: LinearWeight, x: Activations, *, has_gelu: bool) -> Activations:
    values, scales = x.as_e4m3()
    if weight.scales is None:
        raise ValueError("e4m3 weights have scales")
    out = torch._scaled_mm(
        values,
        weight.weight.T,
        scale_a=scales.unsqueeze(1),
        scale_b=weight.scales.unsqueeze(0),
        bias=weight.bias,
        out_dtype=torch.float16,
        use_fast_accum=True,
    )[: len(x.half)]
    if not has_gelu:
        return Activations(out)
    e4m3, row_scales = empty_e4m3(out)
    run_rows(out, out_e4m3=e4m3, out_scales=row_scales, has_gelu=True)
    return Activations(out, e4m3, row_scales)
