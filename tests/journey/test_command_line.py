"""The `glmq` command as a person types it: real processes, in a pipe and at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.journey

ROOT = Path(__file__).parents[2]
Glmq = Callable[..., subprocess.CompletedProcess[str]]
MAIN = "from producer.cli import main; main()"


@pytest.fixture
def road_environ(road) -> dict[str, str]:
    return {
        **os.environ,
        "REDIS_URL": road.settings.redis_url,
        "GLMQ_NAMESPACE": road.settings.namespace,
        "GLMQ_STATE_DIR": str(road.settings.state_dir),
        "COLUMNS": "200",
        "TERM": "dumb",
    }


@pytest.fixture
def glmq(road_environ) -> Glmq:
    def run(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={**road_environ, **environ},
        )

    return run


def test_one_question_prints_the_answer_alone_on_stdout(glmq: Glmq, road_client):
    asked = glmq("chat", "--greedy", "--max-new-tokens", "12", "--stats", "你好")

    expected = road_client.chat("你好", sampling={"temperature": 0.0, "max_new_tokens": 12}).result(30)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == expected.text + "\n"
    assert f"+ {expected.usage.completion_tokens} tokens, first after" in asked.stderr


def test_a_question_comes_from_standard_input(glmq: Glmq):
    greedy = ("--greedy", "--max-new-tokens", "8")
    assert glmq("chat", "-", *greedy, stdin="你好\n").stdout == glmq("chat", "你好", *greedy).stdout


def test_each_line_of_a_pipe_is_a_turn_that_sees_the_ones_before(glmq: Glmq, road_client):
    talked = glmq("chat", "--greedy", "--max-new-tokens", "8", stdin="你好\n\n再见\n/new\n再见\n")

    sampling = {"temperature": 0.0, "max_new_tokens": 8}
    first = road_client.chat("你好", sampling=sampling).result(30).text
    second = road_client.chat("再见", history=[("你好", first)], sampling=sampling).result(30).text
    alone = road_client.chat("再见", sampling=sampling).result(30).text
    assert talked.returncode == 0, talked.stderr
    assert talked.stdout == f"> 你好\n{first}\n> 再见\n{second}\n> /new\n> 再见\n{alone}\n"
    conversations = [
        line.split()[1] for line in talked.stderr.splitlines() if line.startswith("conversation ")
    ]
    archived = [[turn.turn for turn in road_client.conversations.turns(one)] for one in conversations]
    assert archived == [[("你好", first), ("再见", second)], [("再见", alone)]]


def test_a_conversation_is_gone_on_with_shown_exported_and_forgotten(glmq: Glmq, road_client):
    greedy = ("--greedy", "--max-new-tokens", "8", "--conversation", "road-test")
    assert glmq("chat", *greedy, "你好").returncode == 0
    assert glmq("chat", *greedy, stdin="再见\n").returncode == 0
    turns = list(road_client.conversations.turns("road-test"))

    shown = glmq("conversations", "show", "road-test")
    assert shown.returncode == 0, shown.stderr
    for text in ("2 turns", "> 你好", "> 再见", turns[0].answer, "turns 1 to 2 word for word"):
        assert text in shown.stdout
    as_json = json.loads(glmq("conversations", "show", "road-test", "--json", "--turns", "1").stdout)
    assert (as_json["num_turns"], as_json["first"], as_json["turns"][0]["query"]) == (2, 1, "再见")
    assert as_json["next_prompt"] == {"summary_turns": 0, "recent_turns": 2, "left_out_turns": 0}
    assert "road-test" in glmq("conversations", "list").stdout
    assert "road-test" not in glmq("conversations", "list", "--tenant", "other").stdout

    lines = [json.loads(line) for line in glmq("conversations", "export", "road-test").stdout.splitlines()]
    assert [line["type"] for line in lines] == ["conversation", "turn", "turn"]
    assert [(line["query"], line["answer"]) for line in lines[1:]] == [turn.turn for turn in turns]

    forgotten = glmq("conversations", "forget", "road-test")
    assert (forgotten.returncode, forgotten.stdout) == (0, "forgotten: road-test, 2 turns\n")
    for command in ("show", "export", "forget"):
        unknown = glmq("conversations", command, "road-test")
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert unknown.stderr.startswith("glmq: conversation_id: nothing is known about 'road-test'")


def test_one_question_leaves_no_conversation(glmq: Glmq, road_client):
    before = len(list(road_client.conversations.list(None)))
    glmq("chat", "--max-new-tokens", "2", "你好")
    assert len(list(road_client.conversations.list(None))) == before


def test_a_file_is_summarized(glmq: Glmq, tmp_path: Path, road_client):
    file = tmp_path / "text.txt"
    file.write_text("今天天气很好，我们去公园跑步。", encoding="utf-8")

    done = glmq("summarize", str(file), "--max-length", "16", "--style", "title")

    expected = road_client.summarize(
        "今天天气很好，我们去公园跑步。", style="title", max_length=16, sampling={"temperature": 0.0}
    ).result(30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.text + "\n"


LONG = "".join(f"第{number}天，李明在公园跑步，然后喝水，晚上早睡。" for number in range(1, 400))
"""Longer than the worker's context."""


