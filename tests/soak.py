"""Mixed load on one engine, for as long as you say: what has to hold after an hour as after a second.

    make soak                                                 the demo checkpoint, on this machine's GPU or CPU
    make soak ARGS="--seconds 3600 --random int4 --kv int8"   the full size with random weights, on a GPU

Crowds come and go (nobody, one, more than fit), with prompts and answers of all lengths, greedy and drawn, some that copy;
sequences are aborted and preempted, and adapters are loaded, evicted and unloaded. It fails when a sequence is lost, says more
than it may or something after its end, when blocks of the KV cache are missing afterwards, when an answer has become another
one, or when memory has grown.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.lora_adapter import write_adapter
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import Generate, LoadAdapter, Refused, Sampling, UnloadAdapter
from workers.models.config import CheckpointError, ModelConfig
from workers.models.loader import new_network
from workers.models.lora import TARGETS, linear_shapes

DEMO_CHECKPOINT = Path(__file__).parents[1] / "workers" / "models" / "demo"
MIB = 1 << 20
MAX_GPU_GROWTH = 1 * MIB
MAX_RESIDENT_GROWTH = 32 * MIB
"""An allocator keeps a few MiB more or less of what was freed."""
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.1},
    {"temperature": 0.95},
    {"temperature": 0.8, "top_k": 0},
    {"temperature": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.9, "min_new_tokens": 10},
)
NewPrompt = Callable[[int, random.Random], list[int]]
"""A prompt of so many tokens, of which the last two end it."""


class Broken(Exception):
    """What may never happen has happened."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: what tensors hold on the GPU (0 without one), and what is resident of this process (0 where there is no /proc)."""

    gpu: int
    resident: int

    @classmethod
    def now(cls) -> Memory:
        gc.collect()
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text("ascii").split()[1]) if statm.exists() else 0
        gpu = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            gpu = torch.cuda.memory_allocated()
        return cls(gpu, pages * os.sysconf("SC_PAGE_SIZE"))

    def __str__(self) -> str:
        return f"{self.gpu / MIB:,.1f} MiB on the GPU, {self.resident / MIB:,.0f} MiB resident"


@dataclass(slots=True)
class Answer:
    """Of a sequence that has not ended."""

    max_new_tokens: int
    num_tokens: int = 0


@dataclass(slots=True)
class Counts:
    """What a load has come to so far."""

    sequences: int = 0
    ended: int = 0
    aborted: int = 0
    steps: int = 0
    tokens: int = 0
    adapter_changes: int = 0


