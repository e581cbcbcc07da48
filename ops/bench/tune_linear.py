"""Finds the fastest builds of the decode linears on this GPU, and checks each against float32 first.

    python -m ops.bench.tune_linear [--formats INT4 F16] [--rows 1 16 64] [--json plans.json]

Each build runs in a chain of launches over weights that together are several times the L2, in a CUDA graph, the way a
decode step runs it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from pathlib import Path

import torch

from workers.models.kernels import weight_packing
from workers.models.kernels.cuda_driver import build_all
from workers.models.kernels.cuda_linear import (
    BARRIER_BYTES,
    MAX_SHARED_BYTES,
    GroupPlan,
    Launch,
    Plan,
    WarpPlan,
    linear_kernel,
    shared_bytes,
)

SHAPES = {
    "query_key_value": (12288, 4096),
    "dense": (4096, 4096),
    "dense_h_to_4h": (16384, 4096),
    "dense_4h_to_h": (4096, 16384),
}
HEAD = (130528, 4096)
READ_BYTES_PER_SECOND = 3.03e12


def candidates(weight_format: str, rows: int, out_features: int, in_features: int) -> list[Plan]:
    chunks = in_features // 64
    plans: list[Plan] = []
    tiles = -(-rows // 8)
    if tiles <= 8:
        for row_tiles, split, prefetch, stages in itertools.product((1, 2, 4), (4, 8, 16), (2, 4, 8), (2, 4)):
            vectors = {"INT4": 1, "F16": 4}.get(weight_format, 2)
            registers = prefetch * row_tiles * vectors * 4 + row_tiles * tiles * 4
            plan = WarpPlan(tiles, row_tiles, split, prefetch, stages)
            if (
                registers <= 150
                and chunks // split >= prefetch
                and shared_bytes(plan) <= MAX_SHARED_BYTES
                and (tiles == 1 or row_tiles > 1)
                and (tiles <= 2 or (split <= 8 and prefetch <= 4))
                and (tiles <= 3 or (row_tiles == 2 and prefetch > 2 - split // 8))
                and (stages == 4 or (tiles > 2))
            ):
                plans.append(plan)
                if registers <= 40 and tiles == 1 and split < 16:
                    plans.append(WarpPlan(tiles, row_tiles, split, prefetch, stages, 24 // split))
    if weight_format in ("INT4", "INT8") and rows > 4:
        batch = next(size for size in (8, 16, 24, 32, 48, 64, 96, 128) if size >= rows)
        for (groups, tall), split, k_groups, (prefetch, stages), min_blocks in itertools.product(
            ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)),
            (1, 2, 4, 8),
            (1, 2, 4),
            ((4, 4), (4, 8), (8, 8)),
            (1, 2),
        ):
            plan = GroupPlan(batch, tall, split, prefetch, stages, min_blocks, groups, k_groups)
            vectors = {"INT4": 1}.get(weight_format, 2)
            registers = batch * tall // 2 + tall * (16 + 4 * prefetch * vectors) + 32
            num_blocks = -(-out_features // plan.num_rows) * split
            if (
                plan.num_threads <= 768
                # Neither most of the GPU idle nor a second round of blocks; a head has many rounds.
                and (
                    split == 1
                    if out_features > 65536
                    else 56 <= num_blocks <= 300 and 200 <= num_blocks * groups * k_groups * tall <= 1600
                )
                and chunks // (split * k_groups) % prefetch == 0
                and chunks // (split * k_groups) >= prefetch
                and registers * plan.num_threads * min_blocks <= 65536
                and (shared_bytes(plan) + BARRIER_BYTES) * min_blocks <= MAX_SHARED_BYTES
            ):
                plans.append(plan)
    return plans


def make_weights(
    weight_format: str, shape: tuple[int, int], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stored [count, bytes], scales, the first one's values in float32)"""
    out_features, in_features = shape
    if weight_format == "F16":
        stored = torch.randn(count, out_features, in_features, device="cuda", dtype=torch.float16)
        return stored, torch.ones(out_features, device="cuda"), stored[0].float()
    # Small enough that no sum leaves the range of fp16.
    scales = (torch.rand(out_features, device="cuda") + 0.5) / 64
    if weight_format == "E4M3":
        values = torch.randn(count, out_features, in_features, device="cuda").to(torch.float8_e4m3fn)
        return values.view(torch.uint8), scales, values[0].float() * scales[:, None]
    bits = 4 if weight_format == "INT4" else 8
    limit = 2 ** (bits - 1)
    packed, first = [], None
    for _ in range(count):
        values = torch.randint(-limit, limit, shape, device="cuda", dtype=torch.int8)
        first = values if first is None else first
        packed.append(weight_packing.pack(values, bits))
    return torch.stack(packed), scales, first.float() * scales[:, None]


def run_chain(*, launch, x, stored, scales, bias, out) -> None:
    for weight in stored:
        launch.run(x, weight, scales, bias, out, is_dependent=True)


