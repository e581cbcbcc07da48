"""What drafts bring a single user whose answer copies from its prompt: full-size random weights on a GPU, and a script of what is said.

    python ops/bench/copying.py --weights int4 --prompt 1000 --answer 256

Random weights copy nothing, so the tokens are scripted: the GPU runs every step, of one row or of a draft's rows, draws and
sends its tokens as always, and the host then takes the script's token for each draw. What is drafted, how much of it the script
confirms, and when the engine runs ahead is decided by the engine itself. A script has spans of the prompt, of geometric
length, between single tokens of its own; the share that is copied is printed with each result.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from ops.bench.engine import (
    CHATGLM_6B,
    FullVocabulary,
    kv_bytes,
    new_engine,
    read_bytes_per_second,
    record,
)
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Sampling
from workers.engine.model_runner import Launched, Runner
from workers.engine.scheduler import Schedule
from workers.engine.sequence import Sequence
from workers.models.cuda_chatglm import ChatGLMWeights, CudaChatGLM

SPANS = {
    "no copying": (0.0, 1),
    "half, in spans of 8": (0.5, 8),
    "0.8, in spans of 12": (0.8, 12),
    "0.95, in spans of 40": (0.95, 40),
}


def script(prompt: Seq[int], length: int, share: float, span: int, rng: random.Random) -> list[int]:
    """An answer, `share` of whose tokens are copied in spans of this mean length."""
    said: list[int] = []
    num_own = max(round(span * (1 - share) / share), 1) if share else length
    while len(said) < length:
        said += [rng.randrange(5, 130000) for _ in range(num_own)]
        if share:
            start = rng.randrange(len(prompt) - 4 * span)
            count = min(1 + int(rng.expovariate(1 / span)), 4 * span)
            said += prompt[start : start + count]
    return said[:length]


@dataclass(frozen=True, slots=True)
class Scripted:
    """A step whose tokens are the script's."""

    sequences: list[Sequence]
    launched: Launched
    tokens: list[int]

    def token_ids(self) -> list[int]:
        self.launched.token_ids()
        return self.tokens


class ScriptedRunner:
    """A runner whose draws come out as the script says."""

    def __init__(self, runner: Runner, scripts: dict[int, list[int]]) -> None:
        self._runner, self._scripts = runner, scripts
        self.runs_ahead, self.max_draft_rows = runner.runs_ahead, runner.max_draft_rows

    def launch(self, schedule: Schedule) -> Launched:
        drafts = schedule.drafts or [[]] * len(schedule.sequences)
        tokens = []
        for sequence, draft in zip(schedule.sequences, drafts, strict=True):
            said, index = self._scripts[sequence.sequence_id], sequence.num_generated
            # Behind a token of the draft that is not the script's, nobody looks.
            tokens += (said[index : index + len(draft) + 1] + [0] * len(draft))[: len(draft) + 1]
        return Scripted(list(schedule.sequences), self._runner.launch(schedule), tokens)


def measure(engine: Engine, prompt: list[int], said: list[int], sequence_id: int) -> tuple[float, int]:
    """(seconds from the first token to the last one, steps)"""
    runner = engine._runner
    engine._runner = ScriptedRunner(runner, {sequence_id: said})
    try:
        sampling = Sampling(max_new_tokens=len(said), min_new_tokens=len(said), seed=1)
        assert engine.add(Generate(sequence_id, prompt, sampling)) is None
        found: list[int] = []
        began, num_steps = 0.0, 0
        while engine.has_work:
            step = engine.step()
            began = began or time.perf_counter()
            num_steps += 1
            found += step.token_ids
        seconds = time.perf_counter() - began
    finally:
        engine._runner = runner
    assert found == said
    return seconds, num_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="int4", choices=["fp16", "int8", "int4", "fp8"])
    parser.add_argument("--kv", default="fp16", choices=["fp16", "int8"])
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(1)
    with torch.inference_mode():
        model = CudaChatGLM(CHATGLM_6B, ChatGLMWeights.random(CHATGLM_6B, arguments.weights))
        engine = new_engine(
            model,
            arguments.kv,
            num_seqs=8,
            context_len=arguments.prompt + arguments.answer,
            prefill_tokens=4096,
            speculation="auto",
        )
        read = model.weights.num_bytes + (arguments.prompt + arguments.answer / 2) * kv_bytes(arguments.kv)
        roof = read_bytes_per_second() / read
        sequence_id = 0
        max_rows = engine.speculation._max_rows
        for name, (share, span) in SPANS.items():
            prompt = FullVocabulary().random_prompt(arguments.prompt, rng)
            said = script(prompt, arguments.answer, share, span, rng)
            speeds = {}
            for drafts in (False, True):
                engine.speculation._max_rows = max_rows if drafts else 0
                engine.speculation.num_drafted = engine.speculation.num_accepted = 0
                times = []
                for _ in range(5):
                    sequence_id += 1
                    seconds, num_steps = measure(engine, prompt, said, sequence_id)
                    times.append(seconds)
                speeds[drafts] = (len(said) - 1) / sorted(times)[2]
            ratio = speeds[True] / speeds[False]
            drafted, drawn = engine.speculation.num_drafted, engine.speculation.num_accepted
            print(
                f"{arguments.weights}, {arguments.kv} KV, copied: {name}: {speeds[False]:7.1f} tok/s without drafts, "
                f"{speeds[True]:7.1f} with: {ratio:.2f} times; {num_steps} steps, {drawn} of {drafted} drafted tokens drawn",
                flush=True,
            )
            if not arguments.no_record:
                case = f"copying {arguments.weights} kv {arguments.kv} 1 user, {arguments.prompt} in, copied: {name}"
                # The roof is that of one token a step: drafts may break through it.
                record(case, speeds[True], roof, without_drafts_tokens_per_s=round(speeds[False], 1))


if __name__ == "__main__":
    main()
