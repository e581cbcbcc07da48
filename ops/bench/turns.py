"""One conversation of very many turns: does anything grow, get lost, or go wrong?

    python -m ops.bench.turns --turns 2000
    python -m ops.bench.turns --turns 2000 --workers 2 --kill-every 20

Starts a server and workers of its own with the demo checkpoint. Each turn is a question that the demo model is trained on, or any other. Checked:
every answer arrives, every prompt stays within the budget, every turn is in the archive exactly once, in order and word for word as it was
streamed, and the summary covers what it says: each one was made of the one before and exactly the turns by which `covered` grew.

Time to the first token: the last turns of the conversation are compared with turns 50 to 150 of a young one, which is held at the same time, turn by
turn, so that both see the same machine; and with its own turns 50 to 150, between which and the end the machine may have changed. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field

from ops.bench.deployment import Deployment, deployment
from ops.demo_model.tasks.conversation import Conversation
from producer.client import Client
from producer.contract import Failed, Finished, SamplingParams, Started, Token
from producer.contract.conversation import FoldMemory, prompt_budget
from producer.ledger import calls

OLD, YOUNG = "old", "young"
EARLY = slice(50, 150)
NUM_YOUNG = 150
RATIO = 1.3


@dataclass
class Turn:
    query: str
    finished: Finished
    first_token_seconds: float
    """From submit, at the reader."""
    num_started: int


@dataclass
class Fold:
    """What is known of the conversation's summary at one moment."""

    covered: int = 0
    summary: str = ""


@dataclass
class Report:
    turns: list[Turn] = field(default_factory=list)
    young: list[Turn] = field(default_factory=list)
    """Turns of the other conversation."""
    folds: list[Fold] = field(default_factory=lambda: [Fold()])
    problems: list[str] = field(default_factory=list)

    def check(self, is_right: bool, problem: str) -> None:
        if not is_right:
            self.problems.append(problem)
            print(f"WRONG: {problem}", flush=True)


def ask(client: Client, conversation_id: str, query: str, sampling: SamplingParams) -> Turn:
    begin = time.perf_counter()
    first, num_started = 0.0, 0
    for event in client.chat(query, conversation_id=conversation_id, sampling=sampling).stream():
        match event:
            case Started():
                num_started += 1
            case Token():
                first = first or time.perf_counter() - begin
            case Failed():
                raise SystemExit(f"turn failed: {event.code}: {event.message}")
            case Finished():
                return Turn(query, event, first, num_started)
    raise AssertionError("a stream ends with Finished")


def look_at_summary(client: Client, report: Report) -> None:
    """If there is a new summary: was it made of the old one and exactly the turns that it claims?"""
    status = client.ledger.run(calls.conversation("default", OLD)).status
    before = report.folds[-1]
    if status.covered == before.covered:
        report.check(status.summary == before.summary, f"the summary of {status.covered} turns changed")
        return
    report.folds.append(Fold(status.covered, status.summary))
    keys, connection = client.settings.keys, client.ledger.connection
    request_id = str(connection.hget(keys.conversation(f"default:{OLD}"), "folded"))
    memory = FoldMemory.model_validate_json(str(connection.hget(keys.request(request_id), "memory")))
    made = client.result(request_id)
    report.check(
        (memory.first, memory.last, memory.summary) == (before.covered, status.covered, before.summary),
        f"the summary of {status.covered} turns was made of {memory.first}..{memory.last}, the one before covers {before.covered}",
    )
    report.check(
        made.text == status.summary, f"the summary of {status.covered} turns is not what its fold said"
    )


def keep_killing(running: Deployment, seconds: float, stop: threading.Event) -> None:
    """Every so many seconds one worker, in turns; it is started again at once."""
    number = 0
    while not stop.wait(seconds):
        name = f"worker{number % len(running.workers)}"
        running.kill(name)
        running.start_worker(name)
        number += 1


