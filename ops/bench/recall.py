"""Does a fact of the first turn survive forty others? Beside it, what a plain window of the last turns remembers.

    python -m ops.bench.recall --conversations 100

Starts a server and a worker of its own with the demo checkpoint. In each generated conversation (half of them Chinese) the user tells a fact in turn 1 and
asks for it in turn 41; between are questions, follow-ups and other facts, never the same one. The turns are the model's own answers, the summaries are
its own too, and folding runs beside the answers as it always does. The plain window is the same question with as many of the same last turns as fit.
Right means that the answer contains what was told.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass

from ops.bench.deployment import deployment
from ops.demo_model.tasks import facts
from ops.demo_model.tasks.conversation import Conversation
from ops.demo_model.tasks.example import Language
from producer.client import AsyncClient
from producer.contract import SamplingParams, Turn, Usage
from producer.contract.conversation import num_fitting, prompt_budget
from workers.memory import RoundLengths
from workers.models.tokenizer import Tokenizer
from workers.settings import DEMO_CHECKPOINT


@dataclass(frozen=True, slots=True)
class Case:
    """One conversation: what the user says, and what the last question asks for."""

    language: Language
    queries: list[str]
    kind: str
    value: str


@dataclass(frozen=True, slots=True)
class Outcome:
    case: Case
    answer: str
    usage: Usage
    summary: str
    window_answer: str
    window_turns: int

    @property
    def is_right(self) -> bool:
        return _contains(self.answer, self.case.value)

    @property
    def is_in_summary(self) -> bool:
        return _contains(self.summary, self.case.value)

    @property
    def is_window_right(self) -> bool:
        return _contains(self.window_answer, self.case.value)


def draw(rng: random.Random, language: Language, num_turns: int, held_out: bool) -> Case:
    """A conversation whose first turn tells one fact and whose last asks for it."""
    talk = Conversation(rng, language, mixed=0.0)
    kind = rng.choice([kind.name for kind in facts.KINDS])
    talk.held_out = held_out
    talk.add_statement(only=(kind,))
    talk.held_out = False
    others = [other.name for other in facts.KINDS if other.name != kind]
    while len(talk.turns) < num_turns - 1:
        chance = rng.random()
        if chance < 0.50:
            talk.add_question()
        elif chance < 0.65:
            # Adds the question that it follows on if there is none.
            talk.add_follow_up()
        elif chance < 0.90:
            talk.add_statement(only=tuple(rng.sample(others, 1)))
        else:
            talk.add_outside()
    queries = [query for query, _ in talk.turns[: num_turns - 1]]
    query, _ = talk.add_fact_question(kind)
    return Case(language, [*queries, query], kind, talk.facts[kind])


async def run(client: AsyncClient, case: Case, name: str, window: Window, greedy: SamplingParams) -> Outcome:
    for query in case.queries[:-1]:
        await (await client.chat(query, conversation_id=name, sampling=greedy)).result()
    turns = [turn.turn async for turn in client.conversations.turns(name)]
    summary = (await client.conversations.show(name, num_turns=0)).status.summary
    query = case.queries[-1]
    asked = await (await client.chat(query, conversation_id=name, sampling=greedy)).result()
    last = window.last(query, turns)
    plain = await (await client.chat(query, history=last, sampling=greedy)).result()
    return Outcome(case, asked.text, asked.usage, summary, plain.text, len(last))


class Window:
    """The last turns that fit a prompt, and nothing else."""

    def __init__(self, context_len: int, max_new_tokens: int | None) -> None:
        self._rounds = RoundLengths(Tokenizer.from_folder(DEMO_CHECKPOINT))
        self._budget = prompt_budget(context_len, max_new_tokens)

    def last(self, query: str, turns: list[Turn]) -> list[Turn]:
        left = self._budget - self._rounds.of_question(query) - self._rounds.special_tokens
        num = num_fitting((self._rounds.of_turn(turn) for turn in reversed(turns)), left)
        return turns[len(turns) - num :]


def _contains(text: str, value: str) -> bool:
    """Whatever the clean-up of an answer made of its marks and letters."""
    return _plain(value) in _plain(text)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


async def all_of(args: argparse.Namespace, client: AsyncClient) -> list[Outcome]:
    window = Window(args.context, args.max_new_tokens)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=args.max_new_tokens)
    at_a_time = asyncio.Semaphore(args.concurrent)
    done = 0

    async def one(number: int) -> Outcome:
        nonlocal done
        rng = random.Random(f"{args.seed}:{number}")
        case = draw(rng, "zh" if number % 2 else "en", args.turns, args.held_out)
        async with at_a_time:
            outcome = await run(client, case, f"recall-{number}", window, greedy)
        done += 1
        if done % 10 == 0:
            print(f"{done} conversations", file=sys.stderr, flush=True)
        return outcome

    return await asyncio.gather(*(one(number) for number in range(args.conversations)))


def report(outcomes: list[Outcome], args: argparse.Namespace, seconds: float) -> None:
    num = len(outcomes)
    in_window = sum(outcome.window_turns >= args.turns - 1 for outcome in outcomes)
    print(
        f"{num} conversations of {args.turns} turns in {seconds:.0f} s, context {args.context}, "
        f"{'values that training never uses' if args.held_out else 'values as in training'}"
    )
    print(f"with the summary: {sum(outcome.is_right for outcome in outcomes)} of {num} right")
    print(
        f"plain window: {sum(outcome.is_window_right for outcome in outcomes)} of {num} right; turn 1 was in it {in_window} times, "
        f"it held {sum(outcome.window_turns for outcome in outcomes) / num:.0f} turns on average"
    )
    print(f"the summary had the fact in {sum(outcome.is_in_summary for outcome in outcomes)} conversations")
    left_out = [outcome.usage.left_out_turns for outcome in outcomes]
    print(
        f"prompts of the last question: {sum(outcome.usage.recent_turns for outcome in outcomes) / num:.0f} turns word for word, "
        f"at most {max(left_out)} left out"
    )
    by_kind = Counter(outcome.case.kind for outcome in outcomes)
    right = Counter(outcome.case.kind for outcome in outcomes if outcome.is_right)
    print("by kind:", ", ".join(f"{kind} {right[kind]}/{of}" for kind, of in sorted(by_kind.items())))
    if args.show:
        for outcome in outcomes:
            if not outcome.is_right:
                print(f"- {outcome.case.queries[0]} | {outcome.case.queries[-1]} | {outcome.answer}")
                print(f"  {outcome.summary}")


async def main(args: argparse.Namespace) -> int:
    options = (
        "--context",
        str(args.context),
        "--threads",
        str(args.threads),
        "--checkpoint",
        str(DEMO_CHECKPOINT),
    )
    with deployment(args.workers, *options) as running:
        async with AsyncClient(running.settings) as client:
            begin = time.monotonic()
            outcomes = await all_of(args, client)
    report(outcomes, args, time.monotonic() - begin)
    return 0 if sum(outcome.is_right for outcome in outcomes) >= args.least * len(outcomes) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-new-tokens", type=int, default=None)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each worker's engine")
    parser.add_argument("--held-out", action="store_true", help="with values that training never uses")
    parser.add_argument("--least", type=float, default=0.8, help="share of right answers for exit code 0")
    parser.add_argument("--show", action="store_true", help="print what went wrong")
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(asyncio.run(main(parser.parse_args())))
