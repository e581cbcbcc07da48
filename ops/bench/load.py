"""The whole system under load: streaming clients, Redis, Celery, a worker, an engine. Beside it stands the same engine alone.

    python -m ops.bench.load --checkpoint CHECKPOINT --clients 1024 --prompt 128 --answer 128 --slots 1024 -- --quantize fp8 --cache-dtype int8
    python -m ops.bench.load --paced --clients 1024 --slots 1024

What comes after `--` are options of the worker. All clients submit at once, each reads its stream to the end and checks that every
token came once and in order; tokens/s count from the first submit to the last end. `--rounds` has each client ask so often, one
question after another, which shows the steady state. With `--paced` the engine computes nothing (`paced.py`): that measures the road without a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ops.bench import paced
from producer.client import AsyncClient
from producer.contract import ChatRequest, Failed, Finished, SamplingParams, Token
from producer.embedded import EmbeddedServer
from producer.settings import Settings
from workers.adapters import ServedAdapters
from workers.engine.client import ENGINE_MODULE, EngineClient
from workers.engine.messages import Generate, Sampling, Step
from workers.models.tokenizer import Tokenizer
from workers.options import parser as worker_parser
from workers.settings import WorkerSettings
from workers.worker import engine_config

ROOT = Path(__file__).parents[2]
START_SECONDS = 300
CHARACTERS = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少图山统接知较将组见计别她手角期根论运农指"


# --- the questions ----------------------------------------------------------------------------------------------------


def question(tokenizer: Tokenizer, num_tokens: int, rng: random.Random) -> str:
    """A text whose prompt has exactly so many tokens."""
    text = "".join(rng.choice(CHARACTERS) for _ in range(num_tokens))
    while True:
        excess = len(tokenizer.build_prompt(text)) - num_tokens
        if excess == 0:
            return text
        if excess > 0:
            text = text[: -max(excess // 2, 1)]
        else:
            text += "".join(rng.choice(CHARACTERS) for _ in range(max(-excess // 2, 1)))


# --- the clients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """One request, in seconds of the monotonic clock, which all processes share."""

    submitted: float
    first: float
    ended: float
    num_tokens: int
    num_events: int


async def ask(client: AsyncClient, text: str, num_tokens: int, seed: int) -> Answered:
    sampling = SamplingParams(max_new_tokens=num_tokens, min_new_tokens=num_tokens, seed=seed)
    submitted = time.monotonic()
    submission = await client.submit(ChatRequest(query=text, sampling=sampling))
    first, count, num_events = 0.0, 0, 0
    texts = []
    async for event in submission.stream():
        if isinstance(event, Token):
            first = first or time.monotonic()
            if event.index - len(event.ids) != count:
                raise AssertionError(
                    f"{submission.request_id}: {event.index} follows {count}, {len(event.ids)} tokens"
                )
            count = event.index
            num_events += 1
            texts.append(event.text)
        elif isinstance(event, Finished):
            if event.usage.completion_tokens != count or event.text != "".join(texts):
                raise AssertionError(f"{submission.request_id}: the end does not fit the stream")
            return Answered(submitted, first, time.monotonic(), count, num_events)
        elif isinstance(event, Failed):
            raise AssertionError(f"{submission.request_id}: {event.code}: {event.message}")
    raise AssertionError("a stream ends with Finished or Failed")


async def _ask_all(
    settings: Settings, texts: Sequence[str], num_tokens: int, num_rounds: int, begin_at: float
) -> list[Answered]:
    async with AsyncClient(settings) as client:
        # The first requests of a process meet cold connections.
        await asyncio.gather(*(ask(client, text, 2, 0) for text in texts[:2]))

        async def one(number: int) -> list[Answered]:
            return [
                await ask(client, texts[number], num_tokens, number + 1000 * turn)
                for turn in range(num_rounds)
            ]

        await asyncio.sleep(max(begin_at - time.monotonic(), 0))
        answers = await asyncio.gather(*(one(number) for number in range(len(texts))))
    return [answer for several in answers for answer in several]


def _client_process(arguments: tuple[Any, ...]) -> tuple[list[Answered], float]:
    before = time.process_time()
    answers = asyncio.run(_ask_all(*arguments))
    return answers, time.process_time() - before


# --- the system -------------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its threads included, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_seconds(pid: int) -> dict[str, float]:
    """The same by the name of the thread, as far as the system knows names."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            name, fields = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            ticks = fields.split()[11:13]
            found[name] = found.get(name, 0.0) + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return found