def test_a_long_file_is_summarized_in_pieces_and_a_pipe_sees_the_summary_alone(glmq: Glmq, road_client):
    done = glmq("summarize", "-", "--max-length", "16", "--stats", stdin=LONG)

    expected = road_client.summarize(LONG, max_length=16, sampling={"temperature": 0.0}).result(60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.text + "\n"
    assert expected.usage.pieces > 1
    (line,) = done.stderr.splitlines()
    assert (
        f"; before that {expected.usage.pieces} pieces with {expected.usage.piece_prompt_tokens} + " in line
    )


def test_a_terminal_shows_how_far_the_pieces_are(road_environ, tmp_path: Path):
    file = tmp_path / "long.txt"
    file.write_text(LONG, encoding="utf-8")
    command = ["summarize", str(file), "--max-length", "8"]
    shown = at_a_terminal(command, road_environ, until="pieces", ends_itself=True)
    assert "/" in shown.partition("pieces")[2], "so many of so many"


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("chat", " "), "", "query: is blank"),
        (("chat", "--top-p", "2", "x"), "", "top_p: Input should be less than or equal to 1"),
        (("chat", "--adapter", "nobody", "x"), "", "unknown_adapter"),
        (("chat", "很长" * 5000), "", "context_exceeded"),
        (("summarize", "/no/such/file"), "", "file: /no/such/file cannot be read"),
        (("summarize", "-"), "", "text: String should have at least 1 character"),
        (("cancel", "nobody"), "", "nothing is known about 'nobody'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(glmq: Glmq, arguments, stdin, said):
    failed = glmq(*arguments, stdin=stdin)

    assert failed.returncode == 1
    assert failed.stdout.strip() == ""
    assert failed.stderr.startswith("glmq: ")
    assert said in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_a_priority_out_of_range_is_refused_with_the_range(glmq: Glmq):
    failed = glmq("chat", "--priority", "11", "x")

    assert failed.returncode == 2
    assert "--priority" in failed.stderr
    assert "less than or equal to 9" in failed.stderr


def test_redis_not_reachable_says_what_was_tried(glmq: Glmq):
    failed = glmq("chat", "x", REDIS_URL="redis://127.0.0.1:1/0")

    assert failed.returncode == 1
    assert "127.0.0.1:1" in failed.stderr
    assert "glmq up" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_ctrl_c_cancels_the_answer(road_environ, road_client):
    command = [sys.executable, "-c", MAIN, "chat", "--greedy", "你好 你好 你好"]
    environ = {**road_environ, "PYTHONUNBUFFERED": "1"}
    asked = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, cwd=ROOT
    )
    assert asked.stdout is not None
    first = asked.stdout.read(1)
    asked.send_signal(signal.SIGINT)
    rest, errors = asked.communicate(timeout=30)

    assert first
    assert "Traceback" not in errors, errors
    # 130: cancelled. 0: so short an answer that it was complete before the signal.
    assert asked.returncode in (0, 130), errors
    assert rest.endswith("\n")


def test_status_shows_the_worker_once_in_a_pipe(glmq: Glmq, road):
    shown = glmq("status")
    assert shown.returncode == 0, shown.stderr
    assert "0 queued" in shown.stdout
    assert "ready" in shown.stdout

    as_json = json.loads(glmq("status", "--json").stdout)
    assert [worker["about"]["pid"] for worker in as_json["workers"]] == [str(road.process.pid)]


def test_status_without_a_worker_has_an_exit_code_of_its_own(glmq: Glmq):
    lonely = glmq("status", GLMQ_NAMESPACE="nobody-works-here")

    assert lonely.returncode == 3
    assert "no worker is alive" in lonely.stdout