def time_graph(run, repeats: int) -> float:
    """Seconds, the median of `repeats` replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


KINDS = {
    "fused": ("query_key_value",),
    "tall": ("dense_h_to_4h",),
    "square": ("dense",),
    "wide": ("dense_4h_to_h",),
}


def best_plans(results: list[dict]) -> list[dict]:
    """The fastest plan for each format, kind of shape and number of rows; of two shapes of a kind, for both together."""
    best = []
    for weight_format, rows in sorted({(one["format"], one["rows"]) for one in results}):
        for kind, names in KINDS.items():
            times: dict[str, list[float]] = {}
            for one in results:
                if (
                    (one["format"], one["rows"]) == (weight_format, rows)
                    and one["shape"] in names
                    and "us" in one
                ):
                    times.setdefault(one["plan"], []).append(one["us"])
            whole = {plan: sum(found) for plan, found in times.items() if len(found) == len(names)}
            if whole:
                plan = min(whole, key=lambda plan: whole[plan])
                best.append(
                    {"format": weight_format, "shape": kind, "rows": rows, "plan": plan, "us": whole[plan]}
                )
                print(f"best: {weight_format} {kind:6} rows {rows:3} {whole[plan]:7.2f} us {plan}")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["INT4"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--json", type=Path, help="every build's time")
    parser.add_argument("--plans", type=Path, help="the fastest plans, for `engine.py --plans`")
    arguments = parser.parse_args()
    shapes = SHAPES | ({"head": HEAD} if arguments.head else {})
    results, totals, device = [], {}, torch.device("cuda")

    started = time.perf_counter()
    plans = {
        (weight_format, name, rows): candidates(weight_format, rows, *shape)
        for weight_format in arguments.formats
        for name, shape in shapes.items()
        for rows in arguments.rows
    }
    kernels = {
        linear_kernel(plan, weight_format, *shapes[name], True, False)
        for (weight_format, name, _), chosen in plans.items()
        for plan in chosen
    }
    build_all(kernels, device)
    print(f"{len(kernels)} builds in {time.perf_counter() - started:.1f} s", flush=True)

    for weight_format in arguments.formats:
        for name, shape in shapes.items():
            out_features, in_features = shape
            size = out_features * in_features * {"INT4": 0.5, "F16": 2}.get(weight_format, 1)
            count = max(2, int(400e6 / size))
            stored, scales, first = make_weights(weight_format, shape, count)
            bias = torch.randn(out_features, device="cuda", dtype=torch.float16)
            ideal = size / READ_BYTES_PER_SECOND
            for rows in arguments.rows:
                x = torch.randn(rows, in_features, device="cuda", dtype=torch.float16)
                out = torch.empty(rows, out_features, device="cuda", dtype=torch.float16)
                expected = x.float() @ first.T + bias.float()
                best = []
                for plan in plans[weight_format, name, rows]:
                    out.fill_(float("nan"))
                    launch = Launch.of(plan, weight_format, out_features, in_features, True, False)
                    launch.run(x, stored[0], scales, bias, out)
                    error = ((out.float() - expected).norm() / expected.norm()).item()
                    if not error < 2e-3:
                        results.append(
                            {
                                "format": weight_format,
                                "shape": name,
                                "rows": rows,
                                "plan": repr(plan),
                                "error": error,
                            }
                        )
                        print(f"WRONG {weight_format} {name} {rows} {plan} error {error}", flush=True)
                        continue

                    chain = functools.partial(
                        run_chain,
                        launch=launch,
                        x=x,
                        stored=stored,
                        scales=scales,
                        bias=bias,
                        out=out,
                    )
                    seconds = time_graph(chain, 5) / count
                    best.append((seconds, plan, error))
                    results.append(
                        {
                            "format": weight_format,
                            "shape": name,
                            "rows": rows,
                            "plan": repr(plan),
                            "us": seconds * 1e6,
                            "error": error,
                        }
                    )
                best.sort(key=lambda one: one[0])
                for kind in (WarpPlan, GroupPlan):
                    mine = [one for one in best if isinstance(one[1], kind)]
                    if mine:
                        seconds, plan, error = mine[0]
                        print(
                            f"{weight_format} {name:16} rows {rows:3}  {seconds * 1e6:7.2f} us  {ideal / seconds:5.1%}  error {error:.1e}  {plan}",
                            flush=True,
                        )
                if best and name != "head":
                    totals[weight_format, rows] = totals.get((weight_format, rows), 0.0) + best[0][0] * 28
            del stored
    for (weight_format, rows), seconds in totals.items():
        print(f"{weight_format} rows {rows}: all linears of 28 layers {seconds * 1e3:.3f} ms")
    if arguments.json:
        arguments.json.write_text("\n".join(json.dumps(one) for one in results))
    if arguments.plans:
        arguments.plans.write_text("\n".join(json.dumps(one) for one in best_plans(results)))


if __name__ == "__main__":
    main()
