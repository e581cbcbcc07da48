"""Finds the fastest division of the decode attention's work on this GPU, for batches and contexts.

    python -m ops.bench.tune_attention [--kv fp16 int8] [--batch 1 16 64]

Each plan runs in a chain over several layers' caches, which together are several times the L2, in a CUDA graph.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import torch

from workers.models.kernels import cuda_ops
from workers.models.kernels.cuda_driver import build_all
from workers.models.layers import rotary_tables

HEADS, HEAD_DIM, BLOCK_SIZE = 32, 128, 32
READ_BYTES_PER_SECOND = 3.03e12


def plans(batch: int) -> list[cuda_ops.DecodePlan]:
    parts = (1, 2, 4, 8) if batch <= 16 else (1,)
    return [
        cuda_ops.DecodePlan(part, part_keys, warps, unroll)
        for part, part_keys, warps, unroll in itertools.product(
            parts, (64, 128, 256), (3, 4, 6, 8, 16), (1, 2, 3, 4, 6, 8)
        )
        if (part > 1 or part_keys == 256) and warps * unroll <= 64
    ]


def random_cache(num_blocks: int, kv: str) -> cuda_ops.LayerCache:
    shape = (num_blocks, HEADS, BLOCK_SIZE, HEAD_DIM)
    if kv == "fp16":
        return cuda_ops.LayerCache(*(torch.randn(shape, device="cuda", dtype=torch.half) for _ in range(2)))
    values = [torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8) for _ in range(2)]
    return cuda_ops.LayerCache(
        *values, *(torch.full(shape[:3], 0.01, device="cuda", dtype=torch.half) for _ in range(2))
    )


def run_chain(*, plan, workspace, qkv, caches, tables, kv_lens, out, rotary, positions, slots) -> None:
    for cache in caches:
        cuda_ops.run_attend_decode(
            plan,
            workspace,
            qkv,
            cache,
            tables,
            kv_lens,
            HEAD_DIM**-0.5,
            out,
            rotary=rotary,
            positions=positions,
            slots=slots,
            is_dependent=True,
        )


def time_graph(run, repeats: int) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--context", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--top", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    rotary = rotary_tables(2049, HEAD_DIM, torch.float16, device)
    build_all(
        {
            cuda_ops.decode_kernel(plan, HEAD_DIM, HEADS, HEADS, BLOCK_SIZE, kv == "int8", True, True)
            for kv in arguments.kv
            for batch in arguments.batch
            for plan in plans(batch)
        },
        device,
    )
    for kv, batch, context in itertools.product(arguments.kv, arguments.batch, arguments.context):
        per_seq = context // BLOCK_SIZE
        size = batch * context * HEADS * (HEAD_DIM * 4 if kv == "fp16" else HEAD_DIM * 2 + 4)
        caches = [
            random_cache(batch * per_seq + 1, kv) for _ in range(max(1, min(28, int(300e6 / size) + 1)))
        ]
        tables = (torch.randperm(batch * per_seq, device="cuda") + 1).view(batch, per_seq).int()
        kv_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        slots = tables[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1
        qkv = torch.randn(batch, 3 * HEADS * HEAD_DIM, device="cuda", dtype=torch.half)
        positions = torch.full((2, batch), 100, device="cuda")
        out = torch.empty(batch, HEADS * HEAD_DIM, device="cuda", dtype=torch.half)
        found = []
        for plan in plans(batch):
            workspace = cuda_ops.shared_workspace(plan, batch, HEADS, HEAD_DIM, device)
            chain = functools.partial(
                run_chain,
                plan=plan,
                workspace=workspace,
                qkv=qkv,
                caches=caches,
                tables=tables,
                kv_lens=kv_lens,
                out=out,
                rotary=rotary,
                positions=positions,
                slots=slots,
            )
            found.append((time_graph(chain, 5) / len(caches), plan))
        found.sort(key=lambda one: one[0])
        for seconds, plan in found[: arguments.top]:
            print(
                f"{kv} batch {batch:4} context {context:4}: {seconds * 1e6:8.2f} us, "
                f"{size / seconds / READ_BYTES_PER_SECOND:6.1%}  {plan}",
                flush=True,
            )


if __name__ == "__main__":
    main()