@dataclass
class MixedLoad:
    """Drives an engine as its process does, and looks at all that it says. The same seed asks for the same things."""

    engine: Engine
    new_prompt: NewPrompt
    adapters: Mapping[str, Path]
    """Name → folder; the engine need not know them."""
    max_prompt_len: int
    max_new_tokens: int
    crowds: tuple[int, ...]
    """How many sequences there are at a time, in turn at random."""
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    clock: Callable[[], float] = time.monotonic
    """Of what `run` and `soak` call seconds."""
    counts: Counts = field(default_factory=Counts)
    live: dict[int, Answer] = field(default_factory=dict)

    def warm_up(self) -> None:
        """The largest crowd, once with each adapter, and until the last one has ended: slots get the size of the largest
        adapter, and what an engine makes at the first use (a graph for each size of a batch) is made."""
        for name, folder in [*self.adapters.items(), (None, None)]:
            if name is not None:
                self.engine.adapters.load(LoadAdapter(name, str(folder), "load"))
                self.drain()
            for _ in range(max(self.crowds)):
                self.arrive(name)
            self.drain()

    def run(self, until: float, on_crowd: Callable[[], None] = lambda: None) -> None:
        """Until that instant of the clock, and then until nothing is left. on_crowd: called before each new crowd."""
        while self.clock() < until:
            on_crowd()
            crowd = self.rng.choice(self.crowds)
            for _ in range(self.rng.randint(1, 2 * crowd)):
                while len(self.live) >= crowd:
                    self.turn()
                self.arrive(self.rng.choice([None, *self.engine.adapters.names]))
                for _ in range(self.rng.choice((0, 0, 1, 3))):
                    self.turn()
                self.meddle()
            if self.rng.random() < 0.3:
                self.drain()
        self.drain()

    def drain(self) -> None:
        """Turns until every sequence has ended; every block of the KV cache must be free then."""
        while self.live or self.engine.has_work or self.engine.adapters.is_loading:
            self.turn()
        blocks = self.engine.scheduler.block_manager
        if blocks.num_free_blocks != blocks.num_usable_blocks:
            missing = blocks.num_usable_blocks - blocks.num_free_blocks
            raise Broken(f"{missing} blocks of the KV cache belong to no sequence and are not free")

    def turn(self) -> None:
        """What the engine's process does between two looks for commands."""
        for message in self.engine.settle():
            if isinstance(message, Refused):
                raise Broken(f"sequence {message.sequence_id} was refused: {message.message}")
        if not self.engine.has_work:
            if self.live and not self.engine.adapters.is_loading:
                raise Broken(
                    f"lost: sequences {sorted(self.live)[:5]} have not ended, and the engine has no work"
                )
            return
        step = self.engine.step()
        self.counts.steps += 1
        self.counts.tokens += len(step.token_ids)
        for sequence_id, reason in zip(step.sequence_ids, step.finish_reasons, strict=True):
            answer = self.live.get(sequence_id)
            if answer is None:
                raise Broken(f"sequence {sequence_id} said something after its end")
            answer.num_tokens += 1
            if answer.num_tokens > answer.max_new_tokens:
                raise Broken(f"sequence {sequence_id} said more than {answer.max_new_tokens} tokens")
            if reason:
                if reason == "length" and answer.num_tokens < answer.max_new_tokens:
                    raise Broken(
                        f"sequence {sequence_id} ended after {answer.num_tokens} of {answer.max_new_tokens} tokens"
                    )
                del self.live[sequence_id]
                self.counts.ended += 1

    def arrive(self, adapter: str | None) -> None:
        """One more sequence; two of five repeat themselves, so that drafts pay."""
        number = self.counts.sequences
        sampling = Sampling(
            max_new_tokens=self.rng.randint(1, self.max_new_tokens),
            seed=number,
            **self.rng.choice(SAMPLINGS),
        )
        length = self.rng.randint(3, self.max_prompt_len)
        if self.rng.random() < 0.4 and length >= 8:
            part = self.new_prompt(length // 3 + 2, self.rng)
            ids = part[:-2] * 3 + part[-2:]
        else:
            ids = self.new_prompt(length, self.rng)
        refused = self.engine.add(Generate(number, ids, sampling, adapter=adapter))
        if refused is not None:
            raise Broken(f"sequence {number} was refused: {refused.message}")
        self.counts.sequences += 1
        self.live[number] = Answer(sampling.max_new_tokens)

    def meddle(self) -> None:
        """Perhaps aborts a sequence, loads an adapter, or unloads one."""
        if self.live and self.rng.random() < 0.1:
            victim = self.rng.choice(list(self.live))
            self.engine.abort(victim)
            del self.live[victim]
            self.counts.aborted += 1
        if self.adapters and self.rng.random() < 0.02:
            name = self.rng.choice(sorted(self.adapters))
            command = LoadAdapter(name, str(self.adapters[name]), "load", now=self.rng.random() < 0.5)
            self.engine.adapters.load(command)
            self.counts.adapter_changes += 1
        if len(self.engine.adapters.names) > 1 and self.rng.random() < 0.01:
            self.engine.adapters.unload(UnloadAdapter(self.rng.choice(self.engine.adapters.names), "unload"))
            self.counts.adapter_changes += 1

    def probe(self) -> list[list[int]]:
        """What the engine answers to a few prompts, alone and greedily, without adapters: the same at any time."""
        answers = []
        for seed in range(4):
            # Their numbers are below those of the load.
            ids = self.new_prompt(min(24, self.max_prompt_len), random.Random(seed))
            sampling = Sampling(max_new_tokens=min(32, self.max_new_tokens), seed=seed, temperature=0.0)
            refused = self.engine.add(Generate(-1 - seed, ids, sampling))
            if refused is not None:
                raise Broken(f"a probe was refused: {refused.message}")
            answer: list[int] = []
            while self.engine.has_work:
                answer += self.engine.step().token_ids
            answers.append(answer)
        return answers

    def __str__(self) -> str:
        counts = self.counts
        return (
            f"{counts.sequences:,} sequences ({counts.aborted:,} aborted), {counts.steps:,} steps, {counts.tokens:,} tokens, "
            f"{self.engine.scheduler.num_preemptions:,} preemptions, {self.engine.speculation.num_accepted:,} drafted tokens "
            f"drawn, {counts.adapter_changes:,} changes of adapters"
        )


def soak(load: MixedLoad, seconds: float, *, report_seconds: float = 60) -> None:
    """Runs the load and prints how it goes. Memory is compared from the end of the first quarter on, or of the first five
    minutes. Raises Broken."""
    load.warm_up()
    first_probe = load.probe()
    began = load.clock()
    load.run(began + min(seconds / 4, 300))
    before = Memory.now()
    print(f"warm: {load}; {before}", flush=True)
    next_report = load.clock() + report_seconds

    def report() -> None:
        nonlocal next_report
        if load.clock() >= next_report:
            print(f"{load.clock() - began:6.0f} s: {load}; {Memory.now()}", flush=True)
            next_report += report_seconds

    load.run(began + seconds, report)
    after = Memory.now()
    print(f"{load.clock() - began:6.0f} s: {load}; {after}", flush=True)
    if load.probe() != first_probe:
        raise Broken("the engine answers the same prompts in another way than at the beginning")
    if after.gpu > before.gpu + MAX_GPU_GROWTH:
        raise Broken(f"memory on the GPU grew from {before.gpu:,} to {after.gpu:,} bytes")
    if after.resident > before.resident + MAX_RESIDENT_GROWTH:
        raise Broken(f"resident memory grew from {before.resident:,} to {after.resident:,} bytes")
    if not load.engine.scheduler.num_preemptions or not load.counts.aborted:
        raise Broken("nothing was preempted or aborted: this load shows little, give it longer or less cache")


def full_size_load(weights_setting: str, kv: str) -> MixedLoad:
    """Random weights of ChatGLM-6B's size, a cache for a third of the largest crowd, eight adapters for four slots."""
    from ops.bench import engine as bench  # it needs Triton
    from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

    weights = ChatGLMWeights.random(bench.CHATGLM_6B, weights_setting, "fp16")
    engine = bench.new_engine(
        CudaChatGLM(bench.CHATGLM_6B, weights),
        kv,
        num_seqs=64,
        context_len=2048,
        prefill_tokens=4096,
        num_adapters=4,
        speculation="auto",
        num_blocks=500,
    )
    return MixedLoad(
        engine,
        bench.FullVocabulary().random_prompt,
        {str(number): Path(str(number)) for number in range(8)},
        max_prompt_len=900,
        max_new_tokens=500,
        crowds=(1, 1, 2, 4, 16, 48, 64, 96),
    )


def checkpoint_load(checkpoint: Path, scratch: Path) -> MixedLoad:
    """A checkpoint as a worker loads it, with random adapters of its shapes in `scratch`, and a small cache."""
    model_config = ModelConfig.from_folder(checkpoint)
    with torch.device("meta"):
        shapes = linear_shapes(new_network(model_config))
    folders = {
        name: write_adapter(scratch / name, shapes, seed=rank, rank=rank, targets=TARGETS[:num_targets])
        for name, rank, num_targets in (("a", 8, 1), ("b", 20, 4), ("c", 3, 2))
    }
    config = EngineConfig(
        checkpoint=str(checkpoint),
        max_num_seqs=16,
        block_size=16,
        num_blocks=60,
        context_len=512,
        max_adapters=2,
        num_threads=1,
    )
    engine = Engine.from_config(config)
    tokenizer = engine.tokenizer

    special = {tokenizer.mask_id, tokenizer.gmask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    words = sorted(set(range(tokenizer.first_id, tokenizer.end_id)) - special)

    def new_prompt(length: int, rng: random.Random) -> list[int]:
        return [*(rng.choice(words) for _ in range(length - 2)), tokenizer.gmask_id, tokenizer.bos_id]

    return MixedLoad(
        engine, new_prompt, folders, max_prompt_len=60, max_new_tokens=90, crowds=(1, 2, 6, 16, 24)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600, help="3600 unless told")
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument(
        "--random",
        choices=["fp16", "int8", "int4", "fp8"],
        help="full-size random weights of this form, on a GPU",
    )
    parser.add_argument("--kv", choices=["fp16", "int8"], help="of --random; fp16 unless told")
    arguments = parser.parse_args()
    if not arguments.seconds > 0:
        parser.error(f"--seconds is {arguments.seconds:g}: it must be above 0")
    if arguments.kv and not arguments.random:
        parser.error("--kv belongs to --random: give both, or neither")
    if arguments.random and not torch.cuda.is_available():
        parser.error("--random needs an NVIDIA GPU, and there is none: leave it out for the demo checkpoint")
    try:
        with tempfile.TemporaryDirectory(prefix="glmq-soak-") as scratch, torch.inference_mode():
            if arguments.random:
                load = full_size_load(arguments.random, arguments.kv or "fp16")
            else:
                load = checkpoint_load(arguments.checkpoint, Path(scratch))
            soak(load, arguments.seconds)
    except CheckpointError as error:
        parser.error(f"--checkpoint: {error}")
    except Broken as broken:
        raise SystemExit(f"broken: {broken}") from None
    print("held: nothing lost, nothing changed, memory where it was")


if __name__ == "__main__":
    main()