def test_status_is_live_at_a_terminal(road_environ):
    shown = at_a_terminal(["status"], road_environ, until="ready")
    assert "ready" in shown


def test_top_prints_once_in_a_pipe(glmq: Glmq, road, road_client):
    road_client.chat("你好", sampling={"max_new_tokens": 12, "min_new_tokens": 12}).result(30)
    time.sleep(1)

    shown = glmq("top")

    assert shown.returncode == 0, shown.stderr
    for name in ("queued", "tokens/s", "first token", "between tokens", "KV cache", "ready"):
        assert name in shown.stdout
    assert " ms, p95 " in shown.stdout


def test_top_is_live_at_a_terminal(road_environ):
    shown = at_a_terminal(["top", "--interval", "0.2"], road_environ, until="ready")
    assert "tokens/s" in shown


def test_doctor_finds_this_machine_in_order(glmq: Glmq, checkpoint: Path):
    looked = glmq("doctor", "--checkpoint", str(checkpoint))

    assert looked.returncode == 0, looked.stdout + looked.stderr
    for name in ("Python", "appendonly", "maxmemory-policy", "torch", "checkpoint"):
        assert f" {name}: " in looked.stdout
    assert "fail" not in looked.stdout


def test_doctor_names_what_a_checkpoint_lacks(glmq: Glmq, tmp_path: Path, checkpoint: Path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())

    looked = glmq("doctor", "--checkpoint", str(tmp_path))

    assert looked.returncode == 1
    assert "fail checkpoint: " in looked.stdout
    assert "ice_text.model" in looked.stdout


def test_up_starts_a_server_and_a_worker_and_ctrl_c_drains_both(tmp_path: Path, checkpoint: Path):
    environ = {
        **os.environ,
        "GLMQ_STATE_DIR": str(tmp_path / "state"),
        "PYTHONUNBUFFERED": "1",
        "GLMQ_THREADS": "1",
    }
    environ.pop("REDIS_URL", None)
    command = [sys.executable, "-c", MAIN]
    up = subprocess.Popen(
        [*command, "up", "--checkpoint", str(checkpoint), "--slots", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environ,
        cwd=ROOT,
    )
    try:
        assert up.stdout is not None
        lines = []
        for line in up.stdout:
            lines.append(line)
            if line.startswith("ready. "):
                break
        else:
            pytest.fail("".join(lines))
        asked = subprocess.run(
            [*command, "chat", "--max-new-tokens", "4", "hi"],
            capture_output=True,
            text=True,
            env=environ,
            cwd=ROOT,
            timeout=60,
        )
        assert asked.returncode == 0, asked.stderr
        server_pid = json.loads((tmp_path / "state" / "server.json").read_text())["pid"]
        up.send_signal(signal.SIGINT)
        rest, _ = up.communicate(timeout=40)
    finally:
        if up.poll() is None:
            up.kill()
            up.wait()
    assert up.returncode == 0, rest
    assert "stopped" in rest
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid, 0)


def test_up_with_a_broken_checkpoint_says_so_and_stops_its_server(tmp_path: Path):
    environ = {**os.environ, "GLMQ_STATE_DIR": str(tmp_path / "state")}
    environ.pop("REDIS_URL", None)
    failed = subprocess.run(
        [sys.executable, "-c", MAIN, "up", "--checkpoint", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environ,
        cwd=ROOT,
        timeout=60,
    )
    assert failed.returncode == 1
    assert "config.json" in failed.stderr
    assert "Traceback" not in failed.stderr


def at_a_terminal(
    arguments: list[str],
    environ: dict[str, str],
    *,
    until: str,
    seconds: float = 30,
    ends_itself: bool = False,
) -> str:
    """What the command shows at a pseudo-terminal until this text has come; then Ctrl-C, and exit code 0."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        # A suite that runs in the background was started with Ctrl-C ignored, and a program inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execve(sys.executable, [sys.executable, "-c", MAIN, *arguments], {**environ, "TERM": "xterm"})
    shown = b""
    deadline = time.monotonic() + seconds
    try:
        while until.encode() not in shown:
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536)
        if ends_itself:
            while data := _rest(terminal):
                shown += data
        else:
            # One refresh at least, so that it is in its loop.
            time.sleep(1)
            os.write(terminal, b"\x03")
        _, code = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(code) == 0
    return shown.decode(errors="replace")


def _rest(terminal: int) -> bytes:
    """What else comes; nothing when the command has ended."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        # How Linux says that nobody has the other side open any more.
        return b""
