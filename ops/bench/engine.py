"""Tokens a second of the engine's decode step, for batches and contexts, on random weights of the full size.

    python ops/bench/engine.py --weights int4 --batch 1 16 64 --context 256 [--kv int8] [--head int8]

Prints each figure beside the roof that memory bandwidth sets (weights and cache read once) and appends it to
results.jsonl. The whole step counts: network, head, sampling, and the copies of its inputs and tokens.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workers.engine.cuda_graphs import DecodeGraph, Vocabulary
from workers.models.batch import Batch, KVCache
from workers.models.config import ModelConfig
from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

CHATGLM_6B = ModelConfig(
    hidden_size=4096, inner_hidden_size=16384, num_layers=28, num_heads=32, vocab_size=130528
)
VOCABULARY = Vocabulary(first_id=0, end_id=130344, eos_id=130005, invalid_token=5)
RESULTS = Path(__file__).parent / "results.jsonl"
BLOCK_SIZE = 32
MEASURED_READ_BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.03e12}


def read_bytes_per_second() -> float:
    """Measured before for this card, else now."""
    known = MEASURED_READ_BYTES_PER_SECOND.get(torch.cuda.get_device_name())
    if known:
        return known
    data = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_().view(torch.int32)
    data.sum()
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return (1 << 31) / sorted(times)[5]


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def record(case: str, tokens_per_s: float, roof: float, reference: float | None = None, **more: Any) -> None:
    """One line of results.jsonl."""
    line = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "commit": commit(),
        "case": case,
        "tokens_per_s": round(tokens_per_s, 1),
        "roof": round(roof, 1),
        "share": round(tokens_per_s / roof, 4),
        "reference_tokens_per_s": reference,
        **more,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def new_cache(num_blocks: int, kv: str) -> KVCache:
    """A cache full of random keys and values."""
    config = CHATGLM_6B
    shape = (config.num_layers, num_blocks, config.num_heads, BLOCK_SIZE, config.head_dim)
    if kv == "fp16":
        return KVCache(*(torch.empty(shape, dtype=torch.float16, device="cuda").normal_() for _ in range(2)))
    values = [torch.empty(shape, dtype=torch.int8, device="cuda") for _ in range(2)]
    for tensor in values:
        for layer in tensor:
            layer.random_(-127, 128)
    scales = [torch.full(shape[:-1], 0.01, dtype=torch.float16, device="cuda") for _ in range(2)]
    return KVCache(*values, *scales)


def kv_bytes(kv: str) -> int:
    """Bytes of the cache a token."""
    heads = 2 * CHATGLM_6B.num_layers * CHATGLM_6B.num_heads
    return heads * CHATGLM_6B.head_dim * 2 if kv == "fp16" else heads * (CHATGLM_6B.head_dim + 2)


def median_seconds(run: Callable[[], object], count: int = 10) -> float:
    """By the GPU's clock, after one run that does not count."""
    run()
    times = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[count // 2]


def decode_seconds(
    model: CudaChatGLM, cache: KVCache, batch: int, context: int, temperature: float, *, profile: bool
) -> tuple[float, float]:
    """(seconds a step by the host's clock, seconds of the graph alone by the GPU's)."""
    last_tokens = torch.randint(0, 130000, (batch + 1,), device="cuda")
    max_blocks = -(-CHATGLM_6B.max_sequence_length // BLOCK_SIZE)
    graph = DecodeGraph(model, cache, VOCABULARY, last_tokens, batch_size=batch, max_blocks=max_blocks)
    graph.capture()
    num_blocks = -(-context // BLOCK_SIZE)
    # A cache that is too small for the batch is read more than once, which takes the same time.
    blocks = torch.arange(batch * num_blocks) % (cache.num_blocks - 1) + 1
    tables = blocks[torch.randperm(len(blocks))].view(batch, num_blocks).numpy()
    host_tokens = torch.zeros(batch, dtype=torch.int64, pin_memory=True)
    done = [torch.cuda.Event() for _ in range(2)]

    def step(index: int) -> None:
        host = graph.inputs.host()
        host["block_tables"][:, :num_blocks] = tables
        host["kv_lens"][:] = context
        host["positions"][:] = context // 2
        host["slots"][:] = tables[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        host["token_rows"][:] = range(batch)
        host["temperatures"][:] = temperature
        host["top_ks"][:] = 50
        host["top_ps"][:] = 0.7
        host["seeds"][:] = range(batch)
        host["token_indexes"][:] = index
        graph.inputs.send()
        graph.replay()
        host_tokens.copy_(graph.tokens, non_blocking=True)
        done[index % 2].record()

    for index in range(4):
        step(index)
    torch.cuda.synchronize()
    count = 50
    started = time.perf_counter()
    for index in range(count):
        step(index)
        if index:
            # One step ahead of the GPU, as the engine is.
            done[(index - 1) % 2].synchronize()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / count
    if profile:
        print_profile(graph.replay)
    return wall, median_seconds(graph.replay)


def print_profile(run: Callable[[], object]) -> None:
    """Where the GPU's time goes, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:14]:
        print(f"    {event.self_device_time_total / 3:9.1f} us in {event.count // 3:4}  {event.key[:90]}")


def prefill_seconds(model: CudaChatGLM, cache: KVCache, num_prompts: int, prompt_len: int) -> float:
    """Seconds to prefill so many prompts packed together."""
    num_tokens = num_prompts * prompt_len
    lens = torch.full((num_prompts,), prompt_len, dtype=torch.int32, device="cuda")
    starts = torch.arange(num_prompts + 1, dtype=torch.int32, device="cuda") * prompt_len
    batch = Batch(
        is_prefill=True,
        token_ids=torch.randint(0, 130000, (num_tokens,), device="cuda"),
        positions=torch.arange(prompt_len, device="cuda").repeat(2, num_prompts),
        slots=torch.arange(num_tokens, device="cuda") % ((cache.num_blocks - 1) * BLOCK_SIZE) + BLOCK_SIZE,
        kv_lens=lens,
        block_tables=torch.zeros(num_prompts, 1, dtype=torch.int32, device="cuda"),
        query_starts=starts,
        prefix_lens=lens - 1,
        max_query_len=prompt_len,
        max_kv_len=prompt_len,
    )
    return median_seconds(lambda: model(batch, cache), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["int4"], choices=["fp16", "int8", "int4", "fp8"])
    parser.add_argument("--head", default="fp16", choices=["fp16", "int8", "fp8"])
    parser.add_argument("--kv", nargs="+", default=["fp16"], choices=["fp16", "int8"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", nargs="+", type=int, default=[256])
    parser.add_argument("--temperature", type=float, default=0.95)
    parser.add_argument("--prefill", nargs="*", default=[], help="packed prompts, as in 32x128")
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    bandwidth = read_bytes_per_second()
    with torch.inference_mode():
        for setting in arguments.weights:
            weights = ChatGLMWeights.random(CHATGLM_6B, setting, arguments.head)
            model = CudaChatGLM(CHATGLM_6B, weights)
            embedding = weights.embedding.numel() * 2
            read = weights.num_bytes - (embedding if weights.head.weight_format != "F16" else 0)
            print(f"{setting}, {arguments.head} head: {weights.num_bytes / 1e9:.2f} GB of weights")
            for kv in arguments.kv:
                needed = max(arguments.batch) * max(arguments.context) * kv_bytes(kv)
                free = torch.cuda.mem_get_info()[0] - (6 << 30)
                cache = new_cache(int(min(needed, free) / kv_bytes(kv) / BLOCK_SIZE) + 2, kv)
                for prompts in arguments.prefill:
                    count, length = map(int, prompts.split("x"))
                    seconds = prefill_seconds(model, cache, count, length)
                    tokens = count * length
                    flops = (
                        2
                        * tokens
                        * sum(
                            one.out_features * one.in_features
                            for layer in weights.layers
                            for one in layer.linears
                        )
                    )
                    print(
                        f"  prefill {prompts:>8}: {seconds * 1e3:8.2f} ms, {tokens / seconds:9.0f} tok/s, {flops / seconds / 1e12:5.0f} TFLOP/s",
                        flush=True,
                    )
                for batch, context in itertools.product(arguments.batch, arguments.context):
                    wall, gpu = decode_seconds(
                        model, cache, batch, context, arguments.temperature, profile=arguments.profile
                    )
                    roof = batch * bandwidth / (read + batch * context * kv_bytes(kv))
                    tokens_per_s = batch / wall
                    print(
                        f"  {kv} KV, batch {batch:4}, context {context:4}: {tokens_per_s:9.1f} tok/s of {roof:9.1f} "
                        f"({tokens_per_s / roof:5.1%}), {wall * 1e3:.3f} ms a step, {gpu * 1e3:.3f} ms in the graph",
                        flush=True,
                    )
                    if not arguments.no_record:
                        record(
                            f"decode {setting} head {arguments.head} kv {kv} batch {batch} context {context}",
                            tokens_per_s,
                            roof,
                        )
                del cache
            del model, weights
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