def child_of(pid: int) -> int:
    """The process that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += (task / "children").read_text().split()
    return int(children[0])


@dataclass(frozen=True, slots=True)
class System:
    settings: Settings
    worker: subprocess.Popen[bytes]
    server_pid: int
    start_seconds: float
    """From the worker's start to its being ready."""


@contextlib.contextmanager
def system(worker_options: Sequence[str], *, is_paced: bool) -> Iterator[System]:
    with (
        tempfile.TemporaryDirectory(prefix="glmq-bench-") as folder,
        EmbeddedServer.start(Path(folder)) as server,
    ):
        settings = Settings(redis_url=server.url, state_dir=Path(folder))
        log = Path(folder) / "worker.log"
        module = paced.MODULE if is_paced else "workers"
        environ = {**os.environ, "REDIS_URL": server.url, "GLMQ_STATE_DIR": folder}
        environ |= {"GLMQ_METRICS_PORT": "0", "GLMQ_LOG_FORMAT": "json"}
        began = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *worker_options],
                cwd=ROOT,
                env=environ,
                stdout=file,
                stderr=file,
            )
        try:
            while "ready: " not in log.read_text():
                if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    raise SystemExit(f"the worker did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.01)
            yield System(settings, process, server.pid, time.monotonic() - began)
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            troubles = [
                line
                for line in log.read_text().splitlines()
                if '"error"' in line or '"warning"' in line or "Traceback" in line
            ]
            if troubles:
                print("the worker's log:", *troubles[:5], sep="\n  ")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1e3, 2), "p99_ms": round(cuts[98] * 1e3, 2)}


def measure_idle(settings: Settings, texts: Sequence[str], count: int) -> dict[str, float]:
    """The wait for the first token when nothing else runs."""

    async def run() -> list[float]:
        waits = []
        async with AsyncClient(settings) as client:
            for number in range(count + 3):
                answered = await ask(client, texts[number % len(texts)], 3, number)
                await asyncio.sleep(0.02)
                if number >= 3:
                    waits.append(answered.first - answered.submitted)
        return waits

    return quantiles(asyncio.run(run()))


def measure_load(
    running: System, texts: Sequence[str], *, num_tokens: int, num_rounds: int, num_processes: int
) -> dict[str, Any]:
    pids = {"worker": running.worker.pid, "engine": child_of(running.worker.pid), "redis": running.server_pid}
    shares = [texts[index::num_processes] for index in range(num_processes)]
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        # Processes start first: spawning and importing are not what is measured.
        pool.map(time.sleep, [0.05] * num_processes, chunksize=1)
        begin_at = time.monotonic() + 2.0
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        threads_before = thread_seconds(pids["worker"])
        jobs = [(running.settings, share, num_tokens, num_rounds, begin_at) for share in shares]
        found = pool.map(_client_process, jobs, chunksize=1)
        spent = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
        threads = {
            name: round(seconds - threads_before.get(name, 0), 2)
            for name, seconds in thread_seconds(pids["worker"]).items()
        }
    answers = [answer for several, _ in found for answer in several]
    spent["clients"] = sum(seconds for _, seconds in found)
    begin = min(answer.submitted for answer in answers)
    end = max(answer.ended for answer in answers)
    made = sum(answer.num_tokens for answer in answers)
    return {
        "tokens_per_s": made / (end - begin),
        "seconds": end - begin,
        "num_answers": len(answers),
        "first_token": quantiles([answer.first - answer.submitted for answer in answers]),
        "tokens_per_event": round(made / sum(answer.num_events for answer in answers), 2),
        "cpu_us_per_token": {name: round(seconds / made * 1e6, 1) for name, seconds in spent.items()},
        "worker_threads_s": {
            name: seconds for name, seconds in sorted(threads.items(), key=lambda one: -one[1]) if seconds
        },
    }


