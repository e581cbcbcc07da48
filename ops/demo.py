"""`make demo`: the whole road on this machine, with the commands that a person would type.

Starts a server (if none runs) and a worker with the demo checkpoint in a state directory of its own, asks a question, then one
that needs it, holds a conversation that is longer than the context, summarizes a file, and stops everything. Exits 0 only if every step did.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GLMQ = Path(sys.executable).with_name("glmq")
STORY = Path(__file__).with_name("examples") / "report.txt"
TURNS = Path(__file__).with_name("examples") / "conversation.txt"
START_SECONDS = 120
STOP_SECONDS = 30
BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="glmq-demo-") as state_dir:
        environ = {
            **os.environ,
            "GLMQ_STATE_DIR": state_dir,
            "PYTHONUNBUFFERED": "1",
            "GLMQ_LOG_LEVEL": "WARNING",
        }
        # An own server: the demo must neither touch nor need one that is in use.
        environ.pop("REDIS_URL", None)
        show("glmq up &")
        # A session of its own, so that Ctrl-C reaches this script alone and it stops its processes in order.
        up = subprocess.Popen(
            [GLMQ, "up"], env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            wait_until_ready(up)
            say("One question:")
            step(environ, "chat", "--stats", "--greedy", "新冠肺炎怎么预防")
            say("A conversation, whose second question needs the first:")
            step(environ, "chat", "--stats", "--greedy", stdin="新冠肺炎怎么预防\n那感染了怎么办？\n")
            say(
                "Forty turns; the first of them tells an allergy, and the older ones are a summary at the end:"
            )
            feed(environ, TURNS, "chat", "--greedy", "--conversation", "ming")
            step(environ, "chat", "--stats", "--greedy", "--conversation", "ming", "我对什么过敏")
            step(environ, "conversations", "show", "ming", "--turns", "1")
            say("A file, summarized:")
            print(DIM + STORY.read_text(encoding="utf-8").strip() + PLAIN)
            step(environ, "summarize", "--stats", str(STORY))
            say("What the worker says of itself:")
            step(environ, "status")
        finally:
            stop(up)
    print(
        f"\n{BOLD}Done.{PLAIN} All processes are stopped. Next: `make up`, then `glmq chat` in another terminal."
    )
    return 0


def wait_until_ready(up: subprocess.Popen[str]) -> None:
    """Shows what `glmq up` prints until it says that it is ready."""
    assert up.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    for line in up.stdout:
        print(DIM + line.rstrip() + PLAIN, flush=True)
        if line.startswith("ready"):
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"glmq up was not ready after {START_SECONDS} s")
    raise SystemExit(f"glmq up ended with exit code {up.wait()}")


def step(environ: dict[str, str], *arguments: str, stdin: str | None = None) -> None:
    """Runs one command as a person would, and stops the demo if it fails."""
    typed = " ".join(f'"{a}"' if " " in a or not a.isascii() else a for a in arguments)
    show(
        f"printf '{stdin!r:.0s}{stdin.strip()}' | glmq {typed}".replace("\n", "\\n")
        if stdin
        else f"glmq {typed}"
    )
    subprocess.run([GLMQ, *arguments], env=environ, input=stdin, text=True, check=True, timeout=120)


def feed(environ: dict[str, str], file: Path, *arguments: str) -> None:
    """Runs one command on the lines of a file, and leaves out what it prints."""
    show(f"glmq {' '.join(arguments)} < {file.name} > /dev/null")
    with file.open("rb") as lines:
        subprocess.run(
            [GLMQ, *arguments], env=environ, stdin=lines, stdout=subprocess.DEVNULL, check=True, timeout=600
        )


def stop(up: subprocess.Popen[str]) -> None:
    show("kill -INT %1")
    up.send_signal(signal.SIGINT)
    try:
        code = up.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        up.kill()
        raise SystemExit(f"glmq up did not stop within {STOP_SECONDS} s") from None
    if code not in (0, 130):
        raise SystemExit(f"glmq up ended with exit code {code}")


def show(command: str) -> None:
    print(f"\n{BOLD}$ {command}{PLAIN}", flush=True)


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
