"""Tokens a second of the engine's decode step, for batches and contexts, on random weights of the full size.

    python -m ops.bench.engine --weights int4 --batch 1 16 64 --context 256 [--kv int8] [--head int8]
    python -m ops.bench.engine --weights fp8 --kv int8 --requests 1024x128x128

Prints each figure beside the roof that memory bandwidth sets (weights and cache read once) and appends it to
results.jsonl. The whole step counts: network, head, sampling, and the copies of its inputs and tokens. `--requests`
(number x prompt x answer) runs them through the engine itself: scheduling, prefill, decode, tokens on the host.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from workers.engine.adapters import Adapters
from workers.engine.config import EngineConfig, SpeculationSetting
from workers.engine.cuda_graphs import DecodeGraph, Vocabulary
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Sampling
from workers.engine.model_runner import Launched
from workers.engine.scheduler import Schedule
from workers.models.adapter_bank import AdapterBank
from workers.models.batch import Batch, KVCache
from workers.models.chatglm import ChatGLM
from workers.models.config import ModelConfig
from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM
from workers.models.kernels import cuda_linear
from workers.models.layout import Layout
from workers.models.lora import Adapter, Factors
from workers.models.tokenizer import Tokenizer

CHATGLM_6B = ModelConfig(
    hidden_size=4096, inner_hidden_size=16384, num_layers=28, num_heads=32, vocab_size=130528
)
VOCABULARY = Vocabulary(first_id=0, end_id=130344, eos_id=130005, invalid_token=5)
RESULTS = Path(os.environ.get("GLMQ_BENCH_RESULTS") or Path(__file__).parent / "results.jsonl")
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
    """Of the working tree; GLMQ_BENCH_COMMIT where that is a copy without its history."""
    if given := os.environ.get("GLMQ_BENCH_COMMIT"):
        return given
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


class FullVocabulary:
    """The ids of the real tokenizer, which is all that an engine wants of it."""

    first_id, end_id, eos_id = VOCABULARY.first_id, VOCABULARY.end_id, VOCABULARY.eos_id
    bos_id, gmask_id, mask_id = 130004, 130001, 130000

    def layout(self, ids: Sequence[int]) -> Layout:
        return Layout.of_prompt(ids, bos_id=self.bos_id, gmask_id=self.gmask_id, mask_id=self.mask_id)

    def random_prompt(self, length: int, rng: random.Random) -> list[int]:
        return [*(rng.randrange(5, 130000) for _ in range(length - 2)), self.gmask_id, self.bos_id]


class RandomAdapters(Adapters):
    """Adapters of one rank for the fused projection, as ChatGLM-6B's LoRAs are, with random factors instead of files."""

    rank = 8

    def _read(self, folder: Path) -> Adapter:
        assert self.bank is not None
        factors = {
            path: Factors(
                torch.randn(self.rank, in_features, device="cuda", dtype=torch.half) / 64,
                torch.randn(self.rank, out_features, device="cuda", dtype=torch.half) / 64,
            )
            for path, (out_features, in_features) in self.bank.shapes.items()
            if path.endswith("query_key_value")
        }
        return Adapter(folder, factors)


def random_adapters(model: CudaChatGLM, count: int) -> Adapters | None:
    """So many loaded adapters with the names 0, 1, ...; None for none."""
    model.bank = None
    if not count:
        return None
    with torch.device("meta"):
        shapes = ChatGLM(CHATGLM_6B)
    model.bank = AdapterBank(shapes, count, dtype=torch.half, device="cuda")
    adapters = RandomAdapters(model.bank)
    for number in range(count):
        adapters.load_now(str(number), Path(str(number)))
    return adapters


def new_engine(
    model: CudaChatGLM,
    kv: str,
    *,
    num_seqs: int,
    context_len: int,
    prefill_tokens: int,
    num_adapters: int = 0,
    speculation: SpeculationSetting = "off",
    num_blocks: int | None = None,
) -> Engine:
    """Without drafts: what random weights say soon repeats itself, and would be drafted."""
    config = EngineConfig(
        checkpoint="random",
        speculation=speculation,
        max_num_seqs=num_seqs,
        max_prefill_tokens=prefill_tokens,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        cache_dtype="int8" if kv == "int8" else "auto",
        context_len=context_len,
    )
    return Engine(model, cast(Tokenizer, FullVocabulary()), config, random_adapters(model, num_adapters))