def measure_alone(
    settings: WorkerSettings, texts: Sequence[str], *, num_tokens: int, num_rounds: int, is_paced: bool
) -> dict[str, Any]:
    """The same requests, all at once, straight into an engine process; `num_rounds` times as many."""
    adapters = ServedAdapters(settings.worker_id, {}, None)
    tokenizer = Tokenizer.from_folder(settings.checkpoint)
    prompts = [tokenizer.build_prompt(text) for text in texts]
    config = engine_config(settings, adapters, is_first=True)
    with EngineClient(config, module=paced.MODULE if is_paced else ENGINE_MODULE) as engine:
        ready = engine.wait_until_ready(START_SECONDS)
        sampling = Sampling(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, seed=1, temperature=0.95, top_p=0.7
        )

        def run(asked: Sequence[list[int]], first_id: int) -> tuple[float, float, int]:
            """(seconds, the median wait for a first token, tokens)"""
            began = time.monotonic()
            # All before any is read: the engine takes commands between steps.
            for number, prompt in enumerate(asked):
                engine.send(Generate(first_id + number, prompt, sampling))
            left, made, first = len(asked), 0, {}
            while left:
                message = engine.receive(60)
                if not isinstance(message, Step):
                    raise AssertionError(f"the engine said {message}")
                made += len(message.token_ids)
                now = time.monotonic()
                for sequence_id in message.sequence_ids:
                    first.setdefault(sequence_id, now - began)
                left -= sum(map(bool, message.finish_reasons))
            return time.monotonic() - began, statistics.median(first.values()), made

        run(prompts[: min(len(prompts), 16)], 1)
        seconds, first, made = run(prompts * num_rounds, 10_000)
        _, idle, _ = min(run(prompts[:1], 5_000 + number) for number in range(5))
    return {
        "tokens_per_s": made / seconds,
        "seconds": seconds,
        "first_token_ms": round(first * 1e3, 2),
        "first_token_idle_ms": round(idle * 1e3, 2),
        "load_seconds": round(ready.load_seconds, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="default: the bundled demo")
    parser.add_argument("--clients", type=int, default=1024)
    parser.add_argument(
        "--processes", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="of clients"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1], help="questions of a client")
    parser.add_argument("--idle", type=int, default=40, help="requests for the idle system's first token")
    parser.add_argument("--paced", action="store_true", help="an engine that computes nothing")
    parser.add_argument("--skip-alone", action="store_true")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("worker_options", nargs="*", help="after --")
    arguments = parser.parse_args()
    options = [*arguments.worker_options, "--slots", str(arguments.slots)]
    if arguments.checkpoint is not None:
        options += ["--checkpoint", str(arguments.checkpoint)]
    given = vars(worker_parser().parse_args(options))
    settings = replace(WorkerSettings.from_environ({}, **{**given, "adapters": None}), metrics_port=0)
    tokenizer = Tokenizer.from_folder(settings.checkpoint)
    rng = random.Random(1)
    texts = [question(tokenizer, arguments.prompt, rng) for _ in range(arguments.clients)]
    figures: dict[str, Any] = {
        "case": f"{arguments.clients} clients, {arguments.prompt} in, {arguments.answer} out"
    }

    def show(name: str, found: object) -> None:
        figures[name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)

    if not arguments.skip_alone:
        for num_rounds in arguments.rounds:
            alone = measure_alone(
                settings,
                texts,
                num_tokens=arguments.answer,
                num_rounds=num_rounds,
                is_paced=arguments.paced,
            )
            show(f"engine alone, {num_rounds} rounds", alone)
    with system(options, is_paced=arguments.paced) as running:
        show("worker start to ready, s", round(running.start_seconds, 2))
        show("first token, idle", measure_idle(running.settings, texts, arguments.idle))
        for num_rounds in arguments.rounds:
            loaded = measure_load(
                running,
                texts,
                num_tokens=arguments.answer,
                num_rounds=num_rounds,
                num_processes=arguments.processes,
            )
            show(f"through the queue, {num_rounds} rounds", loaded)
            if not arguments.skip_alone:
                share = loaded["tokens_per_s"] / figures[f"engine alone, {num_rounds} rounds"]["tokens_per_s"]
                show(f"share of the engine alone, {num_rounds} rounds", round(share, 4))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