def run(client: Client, args: argparse.Namespace) -> Report:
    report = Report()
    rng = random.Random(args.seed)
    talk = Conversation(rng, "zh" if args.language == "zh" else "en")
    sampling = SamplingParams(temperature=0.0, max_new_tokens=args.max_new_tokens)
    budget = prompt_budget(args.context, args.max_new_tokens)
    begin = time.perf_counter()
    for number in range(args.turns):
        query = talk.add_any()[0] or "?"
        turn = ask(client, OLD, query, sampling)
        report.turns.append(turn)
        usage = turn.finished.usage
        report.check(usage.prompt_tokens <= budget, f"turn {number}: prompt of {usage.prompt_tokens} tokens")
        between = max(number - usage.recent_turns - usage.summary_turns, 0)
        report.check(
            usage.left_out_turns == between, f"turn {number}: {usage} does not account for every turn"
        )
        look_at_summary(client, report)
        if number >= args.turns - NUM_YOUNG:
            report.young.append(ask(client, YOUNG, query, sampling))
        if (number + 1) % 100 == 0:
            last = report.turns[-100:]
            print(
                f"{number + 1} turns in {time.perf_counter() - begin:.0f} s: first token {median_ms(last):.0f} ms, "
                f"prompt {statistics.mean(turn.finished.usage.prompt_tokens for turn in last):.0f} tokens, "
                f"{report.folds[-1].covered} in the summary, {usage.left_out_turns} left out now",
                flush=True,
            )
    return report


def median_ms(turns: list[Turn]) -> float:
    return statistics.median(turn.first_token_seconds for turn in turns) * 1e3


def check_archive(client: Client, report: Report) -> None:
    archived = [turn.turn for turn in client.conversations.turns(OLD)]
    told = [(turn.query, turn.finished.text) for turn in report.turns]
    report.check(
        len(archived) == len(told), f"{len(archived)} turns in the archive, {len(told)} were answered"
    )
    for number, (kept, said) in enumerate(zip(archived, told, strict=False)):
        report.check(tuple(kept) == said, f"turn {number} is {kept} in the archive, and was {said}")
    ids = [turn.request_id for turn in client.conversations.turns(OLD)]
    report.check(len(set(ids)) == len(ids), "a request is in the archive twice")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=0.0, help="seconds; 0: never")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-new-tokens", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1, help="of each worker's engine")
    parser.add_argument("--language", choices=("zh", "en"), default="zh")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    options = ("--context", str(args.context), "--threads", str(args.threads), "--slots", "8")
    with deployment(args.workers, *options) as running, Client(running.settings) as client:
        stop = threading.Event()
        killer = threading.Thread(target=keep_killing, args=(running, args.kill_every, stop), daemon=True)
        if args.kill_every:
            killer.start()
        report = run(client, args)
        stop.set()
        if args.kill_every:
            killer.join()
        check_archive(client, report)
        status = client.conversations.show(OLD).status
    print(
        f"{len(report.turns)} turns, {running.num_started - args.workers} workers killed, "
        f"{sum(turn.num_started > 1 for turn in report.turns)} answers taken over"
    )
    print(
        f"largest prompt: {max(turn.finished.usage.prompt_tokens for turn in report.turns)} of "
        f"{prompt_budget(args.context, args.max_new_tokens)} tokens"
    )
    print(
        f"summary: {status.covered} turns after {len(report.folds) - 1} folds, {status.fold_failures} failures since; "
        f"most turns left out of a prompt: {max(turn.finished.usage.left_out_turns for turn in report.turns)}"
    )
    late, young, early = report.turns[EARLY.start - EARLY.stop :], report.young[EARLY], report.turns[EARLY]
    if len(report.turns) >= 2 * NUM_YOUNG:
        ratio = median_ms(late) / median_ms(young)
        print(
            f"first token, median of the last {len(late)} turns: {median_ms(late):.0f} ms; at turns 50 to 150 of a conversation held at the "
            f"same time {median_ms(young):.0f} ms: {ratio:.2f} times (at most {RATIO}); at its own turns 50 to 150 {median_ms(early):.0f} ms"
        )
        if not args.kill_every:
            report.check(ratio <= RATIO, "the time to the first token grows")
    print(f"{len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
