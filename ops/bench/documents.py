"""A text many times longer than the context, summarized by several workers: how long it takes, who does what, how fast a cancel is.

    python -m ops.bench.documents --tokens 30000 --workers 2

Each piece must have been begun once; exits with 1 if one was not. Then the same text again, cancelled in the middle.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter

from ops.bench.deployment import ROOT, deployment
from ops.demo_model.tasks import reports
from producer.client import Client
from producer.contract import Failed, Finished, Progress, SamplingParams, Started
from producer.ledger import calls
from workers.models.tokenizer import Tokenizer

DEMO = ROOT / "workers" / "models" / "demo"
GREEDY = SamplingParams(temperature=0.0, seed=1)


def text_of(num_tokens: int) -> str:
    """Short reports, one a line, of about so many tokens of the demo's tokenizer together."""
    tokenizer, rng = Tokenizer.from_folder(DEMO), random.Random(7)
    lines: list[str] = []
    while num_tokens > 0:
        lines.append(reports.draw(rng, "zh", False).text)
        num_tokens -= len(tokenizer.encode(lines[-1]))
    return "\n".join(lines)


def summarize(client: Client, text: str) -> bool:
    """Prints what it took. False: a piece was begun twice."""
    begin = time.perf_counter()
    submission = client.summarize(text, max_length=128, sampling=GREEDY)
    for event in submission.stream():
        seconds = time.perf_counter() - begin
        match event:
            case Progress(level=level, done=done, total=total) if done in (0, total):
                print(f"{seconds:7.1f} s  level {level}: {done} of {total} pieces")
            case Started():
                print(f"{seconds:7.1f} s  the summary begins")
            case Failed():
                raise SystemExit(f"failed: {event.code}: {event.message}")
            case Finished():
                usage = event.usage
                print(f"{seconds:7.1f} s  done: {event.text}")
    levels = str(client.ledger.connection.hget(client.ledger.keys.request(submission.request_id), "levels"))
    begun: Counter[str] = Counter()
    num_begun = 0
    for level, total in enumerate(levels.split(","), start=1):
        for number in range(1, int(total) + 1):
            wanted = [(f"{submission.request_id}.{level}.{number}", "0")]
            [followed] = client.ledger.run(calls.follow("", wanted))
            assert followed is not None, wanted
            started = [each for each in calls.events(followed.entries) if isinstance(each, Started)]
            num_begun += len(started)
            begun.update(each.worker for each in started)
    tokens = usage.piece_prompt_tokens + usage.prompt_tokens
    print(f"{usage.pieces} pieces, begun {num_begun} times: {dict(begun)}")
    print(f"{tokens} prompt tokens, {usage.piece_completion_tokens + usage.completion_tokens} answer tokens")
    print(f"{tokens / seconds:.0f} prompt tokens/s")
    return num_begun == usage.pieces


def cancel_in_the_middle(client: Client, text: str) -> None:
    """Prints how long it takes until nothing of the document is queued or running."""
    submission = client.summarize(text, max_length=128, sampling=GREEDY)
    for event in submission.stream():
        if isinstance(event, Progress) and event.done >= event.total // 3:
            break
    begin = time.perf_counter()
    submission.cancel()
    while (overview := client.overview()).num_queued or overview.num_running:
        time.sleep(0.005)
    print(
        f"cancelled after {event.done} of {event.total}: all ended {time.perf_counter() - begin:.3f} s later"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("options", nargs="*", help="of each worker, after --")
    args = parser.parse_args()
    text = text_of(args.tokens)
    options = args.options or ["--threads", "1", "--slots", "4"]
    with deployment(args.workers, *options) as running, Client(running.settings) as client:
        print(f"{args.tokens} tokens, {len(text)} characters, {args.workers} workers")
        is_once = summarize(client, text)
        cancel_in_the_middle(client, text)
    return 0 if is_once else 1


if __name__ == "__main__":
    raise SystemExit(main())