Seq3 = tuple[int, int, int]
"""Number of requests, tokens of a prompt, tokens of an answer."""


class Watch:
    """Runs an engine's schedules, and keeps when the GPU began and ended each step, by its own clock."""

    def __init__(self, engine: Engine) -> None:
        self._launch = engine._runner.launch
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.engine = engine

    def __enter__(self) -> Watch:
        self.engine._runner.launch = self.launch  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.engine._runner.launch = self._launch  # type: ignore[method-assign]

    def launch(self, schedule: Schedule) -> Launched:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launched = self._launch(schedule)
        end.record()
        self.events.append((start, end))
        return launched

    def idle_share(self) -> float:
        """Of the time from the first step to the last one: between the end of a step and the beginning of the next. What
        the GPU waits for within a step (its kernels overlap) is not in it."""
        torch.cuda.synchronize()
        idle = sum(before[1].elapsed_time(after[0]) for before, after in itertools.pairwise(self.events))
        return idle / self.events[0][0].elapsed_time(self.events[-1][1])


def run_requests(
    engine: Engine, count: int, prompt_len: int, answer_len: int, num_adapters: int = 0
) -> dict[str, float]:
    """All at once; each answer has exactly `answer_len` tokens. Seconds, first-token times, and the steps' walls."""
    rng = random.Random(1)
    for index in range(count):
        sampling = Sampling(
            max_new_tokens=answer_len, min_new_tokens=answer_len, seed=index, temperature=0.95, top_p=0.7
        )
        prompt = FullVocabulary().random_prompt(prompt_len, rng)
        adapter = str(index % num_adapters) if num_adapters else None
        refused = engine.add(Generate(index, prompt, sampling, adapter=adapter))
        assert refused is None, refused
    started = last = time.perf_counter()
    first: dict[int, float] = {}
    walls = []
    num_tokens = 0
    with Watch(engine) as watch:
        while engine.has_work:
            step = engine.step()
            now = time.perf_counter()
            walls.append(now - last)
            last = now
            num_tokens += len(step.token_ids)
            for sequence_id in step.sequence_ids:
                first.setdefault(sequence_id, now - started)
    seconds = last - started
    assert num_tokens == count * answer_len, (num_tokens, count * answer_len)
    tail = sorted(walls[len(walls) // 2 :])
    return {
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "first_token_p50_ms": sorted(first.values())[count // 2] * 1e3,
        "late_step_ms": tail[len(tail) // 2] * 1e3,
        "idle_share": round(watch.idle_share(), 4),
        "num_preemptions": engine.scheduler.num_preemptions,
    }


def eager_tokens_per_s(requests: Seq3) -> float:
    """What plain PyTorch makes of them: the same network in fp16, operator by operator, without a graph or kernels of ours. It
    stands for the original code where that cannot run."""
    count, prompt_len, answer_len = requests
    with torch.device("cuda"):
        model = ChatGLM(CHATGLM_6B).half()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float("layernorm" in name and name.endswith("weight")), 0.02)
    engine = new_engine(
        cast(CudaChatGLM, model),
        "fp16",
        num_seqs=count,
        context_len=prompt_len + answer_len,
        prefill_tokens=2048,
    )
    run_requests(engine, count, prompt_len, 4)
    return run_requests(engine, count, prompt_len, answer_len)["tokens_per_s"]


def use_plans(file: Path) -> None:
    """Puts these plans into the table of the linear kernels."""
    table: dict[Any, dict[int, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        plan = eval(one["plan"], {"WarpPlan": cuda_linear.WarpPlan, "GroupPlan": cuda_linear.GroupPlan})
        table.setdefault((one["format"], one["shape"]), {})[one["rows"]] = plan
    for key, plans in table.items():
        cuda_linear._PLANS[key] = tuple(sorted({**dict(cuda_linear._PLANS[key]), **plans}.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["int4"], choices=["fp16", "int8", "int4", "fp8"])
    parser.add_argument("--head", default="fp16", choices=["fp16", "int8", "fp8"])
    parser.add_argument("--kv", nargs="+", default=["fp16"], choices=["fp16", "int8"])
    parser.add_argument("--batch", nargs="*", type=int, default=[])
    parser.add_argument("--context", nargs="+", type=int, default=[256])
    parser.add_argument("--temperature", type=float, default=0.95)
    parser.add_argument("--prefill", nargs="*", default=[], help="packed prompts, as in 32x128")
    parser.add_argument("--requests", nargs="*", default=[], help="through the engine, as in 1024x128x128")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of one prefill of --requests")
    parser.add_argument(
        "--plans", nargs="*", type=Path, default=[], help="of tune_linear.py, instead of the built-in ones"
    )
    parser.add_argument(
        "--adapters", type=int, default=0, help="of rank 8, one for each sequence of --requests in turn"
    )
    parser.add_argument(
        "--eager", action="store_true", help="run --requests in plain PyTorch, too, as the reference"
    )
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    bandwidth = read_bytes_per_second()
    for file in arguments.plans:
        use_plans(file)
    with torch.inference_mode():
        eager: dict[str, float] = {}
        for requests in arguments.requests if arguments.eager else []:
            count, prompt_len, answer_len = map(int, requests.split("x"))
            eager[requests] = eager_tokens_per_s((count, prompt_len, answer_len))
            print(f"plain PyTorch, requests {requests}: {eager[requests]:9.1f} tok/s", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        for setting in arguments.weights:
            weights = ChatGLMWeights.random(CHATGLM_6B, setting, arguments.head)
            model = CudaChatGLM(CHATGLM_6B, weights)
            # Of an embedding that is not the head, a step reads next to nothing.
            is_apart = weights.embedding is not None and weights.head.weight_format != "F16"
            read = weights.num_bytes - (weights.embedding.nbytes if is_apart else 0)
            print(f"{setting}, {arguments.head} head: {weights.num_bytes / 1e9:.2f} GB of weights")
            for kv, requests in itertools.product(arguments.kv, arguments.requests):
                count, prompt_len, answer_len = map(int, requests.split("x"))
                engine = new_engine(
                    model,
                    kv,
                    num_seqs=count,
                    context_len=prompt_len + answer_len,
                    prefill_tokens=arguments.prefill_tokens,
                    num_adapters=arguments.adapters,
                )
                run_requests(engine, min(count, 64), prompt_len, 4, arguments.adapters)
                if arguments.adapters:
                    # Graphs with adapters are captured when they are first needed.
                    run_requests(engine, count, prompt_len, 4, arguments.adapters)
                found = run_requests(engine, count, prompt_len, answer_len, arguments.adapters)
                # Weights are read once a step, the cache as it grows; the prefill's arithmetic is left out.
                mean_read = read + count * (prompt_len + answer_len / 2) * kv_bytes(kv)
                roof = count * bandwidth / mean_read
                print(
                    f"  {kv} KV, requests {requests}: {found['tokens_per_s']:9.1f} tok/s of {roof:9.1f} "
                    f"({found['tokens_per_s'] / roof:5.1%}); "
                    + ", ".join(f"{name} {value:.3f}" for name, value in found.items()),
                    flush=True,
                )
                if not arguments.no_record:
                    case = f"engine {setting} head {arguments.head} kv {kv} requests {requests}"
                    case += f" adapters {arguments.adapters}" if arguments.adapters else ""
                    record(
                        case,
                        found["tokens_per_s"],
                        roof,
                        eager.get(requests),
                        **{k: v for k, v in found.items() if k != "tokens_per_s"},
                    )
                del engine
                gc.collect()
                torch.cuda.empty_cache()
            for kv in arguments.kv if arguments.batch or arguments.prefill else []:
                needed = max([*arguments.batch, 16]) * max(arguments.context) * kv_bytes(kv)
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
