"""How long a fact told in the first turn is remembered: `python ops/demo_model/recall.py`.

Conversations of 41 turns are held with the engine itself. Every few turns the model folds the oldest ones into its summary, as
the conversation memory does; the last turn asks for a fact of the first. It runs no queue and no Redis.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ops.demo_model.tasks import facts, memory  # noqa: E402
from ops.demo_model.tasks.conversation import Conversation  # noqa: E402
from ops.demo_model.tasks.example import Language, rounds  # noqa: E402
from workers.engine.config import EngineConfig  # noqa: E402
from workers.engine.engine import Engine  # noqa: E402
from workers.engine.messages import Generate, Sampling  # noqa: E402
from workers.models.tokenizer import process_response  # noqa: E402

CHECKPOINT = ROOT / "workers" / "models" / "demo"
SEED = 40_000
FOLD_TURNS = 4
"""Turns folded at once; as many stay verbatim."""


class Speaker:
    """The checkpoint on its engine, greedy."""

    def __init__(self, checkpoint: Path, device: str = "auto", max_num_seqs: int = 64) -> None:
        self.engine = Engine.from_config(
            EngineConfig(checkpoint=str(checkpoint), device=device, max_num_seqs=max_num_seqs)
        )

    def answer(self, prompts: list[str], max_new_tokens: int = 256) -> list[str | None]:
        """The answer to each prompt; None for one that did not end by itself."""
        tokenizer = self.engine.tokenizer
        ids: dict[int, list[int]] = {}
        ended: set[int] = set()
        for index, prompt in enumerate(prompts):
            sampling = Sampling(max_new_tokens=max_new_tokens, seed=0, temperature=0.0)
            refused = self.engine.add(Generate(index, tokenizer.encode_prompt(prompt), sampling))
            if refused is not None:
                raise ValueError(refused.message)
            ids[index] = []
        while self.engine.has_work:
            step = self.engine.step()
            for index, token_id, reason in zip(
                step.sequence_ids, step.token_ids, step.finish_reasons, strict=True
            ):
                ids[index].append(token_id)
                if reason == "stop":
                    ended.add(index)
        return [
            process_response(tokenizer.decode(ids[index])) if index in ended else None
            for index in range(len(prompts))
        ]


@dataclass
class Talk:
    """One conversation: what was really told, and the summary that the model keeps of it."""

    conversation: Conversation
    asked: str
    """The kind of fact that the last turn asks for."""
    summary: str = ""
    num_folded: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)

    @property
    def language(self) -> Language:
        return self.conversation.language


def start(index: int, num_turns: int) -> Talk:
    """A conversation whose first turn tells one to three facts, none of which is told again."""
    rng = random.Random(f"{SEED}:{index}")
    conversation = Conversation(rng, "zh" if index % 2 == 0 else "en", held_out=True, mixed=0.0)
    conversation.add_statement(rng.randint(1, 3))
    told = dict(conversation.facts)
    asked = rng.choice(list(told))
    conversation.held_out = False
    while len(conversation.turns) < num_turns:
        conversation.add_any()
        if any(conversation.facts[name] != value for name, value in told.items()):
            # The turn changed a fact of the first one: try another.
            conversation.turns.pop()
            conversation.facts.update(told)
    return Talk(conversation, asked)


def run(speaker: Speaker, num_conversations: int, num_turns: int, fold_turns: int) -> dict[str, float]:
    """Shares of right answers after `num_turns` turns: with the summary, and with the last turns alone."""
    talks = [start(index, num_turns) for index in range(num_conversations)]
    while talks[0].num_folded + 2 * fold_turns <= num_turns:
        prompts = []
        for talk in talks:
            turns = talk.conversation.turns[talk.num_folded : talk.num_folded + fold_turns]
            prompts.append(memory.fold_prompt(talk.summary, turns, talk.language))
        for talk, summary in zip(talks, speaker.answer(prompts), strict=True):
            talk.summary = summary if summary is not None else talk.summary
            talk.num_folded += fold_turns
    with_summary, window, wanted = [], [], []
    for talk in talks:
        kind = facts.BY_NAME[talk.asked]
        query = kind.wording(talk.language).asks[0]
        recent = talk.conversation.turns[talk.num_folded :]
        with_summary.append(memory.remembered(talk.summary, recent, query, talk.language))
        window.append(rounds(recent, query))
        wanted.append(facts.answer(kind, talk.conversation.facts, talk.language))
    found = {}
    for name, prompts in (("with_summary", with_summary), ("last_turns_only", window)):
        right = [answer == expected for answer, expected in zip(speaker.answer(prompts), wanted, strict=True)]
        found[name] = sum(right) / len(right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--turns", type=int, default=40, help="before the question")
    parser.add_argument("--fold", type=int, default=FOLD_TURNS, help="turns folded at once")
    args = parser.parse_args()
    speaker = Speaker(args.checkpoint, args.device)
    print(json.dumps(run(speaker, args.conversations, args.turns, args.fold), indent=1))


if __name__ == "__main__":
    main()
